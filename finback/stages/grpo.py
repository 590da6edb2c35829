"""Group relative policy optimization (DeepSeekMath 4.1, R1 2.2). Started from a base model it is R1-Zero.

Sampling: the engine generates `num_generations` answers to each of `prompts_per_step` questions with the current weights.
Advantages: each answer's reward minus the mean of its group, the same for all its tokens.
Loss: the clipped surrogate of train/grpo_loss.py, in one or several updates per batch of answers.
Every answer of every step is written to samples.jsonl. The MTP module is frozen: RL does not train it, and its loss
does not reach the trunk. Router biases move only if `bias_speed` is not 0.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from finback.config import UserError, check_not_negative, check_positive, check_share
from finback.engine.request import SamplingParams
from finback.model.fp4 import Qat
from finback.model.lora import LoRA
from finback.model.recompute import Policy, policy_of
from finback.parallel.layout import Layout
from finback.rollouts import rl_health
from finback.rollouts.fleet import Fleet
from finback.rollouts.here import Here
from finback.rollouts.servers import Servers
from finback.runs.declaration import Declaration
from finback.runs.folder import StageRun
from finback.runs.recipe import Stage, Work
from finback.stages import validation
from finback.stages.grpo_training import Reinforcement
from finback.stages.tuning_setup import check_layout
from finback.stages.validation import Validation
from finback.stages.watching import Watch, declared
from finback.tasks.rewards import Reward
from finback.tasks.task import Task
from finback.train import loop
from finback.train.grpo_loss import Objective
from finback.train.lean_adam import Moments
from finback.train.precision import Weights


@dataclass(frozen=True, kw_only=True)
class GRPO(Stage):
    """Reinforcement learning with checkable rewards."""

    # a stage, a run, a Hugging Face folder or a .gguf file
    start: str
    # supplies the questions and checks the answers
    task: Task
    # number of steps; with a validation set, at most
    steps: int = 60
    # decides when to stop and which model to keep
    validation: Validation | None = None
    # prompts that are answered every few steps, to see the model change
    watch: Watch | None = None
    # questions per step, over all ranks
    prompts_per_step: int = 32
    # answers per question
    num_generations: int = 8
    # how an answer is rewarded
    reward: Reward = field(default_factory=Reward)
    # the loss: clipping, averaging, KL to a reference model, corrections
    objective: Objective = field(default_factory=Objective)
    # learning rate: constant, then linear to final_lr times it, over the last third of the steps or once validation stops improving;
    # None: 3e-4, or 2e-6 from 50 million parameters on; ten times as high for an adapter
    lr: float | None = None
    # steps of linear warm-up
    warmup: int = 0
    # final learning rate, as a share of lr
    final_lr: float = 0.1
    # sampling temperature of the answers
    temperature: float = 1.0
    # sample only from the k likeliest tokens (0: all); the update renormalizes over the same tokens
    top_k: int = 0
    # sample only from the likeliest tokens that together reach this probability; see top_k
    top_p: float = 1.0
    # longest answer, in tokens
    max_tokens: int = 96
    # start each answer inside the chain of thought, as R1's template does
    think: bool = False
    # clip the gradient to this norm
    max_grad_norm: float = 1.0
    # divide advantages by the standard deviation of the group's rewards
    normalise: bool = True
    # optimizer steps per pass over a step's answers, each on an equal, random share of them (R1)
    updates: int = 1
    # passes over a step's answers
    epochs: int = 1
    # rounds in which questions whose answers all got the same reward are replaced by others (DAPO)
    resample: int = 0
    # the penalty for length rises linearly over this many tokens before max_tokens (DAPO)
    overlong: int = 0
    # largest penalty for length; DAPO's is also half the distance between its rewards, -1 and 1
    overlong_penalty: float = 0.5
    # exclude answers that were cut off, from the loss and from their group's mean and standard deviation
    mask_truncated: bool = False
    # replace the reference model of objective.beta by the policy every this many steps; 0: never
    reference_steps: int = 0
    # compute each prompt once for all its answers in the update: faster if prompts are long
    share_prompts: bool = False
    # route each token in the update to the experts that the engine chose (R3, V3.2's "keep routing")
    routing_replay: bool = False
    # attend in the update to the entries that the engine's indexers selected (DSA, V4's CSA); needs rollouts=Here()
    indexer_replay: bool = False
    # update speed of the routers' biases; 0: they stay as they are
    bias_speed: float = 0.0
    # where answers are generated: by an engine in each rank, or by servers
    rollouts: Here | Servers | Fleet = Here()
    # how many updates old the weights that generated a token may be; 0: generation and learning alternate
    max_staleness: int = 0
    # answers in progress when the weights change: "continue" with the new weights, or "drop" and restart
    in_flight: Literal["continue", "drop"] = "continue"
    # control experiment: give each answer the reward of another
    shuffle_rewards: bool = False
    # stop if the log-probabilities of trainer and engine differ by more on average (nats per token); None: 1e-2 in fp32, 0.2 in bf16
    max_gap: float | None = None
    # stop after this many steps in a row without a gradient, successfully if every answer was right; 0: never
    patience: int = 20
    # precision of trainer and engine; in bf16 the gap between them is about a thousand times as large
    compute: Literal["fp32", "bf16"] = "fp32"
    # dtype of hidden matrices; bf16: no fp32 masters, updates are rounded stochastically; needs compute="bf16" and no layout
    weights: Weights = "fp32"
    # quantization-aware training: routed experts, and the queries and keys of V4's indexers, are rounded to FP4 in every pass
    qat: Qat = "none"
    # padded tokens per backward pass
    micro_tokens: int = 4096
    # train an adapter on a frozen base instead of all weights; the reference model is then the base, with `start`'s adapter if it has one
    adapter: LoRA | None = None
    # how a model too large for one rank is sharded; each rank then generates with a full copy; None: a full copy on each rank
    layout: Layout | None = None
    # activation recomputation in the backward pass; None: "blocks" with an adapter, else "none"
    recompute: Policy | None = None
    # fuse elementwise operations with torch.compile: faster steps, but the first may take a minute longer; not for adapters
    compile: bool = False
    # AdamW's moments: on the device in fp32 or 8 bits, or "host": in the host's memory, moved to the device when used
    moments: Moments = "fp32"
    # steps from one checkpoint to the next
    checkpoint_steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = "steps", "prompts_per_step", "num_generations", "max_tokens", "checkpoint_steps", "updates", "epochs"
        check_positive(self, self.name, *counts, "micro_tokens", "max_grad_norm", "max_gap")
        # with lr = 0 nothing is learned: the gap between trainer and engine must then stay constant
        others = "lr", "top_k", "warmup", "resample", "reference_steps", "bias_speed", "overlong_penalty", "patience"
        check_not_negative(self, self.name, *others, "max_staleness")
        check_share(self, self.name, "final_lr")
        if self.num_generations < 2:
            raise self.wrong("num_generations", "an answer is compared with the others of its group", "Use 2 or more.")
        if self.temperature <= 0:
            raise self.wrong("temperature", "greedy answers do not differ within a group", "Use 1.0.")
        if self.adapter is not None and self.bias_speed:
            raise self.wrong("bias_speed", "would move biases of the base, which an adapter leaves frozen", "Use 0.")
        check_layout(self)
        if self.layout is not None and self.layout.micro_batches > 1:
            problem = "answers are split by micro_tokens"
            raise UserError(f"{self.name}.layout.micro_batches", self.layout.micro_batches, problem, "Use 1.")
        if self.indexer_replay and not isinstance(self.rollouts, Here):
            problem = "only the engine in the training process reports what its indexers select"
            raise self.wrong("indexer_replay", problem, "Use rollouts=Here(), or leave it out.")
        self.rollouts.check_ahead(f"{self.name}.rollouts", self.max_staleness)
        if not 0 < self.top_p <= 1:
            raise self.wrong("top_p", "not above 0 and up to 1", "Use 1 for all tokens.")
        if self.prompts_per_step % self.updates:
            raise self.wrong("updates", f"does not divide {self.prompts_per_step} prompts", "Use a divisor.")
        if not 0 <= self.overlong <= self.max_tokens:
            raise self.wrong("overlong", f"not in 0..max_tokens ({self.max_tokens})", "Lower it.")
        accuracy, extra = self.reward.accuracy, self.reward.extra
        if self.overlong and self.overlong_penalty + extra >= accuracy > 0:
            problem = (
                f"together with the other rewards ({extra:g}) it is not below the reward for accuracy ({accuracy:g})"
            )
            raise self.wrong(
                "overlong_penalty", f"{problem}: a right answer could earn less than a wrong one", "Lower it."
            )

    @property
    def sampling(self) -> SamplingParams:
        """How answers are sampled. Tokens left by top-k and top-p are recorded: the update renormalizes over them."""
        narrowed = self.top_k > 0 or self.top_p < 1
        return SamplingParams(self.temperature, self.max_tokens, self.top_k, self.top_p, return_sampling_mask=narrowed)

    @property
    def recomputes(self) -> Policy | None:
        """The recomputation policy, None if nothing is recomputed."""
        policy = policy_of(self.recompute, self.adapter is not None)
        return None if policy == "none" else policy

    def work(self) -> Work:
        tokens = self.steps * self.prompts_per_step * self.num_generations * self.max_tokens
        validated = self.validation.generates(self.steps) if self.validation is not None else 0
        watched = self.watch.generates(self.steps, self.max_tokens) if self.watch is not None else 0
        generated = tokens * (1 + self.resample) + validated + watched
        return Work(tokens_trained=tokens * self.epochs, tokens_generated=generated)

    def declaration(self) -> Declaration:
        spent: tuple[str, ...] = ("tokens_trained", "tokens_generated", "flops", "flops_training", "flops_generation")
        spent += ("flops_auxiliary", *(("flops_recomputed",) if self.recomputes else ()))
        given = Declaration(
            "reinforcement learning",
            objective="rewards that are checked by programs",
            ledger=spent,
            results=(
                *("steps", "lr", "too_long", "contaminated", "tokens_trained", "tokens_generated"),
                *(("ahead",) if self.max_staleness else ()),
            ),
            curves={
                "share of answers": ("accuracy", "thinks", "well_formed", "truncated"),
                "reward": ("reward",),
                "tokens per answer": ("length",),
                "entropy (nats per token)": ("entropy",),
                "trainer against engine (nats per token)": ("gap_mean", "mismatch_kl"),
                **({"age of tokens (updates)": ("staleness", "staleness_max")} if self.max_staleness else {}),
                **({"idle share": ("trainer_idle", "engines_idle")} if self.max_staleness else {}),
                "router health: max violation": ("max_violation",),
            },
        )
        return declared(self.watch, validation.declared(self.validation, given))

    def describe(self, results: dict[str, Any]) -> str:
        engines = self.rollouts.n if isinstance(self.rollouts, Fleet) else 0
        return rl_health.overlap_text(self.name, results["ahead"], engines) if results.get("ahead") else ""

    def run(self, run: StageRun) -> dict[str, Any]:
        training = Reinforcement(self, run)
        try:
            return loop.run(training)
        finally:
            training.close()
