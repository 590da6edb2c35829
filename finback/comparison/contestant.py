"""Who is compared: what every contestant has, what it answers and at what price; its answers on disk. Does not import torch.

An answer is one line in a file as soon as it is there, so that nothing that was paid for is asked twice. It holds its text
and its cost; whether it is right is judged anew each time.
"""

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, TypeVar

from finback.comparison.endings import before_stop_token, ending
from finback.comparison.protocol import EvalRequest, SamplingProtocol, digest
from finback.config import UserError
from finback.data.messages import parse_response
from finback.data.tokenizer import END_THINK, THINK
from finback.runs.files import read_lines

T = TypeVar("T")

_SYNC = 1.0  # seconds between two calls of fsync: what a loss of power may cost


@dataclass(frozen=True)
class Answer:
    """What a contestant replied to one request."""

    key: str
    suite: str
    # the problem's key, for readers of the file
    question: str
    sample: int
    thinking: str
    # after the chain
    text: str
    # whether the chain has an end
    closed: bool
    # "stop", "length", or what else a server calls it; "" where it calls it nothing
    finish: str
    # None where a server does not say
    prompt_tokens: int | None
    # chain and answer together, whatever a server counts where
    tokens: int | None
    # from when it was begun until it was whole
    seconds: float
    # seconds of the machine that are this answer's share; 0 for endpoints
    busy: float = 0.0
    tries: int = 1
    # what a server says has answered
    model: str = ""

    @property
    def whole(self) -> bool:
        """Whether it came to its end; only then it is judged. An end of an unknown name is one."""
        return ending(self.finish) in ("stop", "refused", "tools", "unknown") and self.closed

    @property
    def content(self) -> str:
        """The text that is judged: up to the first stop token that a server has left in it."""
        return before_stop_token(self.text)[0]

    @property
    def stop_token(self) -> str:
        """The first stop token in the text, "" if there is none."""
        return before_stop_token(self.text)[1]


@dataclass(frozen=True)
class Failure:
    """An ask that got no answer at all, which says nothing of the model."""

    ask: EvalRequest
    problem: str


def parse_answer(ask: EvalRequest, text: str, reasoning: str = "", opened: bool = False, **more: Any) -> Answer:
    """An answer from a reply, with its chain in the text or beside it; `opened` says that the prompt opened one."""
    unopened = text.lstrip().startswith(END_THINK) if reasoning else opened or END_THINK in text
    if unopened and not text.lstrip().startswith(THINK):
        text = THINK + text  # servers that know nothing of chains leave out what the prompt ended with
    response = parse_response(text)
    thinking = reasoning.strip() or response.reasoning
    key = ask.suite.problems[ask.place].key
    return Answer(ask.key, ask.suite.name, key, ask.sample, thinking, response.answer, response.closed, **more)


@dataclass(frozen=True)
class Price:
    """Dollars, and where the figure is from; None where it is unknown, which is not 0."""

    # of the machine, for a model that runs here
    per_hour: float | None = None
    # of a million prompt tokens, for an endpoint
    per_input: float | None = None
    per_output: float | None = None
    basis: str = "NOT PROVIDED"

    def of(self, answer: Answer) -> float | None:
        """What an answer has cost. Tries that failed are not in it: no server says what it charges for them."""
        if self.per_hour is not None:
            return answer.busy * self.per_hour / 3600
        pairs = ((answer.prompt_tokens, self.per_input), (answer.tokens, self.per_output))
        parts = [count * price for count, price in pairs if count is not None and price is not None]
        return sum(parts) / 1e6 if len(parts) == 2 else None


class Contestant(Protocol):
    """A model that can be asked."""

    name: str
    price: Price

    @property
    def identity(self) -> dict[str, Any]:
        """All that its answers depend on, as plain JSON; answers are stored under a digest of it."""
        ...

    def answers(self, asks: Sequence[EvalRequest], rules: SamplingProtocol) -> Iterator[Answer | Failure]:
        """An answer or a failure for each ask, in any order, as they come; closing the iterator ends the work."""
        ...


def by_endpoint(given: Sequence[str], option: str, names: Sequence[str], read: Callable[[str, str], T]) -> dict[str, T]:
    """What an option says of each of the endpoints `names`: VALUE is for all, NAME=VALUE for one.

    `read` makes something of a value, or refuses it; it gets the whole text too.
    """
    found: dict[str, T] = {}
    for text in sorted(given, key=lambda t: "=" in t):
        name, _, value = text.rpartition("=")
        made = read(value, text)
        if name and name not in names:
            raise UserError(option, text, "no such endpoint", f"Known: {', '.join(names) or 'none'}.")
        found |= dict.fromkeys([name] if name else names, made)
    return found


def prices(given: Sequence[str], option: str, names: Sequence[str]) -> dict[str, float]:
    """Prices of --price-in and --price-out, in dollars per million tokens, by the names of endpoints."""

    def dollars(text: str, whole: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= 0):
            raise UserError(option, whole, "not a price", "Write dollars per million tokens: 0.55, or NAME=0.55.")
        return value

    return by_endpoint(given, option, names, dollars)


def distinct(names: Sequence[str]) -> list[str]:
    """Names for a table: of two that are alike the second is "name (2)"."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


class AnswerStore:
    """The answers of one contestant in a folder, by the asks' keys."""

    def __init__(self, folder: Path, name: str, identity: dict[str, Any]) -> None:
        slug = "".join(c if c.isalnum() else "-" for c in name).strip("-")[-60:]
        self.path = folder / f"{slug}-{digest(identity)[:8]}.jsonl"
        known = {field.name for field in fields(Answer)}
        needed = {field.name for field in fields(Answer) if field.default is MISSING}
        self.answers: dict[str, Answer] = {}
        for line in read_lines(self.path):
            if isinstance(line, dict) and needed <= line.keys():
                self.answers[line["key"]] = Answer(**{name: line[name] for name in known & line.keys()})

    def save(self, found: Iterator[Answer | Failure]) -> Iterator[Answer | Failure]:
        """Pass on what comes; every answer is in the file before it is passed on."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a kill left half a line: end that line
                    file.write(b"\n")
            synced = time.monotonic()
            for each in found:
                if isinstance(each, Answer):
                    self.answers[each.key] = each
                    file.write(json.dumps(asdict(each)).encode() + b"\n")
                    file.flush()
                    if time.monotonic() - synced > _SYNC:
                        os.fsync(file.fileno())
                        synced = time.monotonic()
                yield each
            os.fsync(file.fileno())
