"""RL's rewards: accuracy, form, a chain of thought, its language, brevity, and a judge's preference (R1 2.2.2, 2.3).

The parts of a reward are named, so that every step can log them separately. Does not import torch.
"""

from dataclasses import dataclass

from finback.config import UserError, check_fields, check_not_negative
from finback.tasks.judge import Judge
from finback.tasks.language import consistency, known
from finback.tasks.task import Verdict


@dataclass(frozen=True)
class Reward:
    """Weights of the reward's parts. The default is R1-Zero's: accuracy, and a little for the right form.

    The default does not reward thinking: if answers grow longer, it is because thinking makes them right. For any weights,
    a wrong answer earns less than a right one, and an opened but empty chain earns nothing at all. `language` is R1's
    language consistency: the share of the chain's words in `target`.
    """

    # reward of a right answer; multiplied by the score if the check gives partial credit
    accuracy: float = 1.0
    # reward of a well-formed answer that earns nothing for accuracy
    form: float = 0.1
    # reward of a chain that is opened, closed and not empty
    think: float = 0.0
    # multiplied by the share of the chain's words in `target` (R1 2.3.2)
    language: float = 0.0
    # target language, ISO 639-1
    target: str = "en"
    # reward of a right answer of length 0; falls linearly to 0 at the length limit
    brevity: float = 0.0
    # multiplied by the judge's score within the group
    preference: float = 0.0
    # the judge, if preference is not 0
    judge: Judge | None = None

    def __post_init__(self) -> None:
        check_fields(self, "reward")
        check_not_negative(self, "reward", "accuracy", "form", "think", "language", "brevity", "preference")
        if self.accuracy > 0 and self.extra >= self.accuracy:
            total = f"form, think, language and preference add up to {self.extra:g}"
            problem = f"{total}: a wrong answer could earn as much as a right one"
            remedy = "Raise accuracy or lower the others; only their proportions matter."
            raise UserError("reward.accuracy", self.accuracy, problem, remedy)
        if self.language:
            known(self.target, "reward.target")
        if (self.preference > 0) != (self.judge is not None):
            problem = "preference needs a judge, and a judge needs preference"
            raise UserError("reward.preference", self.preference, problem, "Give both or neither.")

    @property
    def extra(self) -> float:
        """The most that a wrong answer can earn."""
        return self.form + self.think + self.language + self.preference

    def parts(self, verdict: Verdict, chain: str, thinks: bool, tokens: int, limit: int) -> dict[str, float]:
        """The rewards of one answer, by name. `chain` is its thinking, `tokens` its length, at most `limit`.

        A reply without an answer (cut off, malformed) earns nothing for language either.
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
        """Names of the parts that can be earned, accuracy and form first."""
        optional = ("think", "language", "brevity", "preference")
        return ["accuracy", "form", *(name for name in optional if getattr(self, name))]
