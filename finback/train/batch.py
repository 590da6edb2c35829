"""The one batch of all training stages: tokens, labels, masks, and for RL log-probabilities and advantages."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finback.data.messages import IGNORE, Lesson
from finback.data.rows import Row


@dataclass(frozen=True)
class SharedRows:
    """A batch's answers in rows that share prompts: each row has a prompt once, followed by all of its answers."""

    # token ids, each row's positions, segments: (rows, tokens)
    tokens: Tensor
    padding_mask: Tensor
    document_ids: Tensor
    # (rows,) prompt length without its last token
    prefixes: Tensor
    # (rows,) number of answers in the row
    answers: Tensor
    # indices, into the flattened rows, at which the batch's labels are predicted, answer by answer
    places: Tensor
    # (rows, tokens, modules, k), as in the batch; entries are counted in these rows
    routed_experts: Tensor | None
    indexer_topk: Tensor | None
    # (places,) indices of the batch's labels that this part predicts, if rows are split; None: all
    predicted: Tensor | None = None

    def part(self, member: int, members: int) -> "SharedRows":
        """This member's part of the rows, split along the sequence; padding at the end makes the parts equal."""
        width = self.tokens.size(1)
        length = -(-width // members)
        start, rows, columns = member * length, self.places // width, self.places % width
        here = ((columns >= start) & (columns < start + length)).nonzero().squeeze(1)

        def cut(t: Tensor, fill: Any) -> Tensor:
            padding = t.new_zeros(len(t), length * members - width, *t.shape[2:]) + fill
            return torch.cat([t, padding], dim=1)[:, start : start + length]

        return replace(
            self,
            tokens=cut(self.tokens, 0),
            padding_mask=cut(self.padding_mask, False),
            document_ids=cut(self.document_ids, int(self.document_ids.max()) + 1),
            places=(rows * length + columns - start)[here],
            routed_experts=None if self.routed_experts is None else cut(self.routed_experts, -1),
            indexer_topk=None if self.indexer_topk is None else cut(self.indexer_topk, -1),
            predicted=here,
        )

    def to(self, device: torch.device) -> "SharedRows":
        """The same rows on another device."""
        moved: dict[str, Any] = {name: None if t is None else t.to(device) for name, t in vars(self).items()}
        return SharedRows(**moved)


@dataclass(frozen=True)
class Batch:
    """Rows of tokens to train on. All tensors but per-row ones are aligned with the input positions.

    The trunk reads the first `seq_len` tokens of a row; the tokens after them are for the MTP modules.
    """

    # (rows, seq_len + depths)
    tokens: Tensor
    # (rows, seq_len + depths): the token that follows each position, IGNORE where no loss is taken
    labels: Tensor
    seq_len: int
    # (rows, seq_len + depths): False for padding; None: no padding
    padding_mask: Tensor | None = None
    # (rows, seq_len + depths): index of the document in its row; None: a row is one document
    document_ids: Tensor | None = None
    # (rows, seq_len), 0 where no loss is taken: log-probabilities of the labels by the engine
    rollout_logprobs: Tensor | None = None
    # by the trainer before the first update (None: use the engine's)
    old_logprobs: Tensor | None = None
    # by the reference model
    reference_logprobs: Tensor | None = None
    # (rows,) advantage of each answer
    advantages: Tensor | None = None
    # (rows,) index of the teacher of each row, if there are several; None: there is one
    teachers: Tensor | None = None
    # (rows, seq_len, layers, k): experts that the engine chose for each token, -1 where the router chooses itself
    routed_experts: Tensor | None = None
    # (rows, seq_len, indexers, index_topk): entries that its indexers selected for each token, -1 where they select themselves
    indexer_topk: Tensor | None = None
    # (labels with loss, any), padded with -1: the token ids that top-k and top-p left at each label; None: all
    kept: Tensor | None = None
    # the batch's answers in rows that share prompts; if given, the trunk reads these
    shared: SharedRows | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same rows on another device."""
        moved: dict[str, Any] = {name: t.to(device) for name, t in self.tensors().items()}
        return replace(self, **moved, shared=None if self.shared is None else self.shared.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that are not None, by field."""
        return {name: t for name, t in vars(self).items() if isinstance(t, Tensor)}

    def chunk(self, parts: int) -> list["Batch"]:
        """Splits the rows into `parts` batches of equal size."""
        each: dict[str, Any] = {name: t.chunk(parts) for name, t in self.tensors().items()}
        return [replace(self, **{name: pieces[i] for name, pieces in each.items()}) for i in range(parts)]

    def taught_by(self, teacher: int) -> "Batch":
        """The rows with one of several teachers."""
        if self.teachers is None:
            return self
        assert self.kept is None and self.shared is None, "distilled answers have separate rows"
        mine = self.teachers == teacher
        each: dict[str, Any] = {name: t[mine] for name, t in self.tensors().items()}
        return replace(self, **each)

    def part(self, member: int, members: int) -> "Batch":
        """This member's part of the rows, split along the sequence into equal parts, plus the tokens after it for MTP."""
        if self.shared is not None:  # the shared rows are read; the answers stay whole
            return replace(self, shared=self.shared.part(member, members))
        length, rest = divmod(self.seq_len, members)
        assert not rest, "seq_len must be divisible by the number of members"
        start, parts = member * length, self.tensors()
        for name, t in parts.items():
            if name == "kept":  # one entry per label with loss, row by row
                learnt = self.learnt
                here = slice(start, start + length)
                numbers = learnt.flatten().cumsum(0).view_as(learnt) - 1
                parts[name] = t[numbers[:, here][learnt[:, here]]]
            elif t.ndim > 1:  # all but per-row tensors
                parts[name] = t[:, start : start + length + t.size(1) - self.seq_len]
        each: dict[str, Any] = dict(parts)
        return replace(self, **each, seq_len=length)

    def widened(self, members: int) -> "Batch":
        """The same rows, padded so that their tokens divide evenly among the members."""
        more = -self.seq_len % members
        if not more or self.shared is not None:
            return self
        fill: dict[str, Any] = {"labels": IGNORE, "padding_mask": False, "routed_experts": -1, "indexer_topk": -1}
        parts = self.tensors()
        if self.padding_mask is None:
            parts["padding_mask"] = torch.ones_like(self.tokens, dtype=torch.bool)
        for name, t in parts.items():
            if name == "document_ids":
                parts[name] = torch.cat([t, (t[:, -1:] + 1).expand(-1, more)], dim=1)
            elif t.ndim > 1 and name != "kept":
                parts[name] = torch.cat([t, t.new_full((len(t), more, *t.shape[2:]), fill.get(name, 0))], dim=1)
        each: dict[str, Any] = dict(parts)
        return replace(self, **each, seq_len=self.seq_len + more)

    def spared(self) -> list[int]:
        """Lengths of the prompts that are not read again, because another answer in their row already has them."""
        if self.shared is None:
            return []
        rows = zip(self.shared.prefixes.tolist(), self.shared.answers.tolist(), strict=True)
        return [prefix for prefix, answers in rows for _ in range(answers - 1)]

    @property
    def inputs(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The trunk's input: tokens, padding_mask and document_ids, each (rows, seq_len) or None."""
        tokens, padding_mask, document_ids = (
            None if t is None else t[:, : self.seq_len] for t in (self.tokens, self.padding_mask, self.document_ids)
        )
        assert tokens is not None
        return tokens, padding_mask, document_ids

    @property
    def learnt(self) -> Tensor:
        """(rows, seq_len) bool, True where the loss is taken."""
        return self.labels[:, : self.seq_len] != IGNORE

    def labels_at(self, depth: int) -> Tensor:
        """Labels (rows, seq_len) of MTP depth k, shifted by k within the same document; depth 0 is the trunk."""
        labels = self.labels[:, depth : depth + self.seq_len]
        if depth == 0 or self.document_ids is None:
            return labels
        here, there = self.document_ids[:, : self.seq_len], self.document_ids[:, depth : depth + self.seq_len]
        return labels.masked_fill(here != there, IGNORE)

    def counts(self, depths: int) -> Tensor:
        """Number of labels of the trunk and of each MTP depth, (1 + depths,) float64."""
        found = [int((self.labels_at(depth) != IGNORE).sum()) for depth in range(depths + 1)]
        return torch.tensor(found, dtype=torch.float64)

    def lengths(self) -> list[int]:
        """Length of each document that the trunk reads, without padding; FLOPs are computed from these."""
        tokens, padding_mask, document_ids = self.inputs
        if padding_mask is None and document_ids is None:
            return [self.seq_len] * len(tokens)
        padding_mask = torch.ones_like(tokens, dtype=torch.bool) if padding_mask is None else padding_mask
        if document_ids is None:
            return [int(n) for n in padding_mask.sum(dim=1)]
        return [
            int(n)
            for ids, mask in zip(document_ids, padding_mask, strict=True)
            for n in torch.unique_consecutive(ids[mask], return_counts=True)[1]
        ]


def idle(length: int, depths: int = 0) -> Batch:
    """A row without loss, for ranks that have no rows but must take part in collectives."""
    shape = 1, length + depths
    tokens, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE)
    nothing, none = torch.zeros(1, length), torch.zeros(shape, dtype=torch.bool)
    return Batch(tokens, labels, length, none, rollout_logprobs=nothing, advantages=torch.zeros(1))


def of_windows(windows: Tensor, depths: int) -> Batch:
    """A batch of windows (rows, seq_len + 1 + depths) of a token stream; loss on every token."""
    return Batch(windows[:, :-1], windows[:, 1:], windows.size(1) - 1 - depths)


def of_rows(rows: Sequence[Row], seq_len: int) -> Batch:
    """A batch of pre-training rows from the loader. Loss on each next token unless it is padding or, with document ids,
    starts another document."""
    tokens = torch.from_numpy(np.stack([row.tokens for row in rows]).astype(np.int64))
    sizes = torch.tensor([row.size for row in rows])
    padding_mask = torch.arange(tokens.size(1)) < sizes[:, None]
    numbers = [row.document_ids for row in rows if row.document_ids is not None]
    follows = padding_mask[:, 1:]
    document_ids = None
    if numbers:
        document_ids = torch.from_numpy(np.stack(numbers).astype(np.int64))
        follows = follows & (document_ids[:, 1:] == document_ids[:, :-1])
        document_ids = document_ids[:, :-1]
    labels = tokens[:, 1:].masked_fill(~follows, IGNORE)
    is_full = bool(padding_mask[:, :seq_len].all())
    return Batch(tokens[:, :-1], labels, seq_len, None if is_full else padding_mask[:, :-1], document_ids)


def of_lessons(rows: Sequence[Sequence[Lesson]], depths: int = 0) -> Batch:
    """A batch of rows of lessons, masked from each other and padded to the longest row; `depths` more tokens for MTP."""
    length = max(sum(len(lesson.ids) for lesson in row) for row in rows)
    shape = len(rows), length + depths
    tokens, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORE)
    document_ids, padding_mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.bool)
    for line, row in enumerate(rows):
        start = 0
        for number, lesson in enumerate(row):
            end = start + len(lesson.ids)
            ids = torch.tensor(lesson.ids)
            tokens[line, start:end] = ids
            labels[line, start : end - 1] = torch.tensor(lesson.labels[1:])
            document_ids[line, start:end], padding_mask[line, start:end] = number, True
            start = end
        document_ids[line, start:] = len(row)
    return Batch(tokens, labels, length, padding_mask, document_ids)
