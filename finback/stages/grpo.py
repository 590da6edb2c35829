"""Group-relative policy optimisation (DeepSeekMath 4.1, R1 2.2): R1-Zero when it starts from a base model.

Sampled: `group` answers to each of `prompts` questions, by the engine, from the very weights that are trained.
Credited: each answer with its reward's distance from its group's mean, every token of it alike.
Learnt: the clipped surrogate of train/grpo_loss.py, in one update or several per batch of answers.
Every answer of every step is kept in samples.jsonl. The MTP module stays as it is: RL neither trains it nor lets its
loss touch the trunk. Router biases move only where `bias_speed` says so.
"""

import copy
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from finback.checkpoint import models, store
from finback.config import UserError, check_not_negative, check_positive, check_share
from finback.data.tokenizer import Tokenizer
from finback.engine.engine import Engine
from finback.engine.request import SamplingParams
from finback.kernels.probe import gemm_peak
from finback.model.count import forward_flops, training_flops
from finback.model.moe import Router
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.runs.declaration import Declaration
from finback.runs.folder import Interrupted, StageRun
from finback.runs.ledger import spent
from finback.runs.progress import Progress
from finback.runs.recipe import Stage, Work
from finback.stages.rollout import Batch, Group, Rollout, batches, record, rollout
from finback.tasks import task as tasks
from finback.tasks.rewards import Reward
from finback.tasks.task import Problem, Task
from finback.train import grpo_loss, rates, router_health
from finback.train.grpo_loss import Objective
from finback.train.loss import token_logprobs
from finback.train.optim import Adam, Gradients
from finback.train.precision import COMPUTE


@dataclass(frozen=True, kw_only=True)
class GRPO(Stage):
    """Reinforcement learning with checkable rewards."""

    start: str
    task: Task
    steps: int = 60
    prompts: int = 32  # questions per step, over all ranks
    group: int = 8  # answers per question
    reward: Reward = field(default_factory=Reward)
    objective: Objective = field(default_factory=Objective)
    lr: float = 3e-4  # for two thirds of the steps, then linearly down to final_lr times it
    warmup: int = 0  # steps over which lr rises to its value
    final_lr: float = 0.1
    temperature: float = 1.0
    max_tokens: int = 96  # per answer
    think: bool = False  # open the chain for the model, as R1's own template does
    grad_clip: float = 1.0
    normalise: bool = True  # divide advantages by the group's std
    updates: int = 1  # optimiser steps per pass over a step's answers, each on its share of the questions
    epochs: int = 1  # passes over a step's answers
    resample: int = 0  # rounds of other questions in place of those whose answers all earned the same (DAPO)
    overlong: int = 0  # the last so many of max_tokens cost up to overlong_penalty, linearly (DAPO)
    overlong_penalty: float = 0.5  # of DAPO's rewards -1 and 1 it is half the distance too
    mask_truncated: bool = False  # learn nothing from answers that were cut off
    reference_steps: int = 0  # refresh the reference model of objective.kl after so many steps; 0: never
    bias_speed: float = 0.0  # of the routers' biases; 0 leaves them as pre-training left them
    shuffle_rewards: bool = False  # control: hand each answer another answer's reward
    max_gap: float = 1e-2  # stop when trainer and engine disagree by more, in nats per token on average
    compute: Literal["fp32", "bf16"] = "fp32"  # of trainer and engine alike; bf16 widens the gap a thousandfold
    micro_tokens: int = 4096  # padded tokens per backward pass
    checkpoint_steps: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = ("steps", "prompts", "group", "max_tokens", "checkpoint_steps", "updates", "epochs", "micro_tokens")
        check_positive(self, self.name, *counts, "grad_clip", "max_gap")
        # lr = 0 only watches: the gap between trainer and engine must then stay flat
        check_not_negative(
            self, self.name, "lr", "warmup", "resample", "reference_steps", "bias_speed", "overlong_penalty"
        )
        check_share(self, self.name, "final_lr")
        if self.group < 2:
            raise UserError(f"{self.name}.group", self.group, "an answer is judged against its group", "Use 2 or more.")
        if self.temperature <= 0:
            raise UserError(
                f"{self.name}.temperature", self.temperature, "greedy answers do not differ within a group", "Use 1.0."
            )
        if self.prompts % self.updates:
            raise UserError(
                f"{self.name}.updates", self.updates, f"does not divide {self.prompts} prompts", "Use a divisor."
            )
        if not 0 <= self.overlong <= self.max_tokens:
            raise UserError(
                f"{self.name}.overlong", self.overlong, f"not in 0..max_tokens ({self.max_tokens})", "Lower it."
            )
        if self.overlong and self.overlong_penalty + self.reward.extra >= self.reward.accuracy > 0:
            raise UserError(
                f"{self.name}.overlong_penalty",
                self.overlong_penalty,
                f"with what a wrong answer can earn ({self.reward.extra:g}) no less than accuracy ({self.reward.accuracy:g}): "
                "a right answer could earn less than a wrong one",
                "Lower it.",
            )

    def inputs(self) -> tuple[str, ...]:
        return (self.start,)

    def work(self) -> Work:
        tokens = self.steps * self.prompts * self.group * self.max_tokens
        return Work(tokens_trained=tokens * self.epochs, tokens_generated=tokens * (1 + self.resample))

    def declaration(self) -> Declaration:
        spent = ("tokens_trained", "tokens_generated", "flops", "flops_training", "flops_generation", "flops_auxiliary")
        return Declaration(
            "reinforcement learning",
            objective="rewards that are checked by programs",
            ledger=spent,
            results=("steps", "tokens_trained", "tokens_generated"),
            curves={
                "share of answers": ("accuracy", "thinks", "well_formed", "truncated"),
                "reward": ("reward",),
                "tokens per answer": ("length",),
                "entropy (nats per token)": ("entropy",),
                "trainer against engine (nats per token)": ("gap_mean",),
                "router health: max violation": ("max_violation",),
            },
        )

    def run(self, run: StageRun) -> dict[str, Any]:
        return _Reinforcement(self, run).run()


