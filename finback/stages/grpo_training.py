"""GRPO's training: log-probabilities, the clipped surrogate, updates, and the state of a run between steps."""

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finback.data.tokenizer import Tokenizer
from finback.model.count import forward_flops_of, recomputed_flops_of, training_flops_of
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.rollouts.generation import PolicyModel
from finback.rollouts.rl_health import overlap
from finback.rollouts.rollouts import Rollout, batches
from finback.rollouts.shared_prompts import placed_logprobs, shared_batches
from finback.runs.files import METRICS, read_lines
from finback.runs.folder import StageRun
from finback.stages.generation_costs import generation_costs
from finback.stages.grpo_ahead import AheadSampler
from finback.stages.grpo_sampling import Group, GroupSampler
from finback.stages.grpo_stopping import Stopping
from finback.stages.tuning_setup import followed, reference_model, trainer_of
from finback.train import grpo_loss
from finback.train.batch import Batch, idle
from finback.train.correction import mismatch
from finback.train.loop import Loop, Training
from finback.train.precision import COMPUTE
from finback.train.trainer import demand_finite

if TYPE_CHECKING:
    from finback.stages.grpo import GRPO

# one update: (answers to learn from with advantages, number of answers and number of tokens to average over)
Share = tuple[list[tuple[Rollout, float]], int, int]

# sums over tokens: loss, clipped, entropy, divergence, tokens, |gap|, tokens compared, weights cut, masked answers' tokens, KL, chi-square
SUMS = 11


