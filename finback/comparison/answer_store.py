"""Answers on disk: one line each as soon as it is there, so that nothing that was paid for is asked twice.

A stored answer holds its text and its cost; whether it is right is judged anew each time. No torch here.
"""

import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from finback.comparison.protocol import EvalRequest, digest
from finback.data.messages import parse_response
from finback.data.tokenizer import END_THINK, THINK
from finback.runs.files import read_lines

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
    # "stop", "length", or what else a server calls it
    finish: str
    # None where a server does not say
    prompt_tokens: int | None
    # chain and answer together
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
        """Whether it came to its end; only then it is judged."""
        return self.finish == "stop" and self.closed


@dataclass(frozen=True)
class Failure:
    """An ask that got no answer at all, which says nothing of the model."""

    ask: EvalRequest
    problem: str


def parse_answer(ask: EvalRequest, text: str, reasoning: str = "", opened: bool = False, **more: Any) -> Answer:
    """An answer from a reply, with its chain in the text or beside it; `opened` says that the prompt opened one."""
    if not reasoning and not text.lstrip().startswith(THINK) and (opened or END_THINK in text):
        text = THINK + text  # servers that know nothing of chains leave out what the prompt ended with
    response = parse_response(text)
    thinking = reasoning.strip() or response.reasoning
    return Answer(
        ask.key,
        ask.suite.name,
        ask.suite.problems[ask.place].key,
        ask.sample,
        thinking,
        response.answer,
        response.closed,
        **more,
    )


class AnswerStore:
    """The answers of one contestant in a folder, by the asks' keys."""

    def __init__(self, folder: Path, name: str, identity: dict[str, Any]) -> None:
        slug = "".join(c if c.isalnum() else "-" for c in name).strip("-")[-60:]
        self.path = folder / f"{slug}-{digest(identity)[:8]}.jsonl"
        known = {field.name for field in fields(Answer)}
        self.answers: dict[str, Answer] = {}
        for line in read_lines(self.path):
            if isinstance(line, dict) and known <= line.keys():
                self.answers[line["key"]] = Answer(**{name: line[name] for name in known})

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
