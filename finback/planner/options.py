"""The options of `finback plan`. Does not import torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from finback.config import UserError, check_not_negative, check_positive
from finback.options import Options, Settings
from finback.parallel import schedules
from finback.planner.workload import Optimizer, Precision, Recompute


@dataclass(frozen=True, kw_only=True)
class PlanOptions(Options):
    """What is planned, and for which hardware; empty strings and None leave the choice to the planner."""

    what: Annotated[
        str, typer.Argument(metavar="RECIPE|PRESET", help="A recipe file, or v3, v2, v2-lite, small, tiny.")
    ] = ""
    on: Annotated[str, typer.Option(help="Hardware, e.g. h800:2048; default for a recipe: this machine.")] = ""
    price: Annotated[float | None, typer.Option(help="Dollars per device-hour.")] = None
    tokens: Annotated[str, typer.Option(help="Tokens to train on, e.g. 14.8T; default: the preset's.")] = ""
    mesh: Annotated[
        str,
        typer.Option(
            help="E.g. pp=16,ep=64; also dp, cp, fsdp, zero. Default: the recipe's layout, else the fastest that fits."
        ),
    ] = ""
    schedule: Annotated[str, typer.Option(help="1f1b, zb1p, interleaved, zbv, dualpipev, or V3's dualpipe.")] = ""
    recompute: Annotated[Recompute | None, typer.Option(help="none, attention, block, or selective (V3's).")] = None
    precision: Annotated[Precision | None, typer.Option(help="bf16 or fp8; default: the best the hardware has.")] = None
    optimizer: Annotated[Optimizer | None, typer.Option(help="adamw or muon; default: the recipe's, else adamw.")] = (
        None
    )
    rows: Annotated[int, typer.Option(help="Sequences per step; default: the preset's.")] = 0
    length: Annotated[int, typer.Option(help="Tokens per sequence; default: the preset's.")] = 0
    micro_rows: Annotated[int, typer.Option(help="Sequences per micro-batch.")] = 1
    skew: Annotated[float, typer.Option(help="Zipf exponent of expert popularity.")] = 0.0
    assume: Annotated[
        tuple[str, ...], typer.Option(metavar="NAME=VALUE", help="Change an assumption; repeatable.")
    ] = ()
    measured: Annotated[
        Path | None, typer.Option(metavar="RUN", help="A run whose RL stage measured engines and trainer.")
    ] = None
    picture: Annotated[
        Path | None, typer.Option(help="Write a picture of the pipeline's schedule, or of trainer and engines.")
    ] = None
    settings: Settings = ()
    ranks: Annotated[int, typer.Option(help="Processes on this machine; 0 means one per core.")] = 0
    calibrate: Annotated[bool, typer.Option("--calibrate", help="Measure this machine first, in about a minute.")] = (
        False
    )
    calibration: Annotated[Path | None, typer.Option(help="Calibration file; default: in the user's cache folder.")] = (
        None
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.price is not None and not 0 <= self.price < 1e9:
            raise UserError("--price", self.price, "not an amount of money", "Use dollars per device-hour, 0 or more.")
        check_not_negative(self, "--", "rows", "length", "ranks")
        check_positive(self, "--", "micro_rows")
        if not 0 <= self.skew <= 4:
            raise UserError("--skew", self.skew, "not in 0..4", "Use 0 for equal experts, up to 4.")
        if self.schedule:
            schedules.find(self.schedule)
