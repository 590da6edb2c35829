"""Pre-training: next token and multi-token prediction, Muon + AdamW, balance without auxiliary loss.

The learning rate follows `phases`, V3's for one. Without them it warms up, stays, and decays once a probe is passed:
the run ends because the model can do something, not because a counter ran out. If the probe is never passed it ends
at `max_tokens` and says so.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from finback.config import UserError, check_fields, check_not_negative, check_positive, check_share
from finback.model.config import ModelConfig
from finback.model.recompute import Policy
from finback.parallel.layout import Layout
from finback.runs.declaration import Declaration
from finback.runs.folder import StageRun
from finback.runs.recipe import Stage, Work
from finback.stages.pretrain_setup import set_up
from finback.tasks.task import Task
from finback.train import loop, rates
from finback.train.precision import ExpertKernel
from finback.train.rates import Level, Phase


@dataclass(frozen=True)
class Probe:
    """What pre-training must reach: greedy accuracy on training-side problems with the chain opened for it."""

    # whose training-side problems are asked
    task: Task
    # share of right answers, 0 to 1, at which the decay begins
    at_least: float
    # how many are asked each time
    problems: int = 128
    # trained tokens from one probe to the next
    every_tokens: int = 200_000
    # per answer
    max_tokens: int = 96

    def __post_init__(self) -> None:
        check_fields(self, "probe")
        check_positive(self, "probe", "problems", "every_tokens", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class Pretrain(Stage):
    """Train a model from scratch, or go on with one, on the shards of a prepare stage."""

    # how a model lies on ranks says nothing of what it learns: it may change while the stage is half done
    free: ClassVar[frozenset[str]] = Stage.free | {"layout"}

    # a prepare stage, or the folder of one
    data: str
    # train from random weights, or
    model: ModelConfig | None = None
    # go on with this model; its tokenizer must be that of `data`
    start: str = ""
    # source name -> share of tokens
    mixture: dict[str, float]
    # ends the level part of the schedule when it is passed
    probe: Probe | None = None
    # of both learning rates; () for warm-up, level and a decay that the probe begins
    phases: tuple[Phase, ...] = ()
    # hard end, decay included; with phases they say where it ends
    max_tokens: int = 4_000_000
    # tokens over which the rates fall at the end
    decay_tokens: int = 500_000
    # tokens over which they rise at the start
    warmup_tokens: int = 80_000
    # rows per step over all ranks
    batch_size: int = 32
    # begin with so many and come to batch_size over ramp_tokens; 0: no ramp
    batch_size_start: int = 0
    # tokens over which the batch grows from batch_size_start
    ramp_tokens: int = 0
    # tokens per row
    seq_len: int = 128
    # windows of the stream, or whole documents that fit best (V3)
    packing: Literal["stream", "best_fit"] = "stream"
    # documents of a row do not see each other; V3 pre-trained without
    document_mask: bool = False
    # for hidden matrices; the rest is AdamW's with either
    optimizer: Literal["muon", "adamw"] = "muon"
    # highest rate of the hidden matrices under Muon
    muon_lr: float = 8e-3
    # highest rate of all that AdamW trains
    adam_lr: float = 8e-3
    # where the decay ends, as a share of the rates above
    final_lr: float = 0.05
    # of hidden matrices
    weight_decay: float = 0.05
    # clip the gradient to this norm
    max_grad_norm: float = 1.0
    # V3: ((0, 0.3), (10T, 0.1))
    mtp_weight: Level = 0.3
    # weight of the balance loss within a sequence (V3: 1e-4)
    balance_alpha: float = 1e-4
    # of the routers' biases; V3: ((0, 0.001), (14.3T, 0.0))
    bias_speed: Level = 0.003
    # decay of the running average of the weights, written to <stage>/average; 0: none
    ema_decay: float = 0.0
    # skip steps whose loss is so many standard deviations above the usual; 0: none
    spike_sigma: float = 8.0
    # so many skipped in a row: back to the last checkpoint, on with the data that follow
    spike_patience: int = 3
    # how a model too large for one rank lies on many; None: a whole copy on each
    layout: Layout | None = None
    # activations made again in the backward pass
    recompute: Policy = "none"
    # auto: bf16 where the processor multiplies it itself and hidden_size is 128 or more; fp8: DeepSeek's, on Hopper, and emulated elsewhere to see what it does
    compute: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    # products of the routed experts: one expert after another, or all in one call; auto: on a GPU what a timed pass says
    expert_kernel: ExpertKernel = "auto"
    # fuse what lies between products: quicker steps, after up to a minute at the first
    compile: bool = False
    # compress validation text after so many tokens each; 0: at the end only
    valid_tokens: int = 0
    # write the model of these times that compresses best to <stage>/best
    keep_best: bool = False
    # a line of router.jsonl after so many steps
    router_steps: int = 10
    # save after so many steps
    checkpoint_steps: int = 50
    # how many checkpoints stay, the newest
    keep: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers()
        if (self.model is None) == (not self.start):
            problem = "say what to train: `model` from random weights, or `start` to go on with one"
            raise UserError(f"{self.name}.model", self.start or self.model, problem, "Give one of the two.")
        if self.phases and self.probe:
            problem = "phases end where they end, a probe ends when it is passed"
            raise UserError(f"{self.name}.phases", len(self.phases), problem, "Give one of the two.")
        if self.batch_size_start and (self.batch_size_start > self.batch_size or not self.ramp_tokens):
            problem = f"a ramp leads up to batch_size ({self.batch_size}) over ramp_tokens ({self.ramp_tokens:,})"
            raise self.wrong("batch_size_start", problem, "Correct one of them.")
        if self.keep_best and not self.valid_tokens:
            raise self.wrong("keep_best", "nothing says which is best", "Set valid_tokens as well.")
        if self.expert_kernel == "grouped_mm" and self.compute == "fp8":
            problem = "is for experts in fp32 or bf16"
            raise self.wrong("expert_kernel", problem, "Use auto or loop.")
        if self.compile:
            self._check_compile()
        if self.layout is not None:
            self.layout.check_length(self.seq_len)

    def _check_numbers(self) -> None:
        counts = ("max_tokens", "batch_size", "seq_len", "checkpoint_steps", "keep", "router_steps", "spike_patience")
        check_positive(self, self.name, *counts, "muon_lr", "adam_lr", "max_grad_norm")
        names = ("decay_tokens", "warmup_tokens", "ramp_tokens", "batch_size_start", "valid_tokens")
        check_not_negative(self, self.name, *names, "weight_decay", "balance_alpha", "spike_sigma")
        check_share(self, self.name, "final_lr", "ema_decay")
        rates.check_levels(self, self.name, "mtp_weight", "bias_speed")

    def _check_compile(self) -> None:
        """UserError for the first knob that does not go with compiled blocks."""
        for name, wrong in (("compute", "fp8"), ("recompute", "attention")):
            if getattr(self, name) == wrong:
                raise self.wrong(name, "cannot be compiled", "Change it, or leave out compile.")

    @property
    def limit(self) -> int:
        """Tokens after which it ends at the latest."""
        return sum(phase.tokens for phase in self.phases) or self.max_tokens

    @property
    def batch_sizes(self) -> list[int]:
        """All numbers of rows that steps have."""
        return rates.ramp_sizes(self.batch_size_start, self.batch_size)

    def batch_size_at(self, tokens: int) -> int:
        """Rows of the step that follows after `tokens` tokens."""
        if not self.batch_size_start:
            return self.batch_size
        return rates.ramp(tokens, self.batch_size_start, self.batch_size, self.ramp_tokens)

    def adapted(self, config: ModelConfig) -> ModelConfig:
        """The config of `start` as it is gone on with."""
        return config

    @property
    def attends_densely(self) -> bool:
        """Whether a sparse model's tokens look at all earlier ones while it is trained."""
        return False

    def learns(self, name: str) -> bool:
        """Whether it teaches a parameter of this name."""
        return True

    def inputs(self) -> tuple[str, ...]:
        return (self.data, *super().inputs())

    def work(self) -> Work:
        return Work(tokens_trained=self.limit)

    def declaration(self) -> Declaration:
        probed = "probe_reached", "probe_best", "probe_passed_at_tokens"
        results = "tokens", "steps", "precision", *probed, "tokens_by_source", "router_last_100_steps", "bits_per_byte"
        return Declaration(
            "pre-training",
            objective="next token and multi-token prediction",
            ledger=("tokens_trained", "flops", "flops_training", "flops_recomputed", "flops_evaluation"),
            results=(*results, "skipped_steps", "rewinds"),
            curves={"loss": ("loss", "mtp_loss"), "router health: max violation": ("max_violation",)},
            length="max_tokens",
        )

    def describe(self, results: dict[str, Any]) -> str:
        reached, router = results["probe_reached"], results["router_last_100_steps"]
        if reached is None:
            end = "ended at its token limit (no probe asked for)"
        elif reached:
            end = f"passed its probe ({results['probe_best']:.0%}) at {results['probe_passed_at_tokens']:,} tokens"
        else:
            end = f"DID NOT PASS ITS PROBE (best {results['probe_best']:.0%}): expect little from what follows"
        bits = ", ".join(f"{source} {value:.2f}" for source, value in results["bits_per_byte"].items()) or "-"
        text = f"Pre-training {self.name!r} {end}; {results['tokens']:,} tokens; bits per byte of unseen text: {bits}."
        violation, idle = router["max_violation"], router["idle_experts"]
        worst = f"\nRouter, worst of the last 100 steps: max violation {violation:.2f}, {idle} experts without a token."
        return text + worst if violation else text  # a dense model has none

    def run(self, run: StageRun) -> dict[str, Any]:
        return loop.run(set_up(self, run))
