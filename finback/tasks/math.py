"""Arithmetic with exactly checkable answers."""

import random
import re
from dataclasses import dataclass
from typing import Literal

from finback.config import UserError, check_fields
from finback.tasks.task import Problem, Verdict

_INTEGER = re.compile(r"[+-]?\d{1,18}")


def integer(text: str) -> int | None:
    """The integer that a text consists of, or None; nothing is evaluated."""
    text = text.strip()
    return int(text) if _INTEGER.fullmatch(text) and text.isascii() else None


@dataclass(frozen=True)
class Chains:
    """Sums and differences of single digits, "3+1-3+6=?", solved one step at a time.

    A guess is right about one time in ten; step by step it is easy, which RL can discover. The canonical form ignores the
    order of the terms, so a held-out problem is never a reordered training problem. `wording` adds words to the steps:
    English, Chinese, or a mixture, as in models that were not trained for one language.
    """

    # smallest number of terms
    min_terms: int = 4
    # largest number of terms
    max_terms: int = 6
    # largest digit of a term
    largest: int = 9
    # language of the words around the steps; "": sums only
    wording: Literal["", "en", "zh", "mixed"] = ""

    def __post_init__(self) -> None:
        check_fields(self, "chains")
        if not 2 <= self.min_terms <= self.max_terms:
            problem = f"not in 2..max_terms ({self.max_terms})"
            raise UserError("chains.min_terms", self.min_terms, problem, "Correct the range.")
        if self.largest < 1:
            raise UserError("chains.largest", self.largest, "terms run from 1 to largest", "Set it to at least 1.")

    @property
    def name(self) -> str:
        return f"chains-{self.min_terms}" + (f"-{self.max_terms}" if self.max_terms > self.min_terms else "")

    def draw(self, rng: random.Random) -> Problem:
        terms = [rng.randint(1, self.largest) for _ in range(rng.randint(self.min_terms, self.max_terms))]
        signed = [terms[0]] + [t if rng.random() < 0.5 else -t for t in terms[1:]]
        total = signed[0]
        steps: list[str] = []
        for term in signed[1:]:
            steps.append(self._step(f"{total}{term:+d}", total + term, not steps, rng))
            total += term
        question = str(signed[0]) + "".join(f"{t:+d}" for t in signed[1:]) + "=?"
        return Problem(
            question=question,
            answer=str(total),
            key="chains:" + " ".join(f"{t:+d}" for t in sorted(signed)),
            solution="\n".join(steps),
            tags={"terms": len(signed)},
        )

    def _step(self, left: str, right: int, first: bool, rng: random.Random) -> str:
        if not self.wording:
            return f"{left}={right}"
        language = rng.choice(("en", "zh")) if self.wording == "mixed" else self.wording
        if language == "zh":
            return f"{'先算' if first else '然后'}{left}得到{right}"
        return f"{'first' if first else 'then'} {left} gives {right}"

    def check(self, problem: Problem, answer: str) -> Verdict:
        value = integer(answer)
        return Verdict(correct=value is not None and value == int(problem.answer), well_formed=value is not None)