class Reinforcement(Training):
    """The state of one RL run: samples, computes advantages and updates; a Loop calls `step`."""

    def __init__(self, stage: "GRPO", run: StageRun) -> None:
        world, share = World.of(run), stage.prompts_per_step // stage.updates
        if share % world.size:
            problem = f"{share} questions per update do not divide among {world.size} ranks"
            raise stage.wrong("prompts_per_step", problem, "Use --ranks.")
        self.stage, self.tokenizer = stage, Tokenizer(run.input(stage.start))
        trainer = trainer_of(stage, run, weight_decay=0.0, frozen=("mtp.",))
        if stage.share_prompts and trainer.model.config.attention == "compressed":
            problem = "V4's sliding windows would extend from a prompt into only one of its answers"
            raise stage.wrong("share_prompts", problem, "Leave it out.")
        self.model = trainer.model
        self.reference = reference_model(stage, run, trainer) if stage.objective.beta else None
        super().__init__(run, trainer, stage.steps, stage.checkpoint_steps, COMPUTE[stage.compute])
        # ranks that read the same answers
        self.same = world.size // trainer.data_ranks
        # replays the experts that the answers were routed to, and the entries that their tokens attended to
        self.choices = followed(stage, self.model)
        policy = PolicyModel(
            trainer.served(),
            self.model.config,
            self.tokenizer,
            run,
            stage.compute,
            return_routed_experts=stage.routing_replay,
            return_indexer_topk=stage.indexer_replay,
            in_flight=stage.in_flight if stage.max_staleness else "none",
        )
        self.rollouts = stage.rollouts.open(policy, stage.sampling)
        sampler = AheadSampler if stage.max_staleness else GroupSampler
        self.sampler: GroupSampler = sampler(stage, run, self.rollouts, self.tokenizer)
        self.stopping = Stopping(self)
        self.totals = {"tokens_trained": 0, "tokens_generated": 0}

    def finished(self, loop: Loop) -> bool:
        return self.stopping.learnt_out or super().finished(loop)

    def before(self, loop: Loop) -> None:
        self.stopping.before(loop)

    def step(self, loop: Loop) -> dict[str, Any]:
        stage, trainer, lr = self.stage, self.trainer, self.stopping.lr(loop.step)
        self.rollouts.update(loop.step - 1)
        asked, groups = self.sampler.sample(loop.step)
        self.rollouts.rest()
        watched = self.stopping.watcher.before(groups, loop)
        begin = time.perf_counter()
        rows = [self._learnable(pairs) for pairs in self._of_updates(groups, loop.step)]
        work = [(self._batches(pairs), answers, tokens) for pairs, answers, tokens in rows]
        seen, worst, norm = torch.zeros(SUMS, dtype=torch.float64), 0.0, 0.0
        self.model.train()
        for epoch in range(stage.epochs):
            for number, (parts, *counts) in enumerate(work):
                # after the first update the weights are no longer those that the engine sampled with
                sums, gap, norm = self._update(parts, counts, loop.step, fresh=epoch == number == 0)
                seen, worst = seen + sums, max(worst, gap)
        health = trainer.balance(stage.bias_speed)
        if self.reference is not None and stage.reference_steps and loop.step % stage.reference_steps == 0:
            self.reference.refresh(self.model)
        loss, clipped, entropy, kl, tokens, gap, compared, cut, masked, engine_kl, chi2 = self._summed(seen)
        with_gradient, tokens, compared = tokens, max(tokens, 1.0), max(compared, 1.0)
        metrics = self.sampler.describe(asked, groups)
        spared = [n for parts, *_ in work for batch in parts for n in batch.spared()]
        learnt = [r for pairs, *_ in rows for r, _ in pairs]
        self._account(loop, [r for group in asked for r in group.rollouts], learnt, spared)
        self.sampler.write_samples(asked, loop.step, self.stopping.watcher.after(watched, loop))
        if stage.objective.correction.acts:
            metrics |= {"weights_cut": cut / tokens, "answers_masked": masked / tokens}
        metrics |= self.sampler.ages(groups, loop.step - 1)
        seconds = time.perf_counter() - begin
        return metrics | {
            "loss": loss / (stage.epochs * stage.updates),
            "clip_share": clipped / tokens,
            "entropy": entropy / tokens,
            "kl": kl / tokens,
            "gap_mean": gap / compared,
            "gap_max": max(self.world.gather(worst)),
            "mismatch_kl": engine_kl / compared,
            "mismatch_chi2": chi2 / compared,
            "grad_norm": norm,
            "lr": lr,
            "tokens_with_gradient": with_gradient,
            "max_violation": health.violation,
            "expert_load": health.shares,
            "update_seconds": seconds,
            "learnt_per_second": tokens / seconds,
            **generation_costs(self.rollouts, loop),
        }

    def _summed(self, mine: Tensor) -> list[float]:
        """Sums over all ranks of their per-row values; rows that several ranks read count once."""
        found: list[float] = (self.world.sum_(mine) / self.same).tolist()
        return found

    # ---- batches ---------------------------------------------------------------------------------------------------

    def _of_updates(self, groups: list[Group], step: int) -> list[list[tuple[Rollout, float]]]:
        """The answers to learn from, by update, for all ranks that read the same rows."""
        each = self.trainer.of_same_rows(self.sampler.of_updates(groups, step))
        return [[pair for pairs in of_ranks for pair in pairs] for of_ranks in zip(*each, strict=True)]

    def _learnable(self, pairs: list[tuple[Rollout, float]]) -> Share:
        """One update's answers, longest first, and the numbers of answers and tokens to average over.

        Without a divergence term, an answer with advantage 0 adds nothing to the loss and is skipped, but it still counts in the
        average: otherwise a step with one useful group would move the model as far as a step with many (DAPO eq. 8, Dr. GRPO).
        """
        tokens = sum(len(r.completion.tokens) for r, _ in pairs)
        # a divergence term also acts on answers with advantage 0
        learnt = [(r, a) for r, a in pairs if a != 0 or self.stage.objective.beta > 0]
        return sorted(learnt, key=lambda pair: -pair[0].length), len(pairs), tokens

    def _batches(self, pairs: list[tuple[Rollout, float]]) -> list[Batch]:
        """The batches of one update, with the log-probabilities of other models that they need."""
        stage = self.stage
        form = shared_batches if stage.share_prompts else batches
        parts = form(pairs, stage.micro_tokens)
        if self.trainer.in_step:
            parts += [idle(1)] * (max(self.world.gather(len(parts))) - len(parts))
        parts = [batch.to(self.world.device) for batch in parts]
        self.model.eval()  # a pass without learning must not count as router load
        with torch.no_grad():
            if stage.objective.correction.needs_trainer:
                parts = [replace(b, old_logprobs=self._replayed_logprobs(b)[0]) for b in parts]
            if self.reference is not None:
                with self.reference.asked() as model:
                    parts = [replace(b, reference_logprobs=self.logprobs(model, b)[0]) for b in parts]
        self.trainer.rest()
        self.model.train()
        return parts

    def logprobs(self, model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the labels (rows, seq_len), 0 elsewhere, and their entropies (labels,)."""
        placed = placed_logprobs(model, self.trainer.part(batch), self.stage.temperature)
        logprobs, entropy = (self.trainer.whole_rows(t, batch) for t in placed)
        return logprobs, entropy[batch.learnt]

    def _replayed_logprobs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """`logprobs` of the trained model, with the engine's choices."""
        with self._replaying(batch):
            return self.logprobs(self.model, batch)

    def _replaying(self, batch: Batch) -> AbstractContextManager[object]:
        """A context in which forward and backward passes use the engine's experts and entries."""
        if self.choices is None:
            return nullcontext()
        part = self.trainer.part(batch)
        rows = part.shared or part
        return self.choices.replaying(rows.routed_experts, rows.indexer_topk)

    # ---- updates ---------------------------------------------------------------------------------------------------

    def _update(self, parts: list[Batch], counts: list[int], step: int, fresh: bool) -> tuple[Tensor, float, float]:
        """One optimizer step. Returns sums over this rank's tokens, its largest gap, and the gradient norm.

        `counts`: this rank's answers and their tokens, including those with advantage 0.
        """
        stage, trainer = self.stage, self.trainer
        answers, tokens = self._summed(torch.tensor(counts, dtype=torch.float64))
        whole = grpo_loss.share(stage.objective.average, tokens, answers, stage.max_tokens)
        trainer.zero()
        seen, worst = torch.zeros(SUMS, dtype=torch.float64), 0.0
        for number, batch in enumerate(parts, 1):
            if number == len(parts):
                trainer.overlap()
            with self._replaying(batch):
                sums, gap = self._backward(batch, whole, fresh)
            seen, worst = seen + sums, max(worst, gap)
        norm = trainer.finish(stage.max_grad_norm)
        demand_finite(norm, f"{stage.name}.lr", self.stopping.peak_lr, step)
        if tokens and norm > 0:
            trainer.update(self.stopping.lr(step))
        return seen, worst, norm

    def _backward(self, batch: Batch, whole: float, fresh: bool) -> tuple[Tensor, float]:
        """Adds one batch's gradient. Returns its sums in the order of SUMS, and its largest gap."""
        objective, learnt = self.stage.objective, batch.learnt
        mask, engine, advantages = learnt.float(), batch.rollout_logprobs, batch.advantages
        assert engine is not None and advantages is not None, "a batch of answers"
        new, entropy = self.logprobs(self.model, batch)
        old, reference = batch.old_logprobs, batch.reference_logprobs
        terms = grpo_loss.terms(new, old, engine, reference, advantages, mask, objective)
        loss = grpo_loss.total(terms.loss, mask, objective.average) / whole
        loss.backward()  # type: ignore[no-untyped-call]
        before = engine if old is None else old
        own = new.detach() if fresh else before  # the trainer's log-probabilities of the sampled tokens
        gap = (own - engine)[learnt].abs()
        compared = learnt.sum() if fresh or old is not None else learnt.sum() * 0
        divergence = (terms.divergence.detach() * mask).sum()
        counts = [terms.clipped.sum(), entropy.sum(), divergence, learnt.sum(), gap.sum(), compared]
        sums = [loss.detach(), *counts, terms.cut.sum(), terms.masked.sum(), *mismatch(own[learnt], engine[learnt])]
        return torch.stack([s.double() for s in sums]).cpu(), float(gap.max()) if len(gap) else 0.0

    # ---- accounting, stopping and resuming -------------------------------------------------------------------------

    def _account(self, loop: Loop, asked: list[Rollout], learnt: list[Rollout], spared: list[int]) -> None:
        """Adds tokens and FLOPs of the step over all ranks; `spared` holds the lengths of prompts that were shared."""
        stage, config, frozen = self.stage, self.model.config, self.stage.adapter is not None
        lengths, once = [r.length for r in learnt], 1 / self.same
        # logprobs of the same answers under the reference model, and under the policy before its updates
        passes = (self.reference is not None) + stage.objective.correction.needs_trainer
        read = ((1, lengths), (-1, spared))
        mine = [
            once * sum(lengths) * stage.epochs,
            sum(len(r.completion.tokens) for r in asked),
            once * stage.epochs * sum(s * training_flops_of(config, n, mtp=False, frozen=frozen) for s, n in read),
            forward_flops_of(config, [r.length for r in asked]),
            once * passes * sum(s * forward_flops_of(config, n) for s, n in read),
            once
            * stage.epochs
            * sum(s * recomputed_flops_of(config, n, stage.recomputes or "none", mtp=False) for s, n in read),
        ]
        sums = self.world.sum_(torch.tensor(mine, dtype=torch.float64)).tolist()
        trained, generated = round(sums[0]), int(sums[1])
        self.totals["tokens_trained"] += trained
        self.totals["tokens_generated"] += generated
        again = {"recomputed": sums[5]} if stage.recomputes else {}
        loop.spend(trained, generated, training=sums[2], generation=sums[3], auxiliary=sums[4], **again)

    def note(self, metrics: dict[str, Any]) -> str:
        return f"accuracy {metrics['accuracy']:.0%}  thinks {metrics['thinks']:.0%}  {metrics['length']:.0f} tokens"

    def after(self, loop: Loop, metrics: dict[str, Any]) -> None:
        self.stopping.after(loop, metrics)
        self.total = float(self.stopping.total)

    def state(self) -> dict[str, Any]:
        return {"totals": self.totals, "questions": self.sampler.state(), **self.stopping.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.totals = {k: int(v) for k, v in state["totals"].items()}
        self.sampler.load_state(state.get("questions", {}))
        self.stopping.load_state(state)
        self.total = float(self.stopping.total)

    def finish(self, loop: Loop) -> dict[str, Any]:
        order = self.sampler.order
        left_out = {"too_long": order.too_long, "contaminated": dict(order.contaminated)}
        if unused := sum(self.world.gather(self.sampler.close())):
            loop.spend(generated=unused)
            self.totals["tokens_generated"] += unused
            loop.account()
        written = self.stopping.finish(loop)
        ahead = {"ahead": overlap(read_lines(self.run.folder / METRICS))} if self.stage.max_staleness else {}
        return {"steps": loop.step, "lr": self.stopping.peak_lr, **left_out, **self.totals, **ahead, **written}

    def close(self) -> None:
        """Releases the generator."""
        self.sampler.close()
        self.rollouts.close()
        if isinstance(self.sampler, AheadSampler):
            self.sampler.ahead.join()
