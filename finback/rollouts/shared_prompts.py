"""Answers to one prompt in one row: the prompt is read once, and the answers attend to it but not to each other.

A row holds the prompt without its last token, then each answer preceded by a copy of that token, which predicts the answer's first token.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from finback.model.logprobs import token_logprobs
from finback.model.transformer import Transformer
from finback.rollouts.rollouts import Rollout, entries_of, in_parts, padded, routes_of
from finback.train.batch import Batch, SharedRows

Pair = tuple[Rollout, float]


def shared_batches(rows: Sequence[Pair], micro_tokens: int) -> list[Batch]:
    """Answers with their advantages as batches of at most micro_tokens padded tokens, with each prompt read once per row.

    Rows that would be longer are split into several.
    """
    groups: dict[tuple[int, ...], list[Pair]] = {}
    for pair in rows:
        groups.setdefault(tuple(pair[0].prompt), []).append(pair)
    lines = sorted((line for g in groups.values() for line in _lines(g, micro_tokens)), key=_width, reverse=True)
    return [_batch(part) for part in in_parts(lines, _width, micro_tokens)]


def predicting(model: Transformer, batch: Batch) -> Tensor:
    """Hidden states (labels, hidden) at the positions that predict the labels of a batch of answers, however its rows are laid out."""
    shared = batch.shared
    if shared is None:
        tokens, padding_mask, _ = batch.inputs
        states: Tensor = model(tokens, padding_mask=padding_mask)[batch.learnt]
        return states
    read: Tensor = model(shared.tokens, None, shared.padding_mask, shared.document_ids, shared.prefixes)
    return read.flatten(0, 1)[shared.places]


def placed_logprobs(model: Transformer, part: Batch, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels of a batch of answers and their entropies, both (rows, seq_len).

    0 where there is no loss, and where another rank's part of a split row predicts.
    """
    learnt, states = part.learnt, predicting(model, part)
    labels, mine = part.labels[learnt], None if part.shared is None else part.shared.predicted
    here = slice(None) if mine is None else mine
    kept = None if part.kept is None else part.kept[here]
    found: Sequence[Tensor] = token_logprobs(model, states, labels[here], temperature, kept)
    if mine is not None:
        found = [t.new_zeros(len(labels)).index_copy(0, mine, t) for t in found]
    logprobs, entropy = (torch.zeros(learnt.shape, device=t.device).masked_scatter(learnt, t) for t in found)
    return logprobs, entropy


def _lines(group: list[Pair], micro_tokens: int) -> list[list[Pair]]:
    lines: list[list[Pair]] = [[]]
    for pair in group:
        if lines[-1] and _width([*lines[-1], pair]) > micro_tokens:
            lines.append([])
        lines[-1].append(pair)
    return lines


def _width(line: list[Pair]) -> int:
    """Tokens that a row with these answers has."""
    return len(line[0][0].prompt) - 1 + sum(len(r.completion.tokens) for r, _ in line)


def _batch(lines: Sequence[list[Pair]]) -> Batch:
    batch = padded([pair for line in lines for pair in line])
    shape = len(lines), _width(lines[0])
    tokens, document_ids = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    padding_mask, places = torch.zeros(shape, dtype=torch.bool), list[Tensor]()
    for row, line in enumerate(lines):
        prompt = line[0][0].prompt
        end = len(prompt) - 1
        tokens[row, :end] = torch.tensor(prompt[:-1])
        for document, (r, _) in enumerate(line, start=1):
            start, end = end, end + len(r.completion.tokens)
            tokens[row, start:end] = torch.tensor([prompt[-1], *r.completion.tokens[:-1]])
            document_ids[row, start:end] = document
            places.append(torch.arange(start, end) + row * shape[1])
        padding_mask[row, :end] = True
        document_ids[row, end:] = len(line) + 1
    prefixes = torch.tensor([len(line[0][0].prompt) - 1 for line in lines])
    answers = torch.tensor([len(line) for line in lines])
    routes, entries = _choices(lines, shape, routes_of), _choices(lines, shape, entries_of, moved=True)
    shared = SharedRows(tokens, padding_mask, document_ids, prefixes, answers, torch.cat(places), routes, entries)
    return replace(batch, shared=shared)


def _choices(
    lines: Sequence[list[Pair]], shape: tuple[int, int], of: Callable[[Rollout], Tensor | None], moved: bool = False
) -> Tensor | None:
    """(rows, tokens, modules, k) choices of rows that share prompts, -1 for padding; None if they are unknown.

    moved: the choices are entries, numbered from the start of prompt and answer; those among an answer's own tokens are shifted to
    its position in the row.
    """
    first = of(lines[0][0][0])
    if first is None:
        return None
    whole = torch.full((*shape, *first.shape[1:]), -1, dtype=torch.int32 if moved else first.dtype)
    for row, line in enumerate(lines):
        prefix = end = len(line[0][0].prompt) - 1
        for r, _ in line:
            ids = of(r)
            assert ids is not None, "answers that lack choices are not learned from"
            whole[row, :prefix] = ids[:prefix]
            start, end = end, end + len(r.completion.tokens)
            own = ids[prefix:].to(whole.dtype)
            whole[row, start:end] = torch.where(own >= prefix, own + (start - prefix), own) if moved else own
    return whole
