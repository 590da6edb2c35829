"""Group-relative policy optimisation (DeepSeekMath 4.1, R1 2.2): R1-Zero when it starts from a base model.

Sampled: `group` answers to each of `prompts` questions, by the engine, from the very weights that are trained.
Credited: each answer with its reward's distance from its group's mean, every token of it alike.
Departures from the paper: one update per batch, so the clip seldom acts; no reference model and no KL term (R1's RL
has a small one; here the policy starts random enough); the loss is averaged over tokens, not over answers (DAPO).
"""

import random
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from finback.checkpoint import model as models
from finback.checkpoint import store
from finback.config import UserError, check_positive
from finback.data.tokenizer import Tokenizer
from finback.engine.engine import Engine
from finback.engine.sequence import Sampling
from finback.kernels.probe import gemm_peak
from finback.model.count import forward_flops, training_flops
from finback.model.moe import max_violation
from finback.parallel.mesh import World
from finback.recipe import Stage, Work
from finback.run import Interrupted, Progress, StageRun, spent
from finback.stages.rollout import Batch, Rollout, batches, rollout
from finback.tasks import task as tasks
from finback.tasks.rewards import Reward
from finback.tasks.task import Task
from finback.train import schedule
from finback.train.loss import token_logprobs
from finback.train.optim import Adam, Gradients


def advantages(rewards: Tensor, normalise: bool = True) -> Tensor:
    """A_i = (r_i - mean r) / std r within each group (DeepSeekMath 4.1.2); rewards (groups, group) -> same shape.

    A group whose rewards are all equal says nothing and gets 0. Without `normalise` only the mean is taken off
    (Dr. GRPO). std is the population's.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if not normalise:
        return centred
    std = rewards.std(dim=1, keepdim=True, correction=0)
    return torch.where(std > 1e-6, centred / std.clamp(min=1e-6), torch.zeros_like(centred))


def policy_loss(
    new: Tensor, old: Tensor, advantage: Tensor, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate, summed over tokens (R1 eq. 1): -min(ρ A, clip(ρ, 1±ε) A) with ρ = exp(new - old).

    new, old, mask (rows, tokens), advantage (rows,). Returns the sum and how many tokens the clip acted on; the
    caller divides by the number of tokens in the whole batch.
    """
    ratio = (new - old).exp()
    weight = advantage[:, None]
    plain, clipped = ratio * weight, ratio.clamp(1 - clip, 1 + clip) * weight
    loss = -torch.minimum(plain, clipped)
    return (loss * mask).sum(), ((clipped < plain) & (mask > 0)).sum()


@dataclass(frozen=True, kw_only=True)
class GRPO(Stage):
    """Reinforcement learning with checkable rewards."""

    start: str
    task: Task
    steps: int = 60
    prompts: int = 32  # questions per step, over all ranks
    group: int = 8  # answers per question
    reward: Reward = field(default_factory=Reward)
    lr: float = 3e-4  # for two thirds of the steps, then linearly down to final_lr times it
    final_lr: float = 0.1
    temperature: float = 1.0
    max_tokens: int = 96  # per answer
    clip: float = 0.2
    grad_clip: float = 1.0
    normalise: bool = True  # divide advantages by the group's std
    shuffle_rewards: bool = False  # control: hand each answer another answer's reward
    max_gap: float = 1e-2  # stop when trainer and engine disagree by more, in nats per token on average
    micro_tokens: int = 4096  # padded tokens per backward pass
    checkpoint_steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, self.name, "prompts", "group", "max_tokens", "checkpoint_steps")

    def inputs(self) -> tuple[str, ...]:
        return (self.start,)

    def work(self) -> Work:
        tokens = self.steps * self.prompts * self.group * self.max_tokens
        return Work(tokens_trained=tokens, tokens_generated=tokens)

    def run(self, run: StageRun) -> dict[str, Any]:
        return _Reinforcement(self, run).run()


