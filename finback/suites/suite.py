"""A suite is a fixed list of questions, and all that another person needs to ask them in the same way. No torch here."""

from dataclasses import dataclass, field

from finback.config import UserError, check_fields
from finback.tasks.task import Problem, Task


@dataclass(frozen=True)
class SuiteSource:
    """Where questions come from; `digest` is the SHA-256 of their canonical text, so that two people can tell."""

    name: str  # a package with its version, a hub data set with its revision, a path, or the generator with its seed
    licence: str  # SPDX identifier, or "unknown"
    digest: str


@dataclass(frozen=True)
class Suite:
    """Questions with gold answers, how they are put, how the answer is found and what is counted."""

    name: str
    problems: tuple[Problem, ...]
    task: Task  # judges: task.check(problem, text after the chain of thought)
    source: SuiteSource
    prompt: str = "{question}"  # what the user turn says; no system prompt, as R1's protocol has it
    system: str = ""
    extraction: str = ""  # in words: where in the answer the checked part is looked for
    metric: str = "accuracy"
    chance: float | None = None  # the share that blind guessing gets, where that is known
    language: str = ""  # ISO 639-1: also report the share of the chains' words that is in it
    stop: tuple[str, ...] = ()
    notes: dict[str, str] = field(default_factory=dict)  # conditions worth printing beside the score

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
