"""The layout of a model on many ranks, for the planner and for the `layout` knob of stages.

Does not import torch. `pp` ranks each hold a stage of the pipeline. The `dp` ranks that hold the same stage read different
rows, and `ep` of them share one set of experts; V3's 2,048 devices are pp=16, dp=128, ep=64. With `cp`, each data-parallel
rank becomes `cp` ranks that read parts of the same, long rows. There is no tensor parallelism, since V3 trains without it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from finback.config import UserError, check_fields, check_positive
from finback.model.config import ModelConfig
from finback.parallel.schedules import SCHEDULES, Schedule, ScheduleName

Sharding = Literal["fsdp", "zero1", "ddp"]


@dataclass(frozen=True)
class Layout:
    """The mesh of ranks, the sharding of parameters, and the pipeline's schedule."""

    # pipeline-parallel ranks
    pp: int = 1
    # data-parallel ranks that hold the same stage; each reads different rows
    dp: int = 1
    # context-parallel ranks, among which the tokens of each row are split; multiplies dp
    cp: int = 1
    # expert-parallel ranks, which share one set of experts; a divisor of dp x cp
    ep: int = 1
    # nodes that the ep ranks are on: a token is sent to each of them once
    nodes: int = 1
    # dualpipe, V3's own, is for plans only: it feeds both ends of a pipeline, which training does not
    schedule: ScheduleName = "1f1b"
    # equal parts into which a rank's rows are split
    micro_batches: int = 1
    # what dp ranks shard: everything (fsdp), the optimizer's state (zero1, as V3), nothing (ddp, for plans only)
    sharding: Sharding = "fsdp"
    # dtype in which sharded weights are gathered; bf16 halves the traffic but rounds
    gather: Literal["fp32", "bf16"] = "fp32"
    # with zero1: dtype in which gradients are summed over ranks; bf16 halves the traffic but rounds
    reduce: Literal["fp32", "bf16"] = "fp32"
    # with zero1: MiB of fp32 gradients that are summed at a time, while the last backward pass of a step runs; 0: all after it
    bucket_mb: float = 0.0
    # whether sharded weights and gradients are stored in host memory, from which each pass fetches a block at a time (FSDP2)
    offload: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "layout")
        check_positive(self, "layout", "pp", "dp", "cp", "ep", "nodes", "micro_batches")
        if self.ep % self.nodes:
            raise UserError("layout.nodes", self.nodes, f"does not divide ep = {self.ep}", "Use a divisor of ep.")
        if self.gather == "bf16" and self.sharding != "fsdp":
            raise UserError("layout.gather", self.gather, "only sharded weights are gathered", 'Use sharding="fsdp".')
        if self.bucket_mb < 0:
            raise UserError("layout.bucket_mb", self.bucket_mb, "is negative", "Use 25, or 0 for none.")
        if self.bucket_mb and self.pp > 1:
            problem = "a pipeline's gradients are complete only after its passes"
            raise UserError("layout.bucket_mb", self.bucket_mb, problem, "Leave it out.")
        for name, value, usual in (("reduce", self.reduce, "fp32"), ("bucket_mb", self.bucket_mb, 0)):
            if value != usual and self.sharding != "zero1":
                problem = "applies to gradients that are whole on every rank"
                raise UserError(f"layout.{name}", value, problem, 'Use sharding="zero1", or leave it out.')
        if self.offload and self.sharding != "fsdp":
            problem = f'sharding="{self.sharding}" computes with the weights where they are stored'
            raise UserError("layout.offload", True, problem, 'Use sharding="fsdp", or leave it out.')

    @property
    def ranks(self) -> int:
        """The number of processes, one per device."""
        return self.pp * self.holders

    @property
    def holders(self) -> int:
        """The number of ranks that hold the same stage, over which its parameters are sharded."""
        return self.dp * self.cp

    @property
    def is_whole(self) -> bool:
        """Whether each rank holds the whole model and computes with it alone, so that it can also generate with it."""
        return self.sharding != "fsdp" and self.pp == self.cp == self.ep == 1

    @property
    def edp(self) -> int:
        """The number of ranks that hold the same experts."""
        return self.holders // self.ep

    @property
    def _held(self) -> str:
        """The formula of `holders` in the knobs' names, for messages."""
        return "dp x cp" if self.cp > 1 else "dp"

    @property
    def pipeline(self) -> Schedule:
        """The schedule; 1F1B without a pipeline."""
        return SCHEDULES[self.schedule if self.pp > 1 else "1f1b"]

    @property
    def stages(self) -> int:
        """The number of stages into which the layers are split."""
        return self.pipeline.stages(self.pp)

    def stages_of(self, pp_rank: int) -> tuple[int, ...]:
        """The stages of a pipeline rank."""
        return self.pipeline.stages_of(pp_rank, self.pp)

    def mesh(self) -> str:
        """The sizes in the form that --mesh takes."""
        zero = {"ddp": 0, "zero1": 1, "fsdp": 3}[self.sharding]
        context = f"cp={self.cp}," if self.cp > 1 else ""
        return f"pp={self.pp},dp={self.dp},{context}ep={self.ep},zero={zero}"

    def sharded(self) -> "Layout":
        """The same mesh with everything sharded."""
        return self if self.sharding == "fsdp" else replace(self, sharding="fsdp", reduce="fp32", bucket_mb=0.0)

    def at(self, rows: int, most: int) -> "Layout":
        """The layout of a step of `rows` rows in a run whose full steps have `most`: it may have fewer micro-batches.

        Micro-batches stay as large as in a full step if they fill the pipeline; otherwise there are as many, but smaller. If
        rows are too few for either, ranks idle, under the schedule that this one falls back on (`Schedule.small`).
        """
        fewer, rest = divmod(self.micro_batches * rows, most)
        if rest or not fewer:
            return self
        small = replace(self, micro_batches=fewer)
        if self.pp == 1 or small._unfilled() is None:
            return small
        falls_back = replace(small, schedule=self.pipeline.small)
        if rows % (self.dp * self.micro_batches) == 0 or falls_back.pipeline.refusal(self.pp, fewer) is not None:
            return self
        return falls_back

    def check_steps(self, c: ModelConfig, sizes: Iterable[int], most: int) -> None:
        """Runs `check` for each number of rows that a run's steps have; full steps have `most`."""
        for rows in sizes:
            self.at(rows, most).check(c, rows, is_full=rows == most)

    def check(self, c: ModelConfig, rows: int, is_full: bool = True) -> None:
        """Raises UserError unless the model and a step's `rows` fit the layout; a full step must fill the pipeline."""
        if rows % (self.dp * self.micro_batches):
            problem = f"does not divide among dp = {self.dp} ranks with {self.micro_batches} micro-batches each"
            raise UserError("rows", rows, problem, f"Use a multiple of {self.dp * self.micro_batches}.")
        if c.num_attention_heads % self.cp:
            problem = f"does not divide the {c.num_attention_heads} heads; each rank gets an equal share"
            raise UserError("layout.cp", self.cp, problem, "Use a divisor.")
        self._check_experts(c)
        if self.pp > 1:
            self._check_pipeline(c, is_full)

    def check_length(self, length: int) -> None:
        """Raises UserError unless rows of `length` tokens can be split over cp ranks."""
        if length % self.cp:
            problem = f"does not divide rows of {length:,} tokens; each rank gets an equal part"
            raise UserError("layout.cp", self.cp, problem, "Use a divisor, or change the length of rows.")

    def check_trainable(self, c: ModelConfig, rows: int, ranks: int) -> None:
        """Runs `check`, and raises UserError unless there are `ranks` ranks and the knobs can be trained, not only planned."""
        if self.ranks != ranks:
            problem = f"pp x {self._held} is {self.ranks}, but there are {ranks} ranks"
            raise UserError("layout.dp", self.dp, problem, "Start that many ranks, or change the layout.")
        for name, value, instead in (("schedule", "dualpipe", "dualpipev"), ("sharding", "ddp", "zero1")):
            if getattr(self, name) == value:
                raise UserError(f"layout.{name}", value, "can be planned, not trained", f'Use "{instead}".')
        self.check(c, rows)

    def _check_experts(self, c: ModelConfig) -> None:
        experts = c.n_routed_experts
        if self.ep > 1 and (experts == 0 or experts % self.ep):
            raise UserError("layout.ep", self.ep, f"does not divide {experts} experts", "Use a divisor.")
        if self.holders % self.ep:
            problem = f"does not divide {self._held} = {self.holders}"
            raise UserError("layout.ep", self.ep, problem, "Use a divisor of it.")
        if experts and experts // self.ep % self.edp:  # then the rows of each expert are sharded, which must be even
            for name in ("moe_intermediate_size", "hidden_size"):
                if getattr(c, name) % self.edp:
                    problem = (
                        f"{self._held} / ep = {self.edp} divides neither {experts // self.ep} experts nor model.{name}"
                    )
                    raise UserError("layout.dp", self.dp, problem, "Use a divisor of one of them.")

    def _check_pipeline(self, c: ModelConfig, is_full: bool) -> None:
        if c.shared_indexers:
            problem = "stages do not pass on what an indexer selects for layers that share it"
            raise UserError("layout.pp", self.pp, problem, "Use 1.")
        # all MTP modules are on the last stage
        most = c.num_hidden_layers + (c.num_nextn_predict_layers > 0)
        if self.stages > most:
            problem = f"{self.schedule} has {self.stages} stages, but there are layers for only {most}"
            raise UserError("layout.pp", self.pp, problem, "Lower it.")
        unfilled = self._unfilled() if is_full else self.pipeline.refusal(self.pp, self.micro_batches)
        if unfilled is not None:
            raise unfilled

    def _unfilled(self) -> UserError | None:
        """The error if the schedule cannot run the micro-batches or they do not fill the pipeline; otherwise None."""
        refused = self.pipeline.refusal(self.pp, self.micro_batches)
        if refused is None and self.micro_batches < self.stages:
            problem = f"fewer than the {self.stages} stages of the pipeline"
            return UserError("layout.micro_batches", self.micro_batches, problem, "Raise it.")
        return refused