class _Reinforcement:
    """The state of one RL run between its steps."""

    def __init__(self, stage: GRPO, run: StageRun) -> None:
        self.stage, self.stage_run = stage, run
        assert isinstance(run.ranks, World), "RL exchanges gradients over a World"
        self.world = run.ranks
        if stage.prompts % self.world.size:
            raise UserError(
                f"{stage.name}.prompts",
                stage.prompts,
                f"does not divide among {self.world.size} ranks",
                "Use --ranks.",
            )
        self.folder = run.input(stage.start)
        self.tokenizer = Tokenizer(self.folder)
        self.model = models.load(self.folder)
        # The MTP module is kept as it is: RL does not touch it, nor does its loss touch the trunk.
        self.named = [(n, p) for n, p in self.model.named_parameters() if not n.startswith("mtp.")]
        self.gradients = Gradients([p for _, p in self.named])
        self.adam = Adam(self.named, betas=(0.9, 0.95), weight_decay=0.0)
        self.engine = Engine(self.model, self.tokenizer.stops)
        self.sampling = Sampling(stage.temperature, stage.max_tokens)
        self.step = 0
        self.totals = {"tokens_trained": 0, "tokens_generated": 0}
        self.accounted, self.mark = dict(self.totals), time.perf_counter()

    def run(self) -> dict[str, Any]:
        stage, run = self.stage, self.stage_run
        self._resume()
        self.peak = gemm_peak(torch.float32, torch.device("cpu"))
        progress = Progress(run, stage.steps, "steps", spent(run.folder)["seconds"])
        while self.step < stage.steps:
            begin = time.perf_counter()
            metrics = self._train_step()
            run.log(self.step, **metrics, seconds=time.perf_counter() - begin)
            progress.show(
                self.step,
                f"accuracy {metrics['accuracy']:.0%}  thinks {metrics['thinks']:.0%}  {metrics['length']:.0f} tokens",
            )
            self._check_gap(metrics)
            stop = run.check_stop()
            if stop or self.step % stage.checkpoint_steps == 0 or self.step == stage.steps:
                self._checkpoint()
            if stop:
                raise Interrupted
        if run.is_writer:
            models.save(run.folder, self.model)
            self.tokenizer.save(run.folder)
            store.clear(run.folder)
        return {"steps": self.step, **self.totals}

    def _train_step(self) -> dict[str, float]:
        stage, world = self.stage, self.world
        self.step += 1
        rollouts, rewards = self._sample()
        credit = self._credit(rewards)
        begin = time.perf_counter()
        parts = batches(rollouts, credit, stage.micro_tokens)
        count = world.sum_(torch.tensor(float(sum(b.mask.sum().item() for b in parts)))).item()
        self.gradients.zero()
        self.model.train()
        seen = torch.zeros(6)  # loss, clipped, entropy, |gap|, signed gap, tokens
        worst = 0.0
        for batch in parts:
            sums, gap = self._backward(batch, max(count, 1.0))
            seen += sums
            worst = max(worst, gap)
        norm = self.gradients.finish(world, 1.0, stage.grad_clip)
        if count and norm > 0:
            third = stage.steps // 3
            self.adam.step(stage.lr * schedule.decay(self.step, stage.steps - third, third, stage.final_lr))
        loads = [world.sum_(r.load.clone()) for r in self.model.routers()]
        for router in self.model.routers():
            router.load.zero_()  # the bias stays as pre-training left it
        totals = world.sum_(seen)
        worst = max(world.gather(worst))
        loss, clipped, entropy, gap, _, tokens = (totals / max(count, 1.0)).tolist()
        assert count == 0 or abs(tokens - 1) < 1e-3, "every counted token was trained on"
        metrics = self._describe(rollouts, rewards)
        return metrics | {
            "loss": loss, "clip_share": clipped, "entropy": entropy, "gap_mean": gap, "gap_max": worst,
            "grad_norm": norm, "tokens_with_gradient": count,
            "max_violation": max((max_violation(load) for load in loads), default=0.0),
            "update_seconds": time.perf_counter() - begin,
        }  # fmt: skip

    def _sample(self) -> tuple[list[Rollout], Tensor]:
        """This rank's questions of the step, answered `group` times; rewards (questions, group)."""
        stage, world = self.stage, self.world
        rng = random.Random(self.stage_run.seed("questions", self.step))
        problems = [tasks.draw(stage.task, "train", rng) for _ in range(stage.prompts)]
        mine = range(world.rank, stage.prompts, world.size)
        asked = [problems[i] for i in mine for _ in range(stage.group)]
        seeds = [self.stage_run.seed("answer", self.step, i, k) for i in mine for k in range(stage.group)]
        rollouts = rollout(self.engine, self.tokenizer, stage.task, asked, seeds, self.sampling)
        rewards = torch.tensor([stage.reward(r.verdict) for r in rollouts]).view(-1, stage.group)
        return rollouts, rewards

    def _credit(self, rewards: Tensor) -> Tensor:
        """Advantages (answers,); the control hands rewards around at random first."""
        if self.stage.shuffle_rewards:
            generator = torch.Generator().manual_seed(
                self.stage_run.seed("shuffle", self.step, self.world.rank)
            )
            order = torch.randperm(rewards.numel(), generator=generator)
            rewards = rewards.flatten()[order].view_as(rewards)
        return advantages(rewards, self.stage.normalise).flatten()

    def _backward(self, batch: Batch, count: float) -> tuple[Tensor, float]:
        stage = self.stage
        hidden = self.model(batch.tokens[:, :-1], real=batch.real[:, :-1])
        wanted = batch.mask > 0
        logp, entropy = token_logprobs(
            hidden[wanted], self.model.head.weight, batch.tokens[:, 1:][wanted], stage.temperature
        )
        new = torch.zeros_like(batch.old).masked_scatter(wanted, logp)
        loss, clipped = policy_loss(new, batch.old, batch.advantage, batch.mask, stage.clip)
        (loss / count).backward()
        gap = logp.detach() - batch.old[wanted]
        sums = [loss.detach(), clipped, entropy.sum(), gap.abs().sum(), gap.sum(), wanted.sum()]
        return torch.stack([s.float() for s in sums]), float(gap.abs().max())

    def _describe(self, rollouts: list[Rollout], rewards: Tensor) -> dict[str, float]:
        """Means over all ranks' answers of this step."""
        generated = sum(len(r.completion.tokens) for r in rollouts)
        trained = sum(len(r.prompt) + len(r.completion.tokens) for r in rollouts)
        varied = float((rewards.std(dim=1, correction=0) > 1e-6).sum())
        mine = torch.tensor(
            [
                rewards.sum().item(), sum(r.verdict.correct for r in rollouts),
                sum(r.verdict.well_formed for r in rollouts), sum(r.response.thinks for r in rollouts), generated,
                sum(r.completion.finish == "length" for r in rollouts), varied, trained,
            ],
            dtype=torch.float64,
        )  # fmt: skip
        reward, right, formed, thinks, length, cut, groups, trained_all = self.world.sum_(mine).tolist()
        n = self.stage.prompts * self.stage.group
        self.totals["tokens_generated"] += int(length)
        self.totals["tokens_trained"] += int(trained_all * groups / self.stage.prompts)
        return {
            "reward": reward / n, "accuracy": right / n, "well_formed": formed / n, "thinks": thinks / n,
            "length": length / n, "truncated": cut / n, "groups_with_gradient": groups / self.stage.prompts,
        }  # fmt: skip

    def _check_gap(self, metrics: dict[str, float]) -> None:
        if metrics["gap_mean"] > self.stage.max_gap:
            raise UserError(
                f"{self.stage.name}.max_gap", self.stage.max_gap,
                f"trainer and engine differ by {metrics['gap_mean']:.2g} nats per token at step {self.step}",
                "They must be the same model: report this with the run folder, or raise max_gap knowingly.",
            )  # fmt: skip

    def _checkpoint(self) -> None:
        done = self.totals
        before = self.accounted
        generated = done["tokens_generated"] - before["tokens_generated"]
        trained = done["tokens_trained"] - before["tokens_trained"]
        self.accounted = dict(done)
        if self.stage_run.is_writer:
            tensors = models.tensors_of(self.model) | self.adam.state()
            store.save_step(self.stage_run.folder, self.step, tensors, {"totals": done})
        c, context = self.model.config, self.stage.max_tokens / 4
        flops = generated * forward_flops(c, context) + trained * training_flops(c, context, mtp=False)
        now = time.perf_counter()
        peak, self.mark = (now - self.mark) * self.peak * self.world.size, now
        self.stage_run.account(
            tokens_trained=trained, tokens_generated=generated, flops=flops, peak_flops=peak
        )

    def _resume(self) -> None:
        found = store.load_newest(self.stage_run.folder)
        if found is not None:
            self.step, tensors, meta = found
            models.restore(self.model, tensors)
            self.adam.load_state(tensors)
            self.totals = {k: int(v) for k, v in meta["totals"].items()}
            self.stage_run.say(f"{self.stage.name:10} resumed at step {self.step}")
        self.accounted = dict(self.totals)
        self.stage_run.rewind(self.step + 1)
