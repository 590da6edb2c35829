"""What the command line says about a plan: the options, their words of help, and the checks on their values.

No torch here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args

import typer

from finback.config import UserError, did_you_mean
from finback.parallel import pipeline_tables as schedule
from finback.planner.workload import Optimizer, Precision, Recompute

What = Annotated[str, typer.Argument(metavar="RECIPE|PRESET", help="A recipe file, or v3, v2, v2-lite, small, tiny.")]
On = Annotated[str, typer.Option(help="Hardware, e.g. h800:2048; without it a recipe is planned for this machine.")]
Price = Annotated[float | None, typer.Option(help="Dollars per device-hour.")]
Tokens = Annotated[str, typer.Option(help="Tokens to train on, e.g. 14.8T; default the preset's.")]
Mesh = Annotated[
    str,
    typer.Option(
        help="E.g. pp=16,ep=64; also dp, fsdp, zero. Default the recipe's layout, else the fastest that fits."
    ),
]
ScheduleName = Annotated[str, typer.Option(help="1f1b, zb1p, interleaved, zbv, dualpipev, or V3's dualpipe.")]
RecomputeName = Annotated[str, typer.Option(help="none, attention, block, or selective (V3's).")]
PrecisionName = Annotated[str, typer.Option(help="bf16 or fp8; default what the hardware has.")]
OptimizerName = Annotated[str, typer.Option(help="adamw or muon; default the recipe's, else adamw.")]
Rows = Annotated[int, typer.Option(help="Sequences per step; default the preset's.")]
Length = Annotated[int, typer.Option(help="Tokens per sequence; default the preset's.")]
MicroRows = Annotated[int, typer.Option(help="Sequences per micro-batch.")]
Skew = Annotated[float, typer.Option(help="Zipf exponent of how popular experts are.")]
Assume = Annotated[list[str], typer.Option(metavar="NAME=VALUE", help="Another assumption; repeatable.")]
Picture = Annotated[Path | None, typer.Option(help="Draw the pipeline's schedule to this file.")]
Ranks = Annotated[int, typer.Option(help="Processes on this machine; 0 means one per core.")]
Calibrate = Annotated[bool, typer.Option("--calibrate", help="Measure this machine first, in about a minute.")]
Calibration = Annotated[Path | None, typer.Option(help="Its file; default in the user's cache folder.")]


@dataclass(frozen=True)
class Options:
    """What the command line says about a plan; empty text is left to the planner."""

    on: str = ""
    price: float | None = None
    tokens: str = ""
    mesh: str = ""
    schedule: str = ""
    recompute: str = ""
    precision: str = ""
    optimizer: str = ""
    rows: int = 0
    length: int = 0
    micro_rows: int = 1
    skew: float = 0.0
    assume: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.price is not None and not 0 <= self.price < 1e9:
            raise UserError("--price", self.price, "not an amount of money", "Use dollars per device-hour, 0 or more.")
        for name in ("rows", "length"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name}", getattr(self, name), "negative", "Use 1 or more.")
        if self.micro_rows < 1:
            raise UserError("--micro-rows", self.micro_rows, "not above 0", "Use 1 or more.")
        if not 0 <= self.skew <= 4:
            raise UserError("--skew", self.skew, "not an exponent", "Use 0 (all experts alike) up to 4.")
        _one_of("--recompute", self.recompute, get_args(Recompute))
        _one_of("--precision", self.precision, get_args(Precision))
        _one_of("--optimizer", self.optimizer, get_args(Optimizer))
        if self.schedule:
            schedule.find(self.schedule)


def _one_of(field: str, value: str, known: Sequence[str]) -> None:
    if value and value not in known:
        raise UserError(field, value, "unknown", did_you_mean(value, known))
