"""Dialogues as lessons: ids with a mark on what is to be learnt, and lessons packed into rows that share no attention."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finback.config import UserError
from finback.data import chat
from finback.data.chat import Message
from finback.data.tokenizer import END_THINK, THINK, Tokenizer

WINDOW = 1024  # lessons that are fitted into rows together


@dataclass(frozen=True)
class Lesson:
    """A dialogue's ids, and for each of them whether it is to be learnt: what the assistant said, to its last mark."""

    ids: list[int]
    taught: list[bool]


def lessons(messages: Sequence[Message], tokenizer: Tokenizer) -> list[Lesson]:
    """What a dialogue has to teach. A prompt never holds the chains of earlier turns, so no lesson does either.

    In DeepSeek's form one lesson teaches all turns, and one more each turn whose chain the first had to leave out. A
    model with a template of its own gets one lesson for each assistant turn, behind the prompt that its template writes.
    """
    turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
    if not turns:
        raise UserError("messages", len(messages), "nothing that an assistant says", "Give it something to learn.")
    if tokenizer.template is not None:
        return [_by_template(messages[: i + 1], tokenizer) for i in turns]
    chat.demand_marks(tokenizer)
    *earlier, last = turns
    chained = [i for i in earlier if messages[i].thinking]
    whole = [replace(m, thinking="") if i in chained else m for i, m in enumerate(messages[: last + 1])]
    return [
        _marked(whole, set(turns) - set(chained), tokenizer),
        *(_marked([*map(_bare, messages[:i]), messages[i]], {i}, tokenizer) for i in chained),
    ]


def _bare(message: Message) -> Message:
    return replace(message, thinking="")


def _marked(messages: Sequence[Message], taught: set[int], tokenizer: Tokenizer) -> Lesson:
    """In DeepSeek's form; the mark that opens an assistant's turn belongs to the prompt."""
    ids, learnt = [tokenizer.bos], [False]
    for index, message in enumerate(messages):
        turn = chat.turn(message, tokenizer, with_thinking=True)
        opens = message.role == "assistant"
        ids += turn
        learnt += [index in taught and not (opens and place == 0) for place in range(len(turn))]
    return Lesson(ids, learnt)


def _by_template(messages: Sequence[Message], tokenizer: Tokenizer) -> Lesson:
    """The template's prompt for all but the last message, then that message as the model should say it."""
    *said, answer = messages
    text = chat.rendered(said, tokenizer, think=bool(answer.thinking))
    opened, spaced = chat.is_open(text), text.endswith("\n")
    reply = answer.content
    if answer.thinking or opened:
        gap = "\n" if spaced or not opened else ""
        reply = f"{'' if opened else THINK + gap}{answer.thinking}{gap}{END_THINK}{gap * 2}{answer.content}"
    prompt = tokenizer.encode_marked(text)
    made = [*tokenizer.encode_marked(reply), _end(tokenizer)]
    return Lesson(prompt + made, [False] * len(prompt) + [True] * len(made))


def _end(tokenizer: Tokenizer) -> int:
    """The token that ends an answer: eos, or what generation_config.json stops at."""
    ends = [token for token in (tokenizer.eos, *tokenizer.stops) if token >= 0]
    if not ends:
        raise UserError(
            "tokenizer",
            str(tokenizer.path),
            "names no token that ends an answer",
            "Put eos_token into its tokenizer_config.json.",
        )
    return ends[0]


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
            learnt = torch.tensor(lesson.taught[1:])
            targets[line, start : end - 1] = torch.where(learnt, ids[1:], -1)
            documents[line, start:end], real[line, start:end] = number, True
            start = end
        documents[line, start:] = len(row)
    return Packed(tokens, targets, documents, real, len(rows))
