"""What a stage declares of the folder it leaves, so that readers need neither its class nor a table of classes."""

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Kind = Literal[
    "data", "pre-training", "fine-tuning", "reinforcement learning", "rejection sampling", "evaluation", "other"
]


DECLARATION = "declaration"  # the key in config.json beside the knobs


@dataclass(frozen=True)
class Declaration:
    """Written into config.json beside the knobs: a folder stays readable where the stage's class is not known."""

    kind: Kind = "other"
    # what training optimises, in words; empty where nothing is trained
    objective: str = ""
    # sums in its ledger beside seconds and cores; a document that misses one says so
    ledger: tuple[str, ...] = ()
    # keys of its results
    results: tuple[str, ...] = ()
    # curves to draw: title with unit -> metrics that share the axis
    curves: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # knob that says how long it takes at most, in steps or, for a knob of tokens, in tokens
    length: str = "steps"

    @property
    def trains(self) -> bool:
        """Whether it updates parameters."""
        return "flops_training" in self.ledger

    @property
    def samples(self) -> bool:
        """Whether answers are sampled to learn from."""
        return "flops_generation" in self.ledger


def from_json(raw: Any) -> Declaration:
    """A declaration out of a config.json, perhaps of another version: what does not fit keeps its default."""
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