@dataclass(frozen=True)
class StageLayers:
    """A pipeline stage's layers, with MTP modules numbered after the last layer, and which ends of the model it has."""

    layers: tuple[int, ...]
    embeds: bool
    has_head: bool


def split_layers(c: ModelConfig, stages: int) -> list[StageLayers]:
    """Distributes layers over stages in order and as evenly as possible; first and last, with embedding and head, get fewer.

    MTP modules count as layers and are all on the last stage.
    """
    depths = c.num_nextn_predict_layers
    sizes = _even(c.num_hidden_layers + depths, stages)
    if sizes[-1] < depths:
        sizes = [*_even(c.num_hidden_layers, stages - 1), depths]
    starts = [sum(sizes[:stage]) for stage in range(stages)]
    return [
        StageLayers(tuple(range(start, start + size)), stage == 0, stage == stages - 1)
        for stage, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]


def _even(layers: int, stages: int) -> list[int]:
    most = -(-layers // stages)
    sizes = [most] * stages
    for number in range(most * stages - layers):
        sizes[-1 - number // 2 if number % 2 == 0 else number // 2] -= 1
    return sizes


def share(length: int, members: int, member: int) -> tuple[int, int]:
    """Start and end of a member's part of `length` experts or rows: parts of ⌈length / members⌉, the last shorter or empty."""
    part = -(-length // members)
    return min(member * part, length), min((member + 1) * part, length)


def pack(weights: Sequence[float], bins: int, room: int) -> list[list[int]]:
    """Assigns items to bins of at most `room` items: heaviest first, each to the lightest bin that is not full."""
    packed: list[list[int]] = [[] for _ in range(bins)]
    total = [0.0] * bins
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        lightest = min((b for b in range(bins) if len(packed[b]) < room), key=lambda b: total[b])
        packed[lightest].append(item)
        total[lightest] += weights[item]
    return packed
