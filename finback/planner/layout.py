"""How a model is spread over devices: the mesh, its checks, and which layers lie on which pipeline rank. No torch here."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from finback.config import UserError, did_you_mean
from finback.model.config import ModelConfig
from finback.model.count import layer_parameters
from finback.parallel import pipeline_tables as schedules
from finback.parallel.pipeline_tables import Schedule

Recompute = Literal["none", "selective", "full"]
Precision = Literal["fp32", "bf16", "fp8"]
Optimizer = Literal["adamw", "muon"]
CHOICES = {
    "--recompute": ("none", "selective", "full"),
    "--precision": ("fp32", "bf16", "fp8"),
    "--optimizer": ("adamw", "muon"),
}


@dataclass(frozen=True)
class Layout:
    """A mesh and how a step runs on it: devices = pp · dp, and the ep ranks of an expert group lie within dp.

    `zero` says what data-parallel ranks share out: 0 nothing, 1 the optimizer (ZeRO-1, as V3), 3 all (FSDP). There is
    no tensor parallelism: V3 trains without it, and so do we.
    """

    pp: int = 1
    dp: int = 1
    ep: int = 1
    zero: int = 1
    schedule: str = "1f1b"
    recompute: Recompute = "none"
    precision: Precision = "bf16"
    optimizer: Optimizer = "adamw"
    rows: int = 1  # sequences per step, over all ranks
    length: int = 4096  # tokens per sequence
    micro_rows: int = 1  # sequences per micro-batch

    @property
    def devices(self) -> int:
        """All of them."""
        return self.pp * self.dp

    @property
    def plan(self) -> Schedule:
        """The pipeline schedule; without a pipeline the plain one."""
        return schedules.find(self.schedule if self.pp > 1 else "1f1b")

    @property
    def stages(self) -> int:
        """Stages a micro-batch passes."""
        return self.plan.stages(self.pp)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step through one pipeline."""
        return self.rows // (self.dp * self.micro_rows)

    def held(self, rank: int) -> tuple[int, ...]:
        """The stages whose weights a pipeline rank holds."""
        return (rank,) if self.plan.copies == 1 else (rank, self.stages - 1 - rank)

    @property
    def operations(self) -> int:
        """Forward passes of one stage that each rank does in a step."""
        return self.micro_batches * self.stages // self.pp

    def mesh(self) -> str:
        """As --mesh takes it."""
        return f"pp={self.pp},dp={self.dp},ep={self.ep},zero={self.zero}"


def parse_mesh(text: str, devices: int) -> dict[str, int]:
    """`pp=16,ep=64` -> fields of a Layout; dp is what is left of the devices. UserError for what makes no mesh."""
    found: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        known = ("pp", "dp", "fsdp", "ep", "tp", "zero")
        if name not in known:
            raise UserError("--mesh", text, f"no dimension {name!r}", did_you_mean(name, known))
        if not (equals and value.isdecimal()) or (int(value) == 0 and name != "zero") or name in found:
            raise UserError("--mesh", text, f"{part!r} is not one whole number above 0", "Write pp=16,ep=64.")
        found[name] = int(value)
    if found.pop("tp", 1) != 1:
        raise UserError(
            "--mesh", text, "tensor parallelism is not supported, V3 trains without it", "Use ep, pp and zero or fsdp."
        )
    if "fsdp" in found:
        if "dp" in found or "zero" in found:
            raise UserError("--mesh", text, "fsdp is dp with zero=3", "Give one of the two.")
        found |= {"dp": found.pop("fsdp"), "zero": 3}
    if found.get("zero", 1) not in (0, 1, 3):
        raise UserError("--mesh", text, f"zero={found['zero']} is not supported", "Use zero=0, 1 or 3.")
    pp = found.setdefault("pp", max(devices // found["dp"], 1) if "dp" in found else 1)
    found.setdefault("dp", max(devices // pp, 1))
    if pp * found["dp"] != devices:
        raise UserError(
            "--mesh", text, f"pp · dp = {pp} · {found['dp']} are not {devices} devices", "Change it, or --on."
        )
    return found


def check(c: ModelConfig, layout: Layout) -> None:
    """UserError unless the model, the batch and the schedule fit the mesh."""
    if layout.ep > 1 and (not c.n_routed_experts or c.n_routed_experts % layout.ep):
        raise UserError(
            "--mesh ep", layout.ep, f"does not divide {c.n_routed_experts} experts", "Use a divisor of them."
        )
    if layout.dp % layout.ep:
        raise UserError("--mesh ep", layout.ep, f"does not divide dp = {layout.dp}", "Use a divisor of it.")
    slots = c.num_hidden_layers + c.num_nextn_predict_layers
    if layout.stages > slots:
        raise UserError("--mesh pp", layout.pp, f"makes {layout.stages} stages of {slots} layers", "Use fewer stages.")
    if layout.rows % (layout.dp * layout.micro_rows):
        raise UserError(
            "--rows",
            layout.rows,
            f"does not divide among dp = {layout.dp} ranks of {layout.micro_rows} at a time",
            f"Use a multiple of {layout.dp * layout.micro_rows}.",
        )
    layout.plan.check(layout.pp, layout.micro_batches)


@dataclass(frozen=True)
class Part:
    """What one stage holds: its layers (MTP modules count on from the last), and whether it embeds and scores."""

    layers: tuple[int, ...]
    embeds: bool
    scores: bool


def parts(c: ModelConfig, stages: int) -> list[Part]:
    """Layers in order over stages, as even as can be; the ends, which embed and score, get the fewer."""
    slots = c.num_hidden_layers + c.num_nextn_predict_layers
    most = -(-slots // stages)
    sizes = [most] * stages
    for number in range(most * stages - slots):
        sizes[-1 - number // 2 if number % 2 == 0 else number // 2] -= 1
    found, start = [], 0
    for stage, size in enumerate(sizes):
        found.append(Part(tuple(range(start, start + size)), stage == 0, stage == stages - 1))
        start += size
    return found


def part_parameters(c: ModelConfig, part: Part, shared_ends: bool) -> tuple[int, int]:
    """Parameters of a stage: those every data-parallel rank holds, and those of routed experts, which ep shares out.

    Where MTP runs apart from the embedding it needs a copy of it; `shared_ends` says that both lie on one rank.
    """
    d, embedding = c.hidden_size, c.vocab_size * c.hidden_size
    moe = sum(c.is_moe(layer) for layer in part.layers)
    routed = moe * c.n_routed_experts * 3 * d * c.moe_intermediate_size
    one_of = {
        c.is_moe(layer): layer_parameters(c, layer, active=False)
        for layer in part.layers[:: max(len(part.layers) - 1, 1)]
    }
    plain = moe * one_of.get(True, 0) + (len(part.layers) - moe) * one_of.get(False, 0) - routed
    modules = sum(layer >= c.num_hidden_layers for layer in part.layers)
    plain += modules * (2 * d * d + 3 * d)
    if part.embeds:
        plain += embedding
    if part.scores:
        plain += d + (0 if c.tie_word_embeddings and shared_ends else embedding)
        if modules and not shared_ends:
            plain += embedding
    return plain, routed


def with_mesh(layout: Layout, mesh: dict[str, int]) -> Layout:
    """A layout with the fields of `parse_mesh`."""
    return dataclasses.replace(layout, **mesh)  # type: ignore[arg-type]
