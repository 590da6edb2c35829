"""One training step as the planner computes with it: a layout, its batch, and how it is computed. No torch here."""

from dataclasses import dataclass
from typing import Any, Literal

from finback.config import UserError, did_you_mean
from finback.model.config import ModelConfig
from finback.parallel.layout import Layout
from finback.train.rates import ramp_sizes

# as Pretrain.recompute has them; "selective" is V3's own, for plans: norms, up-projections and SwiGLU are done again
Recompute = Literal["none", "attention", "block", "selective"]
Precision = Literal["fp32", "bf16", "fp8"]
Optimizer = Literal["adamw", "muon"]


@dataclass(frozen=True)
class Workload:
    """What every rank does in one optimizer step."""

    layout: Layout = Layout(sharding="zero1")
    # sequences per step, over all ranks
    rows: int = 1
    # tokens per sequence
    length: int = 4096
    recompute: Recompute = "none"
    precision: Precision = "bf16"
    optimizer: Optimizer = "adamw"
    # of the first steps, where there is a ramp; 0: none
    rows_start: int = 0
    # a running average of the weights is kept
    averaged: bool = False
    # the whole model is put together on every rank now and then, to generate
    probed: bool = False
    # documents of a row do not see each other
    masked: bool = False
    # blocks are compiled, which neither FP8 nor recomputed attention can be
    compiled: bool = False

    def check(self, c: ModelConfig) -> None:
        """UserError unless the model and every step's rows fit the layout."""
        self.layout.check_length(self.length)
        self.layout.check(c, self.rows)
        self.layout.check_steps(c, ramp_sizes(self.rows_start, self.rows), self.rows)

    @property
    def micro_rows(self) -> int:
        """Sequences of one micro-batch."""
        return self.rows // (self.layout.dp * self.layout.micro_batches)

    @property
    def micro_tokens(self) -> int:
        """Tokens of one micro-batch that a rank has."""
        return self.micro_rows * self.length // self.layout.cp

    @property
    def passes(self) -> int:
        """Forward passes of one stage that each rank does in a step."""
        return self.layout.micro_batches * self.layout.stages // self.layout.pp

    def knobs(self) -> str:
        """What a Pretrain stage is given to train so."""
        default = vars(Layout())
        changed = ", ".join(f"{k}={v!r}" for k, v in vars(self.layout).items() if v != default[k]).replace("'", '"')
        rest = f'recompute="{self.recompute}", compute="{self.precision}"'
        # one rank needs no layout
        return rest if self.layout.ranks == 1 else f"layout=Layout({changed}), {rest}"


def parse_mesh(text: str, devices: int) -> dict[str, Any]:
    """`pp=16,ep=64` -> fields of a Layout; dp is what is left of the devices. UserError for what makes no mesh."""
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
