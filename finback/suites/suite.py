"""A suite is a fixed list of questions, and all that another person needs to ask them in the same way. Does not import torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from finback.config import UserError, check_fields, did_you_mean
from finback.tasks.task import Problem, Task


@dataclass(frozen=True)
class SuiteSource:
    """Where questions come from; `digest` is the SHA-256 of their canonical text, so that two people can compare."""

    # a package with its version, a hub data set with its revision, a path, or the generator with its seed
    name: str
    # SPDX identifier, or "unknown"
    licence: str
    digest: str


@dataclass(frozen=True)
class Continuations:
    """The texts that may follow a question: the likeliest is the answer, by the letter of its place."""

    texts: tuple[str, ...]
    # divide log-likelihoods by the number of characters
    normalize: bool


@dataclass(frozen=True)
class Suite:
    """Questions with gold answers, how they are put, how the answer is found and what is counted."""

    name: str
    problems: tuple[Problem, ...]
    # judges: task.check(problem, text after the chain of thought)
    task: Task
    source: SuiteSource
    # what the user turn says; no system prompt, as R1's protocol has it
    prompt: str = "{question}"
    system: str = ""
    # in words: where in the answer the checked part is looked for
    extraction: str = ""
    metric: str = "accuracy"
    # the share that blind guessing gets, where that is known
    chance: float | None = None
    # ISO 639-1: also report the share of the chains' words that is in it
    language: str = ""
    stop: tuple[str, ...] = ()
    # by a problem's key, where choices are scored by their log-likelihood and nothing is generated
    continuations: dict[str, Continuations] = field(default_factory=dict)
    # conditions worth printing beside the score
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "suite")
        if not self.problems:
            raise UserError("suite.problems", self.name, "no questions", "Ask for at least one.")
        if "{question}" not in self.prompt:
            raise UserError("suite.prompt", self.prompt, "does not ask", "Write {question} where it belongs.")

    def ask(self, problem: Problem) -> list[dict[str, str]]:
        """The messages that put one question to a chat model."""
        turn = {"role": "user", "content": self.prompt.replace("{question}", problem.question)}
        return [{"role": "system", "content": self.system}, turn] if self.system else [turn]


def check_options(name: str, options: Iterable[str], known: Iterable[str]) -> None:
    """UserError for the first option of a suite that it does not know."""
    if unknown := [option for option in options if option not in known]:
        raise UserError(name, unknown[0], "no such option", did_you_mean(unknown[0], known))
