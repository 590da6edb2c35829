"""A suite: a fixed list of questions with everything needed to reproduce its scores. Does not import torch."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from finback.config import UserError, check_fields, did_you_mean
from finback.tasks.task import Problem, Task


@dataclass(frozen=True)
class SuiteSource:
    """The source of questions; `digest` is the SHA-256 of their canonical text, by which two people can compare them."""

    # a package with its version, a hub data set with its revision, a path, or the generator with its seed
    name: str
    # SPDX identifier, or "unknown"
    licence: str
    digest: str


@dataclass(frozen=True)
class Continuations:
    """The texts that may follow a question; the letter of the likeliest one is the answer."""

    texts: tuple[str, ...]
    # whether log-likelihoods are divided by the number of characters
    normalize: bool


@dataclass(frozen=True)
class Suite:
    """Questions with gold answers, their prompt, the extraction of answers, and the metric."""

    name: str
    problems: tuple[Problem, ...]
    # the judge: task.check(problem, text after the chain of thought)
    task: Task
    source: SuiteSource
    # the user turn; the system prompt is empty by default, as in R1's protocol
    prompt: str = "{question}"
    system: str = ""
    # a description, for reports, of where the final answer is searched for
    extraction: str = ""
    metric: str = "accuracy"
    # the score of blind guessing, if known
    chance: float | None = None
    # ISO 639-1; if set, the share of the chains' words in this language is reported too
    language: str = ""
    stop: tuple[str, ...] = ()
    # by problem key, if choices are scored by log-likelihood instead of generating
    continuations: dict[str, Continuations] = field(default_factory=dict)
    # conditions that reports print with the score
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(self, "suite")
        if not self.problems:
            raise UserError("suite.problems", self.name, "no questions", "Ask for at least one.")
        if "{question}" not in self.prompt:
            raise UserError("suite.prompt", self.prompt, "lacks {question}", "Write {question} where it belongs.")

    def ask(self, problem: Problem) -> list[dict[str, str]]:
        """The messages that ask a chat model one question."""
        turn = {"role": "user", "content": self.prompt.replace("{question}", problem.question)}
        return [{"role": "system", "content": self.system}, turn] if self.system else [turn]


def check_options(name: str, options: Iterable[str], known: Iterable[str]) -> None:
    """Raises UserError for the first option that a suite does not know."""
    if unknown := [option for option in options if option not in known]:
        raise UserError(name, unknown[0], "no such option", did_you_mean(unknown[0], known))
