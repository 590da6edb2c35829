"""How a model lies on many ranks: what the planner computes with and prints, and what a stage's `layout` takes.

Does not import torch. `pp` ranks hold a stage of the pipeline each. The `dp` ranks that hold the same stage read rows of their
own, and `ep` of them share one set of experts, so that V3's 2,048 devices are pp=16, dp=128, ep=64. With `cp` each of them is
as many ranks, which read parts of the same rows: long ones. There is no tensor parallelism: V3 trains without it.
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
    """The mesh of ranks, what they share out, and the schedule of the pipeline."""

    # ranks of a pipeline
    pp: int = 1
    # data-parallel ranks that hold the same stage; each reads rows of its own
    dp: int = 1
    # ranks among which the tokens of each row are cut; so many in place of each data-parallel one
    cp: int = 1
    # those of dp x cp that share one set of experts; a divisor of that
    ep: int = 1
    # nodes on which the ep ranks lie: a token crosses to each of them once
    nodes: int = 1
    # the last one, V3's own, is for plans: it feeds both ends of a pipeline, which training does not
    schedule: ScheduleName = "1f1b"
    # equal parts into which a rank's rows are cut
    micro_batches: int = 1
    # what dp ranks share out: all (fsdp), the optimizer's state (zero1, as V3), nothing (ddp, for plans)
    sharding: Sharding = "fsdp"
    # dtype in which sharded weights travel; bf16 halves the traffic, and rounds
    gather: Literal["fp32", "bf16"] = "fp32"
    # whether sharded weights and gradients are stored in host memory, from which each pass fetches a block at a time (FSDP2)
    offload: bool = False

    def __post_init__(self) -> None:
        check_fields(self, "layout")
        check_positive(self, "layout", "pp", "dp", "cp", "ep", "nodes", "micro_batches")
        if self.ep % self.nodes:
            raise UserError("layout.nodes", self.nodes, f"does not divide ep = {self.ep}", "Use a divisor.")
        if self.gather == "bf16" and self.sharding != "fsdp":
            raise UserError("layout.gather", self.gather, "only sharded weights travel", 'Use sharding="fsdp".')
        if self.offload and self.sharding != "fsdp":
            problem = f'sharding="{self.sharding}" computes with the weights where they are stored'
            raise UserError("layout.offload", True, problem, 'Use sharding="fsdp", or leave it out.')

    @property
    def ranks(self) -> int:
        """Processes, one for each device."""
        return self.pp * self.holders

    @property
    def holders(self) -> int:
        """Ranks that hold the same stage, and share out its parameters."""
        return self.dp * self.cp

    @property
    def edp(self) -> int:
        """Those of them that hold the same experts."""
        return self.holders // self.ep

    @property
    def _held(self) -> str:
        """What their number is, in the knobs' names."""
        return "dp x cp" if self.cp > 1 else "dp"

    @property
    def pipeline(self) -> Schedule:
        """The schedule; without a pipeline the plain one."""
        return SCHEDULES[self.schedule if self.pp > 1 else "1f1b"]

    @property
    def stages(self) -> int:
        """Pieces into which the layers are cut."""
        return self.pipeline.stages(self.pp)

    def stages_of(self, pp_rank: int) -> tuple[int, ...]:
        """The stages of a pipeline rank."""
        return self.pipeline.stages_of(pp_rank, self.pp)

    def mesh(self) -> str:
        """The sizes as --mesh takes them."""
        zero = {"ddp": 0, "zero1": 1, "fsdp": 3}[self.sharding]
        context = f"cp={self.cp}," if self.cp > 1 else ""
        return f"pp={self.pp},dp={self.dp},{context}ep={self.ep},zero={zero}"

    def at(self, rows: int, most: int) -> "Layout":
        """The layout of a step of `rows` rows in a run whose fullest steps have `most`: with fewer micro-batches.

        They stay as large as those of a full step where they fill the pipeline; else there are as many, and smaller. Rows that
        are too few for either leave ranks idle, under the schedule that its own falls back on.
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
        """`check` for every number of rows that steps of a run have, up to `most`."""
        for rows in sizes:
            self.at(rows, most).check(c, rows, is_full=rows == most)

    def check(self, c: ModelConfig, rows: int, is_full: bool = True) -> None:
        """Raise UserError unless the model and the `rows` of one step fit; a full one has to fill the pipeline."""
        if rows % (self.dp * self.micro_batches):
            problem = f"does not divide among dp = {self.dp} ranks with {self.micro_batches} micro-batches each"
            raise UserError("rows", rows, problem, f"Use a multiple of {self.dp * self.micro_batches}.")
        if self.cp > 1 and (c.index_topk or c.attention == "compressed"):
            problem = "an indexer and compressed entries are of all heads and of whole rows, and ranks exchange heads for tokens"
            raise UserError("layout.cp", self.cp, problem, "Use 1.")
        if c.num_attention_heads % self.cp:
            problem = f"does not divide {c.num_attention_heads} heads, of which each rank attends with its share"
            raise UserError("layout.cp", self.cp, problem, "Use a divisor.")
        self._check_experts(c)
        if self.pp > 1:
            self._check_pipeline(c, is_full)

    def check_length(self, length: int) -> None:
        """Raise UserError unless rows of `length` tokens can be cut."""
        if length % self.cp:
            problem = f"does not divide rows of {length:,} tokens, of which each rank has its part"
            raise UserError("layout.cp", self.cp, problem, "Use a divisor, or other rows.")

    def check_trainable(self, c: ModelConfig, rows: int, ranks: int) -> None:
        """`check`, and raise UserError unless so many ranks are there and training can do all that is asked."""
        if self.ranks != ranks:
            problem = f"pp x {self._held} is {self.ranks}, but there are {ranks} ranks"
            raise UserError("layout.dp", self.dp, problem, "Start as many as the product says, or change it.")
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
        if experts and experts // self.ep % self.edp:  # then an expert's rows are cut, and cut evenly
            for name in ("moe_intermediate_size", "hidden_size"):
                if getattr(c, name) % self.edp:
                    problem = (
                        f"{self._held} / ep = {self.edp} divides neither {experts // self.ep} experts nor model.{name}"
                    )
                    raise UserError("layout.dp", self.dp, problem, "Use a divisor of one of them.")

    def _check_pipeline(self, c: ModelConfig, is_full: bool) -> None:
        # all MTP modules lie on the last stage
        most = c.num_hidden_layers + (c.num_nextn_predict_layers > 0)
        if self.stages > most:
            problem = f"{self.schedule} makes {self.stages} stages, and {most} can have a layer"
            raise UserError("layout.pp", self.pp, problem, "Lower it.")
        unfilled = self._unfilled() if is_full else self.pipeline.refusal(self.pp, self.micro_batches)
        if unfilled is not None:
            raise unfilled

    def _unfilled(self) -> UserError | None:
        """Why its micro-batches do not go through the pipeline, or do not fill it; None if they do."""
        refused = self.pipeline.refusal(self.pp, self.micro_batches)
        if refused is None and self.micro_batches < self.stages:
            problem = f"fewer than the {self.stages} stages that they are to fill"
            return UserError("layout.micro_batches", self.micro_batches, problem, "Raise it.")
        return refused


@dataclass(frozen=True)
class StageLayers:
    """What one pipeline stage holds: its layers (MTP modules count on from the last), and which ends of the model."""

    layers: tuple[int, ...]
    embeds: bool
    has_head: bool


def split_layers(c: ModelConfig, stages: int) -> list[StageLayers]:
    """Layers in order over stages, as even as can be; the ends, which embed and have the head, get the fewer.

    MTP modules count as layers and all lie on the last stage.
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
    """Where a member's part of `length` experts or rows begins and ends: equal parts rounded up, the last short or empty."""
    part = -(-length // members)
    return min(member * part, length), min((member + 1) * part, length)


def pack(weights: Sequence[float], bins: int, room: int) -> list[list[int]]:
    """Items into bins of at most `room`, the heaviest first, each into the lightest bin that is not full."""
    packed: list[list[int]] = [[] for _ in range(bins)]
    total = [0.0] * bins
    for item in sorted(range(len(weights)), key=lambda i: -weights[i]):
        lightest = min((b for b in range(bins) if len(packed[b]) < room), key=lambda b: total[b])
        packed[lightest].append(item)
        total[lightest] += weights[item]
    return packed
