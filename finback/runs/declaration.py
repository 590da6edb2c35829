"""What a stage declares about its folder, so that readers need neither its class nor a table of classes."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Kind = Literal[
    "data", "pre-training", "fine-tuning", "reinforcement learning", "rejection sampling", "evaluation", "other"
]


DECLARATION = "declaration"  # key in config.json, next to the knobs


@dataclass(frozen=True)
class Declaration:
    """Written into config.json next to the knobs, so that a folder can be read without the stage's class."""

    kind: Kind = "other"
    # what training optimizes, in words; "": nothing is trained
    objective: str = ""
    # sums that its ledger has besides seconds and cores; documents report missing ones
    ledger: tuple[str, ...] = ()
    # keys of its results
    results: tuple[str, ...] = ()
    # curves to draw: title with unit -> metrics that share the axis
    curves: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # knob that limits its length, in steps, or in tokens for a knob of tokens
    length: str = "steps"

    @property
    def trains(self) -> bool:
        """Whether it updates parameters."""
        return "flops_training" in self.ledger

    @property
    def samples(self) -> bool:
        """Whether it samples answers to learn from."""
        return "flops_generation" in self.ledger


def from_json(raw: Any) -> Declaration:
    """A declaration from a config.json, perhaps of another version: invalid entries get their default."""
    found: dict[str, Any] = raw if isinstance(raw, dict) else {}
    curves = found.get("curves")
    return Declaration(
        kind=next((k for k in get_args(Kind) if k == found.get("kind")), "other"),
        objective=str(found.get("objective", "")),
        ledger=_texts(found.get("ledger")),
        results=_texts(found.get("results")),
        curves={str(title): _texts(names) for title, names in curves.items()} if isinstance(curves, dict) else {},
        length=str(found.get("length", "steps")),
    )


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, (list, tuple)) else ()
