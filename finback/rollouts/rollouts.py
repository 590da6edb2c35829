"""Problems -> completions -> verdicts, for evaluation, probes and RL; and completions -> training batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from finback.data.messages import IGNORE, Response, parse_response
from finback.data.tokenizer import THINK, Tokenizer
from finback.engine.request import Completion, SamplingParams
from finback.rollouts.drawing import Window
from finback.rollouts.generation import Generator
from finback.tasks.task import NO_ANSWER, Problem, Task, Verdict, judged
from finback.train.batch import Batch

T = TypeVar("T")


@dataclass(frozen=True)
class Rollout:
    """One answer to one problem, with its verdict."""

    problem: Problem
    prompt: list[int]
    completion: Completion
    response: Response
    verdict: Verdict

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt) + len(self.completion.tokens)


def rollout(
    generator: Generator,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    seeds: Sequence[int],
    sampling: SamplingParams,
    think: bool = False,
) -> list[Rollout]:
    """Answers each problem once; `think` opens the chain for the model. An answer cut off within its chain is wrong."""
    window = Window(tokenizer, generator.model_config, sampling.max_tokens, think)
    # answers of a group share a question, which is encoded once
    encoded = {question: window.prompt(p) for question, p in {p.question: p for p in problems}.items()}
    asked = [encoded[problem.question] for problem in problems]
    prompts = [ids for ids, _ in asked]
    for ids, problem in zip(prompts, problems, strict=True):  # check all before answering any
        if len(ids) + sampling.max_tokens > window.size:
            raise window.too_long(problem)
    completions = generator.generate(prompts, sampling, seeds)
    texts = [tokenizer.decode(completion.tokens) for completion in completions]
    responses = [parse_response(THINK * opened + text) for text, (_, opened) in zip(texts, asked, strict=True)]
    # an answer that was cut off, or whose chain never ends, is not checked
    whole = [c.finish_reason == "stop" and r.closed for c, r in zip(completions, responses, strict=True)]
    pairs = [(p, r.answer) for p, r, ok in zip(problems, responses, whole, strict=True) if ok]
    verdicts = iter(judged(task, pairs))
    return [
        Rollout(p, prompt, c, r, next(verdicts) if ok else NO_ANSWER)
        for p, prompt, c, r, ok in zip(problems, prompts, completions, responses, whole, strict=True)
    ]


def record(r: Rollout) -> dict[str, Any]:
    """A rollout as a row of a JSONL file."""
    return {
        "question": r.problem.question,
        "gold": r.problem.answer,
        "thinking": r.response.reasoning,
        "answer": r.response.answer,
        "thinks": r.response.thinks,
        "correct": r.verdict.correct,
        **({"checks": r.verdict.parts} if r.verdict.parts else {}),
        "tokens": len(r.completion.tokens),
        "finish": r.completion.finish_reason,
    }


def batches(rows: Sequence[tuple[Rollout, float]], micro_tokens: int) -> list[Batch]:
    """Answers with their advantages, longest first, as batches of at most micro_tokens padded tokens."""
    made = []
    for part in in_parts(rows, lambda pair: pair[0].length, micro_tokens):
        batch = padded(part)
        rows_of = [r for r, _ in part]
        routes, entries = (_aligned([of(r) for r in rows_of], batch.seq_len) for of in (routes_of, entries_of))
        made.append(replace(batch, routed_experts=routes, indexer_topk=entries))
    return made


def in_parts(rows: Sequence[T], width: Callable[[T], int], micro_tokens: int) -> Iterator[Sequence[T]]:
    """Splits rows, longest first, so that each part has at most micro_tokens tokens when padded to its first row."""
    start = 0
    while start < len(rows):
        stop = start + max(1, micro_tokens // width(rows[start]))
        yield rows[start:stop]
        start = stop


def padded(rows: Sequence[tuple[Rollout, float]]) -> Batch:
    """A batch with one row per answer, prompt included, without choices to replay."""
    shape = len(rows), max(r.length for r, _ in rows)
    tokens, padding_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    labels, logprobs = torch.full(shape, IGNORE), torch.zeros(shape)
    for row, (r, _) in enumerate(rows):
        prompt, end = len(r.prompt), r.length
        tokens[row, :end] = torch.tensor(r.prompt + r.completion.tokens)
        padding_mask[row, : end - 1] = True  # the model never reads an answer's last token
        labels[row, prompt - 1 : end - 1] = torch.tensor(r.completion.tokens)
        logprobs[row, prompt - 1 : end - 1] = torch.tensor(r.completion.logprobs)
    tokens, labels, mask, logprobs = (
        t[:, :-1] for t in (tokens, labels, padding_mask, logprobs)
    )  # the last token predicts nothing
    advantages = torch.tensor([a for _, a in rows])
    kept = kept_ids([ids for r, _ in rows for ids in r.completion.sampling_mask or ()])
    return Batch(tokens, labels, shape[1] - 1, mask, rollout_logprobs=logprobs, advantages=advantages, kept=kept)


def kept_ids(masks: Sequence[np.ndarray]) -> Tensor | None:
    """(tokens, most) ids that each token of the answers was drawn from, padded with -1; None without tokens."""
    if not masks:
        return None
    kept = torch.full((len(masks), max(map(len, masks))), -1, dtype=torch.int32)
    for row, ids in enumerate(masks):
        kept[row, : len(ids)] = torch.from_numpy(ids)
    return kept


def _aligned(choices: Sequence[Tensor | None], seq_len: int) -> Tensor | None:
    """(rows, seq_len, modules, k) choices of all tokens that are read, -1 for padding; None if any row lacks them."""
    known = [ids for ids in choices if ids is not None]
    if len(known) < len(choices):
        return None
    whole = torch.full((len(known), seq_len, *known[0].shape[1:]), -1, dtype=known[0].dtype)
    for row, ids in enumerate(known):
        whole[row, : len(ids)] = ids
    return whole


def routes_of(r: Rollout) -> Tensor | None:
    """(tokens, layers, k) experts of all tokens but the last, which is never read; None if unknown."""
    ids = r.completion.routed_experts
    assert ids is None or len(ids) == r.length - 1, "experts for all tokens but the last"
    return None if ids is None else torch.from_numpy(ids.astype("int16"))


def entries_of(r: Rollout) -> Tensor | None:
    """(tokens, indexers, index_topk) entries selected for all tokens but the last, which is never read; None if unknown."""
    ids = r.completion.indexer_topk
    assert ids is None or len(ids) == r.length - 1, "entries for all tokens but the last"
    return None if ids is None else torch.from_numpy(ids)