class _Reinforcement:
    """The state of one RL run between its steps."""

    def __init__(self, stage: GRPO, run: StageRun) -> None:
        self.stage, self.stage_run = stage, run
        assert isinstance(run.ranks, World), "RL exchanges gradients over a World"
        self.world = run.ranks
        share = stage.prompts // stage.updates
        if share % self.world.size:
            raise UserError(
                f"{stage.name}.prompts",
                stage.prompts,
                f"{share} questions per update do not divide among {self.world.size} ranks",
                "Use --ranks.",
            )
        self.folder = run.input(stage.start)
        self.tokenizer = Tokenizer(self.folder)
        self.model = models.load(self.folder, COMPUTE[stage.compute]).to(self.world.device)
        self.named = [(n, p) for n, p in self.model.named_parameters() if not n.startswith("mtp.")]
        self.gradients = Gradients([p for _, p in self.named])
        self.adam = Adam(self.named, betas=(0.9, 0.95), weight_decay=0.0)
        self.engine = Engine(self.model, self.tokenizer.stops)
        self.sampling = SamplingParams(stage.temperature, stage.max_tokens)
        self.reference = copy.deepcopy(self.model).eval() if stage.objective.kl else None
        self.step = 0
        self.totals = {"tokens_trained": 0, "tokens_generated": 0}
        self.accounted, self.mark = dict(self.totals), time.perf_counter()
        self.read = 0  # tokens of questions since the last line of the ledger, once for each answer

    def run(self) -> dict[str, Any]:
        stage, run = self.stage, self.stage_run
        self._resume()
        self.peak = gemm_peak(COMPUTE[stage.compute], self.world.device)
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
        return {"steps": self.step, **self.totals}

    def _train_step(self) -> dict[str, Any]:
        stage, world = self.stage, self.world
        self.step += 1
        asked, kept = self._sample()
        self._credit(kept)
        begin = time.perf_counter()
        work = [self._batches(share) for share in self._shares(kept)]
        seen, worst, norm = torch.zeros(7, dtype=torch.float64), 0.0, 0.0
        self.model.train()
        for epoch in range(stage.epochs):
            for number, (parts, answers) in enumerate(work):
                # later the weights are not those any more that the engine spoke with
                sums, gap, norm = self._update(parts, answers, fresh=epoch == number == 0)
                seen, worst = seen + sums, max(worst, gap)
        # the trunk's alone: MTP's module stays as it is
        routers = [m for m in self.model.blocks.modules() if isinstance(m, Router)]
        counted = router_health.balance(routers, world, stage.bias_speed)
        if self.reference is not None and stage.reference_steps and self.step % stage.reference_steps == 0:
            self.reference.load_state_dict(self.model.state_dict())
        loss, clipped, entropy, kl, tokens, gap, compared = world.sum_(seen).tolist()
        tokens, compared, updates = max(tokens, 1.0), max(compared, 1.0), stage.epochs * stage.updates
        metrics = self._describe(asked, kept, sum(int(b.real.sum()) for parts, _ in work for b in parts))
        self._keep_samples(asked)
        return metrics | {
            "loss": loss / updates,
            "clip_share": clipped / tokens,
            "entropy": entropy / tokens,
            "kl": kl / tokens,
            "gap_mean": gap / compared,
            "gap_max": max(world.gather(worst)),
            "grad_norm": norm,
            "lr": self._rate(),
            "tokens_with_gradient": float(seen[4]),
            "max_violation": counted.violation,
            "expert_load": counted.shares,
            "update_seconds": time.perf_counter() - begin,
        }

    # ---- asking ----------------------------------------------------------------------------------------------------

    def _sample(self) -> tuple[list[Group], list[Group]]:
        """This rank's groups of the step: all that were asked, and those that are learnt from, in order."""
        stage, world = self.stage, self.world
        rng = random.Random(self.stage_run.seed("questions", self.step))
        problems = [tasks.draw(stage.task, "train", rng) for _ in range(stage.prompts)]
        mine = range(world.rank, stage.prompts, world.size)
        kept = self._ask([problems[i] for i in mine], [("answer", self.step, i) for i in mine])
        asked = list(kept)
        for turn in range(stage.resample):
            idle = [place for place, group in enumerate(kept) if not group.differs]
            seeds = [("again", self.step, turn, mine[place]) for place in idle]
            rngs = [random.Random(self.stage_run.seed("question", *seed)) for seed in seeds]
            others = self._ask([tasks.draw(stage.task, "train", rng) for rng in rngs], seeds)
            for place, group in zip(idle, others, strict=True):
                kept[place] = group
            asked += others
        return asked, kept

    def _ask(self, problems: list[Problem], seeds: Sequence[tuple[object, ...]]) -> list[Group]:
        """Answer each problem `group` times; answer k of a problem uses random numbers of (its seed, k)."""
        stage = self.stage
        count = range(stage.group)
        rollouts = rollout(
            self.engine,
            self.tokenizer,
            stage.task,
            [p for p in problems for _ in count],
            [self.stage_run.seed(*seed, k) for seed in seeds for k in count],
            self.sampling,
            stage.think,
        )
        answers = [rollouts[start : start + stage.group] for start in range(0, len(rollouts), stage.group)]
        return [Group(group, self._earned(group)) for group in answers]

    def _earned(self, group: list[Rollout]) -> list[dict[str, float]]:
        """What each answer to one question earns, by part."""
        stage, reward = self.stage, self.stage.reward
        lengths = [len(r.completion.tokens) for r in group]
        earned = [
            reward.parts(r.verdict, r.response.reasoning, r.response.thinks, n, stage.max_tokens)
            for r, n in zip(group, lengths, strict=True)
        ]
        empty = [r.response.thinks and not r.response.reasoning for r in group]
        good = [i for i, r in enumerate(group) if r.verdict.well_formed and not empty[i]]
        if reward.judge is not None and good:
            said = [group[i].response.answer for i in good]
            # one alone has nothing to be compared with
            scores = reward.judge.prefer(group[0].problem.question, said) if len(good) > 1 else [0.5]
            for i, score in zip(good, scores, strict=True):
                earned[i]["preference"] = reward.preference * score
        if stage.overlong:
            for parts, n in zip(earned, lengths, strict=True):
                over = max(0, n - (stage.max_tokens - stage.overlong))
                parts["overlong"] = -stage.overlong_penalty * over / stage.overlong
        return earned

    def _credit(self, kept: list[Group]) -> None:
        """Give answers their advantages; the control hands rewards around at random first."""
        rewards = torch.tensor([group.rewards for group in kept])
        if self.stage.shuffle_rewards:
            seed = self.stage_run.seed("shuffle", self.step, self.world.rank)
            order = torch.randperm(rewards.numel(), generator=torch.Generator().manual_seed(seed))
            rewards = rewards.flatten()[order].view_as(rewards)
        for group, credit in zip(kept, grpo_loss.advantages(rewards, self.stage.normalise), strict=True):
            group.credit = credit.tolist()

    # ---- learning --------------------------------------------------------------------------------------------------

    def _shares(self, kept: list[Group]) -> list[list[Group]]:
        """This rank's groups, one list for each of the step's updates."""
        each = len(kept) // self.stage.updates
        return [kept[start : start + each] for start in range(0, len(kept), each)]

    def _batches(self, share: list[Group]) -> tuple[list[Batch], int]:
        """The batches of one update, with what they need of other models, and how many answers they stand for."""
        stage = self.stage
        pairs = [pair for g in share for pair in zip(g.rollouts, g.credit, strict=True)]
        if stage.mask_truncated:
            pairs = [(r, a) for r, a in pairs if r.completion.finish_reason != "length"]
        rollouts, credit = [r for r, _ in pairs], [a for _, a in pairs]
        made = batches(rollouts, credit, stage.micro_tokens, all_rows=stage.objective.kl > 0)
        parts = [batch.to(self.world.device) for batch in made]
        self.model.eval()  # what is only looked at does not count as load
        with torch.no_grad():
            for batch in parts:
                if stage.objective.truncate is not None:
                    batch.anchor = self._logprobs(self.model, batch)[0]
                if self.reference is not None:
                    batch.reference = self._logprobs(self.reference, batch)[0]
        self.model.train()
        return parts, len(pairs)

    def _logprobs(self, model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities (rows, length - 1) of the answers' tokens, 0 elsewhere, and their entropies (tokens,)."""
        hidden = model(batch.tokens[:, :-1], padding_mask=batch.real[:, :-1])
        wanted = batch.mask > 0
        logp, entropy = token_logprobs(
            hidden[wanted], model.head.weight, batch.tokens[:, 1:][wanted], self.stage.temperature
        )
        return torch.zeros_like(batch.old).masked_scatter(wanted, logp), entropy

    def _update(self, parts: list[Batch], answers: int, fresh: bool) -> tuple[Tensor, float, float]:
        """One optimiser step; sums over this rank's tokens, its largest gap, and the gradient's norm."""
        stage, world = self.stage, self.world
        mine = torch.tensor([sum(float(b.mask.sum()) for b in parts), float(answers)], dtype=torch.float64)
        tokens, all_answers = world.sum_(mine).tolist()
        whole = grpo_loss.share(stage.objective.average, tokens, all_answers, stage.max_tokens)
        self.gradients.zero()
        seen, worst = torch.zeros(7, dtype=torch.float64), 0.0
        for batch in parts:
            sums, gap = self._backward(batch, whole, fresh)
            seen, worst = seen + sums, max(worst, gap)
        norm = self.gradients.finish(world, 1.0, stage.grad_clip)
        if not math.isfinite(norm):
            raise UserError(
                f"{stage.name}.lr", stage.lr, f"the gradient is not finite at step {self.step}", "Lower it."
            )
        if tokens and norm > 0:
            self.adam.step(self._rate())
        return seen, worst, norm

    def _rate(self) -> float:
        """This step's learning rate: up over the warm-up, level, and down over the last third."""
        stage = self.stage
        third = stage.steps // 3
        factor = rates.warmup(self.step, stage.warmup)
        return stage.lr * factor * rates.decay(self.step, stage.steps - third, third, stage.final_lr)

    def _backward(self, batch: Batch, whole: float, fresh: bool) -> tuple[Tensor, float]:
        """Add one batch's gradient: loss, clipped, entropy, divergence, tokens, |gap|, tokens compared; largest gap."""
        aim, wanted = self.stage.objective, batch.mask > 0
        new, entropy = self._logprobs(self.model, batch)
        old = batch.old if batch.anchor is None else batch.anchor
        loss, clipped = grpo_loss.surrogate(new, old, batch.advantage, batch.mask, aim)
        if batch.anchor is not None and aim.truncate is not None:
            loss = loss * (batch.anchor - batch.old).exp().clamp(max=aim.truncate)
        kl = torch.zeros_like(new)
        if batch.reference is not None:
            kl = grpo_loss.divergence(new, batch.reference, aim.kl_form)
            loss = loss + aim.kl * kl
        loss = grpo_loss.total(loss, batch.mask, aim.average) / whole
        loss.backward()  # type: ignore[no-untyped-call]
        spoken = new.detach() if fresh else old  # the trainer's view of what the engine said
        gap = (spoken - batch.old)[wanted].abs()
        compared = wanted.sum() if fresh or batch.anchor is not None else wanted.sum() * 0
        sums = [
            loss.detach(),
            clipped.sum(),
            entropy.sum(),
            (kl.detach() * batch.mask).sum(),
            wanted.sum(),
            gap.sum(),
            compared,
        ]
        return torch.stack([s.double() for s in sums]).cpu(), float(gap.max())

    # ---- telling ---------------------------------------------------------------------------------------------------

    def _describe(self, asked: list[Group], kept: list[Group], trained: int) -> dict[str, Any]:
        """Means over all ranks' answers of this step, those to replaced questions included."""
        rollouts = [r for group in asked for r in group.rollouts]
        earned = [parts for group in asked for parts in group.earned]
        names = [*self.stage.reward.names, *(["overlong"] if self.stage.overlong else [])]
        mine = torch.tensor(
            [
                len(rollouts),
                sum(r.verdict.correct for r in rollouts),
                sum(r.verdict.well_formed for r in rollouts),
                sum(r.response.thinks for r in rollouts),
                sum(len(r.completion.tokens) for r in rollouts),
                sum(r.completion.finish_reason == "length" for r in rollouts),
                sum(group.differs for group in kept),
                trained * self.stage.epochs,
                sum(len(r.prompt) for r in rollouts),
                *(sum(parts[name] for parts in earned) for name in names),
            ],
            dtype=torch.float64,
        )
        n, right, formed, thinks, length, cut, varied, trained_all, read, *parts = self.world.sum_(mine).tolist()
        self.totals["tokens_generated"] += int(length)
        self.totals["tokens_trained"] += int(trained_all)
        self.read += int(read)
        return {
            "reward": sum(parts) / n,
            **{f"reward_{k}": v / n for k, v in zip(names, parts, strict=True)},
            "accuracy": right / n,
            "well_formed": formed / n,
            "thinks": thinks / n,
            "length": length / n,
            "truncated": cut / n,
            "groups_with_gradient": varied / self.stage.prompts,
            "answers": n,
        }

    def _keep_samples(self, asked: list[Group]) -> None:
        """Append every answer of the step, with what it earned, to samples.jsonl."""
        mine = [
            {"step": self.step, **record(r), "reward": parts, "advantage": round(credit, 4) if group.credit else None}
            for group in asked
            for r, parts, credit in zip(
                group.rollouts, group.earned, group.credit or [0.0] * len(group.rollouts), strict=True
            )
        ]
        self.stage_run.log_samples([r for rank in self.world.gather(mine) for r in rank])

    def _check_gap(self, metrics: dict[str, Any]) -> None:
        if not metrics["gap_mean"] <= self.stage.max_gap:  # also when it is no number
            raise UserError(
                f"{self.stage.name}.max_gap",
                self.stage.max_gap,
                f"trainer and engine differ by {metrics['gap_mean']:.2g} nats per token at step {self.step}",
                "They must be the same model: report this with the run folder, or raise max_gap knowingly.",
            )

    # ---- stopping and going on -------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        done, before = self.totals, self.accounted
        generated = done["tokens_generated"] - before["tokens_generated"]
        trained = done["tokens_trained"] - before["tokens_trained"]
        self.accounted = dict(done)
        if self.stage_run.is_writer:
            tensors = models.tensors_of(self.model) | self.adam.state()
            if self.reference is not None:
                tensors |= {f"reference.{n}": t for n, t in self.reference.state_dict().items()}
            store.save_step(self.stage_run.folder, self.step, tensors, {"totals": done})
        c, context = self.model.config, self.stage.max_tokens / 4
        learnt = trained * training_flops(c, context, mtp=False)
        forward = forward_flops(c, context)
        flops = generated * forward + learnt
        # what the reference, and the policy before its updates, say of the same answers
        passes = (self.reference is not None) + (self.stage.objective.truncate is not None)
        read, self.read = self.read, 0
        now = time.perf_counter()
        peak, self.mark = (now - self.mark) * self.peak * self.world.size, now
        self.stage_run.account(
            tokens_trained=trained,
            tokens_generated=generated,
            flops=flops,
            peak_flops=peak,
            flops_training=learnt,
            flops_generation=(generated + read) * forward,
            flops_auxiliary=passes * trained / self.stage.epochs * forward,
        )

    def _resume(self) -> None:
        found = store.load_newest(self.stage_run.folder, self.stage_run.say)
        if found is not None:
            self.step, tensors, meta = found
            models.restore(self.model, tensors)
            self.adam.load_state(tensors)
            if self.reference is not None:
                start = len("reference.")
                mine = {n[start:]: t for n, t in tensors.items() if n.startswith("reference.")}
                self.reference.load_state_dict(mine)
            self.totals = {k: int(v) for k, v in meta["totals"].items()}
            self.stage_run.say(f"{self.stage.name:10} resumed at step {self.step}")
        self.accounted = dict(self.totals)
        self.stage_run.rewind(self.step + 1)
