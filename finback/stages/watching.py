"""Prompts that RL answers every few steps, to show how the model's reasoning changes. They are not trained on.

The answers are in watched.jsonl in the stage's folder and on the page of the run, with the log-probabilities of their tokens, when
sampled and at the next look, and the experts they are routed to. samples.jsonl has the same for one group of training answers.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from finback.config import UserError, check_not_negative, check_positive
from finback.data.messages import parse_response
from finback.data.tokenizer import THINK
from finback.engine.request import Completion, SamplingParams
from finback.model.count import forward_flops_of
from finback.parallel.mesh import World
from finback.rollouts.drawing import Window
from finback.rollouts.rollouts import Rollout, record
from finback.runs.declaration import Declaration
from finback.runs.files import WATCHED
from finback.stages.token_detail import TokenDetail
from finback.tasks.task import NO_ANSWER, Problem
from finback.train.loop import Loop

if TYPE_CHECKING:
    from finback.stages.grpo_sampling import Group
    from finback.stages.grpo_training import Reinforcement

MOST_ANSWERS = 16  # answers of a group that are described token by token


@dataclass(frozen=True)
class Watch:
    """A fixed set of prompts, answered before the first step and every `every_steps` by the current model."""

    # prompts, as a user would type them
    prompts: tuple[str, ...]
    # steps between answers
    every_steps: int = 5
    # sampling temperature; 0: greedy
    temperature: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "watch", "every_steps")
        check_not_negative(self, "watch", "temperature")
        if isinstance(self.prompts, str) or not self.prompts or not all(self.prompts):
            raise UserError("watch.prompts", self.prompts, "no prompts", "Give a tuple of texts.")

    def generates(self, steps: int, max_tokens: int) -> int:
        """Upper bound of the tokens generated over `steps` steps."""
        return (1 + steps // self.every_steps) * len(self.prompts) * max_tokens


def declared(watch: Watch | None, given: Declaration) -> Declaration:
    """A stage's declaration, extended by what watching adds."""
    if watch is None or "flops_evaluation" in given.ledger:
        return given
    return replace(given, ledger=(*given.ledger, "flops_evaluation"))


@dataclass(frozen=True)
class Seen:
    """One group before it is learned from: this rank's answers, all ranks' answers, and their tokens."""

    mine: list[Rollout]
    answers: list[Rollout]
    before: list[dict[str, Any]]


class Watcher:
    """Answers the watched prompts of an RL run, and records how training changes single tokens.

    For each answer to a watched prompt: the log-probabilities of its tokens now, and at the next look. For one group of training
    answers, in every step before a look: the log-probabilities before and after the step.
    """

    def __init__(self, training: "Reinforcement") -> None:
        stage, self.run, self.trainer, self.rollouts = training.stage, training.run, training.trainer, training.rollouts
        self.stage, self.watch = stage, stage.watch
        self.tokenizer, self.world = training.tokenizer, World.of(self.run)
        window = Window(self.tokenizer, self.rollouts.model_config, stage.max_tokens, stage.think)
        texts = self.watch.prompts if self.watch is not None else ()
        self.problems = [Problem(text, "", text) for text in texts]
        # each prompt as token ids, and whether they open the chain
        self.prompts = [window.prompt(problem) for problem in self.problems]
        for problem, (ids, _) in zip(self.problems, self.prompts, strict=True):
            if len(ids) + stage.max_tokens > window.size:
                raise window.too_long(problem)
        self.detail = TokenDetail(
            self.trainer, self.tokenizer, training.logprobs, stage.micro_tokens, whole=stage.layout is None
        )
        # token ids of the answers at the last look
        self.former: list[list[int]] = []

    def look(self, loop: Loop) -> None:
        """Answers each prompt once, if a look is due; ranks share the prompts."""
        watch, world, model = self.watch, self.world, self.trainer.model
        if watch is None or not self._is_due(loop.step):
            return
        was_training = model.training
        self.rollouts.update(loop.step)
        mine = range(world.rank, len(self.prompts), world.size)
        sampling = SamplingParams(watch.temperature, self.stage.max_tokens)
        seeds = [self.run.seed("watched answer", i) for i in mine]
        completions = self.rollouts.generate([self.prompts[i][0] for i in mine], sampling, seeds) if mine else []
        model.train(was_training)
        pairs = [pair for rank in world.gather(list(zip(mine, completions, strict=True))) for pair in rank]
        answers = [self._answer(i, completion) for i, completion in sorted(pairs, key=lambda pair: pair[0])]
        flops = forward_flops_of(self.rollouts.model_config, [r.length for r in answers])
        loop.spend(evaluation=flops)
        # only the token ids of former answers are stored
        former = [self._answer(i, Completion(ids, [0.0] * len(ids), "stop")) for i, ids in enumerate(self.former)]
        found = self._described([*answers, *former], loop)
        then = [d["logprobs"] for d in found[len(answers) :]] or [None] * len(answers)
        for r, described, logprobs in zip(answers, found, then, strict=False):
            later = {} if logprobs is None else {"former_logprobs": logprobs}
            # watched answers are not judged
            self.run.append(WATCHED, {"step": loop.step, **record(r), "correct": None} | described | later)
        self.former = [r.completion.tokens for r in answers]

    def before(self, groups: "list[Group]", loop: Loop) -> Seen | None:
        """A group of rank 0 that training is about to use, if possible one with different rewards."""
        if not self._is_due(loop.step):
            return None
        chosen = [g.rollouts for g in groups if g.differs] or [g.rollouts for g in groups]
        mine = chosen[0][:MOST_ANSWERS] if self.run.is_writer else []
        answers = [r for rank in self.world.gather(mine) for r in rank]
        return Seen(mine, answers, self._described(answers, loop))

    def after(self, seen: Seen | None, loop: Loop) -> dict[int, dict[str, Any]]:
        """How the step changed that group's tokens, by the id of each of this rank's answers."""
        if seen is None:
            return {}
        new = [described["logprobs"] for described in self._described(seen.answers, loop)]
        pairs = zip(seen.mine, seen.before, new, strict=False)
        return {id(r): before | {"new_logprobs": logprobs} for r, before, logprobs in pairs}

    def _is_due(self, step: int) -> bool:
        return self.watch is not None and step % self.watch.every_steps == 0

    def _answer(self, i: int, completion: Completion) -> Rollout:
        """An answer to a prompt."""
        ids, opened = self.prompts[i]
        response = parse_response(THINK * opened + self.tokenizer.decode(completion.tokens))
        return Rollout(self.problems[i], ids, completion, response, NO_ANSWER)

    def _described(self, answers: list[Rollout], loop: Loop) -> list[dict[str, Any]]:
        flops = forward_flops_of(self.rollouts.model_config, [r.length for r in answers])
        loop.spend(evaluation=flops * self.trainer.data_ranks)
        return self.detail.describe(answers)

    def state(self) -> dict[str, Any]:
        """What the next look depends on."""
        return {"former": self.former}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.former = state.get("former", [])
