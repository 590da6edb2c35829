"""The contestants of a comparison: their interface, answers and prices, and the store of answers. Does not import torch.

Each answer is appended to a file as one line when it arrives, so that no request is paid for twice. The line holds the text
and its cost but no verdict: answers are judged again on every run.
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

_SYNC = 1.0  # seconds between two calls of fsync, and so of answers that a power failure may lose


@dataclass(frozen=True)
class Answer:
    """What a contestant replied to one request."""

    key: str
    suite: str
    # the problem's key, for people who read the file
    question: str
    sample: int
    thinking: str
    # what follows the chain of thought
    text: str
    # whether the chain of thought is closed
    closed: bool
    # the finish reason: "stop", "length", or the server's own word; "" if it sends none
    finish: str
    # None if a server does not report it
    prompt_tokens: int | None
    # chain of thought and answer together; see `endpoint.billed`
    tokens: int | None
    # from the start of the last try to the last token
    seconds: float
    # this answer's share of the machine's seconds; 0 for endpoints
    busy: float = 0.0
    tries: int = 1
    # the model that the server names in its reply
    model: str = ""

    @property
    def whole(self) -> bool:
        """Whether the answer is complete; only complete answers are judged. An unknown finish reason counts as complete."""
        return ending(self.finish) in ("stop", "refused", "tools", "unknown") and self.closed

    @property
    def content(self) -> str:
        """The text that is judged: up to the first stop token that the server left in it."""
        return before_stop_token(self.text)[0]

    @property
    def stop_token(self) -> str:
        """The first stop token in the text, or ""."""
        return before_stop_token(self.text)[1]


@dataclass(frozen=True)
class Failure:
    """A request that got no answer. It counts neither for nor against the model."""

    ask: EvalRequest
    problem: str


def parse_answer(ask: EvalRequest, text: str, reasoning: str = "", opened: bool = False, **more: Any) -> Answer:
    """Builds an answer from a reply; `reasoning` is a chain of thought sent separately, `opened`: the prompt opened one."""
    unopened = text.lstrip().startswith(END_THINK) if reasoning else opened or END_THINK in text
    if unopened and not text.lstrip().startswith(THINK):
        text = THINK + text  # a server without a reasoning parser does not repeat the <think> that ends the prompt
    response = parse_response(text)
    thinking = reasoning.strip() or response.reasoning
    key = ask.suite.problems[ask.place].key
    return Answer(ask.key, ask.suite.name, key, ask.sample, thinking, response.answer, response.closed, **more)


@dataclass(frozen=True)
class Price:
    """Dollars, and the source of the figure. None is an unknown price, not 0."""

    # per machine-hour, for a model that runs here
    per_hour: float | None = None
    # per million prompt tokens, for an endpoint
    per_input: float | None = None
    # per million generated tokens, for an endpoint
    per_output: float | None = None
    basis: str = "NOT PROVIDED"

    def of(self, answer: Answer) -> float | None:
        """The cost of an answer in dollars, without failed tries, since no server reports what it charges for those."""
        if self.per_hour is not None:
            return answer.busy * self.per_hour / 3600
        pairs = ((answer.prompt_tokens, self.per_input), (answer.tokens, self.per_output))
        parts = [count * price for count, price in pairs if count is not None and price is not None]
        return sum(parts) / 1e6 if len(parts) == 2 else None


class Contestant(Protocol):
    """A model that can be compared."""

    name: str
    price: Price

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the answers depend on, as plain JSON; answers are stored under a digest of it."""
        ...

    def answers(self, asks: Sequence[EvalRequest], rules: SamplingProtocol) -> Iterator[Answer | Failure]:
        """Yields an answer or a failure for each request, in order of arrival; closing the iterator ends the work."""
        ...


def by_endpoint(given: Sequence[str], option: str, names: Sequence[str], read: Callable[[str, str], T]) -> dict[str, T]:
    """The value of an option for each of the endpoints `names`: VALUE applies to all, NAME=VALUE to one.

    `read(value, text)` parses a value or raises UserError; `text` is the whole argument, for the message.
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
    """Names for a table: the second "name" becomes "name (2)"."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


class AnswerStore:
    """The answers of one contestant in a folder, by the keys of requests."""

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
        """Yields from `found`; each answer is in the file before it is yielded."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a killed process left half a line; the next answer needs a line to itself
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
