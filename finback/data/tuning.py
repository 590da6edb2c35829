"""Lessons packed into rows that share no attention."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finback.data.messages import IGNORE, Lesson

WINDOW = 1024  # lessons that are fitted into rows together


@dataclass
class Packed:
    """Rows of lessons: tokens (rows, length + depths), the rest (rows, length)."""

    tokens: Tensor
    targets: Tensor  # the next token where it is to be learnt, else -1
    documents: Tensor  # which lesson of its row a token belongs to; padding is the last
    real: Tensor  # False for padding
    rows: int  # of the step, over all ranks

    def to(self, device: torch.device) -> "Packed":
        """The same rows where a model computes."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            targets=self.targets.to(device),
            documents=self.documents.to(device),
            real=self.real.to(device),
        )

    def further(self, depth: int) -> Tensor:
        """Targets of MTP's depth k (rows, length): those of k places further on, as far as the lesson goes."""
        moved = torch.full_like(self.targets, -1)
        moved[:, :-depth] = self.targets[:, depth:]
        same = torch.zeros_like(self.real)
        same[:, :-depth] = self.documents[:, depth:] == self.documents[:, :-depth]
        return moved.masked_fill(~same, -1)


def arrange(lengths: Sequence[int], row: int, rng: random.Random) -> list[list[int]]:
    """Best-fit: lessons, by their lengths, into rows of at most `row` tokens, in random order; lists of indices.

    Within a window of lessons the longest comes first, each into the fullest row that still has room for it.
    """
    order = list(range(len(lengths)))
    rng.shuffle(order)
    rows: list[list[int]] = []
    for start in range(0, len(order), WINDOW):
        window = sorted(order[start : start + WINDOW], key=lambda i: -lengths[i])
        fresh: list[list[int]] = []
        room: list[int] = []
        for index in window:
            fits = [r for r, left in enumerate(room) if left >= lengths[index]]
            if fits:
                best = min(fits, key=lambda r: room[r])
                fresh[best].append(index)
                room[best] -= lengths[index]
            else:
                fresh.append([index])
                room.append(row - lengths[index])
        rng.shuffle(fresh)
        rows += fresh
    return rows


def packed(rows: Sequence[Sequence[Lesson]], depths: int = 0) -> Packed:
    """Rows of lessons as tensors, as wide as the fullest; `depths` further tokens for MTP."""
    length = max(sum(len(lesson.ids) for lesson in row) for row in rows)
    tokens = torch.zeros(len(rows), length + depths, dtype=torch.long)
    targets = torch.full((len(rows), length), -1)
    documents = torch.zeros(len(rows), length, dtype=torch.long)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    for line, row in enumerate(rows):
        start = 0
        for number, lesson in enumerate(row):
            end = start + len(lesson.ids)
            ids = torch.tensor(lesson.ids)
            tokens[line, start:end] = ids
            labels = torch.tensor(lesson.labels[1:])
            targets[line, start : end - 1] = labels.masked_fill(labels == IGNORE, -1)
            documents[line, start:end], real[line, start:end] = number, True
            start = end
        documents[line, start:] = len(row)
    return Packed(tokens, targets, documents, real, len(rows))
