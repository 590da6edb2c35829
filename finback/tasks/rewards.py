"""What RL pays for: accuracy, form, a chain of thought, its language, brevity, and a judge's preference (R1 2.2.2, 2.3).

Reward parts are named, so that every step can log what was earned for what. No torch here.
"""

from dataclasses import dataclass

from finback.config import UserError, check_fields, check_not_negative
from finback.tasks.judge import Judge
from finback.tasks.language import consistency, known
from finback.tasks.task import Verdict


@dataclass(frozen=True)
class Reward:
    """Weights of what is paid. The default is R1-Zero's: accuracy, and a little for an answer of the asked form.

    Thinking itself then earns nothing: if answers grow longer, it is because thinking makes them right. Whatever the
    weights, a wrong answer cannot earn as much as a right one, and an opened chain with nothing in it earns nothing
    at all. `language` is R1's language consistency: the share of the chain's words that are in `target`.
    """

    # for a right answer; where the check is graded, times the score
    accuracy: float = 1.0
    # for a well-formed answer that earns nothing for its accuracy
    form: float = 0.1
    # for a chain that was opened, closed and has something in it
    think: float = 0.0
    # times the share of the chain's words in `target` (R1 2.3.2)
    language: float = 0.0
    # ISO 639-1
    target: str = "en"
    # falls linearly from this at no tokens to 0 at the limit; for right answers alone
    brevity: float = 0.0
    # times the judge's score among the answers of a group
    preference: float = 0.0
    # what gives the preference
    judge: Judge | None = None

    def __post_init__(self) -> None:
        check_fields(self, "reward")
        check_not_negative(self, "reward", "accuracy", "form", "think", "language", "brevity", "preference")
        if self.accuracy > 0 and self.extra >= self.accuracy:
            total = f"form, think, language and preference add up to {self.extra:g}"
            problem = f"{total}: a wrong answer could earn as much as a right one"
            remedy = "Weigh accuracy higher or the others lower; only their proportions matter."
            raise UserError("reward.accuracy", self.accuracy, problem, remedy)
        if self.language:
            known(self.target, "reward.target")
        if (self.preference > 0) != (self.judge is not None):
            problem = "a preference and a judge go together"
            raise UserError("reward.preference", self.preference, problem, "Give both or none.")

    @property
    def extra(self) -> float:
        """The most that a wrong answer can earn."""
        return self.form + self.think + self.language + self.preference

    def parts(self, verdict: Verdict, chain: str, thinks: bool, tokens: int, limit: int) -> dict[str, float]:
        """What one answer earns, by name; `chain` is its thinking, `tokens` of at most `limit` its length.

        An answer that is no answer (cut off, not of the asked form) earns nothing for its language either.
        """
        earned = dict.fromkeys(self.names, 0.0)
        if not (verdict.correct or verdict.well_formed) or (thinks and not chain.strip()):
            return earned
        earned["accuracy"] = self.accuracy * verdict.score
        earned["form"] = 0.0 if verdict.score else self.form
        if self.think and thinks:
            earned["think"] = self.think
        if self.language and thinks:
            earned["language"] = self.language * (consistency(chain, self.target) or 0.0)
        if self.brevity and verdict.correct:
            earned["brevity"] = self.brevity * (1 - tokens / limit)
        return earned

    @property
    def names(self) -> list[str]:
        """The parts that can be earned, accuracy and form first."""
        optional = ("think", "language", "brevity", "preference")
        return ["accuracy", "form", *(name for name in optional if getattr(self, name))]
