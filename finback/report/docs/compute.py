"""FLOPs as the EU counts them, and the thresholds (Commission guidelines C(2025) 7719, paras 53-82 and annex 117-133).

Training compute is that of passes that update parameters. The cumulative amount also includes answers sampled to learn from,
unless they are published, and the compute of the starting weights. Neither includes evaluation, recomputation, teachers,
reference models or failed experiments; precision makes no difference. Does not import torch.
"""

from dataclasses import dataclass
from typing import Any

from finback.report.docs.facts import MISSING, RunFacts
from finback.report.docs.questionnaire import Answers

GENERAL_PURPOSE = 1e23
SYSTEMIC = 1e25
METHOD = (
    "Counted in closed form from the model's shapes: two FLOP per weight that a token meets and the products of attention, "
    "three times that where parameters are updated (finback/model/count.py); activated parameters alone, of a mixture of "
    "experts. The guidelines ask for 30 % accuracy."
)


@dataclass(frozen=True)
class Compute:
    """Sums over the stages whose updates are in the model; MISSING if a stage's ledger lacks them."""

    training: Any
    generation: Any
    # of the starting weights: 0 for random ones, MISSING if unknown
    base: Any

    @property
    def cumulative(self) -> Any:
        """The amount for the test of systemic risk."""
        return self.training + self.generation + self.base


def of(run: RunFacts, answers: Answers) -> Compute:
    """The compute of a run's model."""
    sampled = [s for s in run.lineage if s.declaration.samples]
    public = answers("data.synthetic_public") is True
    generation = 0.0 if public else sum((s.spent("flops_generation") for s in sampled), 0.0)
    return Compute(
        sum((s.spent("flops_training") for s in run.chain), 0.0), generation, answers("base.flop") if run.base else 0.0
    )


def verdicts(run: RunFacts, answers: Answers) -> list[tuple[str, str]]:
    """The three tests by name; this is not legal advice."""
    c = of(run, answers)
    return [
        ("10^23 FLOP: presumed general-purpose", _over(c.training, GENERAL_PURPOSE)),
        ("10^25 FLOP, cumulative: presumed systemic risk (Art 51(2))", _over(c.cumulative, SYSTEMIC)),
        ("one third of the original's compute: a modifier becomes its provider (para 63)", _third(run, answers, c)),
    ]


def _over(flop: Any, line: float) -> str:
    if flop is MISSING:
        return "UNKNOWN: compute NOT PROVIDED"
    return f"{'YES' if flop > line else 'no'}: {flop:.3g} FLOP are {flop / line:.2g} of {line:.0e}"


def _third(run: RunFacts, answers: Answers, c: Compute) -> str:
    if not run.base:
        return "does not apply: the model began with random weights"
    if c.training is MISSING:
        return "UNKNOWN: compute NOT PROVIDED"
    whose, original = "the original's", c.base
    if original is MISSING:  # the threshold is used instead (paras 63-68)
        original = SYSTEMIC if answers("base.systemic") is True else GENERAL_PURPOSE
        whose = f"{original:.0e}, since the original's is NOT PROVIDED"
    share = c.training / original
    return f"{'YES' if share > 1 / 3 else 'no'}: {c.training:.3g} FLOP are {share:.2g} of {whose}"
