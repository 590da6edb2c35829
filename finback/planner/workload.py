"""One training step for the planner: layout, batch, precision and recomputation. Does not import torch."""

from dataclasses import dataclass
from typing import Any, Literal

from finback.config import UserError, did_you_mean
from finback.model.config import ModelConfig
from finback.parallel.layout import Layout
from finback.train.rates import ramp_sizes

# as in Pretrain.recompute; "selective" is V3's, for planning only: recomputes norms, up-projections and SwiGLU
Recompute = Literal["none", "attention", "block", "selective"]
Precision = Literal["fp32", "bf16", "fp8"]
Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True)
class Workload:
    """One optimizer step over all ranks."""

    layout: Layout = Layout(sharding="zero1")
    # sequences per step, over all ranks
    rows: int = 1
    # tokens per sequence
    length: int = 4096
    recompute: Recompute = "none"
    precision: Precision = "bf16"
    optimizer: Optimizer = "adamw"
    # sequences in the first steps, if there is a ramp; 0: no ramp
    rows_start: int = 0
    # whether a moving average of the weights is kept
    averaged: bool = False
    # whether hidden matrices are bf16 without fp32 masters
    rounded: bool = False
    # whether the whole model is sometimes gathered on every rank, to generate
    probed: bool = False
    # whether documents of a row are masked from each other
    masked: bool = False
    # whether blocks are compiled, which excludes FP8 and recomputed attention
    compiled: bool = False

    def check(self, c: ModelConfig) -> None:
        """Raises UserError unless the model and every step's rows fit the layout."""
        self.layout.check_length(self.length)
        self.layout.check(c, self.rows)
        self.layout.check_steps(c, ramp_sizes(self.rows_start, self.rows), self.rows)

    @property
    def micro_rows(self) -> int:
        """Sequences per micro-batch."""
        return self.rows // (self.layout.dp * self.layout.micro_batches)

    @property
    def micro_tokens(self) -> int:
        """Tokens of one micro-batch on a rank."""
        return self.micro_rows * self.length // self.layout.cp

    @property
    def passes(self) -> int:
        """Forward passes per stage and rank in a step."""
        return self.layout.micro_batches * self.layout.stages // self.layout.pp

    def knobs(self) -> str:
        """Knobs of a Pretrain stage that trains this way."""
        default = vars(Layout())
        changed = ", ".join(f"{k}={v!r}" for k, v in vars(self.layout).items() if v != default[k]).replace("'", '"')
        rest = f'recompute="{self.recompute}", compute="{self.precision}"'
        # a single rank needs no layout
        return rest if self.layout.ranks == 1 else f"layout=Layout({changed}), {rest}"


def parse_mesh(text: str, devices: int) -> dict[str, Any]:
    """`pp=16,ep=64` -> fields of a Layout; dp takes the remaining devices. UserError for an invalid mesh."""
    found: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        known = ("pp", "dp", "fsdp", "cp", "ep", "tp", "zero")
        if name not in known:
            raise UserError("--mesh", text, f"no dimension {name!r}", did_you_mean(name, known))
        if not (equals and value.isdecimal()) or (int(value) == 0 and name != "zero") or name in found:
            raise UserError("--mesh", text, f"{part!r} is not one whole number above 0", "Write pp=16,ep=64.")
        found[name] = int(value)
    if found.pop("tp", 1) != 1:
        problem = "tensor parallelism is not supported, V3 trains without it"
        raise UserError("--mesh", text, problem, "Use ep, pp and zero or fsdp.")
    if "fsdp" in found:
        if "dp" in found or "zero" in found:
            raise UserError("--mesh", text, "fsdp is dp with zero=3", "Give one of the two.")
        found |= {"dp": found.pop("fsdp"), "zero": 3}
    sharding = {0: "ddp", 1: "zero1", 3: "fsdp"}.get(zero := found.pop("zero", 1))
    if sharding is None:
        raise UserError("--mesh", text, f"zero={zero} is not supported", "Use zero=0, 1 or 3.")
    cp = found.get("cp", 1)
    pp = found.setdefault("pp", max(devices // (found["dp"] * cp), 1) if "dp" in found else 1)
    found.setdefault("dp", max(devices // (pp * cp), 1))
    if pp * found["dp"] * cp != devices:
        names = "pp · dp · cp" if cp > 1 else "pp · dp"
        sizes = f"{pp} · {found['dp']}" + (f" · {cp}" if cp > 1 else "")
        problem = f"{names} = {sizes} are not {devices} devices"
        raise UserError("--mesh", text, problem, "Change it, or --on.")
    return found | {"sharding": sharding}
