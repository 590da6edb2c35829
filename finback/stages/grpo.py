"""Group relative policy optimization (DeepSeekMath 4.1, R1 2.2): R1-Zero when it starts from a base model.

Sampled: `num_generations` answers to each of `prompts_per_step` questions, by the engine, from the very weights that are trained.
Advantages: the distance of each answer's reward from its group's mean, the same for all its tokens.
Learnt: the clipped surrogate of train/grpo_loss.py, in one update or several per batch of answers.
Every answer of every step is written to samples.jsonl. The MTP module stays as it is: RL neither trains it nor lets its
loss touch the trunk. Router biases move only where `bias_speed` says so.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from finback.config import UserError, check_not_negative, check_positive, check_share
from finback.engine.request import SamplingParams
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


@dataclass(frozen=True, kw_only=True)
class GRPO(Stage):
    """Reinforcement learning with checkable rewards."""

    # a stage, a run, a Hugging Face folder or a .gguf file
    start: str
    # questions and the check of an answer
    task: Task
    # at most, with a validation set
    steps: int = 60
    # says when to stop and which model to keep
    validation: Validation | None = None
    # prompts whose answers are written down as they change
    watch: Watch | None = None
    # questions per step, over all ranks
    prompts_per_step: int = 32
    # answers per question
    num_generations: int = 8
    # what an answer is paid for
    reward: Reward = field(default_factory=Reward)
    # the loss: clipping, averaging, divergence from a reference model, corrections
    objective: Objective = field(default_factory=Objective)
    # level, and linearly down to final_lr times it over the last third of the steps or once the validation set stops it;
    # None: 3e-4, from 50 million parameters on 2e-6, ten times that for an adapter
    lr: float | None = None
    # steps over which lr rises to its value
    warmup: int = 0
    # where the rate ends, as a share of lr
    final_lr: float = 0.1
    # of the answers
    temperature: float = 1.0
    # only the k likeliest tokens, 0: all, and those that together reach this probability; the update counts probabilities among them
    top_k: int = 0
    # see top_k
    top_p: float = 1.0
    # per answer
    max_tokens: int = 96
    # open the chain for the model, as R1's own template does
    think: bool = False
    # clip the gradient to this norm
    max_grad_norm: float = 1.0
    # divide advantages by the group's std
    normalise: bool = True
    # optimizer steps per pass over a step's answers, each on an equal share of them, drawn at random (R1)
    updates: int = 1
    # passes over a step's answers
    epochs: int = 1
    # rounds of other questions in place of those whose answers all earned the same (DAPO)
    resample: int = 0
    # the last so many of max_tokens cost up to overlong_penalty, linearly (DAPO)
    overlong: int = 0
    # of DAPO's rewards -1 and 1 it is half the distance too
    overlong_penalty: float = 0.5
    # learn nothing from answers that were cut off, and leave them out of their group's mean and std
    mask_truncated: bool = False
    # refresh the reference model of objective.beta after so many steps; 0: never
    reference_steps: int = 0
    # have the update read each prompt once for all its answers: quicker where prompts are long
    share_prompts: bool = False
    # have the update send each token to the experts that the engine sent it to (R3, V3.2's "keep routing")
    routing_replay: bool = False
    # of the routers' biases; 0 leaves them as pre-training left them
    bias_speed: float = 0.0
    # where answers are generated: by the engine in each rank, or by servers
    rollouts: Here | Servers | Fleet = Here()
    # updates that a token's weights may be behind those that learn from it; 0: generating and learning take turns
    max_staleness: int = 0
    # what becomes of answers under way when there are new weights: they go on with them, or are begun again
    in_flight: Literal["continue", "drop"] = "continue"
    # control: hand each answer another answer's reward
    shuffle_rewards: bool = False
    # stop when trainer and engine disagree by more, in nats per token on average; None: 1e-2 in fp32, 0.2 in bf16
    max_gap: float | None = None
    # stop after so many steps in a row that taught nothing, with success if every answer was right; 0: never
    patience: int = 20
    # of trainer and engine alike; bf16 makes the gap a thousand times as large
    compute: Literal["fp32", "bf16"] = "fp32"
    # padded tokens per backward pass
    micro_tokens: int = 4096
    # learn an adapter on a frozen base instead of all weights; the reference model is then the base alone
    adapter: LoRA | None = None
    # how a model too large for one rank lies on many, which generate with whole copies of it; None: a whole copy on each
    layout: Layout | None = None
    # what the backward pass makes again instead of keeping it; None: blocks where an adapter is learnt, else nothing
    recompute: Policy | None = None
    # AdamW's: on the device in fp32, or in 8 bits each; "host": in the host's memory, and on the device as they are used
    moments: Moments = "fp32"
    # save after so many steps
    checkpoint_steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = "steps", "prompts_per_step", "num_generations", "max_tokens", "checkpoint_steps", "updates", "epochs"
        check_positive(self, self.name, *counts, "micro_tokens", "max_grad_norm", "max_gap")
        # lr = 0 only watches: the gap between trainer and engine must then stay flat
        others = "lr", "top_k", "warmup", "resample", "reference_steps", "bias_speed", "overlong_penalty", "patience"
        check_not_negative(self, self.name, *others, "max_staleness")
        check_share(self, self.name, "final_lr")
        if self.num_generations < 2:
            raise self.wrong("num_generations", "an answer is judged against its group", "Use 2 or more.")
        if self.temperature <= 0:
            raise self.wrong("temperature", "greedy answers do not differ within a group", "Use 1.0.")
        if self.adapter is not None and self.bias_speed:
            raise self.wrong("bias_speed", "moves biases of a base that an adapter leaves as it is", "Use 0.")
        check_layout(self)
        if self.layout is not None and self.layout.micro_batches > 1:
            problem = "answers are cut by micro_tokens"
            raise UserError(f"{self.name}.layout.micro_batches", self.layout.micro_batches, problem, "Use 1.")
        self.rollouts.check_ahead(f"{self.name}.rollouts", self.max_staleness)
        if not 0 < self.top_p <= 1:
            raise self.wrong("top_p", "not above 0 and up to 1", "Use 1 for all tokens.")
        if self.prompts_per_step % self.updates:
            raise self.wrong("updates", f"does not divide {self.prompts_per_step} prompts", "Use a divisor.")
        if not 0 <= self.overlong <= self.max_tokens:
            raise self.wrong("overlong", f"not in 0..max_tokens ({self.max_tokens})", "Lower it.")
        accuracy, extra = self.reward.accuracy, self.reward.extra
        if self.overlong and self.overlong_penalty + extra >= accuracy > 0:
            problem = f"with what a wrong answer can earn ({extra:g}) no less than accuracy ({accuracy:g})"
            raise self.wrong(
                "overlong_penalty", f"{problem}: a right answer could earn less than a wrong one", "Lower it."
            )

    @property
    def sampling(self) -> SamplingParams:
        """How answers are drawn; what top-k and top-p leave is noted, for the update counts probabilities among it."""
        narrowed = self.top_k > 0 or self.top_p < 1
        return SamplingParams(self.temperature, self.max_tokens, self.top_k, self.top_p, return_sampling_mask=narrowed)

    @property
    def recomputes(self) -> Policy | None:
        """The policy, None where nothing is made again."""
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
