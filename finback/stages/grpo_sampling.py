"""Sampling for GRPO: groups of answers to each question, their rewards and their advantages."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from finback.data.tokenizer import Tokenizer
from finback.parallel.mesh import World
from finback.rollouts.drawing import Window
from finback.rollouts.generation import Generator
from finback.rollouts.rollouts import Rollout, record, rollout
from finback.runs.files import SAMPLES
from finback.runs.folder import StageRun
from finback.stages.validation import training_questions
from finback.tasks.task import Problem
from finback.train import grpo_loss

if TYPE_CHECKING:
    from finback.stages.grpo import GRPO

# the inputs of a question's random seed
Seed = tuple[str | int, ...]


@dataclass
class Group:
    """One question's answers, with each one's rewards by part, whether it counts, and its advantage."""

    rollouts: list[Rollout]
    parts: list[dict[str, float]]
    # False for masked answers: they are neither learned from nor part of the group's mean
    counted: list[bool]
    advantages: list[float] = field(default_factory=list)

    @property
    def rewards(self) -> list[float]:
        """Total reward of each answer."""
        return [sum(parts.values()) for parts in self.parts]

    @property
    def differs(self) -> bool:
        """Whether the answers that count have different rewards."""
        earned = [reward for reward, counts in zip(self.rewards, self.counted, strict=True) if counts]
        return bool(earned) and max(earned) - min(earned) > 1e-6


class GroupSampler:
    """Samples this rank's groups of a step with a generator that has the current weights."""

    def __init__(self, stage: "GRPO", run: StageRun, generator: Generator, tokenizer: Tokenizer) -> None:
        self.stage, self.run, self.generator, self.tokenizer = stage, run, generator, tokenizer
        self.world = World.of(run)
        window = Window(tokenizer, generator.model_config, stage.max_tokens, stage.think)
        self.order = training_questions(stage.task, stage.validation, window, run)

    def state(self) -> dict[str, Any]:
        """What the next step's questions depend on, as JSON."""
        return self.order.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.order.load_state(state)

    def close(self) -> int:
        """Stops sampling. Returns this rank's tokens that were generated but will not be learned from."""
        return 0

    def sample(self, step: int) -> tuple[list[Group], list[Group]]:
        """All groups that were sampled, and those that are learned from, with advantages; both in order."""
        stage, world = self.stage, self.world
        rng = random.Random(self.run.seed("questions", step))
        problems = [self.order.draw(rng) for _ in range(stage.prompts_per_step)]
        mine = range(world.rank, stage.prompts_per_step, world.size)
        groups = self.ask([problems[i] for i in mine], [("answer", step, i) for i in mine])
        asked = list(groups)
        for turn in range(stage.resample):
            idle = [place for place, group in enumerate(groups) if not group.differs]
            others = self.ask(*self._others([("again", step, turn, mine[place]) for place in idle]))
            for place, group in zip(idle, others, strict=True):
                groups[place] = group
            asked += others
        self.give_advantages(groups, step)
        return asked, groups

    def _others(self, mine: list[Seed]) -> tuple[list[Problem], list[Seed]]:
        """A question for each of this rank's seeds. Every rank draws all ranks' questions, so that they share one order."""
        every = sorted(seed for rank in self.world.gather(mine) for seed in rank)
        drawn = {seed: self.order.draw(random.Random(self.run.seed("question", *seed))) for seed in every}
        return [drawn[seed] for seed in mine], mine

    def ask(self, problems: list[Problem], seeds: Sequence[Seed]) -> list[Group]:
        """Samples num_generations answers to each problem; answer k of a problem uses random numbers of (its seed, k)."""
        stage = self.stage
        count = range(stage.num_generations)
        asked = [p for p in problems for _ in count]
        each = [self.run.seed(*s, k) for s in seeds for k in count]
        rollouts = rollout(self.generator, self.tokenizer, stage.task, asked, each, stage.sampling, stage.think)
        answers = [rollouts[start : start + len(count)] for start in range(0, len(rollouts), len(count))]
        return [Group(group, self.rewarded(group), [self.counts(r) for r in group]) for group in answers]

    def counts(self, r: Rollout) -> bool:
        """Whether an answer is learned from: truncated ones may be masked; answers with unknown choices must be."""
        stage, done = self.stage, r.completion
        cut = stage.mask_truncated and done.finish_reason == "length"
        routed = done.routed_experts is not None or not stage.routing_replay
        return not cut and routed and (done.indexer_topk is not None or not stage.indexer_replay)

    def rewarded(self, group: list[Rollout]) -> list[dict[str, float]]:
        """Rewards of each answer to one question, by part."""
        stage, reward = self.stage, self.stage.reward
        lengths = [len(r.completion.tokens) for r in group]
        earned = [
            reward.parts(r.verdict, r.response.reasoning, r.response.thinks, n, stage.max_tokens)
            for r, n in zip(group, lengths, strict=True)
        ]
        empty = [r.response.thinks and not r.response.reasoning for r in group]
        good = [i for i, r in enumerate(group) if r.verdict.well_formed and not empty[i]]
        if reward.judge is not None and good:
            answers = [group[i].response.answer for i in good]
            # a single answer has no other to be compared with
            preferences = reward.judge.prefer(group[0].problem.question, answers) if len(good) > 1 else [0.5]
            for i, preference in zip(good, preferences, strict=True):
                earned[i]["preference"] = reward.preference * preference
        if stage.overlong:
            for parts, n in zip(earned, lengths, strict=True):
                over = max(0, n - (stage.max_tokens - stage.overlong))
                parts["overlong"] = -stage.overlong_penalty * over / stage.overlong
        return earned

    def give_advantages(self, groups: list[Group], step: int) -> None:
        """Computes the advantages of each group; the control experiment first shuffles the rewards."""
        rewards, counted = torch.tensor([g.rewards for g in groups]), torch.tensor([g.counted for g in groups])
        if self.stage.shuffle_rewards:
            rewards = rewards.flatten()[self.shuffled_places(rewards.numel(), step)].view_as(rewards)
        for group, row in zip(groups, grpo_loss.advantages(rewards, self.stage.normalise, counted), strict=True):
            group.advantages = row.tolist()

    def of_updates(self, groups: list[Group], step: int) -> list[list[tuple[Rollout, float]]]:
        """This rank's answers that count, with advantages, by update. All ranks' answers are divided into equal shares at
        random, regardless of their question (R1 2.2)."""
        stage, count = self.stage, self.stage.num_generations
        total = stage.prompts_per_step * count
        order = torch.arange(total)
        if stage.updates > 1:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(self.run.seed("updates", step)))
        share = torch.empty_like(order).scatter_(0, order, torch.arange(total) * stage.updates // total).tolist()
        found: list[list[tuple[Rollout, float]]] = [[] for _ in range(stage.updates)]
        for place, group in enumerate(groups):
            first = (self.world.rank + place * self.world.size) * count
            for k, (r, advantage, counts) in enumerate(
                zip(group.rollouts, group.advantages, group.counted, strict=True)
            ):
                if counts:
                    found[share[first + k]].append((r, advantage))
        return found

    def shuffled_places(self, count: int, step: int) -> list[int]:
        """The permutation of this rank's rewards in the control experiment with shuffled rewards."""
        generator = torch.Generator().manual_seed(self.run.seed("shuffle", step, self.world.rank))
        return torch.randperm(count, generator=generator).tolist()

    def write_samples(self, asked: list[Group], step: int, details: dict[int, dict[str, Any]]) -> None:
        """Appends every answer of the step with its rewards to samples.jsonl; `details` has more on some answers, by id."""
        mine = []
        for group in asked:
            advantages: list[float | None] = [round(a, 4) for a in group.advantages] or [None] * len(group.rollouts)
            for r, parts, advantage in zip(group.rollouts, group.parts, advantages, strict=True):
                mine.append(
                    {"step": step, **record(r), "reward": parts, "advantage": advantage, **details.get(id(r), {})}
                )
        self.run.append(SAMPLES, *(r for rank in self.world.gather(mine) for r in rank))

    def ages(self, groups: list[Group], version: int) -> dict[str, Any]:
        """Ages of the tokens, if they can be older than the current weights. Collective: all ranks call it."""
        return {}

    def describe(self, asked: list[Group], learnt: list[Group]) -> dict[str, Any]:
        """Means over all ranks' answers of a step, including those to replaced questions."""
        rollouts = [r for group in asked for r in group.rollouts]
        earned = [parts for group in asked for parts in group.parts]
        names = [*self.stage.reward.names, *(["overlong"] if self.stage.overlong else [])]
        counts = {
            "answers": len(rollouts),
            "accuracy": sum(r.verdict.correct for r in rollouts),
            "well_formed": sum(r.verdict.well_formed for r in rollouts),
            "thinks": sum(r.response.thinks for r in rollouts),
            "length": sum(len(r.completion.tokens) for r in rollouts),
            "routes_missing": sum(r.completion.routed_experts is None for r in rollouts),
            "truncated": sum(r.completion.finish_reason == "length" for r in rollouts),
            "groups_with_gradient": sum(group.differs for group in learnt),
            **{f"reward_{name}": sum(parts[name] for parts in earned) for name in names},
        }
        sums = self.world.sum_(torch.tensor(list(counts.values()), dtype=torch.float64)).tolist()
        found = dict(zip(counts, sums, strict=True))
        n, varied = found.pop("answers"), found.pop("groups_with_gradient")
        if not self.stage.routing_replay:
            del found["routes_missing"]
        graded: Counter[str] = Counter()
        for r in rollouts:
            graded.update(r.verdict.parts)
        graded_by_rank = self.world.gather(dict(graded))
        checks = sorted({name for one in graded_by_rank for name in one})
        return {
            "reward": sum(found[f"reward_{name}"] for name in names) / n,
            **{name: total / n for name, total in found.items()},
            "groups_with_gradient": varied / self.stage.prompts_per_step,
            "answers": n,
            **{f"check_{name}": sum(one.get(name, 0.0) for one in graded_by_rank) / n for name in checks},
        }
