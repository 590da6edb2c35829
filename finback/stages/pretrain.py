"""Pre-training: next-token and multi-token prediction, Muon + AdamW, auxiliary-loss-free load balancing.

The learning rate follows `phases`, such as V3's. Without phases it warms up, stays constant, and decays once a probe is
passed: training ends because the model can do something, not at a fixed count. If the probe is never passed, training
ends at `max_tokens` and reports it.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from finback.config import UserError, check_fields, check_not_negative, check_positive, check_share
from finback.model.config import ModelConfig
from finback.model.dsa_training import Attention
from finback.model.fp4 import Qat
from finback.model.recompute import Policy
from finback.parallel.layout import Layout
from finback.runs.declaration import Declaration
from finback.runs.folder import StageRun
from finback.runs.recipe import Stage, Work
from finback.stages.compile_check import check_knobs
from finback.stages.pretrain_setup import set_up
from finback.tasks.task import Task
from finback.train import loop, rates
from finback.train.optim import MuonForm
from finback.train.precision import ExpertKernel, Weights, check_qat, check_weights
from finback.train.rates import Level, Phase, Steps


@dataclass(frozen=True)
class Probe:
    """A goal for pre-training: greedy accuracy on training-side problems, with the chain opened for the model."""

    # the task whose training-side problems are asked
    task: Task
    # accuracy, 0 to 1, at which the decay begins
    at_least: float
    # problems per probe
    problems: int = 128
    # tokens trained from one probe to the next
    every_tokens: int = 200_000
    # longest answer, in tokens
    max_tokens: int = 96

    def __post_init__(self) -> None:
        check_fields(self, "probe")
        check_positive(self, "probe", "problems", "every_tokens", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class Pretrain(Stage):
    """Trains a model from scratch, or continues one, on the shards of a prepare stage."""

    # the layout does not change what the model learns, so it may change when the stage resumes
    free: ClassVar[frozenset[str]] = Stage.free | {"layout"}

    # a prepare stage, or the folder of one
    data: str
    # train this model from random weights, or
    model: ModelConfig | None = None
    # continue this model; its tokenizer must be that of `data`
    start: str = ""
    # source name -> share of tokens
    mixture: dict[str, float]
    # when passed, ends the constant part of the schedule
    probe: Probe | None = None
    # phases of both learning rates; (): warm-up, constant, and a decay that the probe starts
    phases: tuple[Phase, ...] = ()
    # hard limit in tokens, decay included; phases set their own end
    max_tokens: int = 4_000_000
    # tokens over which the learning rates decay
    decay_tokens: int = 500_000
    # tokens over which the learning rates warm up
    warmup_tokens: int = 80_000
    # rows per step over all ranks; ((first token, rows), ...): a schedule, such as fewer rows where they are longer
    batch_size: Steps = 32
    # initial batch size, which grows to batch_size over ramp_tokens; 0: constant
    batch_size_start: int = 0
    # tokens over which the batch grows from batch_size_start
    ramp_tokens: int = 0
    # tokens per row; ((first token, length), ...): rows that grow (V4: 4K, 16K, 64K, 1M)
    seq_len: Steps = 128
    # attention of a model with indexers is dense in rows shorter than this, and its indexers do not learn (V4: 64K)
    sparse_from: int = 0
    # when attention becomes sparse, tokens over which indexers first learn from dense attention
    indexer_tokens: int = 0
    # stream: windows of the token stream; best_fit: whole documents, packed by best fit (V3)
    packing: Literal["stream", "best_fit"] = "stream"
    # mask attention between documents of a row; V3 pre-trained without
    document_mask: bool = False
    # optimizer of the hidden matrices; AdamW trains the rest in either case
    optimizer: Literal["muon", "adamw"] = "muon"
    # Muon's orthogonalization: Jordan's five steps, or V4's ten, after which singular values are 1
    muon_form: MuonForm = "jordan"
    # peak learning rate of Muon's matrices
    muon_lr: float = 8e-3
    # peak learning rate of AdamW's parameters
    adam_lr: float = 8e-3
    # learning rate at the end of the decay, as a share of the peak
    final_lr: float = 0.05
    # weight decay of hidden matrices
    weight_decay: float = 0.05
    # clip the gradient to this norm
    max_grad_norm: float = 1.0
    # weight of the multi-token prediction loss; V3: ((0, 0.3), (10T, 0.1))
    mtp_weight: Level = 0.3
    # weight of the balance loss within a sequence (V3: 1e-4)
    balance_alpha: float = 1e-4
    # update speed of the routers' biases; V3: ((0, 0.001), (14.3T, 0.0))
    bias_speed: Level = 0.003
    # decay of the exponential moving average of the weights, written to <stage>/average; 0: none
    ema_decay: float = 0.0
    # skip steps whose loss is this many standard deviations above normal; 0: never
    spike_sigma: float = 8.0
    # after this many skipped steps in a row, return to the last checkpoint and continue with the data that follow
    spike_patience: int = 3
    # after such a return, the number of steps with V4's anticipatory routing: experts chosen by older weights; 0: none
    anticipatory_steps: int = 0
    # how many updates older these weights are; V4's number is not published
    anticipatory_delay: int = 4
    # how a model too large for one rank is sharded; None: a full copy on each rank
    layout: Layout | None = None
    # activation recomputation in the backward pass
    recompute: Policy = "none"
    # auto: bf16 if the processor multiplies in it natively and hidden_size is at least 128; fp8: DeepSeek's, on Hopper, emulated elsewhere for study
    compute: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    # dtype of hidden matrices; bf16: no fp32 masters, updates are rounded stochastically; needs compute="bf16" and no layout
    weights: Weights = "fp32"
    # quantization-aware training: routed experts, and the queries and keys of V4's indexers, are rounded to FP4 in every pass
    qat: Qat = "none"
    # routed experts: one after another ("loop") or in one grouped call; auto: on a GPU, whichever is faster in a timed pass
    expert_kernel: ExpertKernel = "auto"
    # fuse elementwise operations with torch.compile: faster steps, but the first may take a minute longer
    compile: bool = False
    # measure compression of validation text every this many tokens; 0: only at the end
    valid_tokens: int = 0
    # write the model with the best compression to <stage>/best
    keep_best: bool = False
    # steps from one line of router.jsonl to the next
    router_steps: int = 10
    # steps from one checkpoint to the next
    checkpoint_steps: int = 50
    # number of checkpoints to keep, newest first
    keep: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_numbers()
        if (self.model is None) == (not self.start):
            problem = "say what to train: `model` from random weights, or `start` to continue a trained one"
            raise UserError(f"{self.name}.model", self.start or self.model, problem, "Give one of the two.")
        if self.phases and self.probe:
            problem = "phases and a probe would both set the end of training"
            raise UserError(f"{self.name}.phases", len(self.phases), problem, "Give one of the two.")
        if self.batch_size_start and isinstance(self.batch_size, tuple):
            raise self.wrong("batch_size_start", "batch_size is a schedule already", "Give one of the two.")
        if self.batch_size_start and (self.batch_size_start > self.most_rows or not self.ramp_tokens):
            problem = f"must be below batch_size ({self.batch_size}), with ramp_tokens ({self.ramp_tokens:,}) above 0"
            raise self.wrong("batch_size_start", problem, "Correct one of them.")
        self._check_lengths()
        if self.keep_best and not self.valid_tokens:
            raise self.wrong("keep_best", "without validation there is no best model", "Set valid_tokens as well.")
        if self.expert_kernel == "grouped_mm" and self.compute == "fp8":
            problem = "needs experts in fp32 or bf16"
            raise self.wrong("expert_kernel", problem, "Use auto or loop.")
        check_knobs(self, {"compute": "fp8", "recompute": "attention"})
        if self.anticipatory_steps and (self.layout is not None or self.compile):
            problem = "needs a full copy on each rank and routers that are not compiled"
            raise self.wrong("anticipatory_steps", problem, "Leave out layout and compile, or use 0.")
        if self.layout is not None:
            for _, length in rates.pairs_of(self.seq_len):
                self.layout.check_length(length)
            if self.layout.offload:
                problem = "is supported in fine-tuning and RL only: Muon would orthogonalize on the host"
                raise UserError(f"{self.name}.layout.offload", True, problem, "Leave it out, or use more ranks.")
        check_qat(self.name, self.qat, self.layout)
        check_weights(self)

    def _check_numbers(self) -> None:
        counts = ("max_tokens", "checkpoint_steps", "keep", "router_steps", "spike_patience")
        check_positive(self, self.name, *counts, "anticipatory_delay", "muon_lr", "adam_lr", "max_grad_norm")
        names = (
            "decay_tokens",
            "warmup_tokens",
            "ramp_tokens",
            "batch_size_start",
            "valid_tokens",
            "anticipatory_steps",
            "sparse_from",
            "indexer_tokens",
        )
        check_not_negative(self, self.name, *names, "weight_decay", "balance_alpha", "spike_sigma")
        check_share(self, self.name, "final_lr", "ema_decay")
        rates.check_levels(self, self.name, "mtp_weight", "bias_speed")
        rates.check_steps(self, self.name, "batch_size", "seq_len")

    def _check_lengths(self) -> None:
        lengths = [length for _, length in rates.pairs_of(self.seq_len)]
        if lengths != sorted(set(lengths)):
            raise self.wrong(
                "seq_len", "rows must grow: a length that returns would read its rows again", "Order them."
            )
        if self.sparse_from > self.longest:
            problem = f"rows have at most {self.longest} tokens, so attention would never be sparse"
            raise self.wrong("sparse_from", problem, "Lower it, or lengthen the rows.")

    @property
    def limit(self) -> int:
        """Upper bound of the tokens trained."""
        return sum(phase.tokens for phase in self.phases) or self.max_tokens

    @property
    def batch_sizes(self) -> list[int]:
        """All batch sizes that steps may have, in rows."""
        if isinstance(self.batch_size, tuple):
            return sorted({rows for _, rows in self.batch_size})
        return rates.ramp_sizes(self.batch_size_start, self.batch_size)

    @property
    def most_rows(self) -> int:
        """The largest batch size."""
        return max(rows for _, rows in rates.pairs_of(self.batch_size))

    @property
    def longest(self) -> int:
        """The length of the longest rows."""
        return max(length for _, length in rates.pairs_of(self.seq_len))

    def batch_size_at(self, tokens: int) -> int:
        """Batch size, in rows, of the step that follows after `tokens` tokens."""
        if not self.batch_size_start:
            return rates.level(self.batch_size, tokens)
        return rates.ramp(tokens, self.batch_size_start, self.most_rows, self.ramp_tokens)

    @property
    def most_tokens(self) -> int:
        """Tokens of the largest step, padding included."""
        starts = {start for value in (self.batch_size, self.seq_len) for start, _ in rates.pairs_of(value)}
        return max(rates.level(self.batch_size, start) * self.seq_len_at(start) for start in starts)

    def seq_len_at(self, tokens: int) -> int:
        """Tokens per row of the step that follows after `tokens` tokens."""
        return rates.level(self.seq_len, tokens)

    def attention_at(self, tokens: int) -> Attention:
        """How that step attends, in a model with indexers."""
        if self.seq_len_at(tokens) < self.sparse_from:
            return "dense"
        begin = next(start for start, length in rates.pairs_of(self.seq_len) if length >= self.sparse_from)
        return "warm-up" if tokens < begin + self.indexer_tokens else "sparse"

    def adapted(self, config: ModelConfig) -> ModelConfig:
        """The config of `start` as training continues it."""
        return config

    def learns(self, name: str) -> bool:
        """Whether this stage trains the parameter of this name."""
        return True

    def inputs(self) -> tuple[str, ...]:
        return (self.data, *super().inputs())

    def work(self) -> Work:
        return Work(tokens_trained=self.limit)

    def declaration(self) -> Declaration:
        probed = "probe_reached", "probe_best", "probe_passed_at_tokens"
        results = "tokens", "steps", "precision", *probed, "tokens_by_source", "router_last_100_steps", "bits_per_byte"
        spent: tuple[str, ...] = ("tokens_trained", "flops", "flops_training", "flops_recomputed", "flops_evaluation")
        spent += ("flops_auxiliary",) if self.anticipatory_steps else ()
        return Declaration(
            "pre-training",
            objective="next token and multi-token prediction",
            ledger=spent,
            results=(*results, "skipped_steps", "rewinds"),
            curves={"loss": ("loss", "mtp_loss"), "router health: max violation": ("max_violation",)},
            length="max_tokens",
        )

    def describe(self, results: dict[str, Any]) -> str:
        reached, router = results["probe_reached"], results["router_last_100_steps"]
        if reached is None:
            end = "ended at its token limit (no probe was set)"
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
