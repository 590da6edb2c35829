"""Prompts that RL answers every so many steps, so that one sees its reasoning change. Nothing is learnt from them.

The answers stand in watched.jsonl in the stage's folder, and on the page of its run.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from finback.config import UserError, check_not_negative, check_positive
from finback.data.messages import parse_response
from finback.data.tokenizer import THINK, Tokenizer
from finback.engine.request import SamplingParams
from finback.model.count import forward_flops_of
from finback.parallel.mesh import World
from finback.rollouts.drawing import Window
from finback.rollouts.generation import Rollouts
from finback.rollouts.rollouts import Rollout, record
from finback.runs.declaration import Declaration
from finback.runs.files import WATCHED
from finback.runs.folder import StageRun
from finback.tasks.task import NO_ANSWER, Problem
from finback.train.loop import Loop
from finback.train.trainer import Trainer

if TYPE_CHECKING:
    from finback.stages.grpo import GRPO


@dataclass(frozen=True)
class Watch:
    """A fixed set of prompts, answered before the first step and every `every_steps` by the model as it is then."""

    # as a user would write them
    prompts: tuple[str, ...]
    # steps from one answer to the next
    every_steps: int = 5
    # 0: the likeliest answer
    temperature: float = 0.0

    def __post_init__(self) -> None:
        check_positive(self, "watch", "every_steps")
        check_not_negative(self, "watch", "temperature")
        if isinstance(self.prompts, str) or not self.prompts or not all(self.prompts):
            raise UserError("watch.prompts", self.prompts, "no prompts", "Give a tuple of texts.")

    def generates(self, steps: int, max_tokens: int) -> int:
        """Tokens that the answers have at most, over so many steps."""
        return (1 + steps // self.every_steps) * len(self.prompts) * max_tokens


def declared(watch: Watch | None, given: Declaration) -> Declaration:
    """A stage's declaration with what watching adds to it."""
    if watch is None or "flops_evaluation" in given.ledger:
        return given
    return replace(given, ledger=(*given.ledger, "flops_evaluation"))


class Watcher:
    """Has the prompts of one RL run answered, if there are any."""

    def __init__(
        self, stage: "GRPO", run: StageRun, trainer: Trainer, tokenizer: Tokenizer, rollouts: Rollouts
    ) -> None:
        self.stage, self.run, self.trainer, self.rollouts = stage, run, trainer, rollouts
        self.tokenizer, self.world, self.watch = tokenizer, World.of(run), stage.watch
        window = Window(tokenizer, rollouts.model_config, stage.max_tokens, stage.think)
        texts = self.watch.prompts if self.watch is not None else ()
        self.problems = [Problem(text, "", text) for text in texts]
        # each as ids, and whether they open the chain
        self.prompts = [window.prompt(problem) for problem in self.problems]
        for problem, (ids, _) in zip(self.problems, self.prompts, strict=True):
            if len(ids) + stage.max_tokens > window.size:
                raise window.too_long(problem)

    def look(self, loop: Loop) -> None:
        """One answer to each prompt, where it is time; ranks share the prompts."""
        watch, world, model = self.watch, self.world, self.trainer.model
        if watch is None or loop.step % watch.every_steps:
            return
        was_training = model.training
        self.rollouts.update(loop.step)
        mine = range(world.rank, len(self.prompts), world.size)
        sampling = SamplingParams(watch.temperature, self.stage.max_tokens)
        seeds = [self.run.seed("watched answer", i) for i in mine]
        answers = self.rollouts.generate([self.prompts[i][0] for i in mine], sampling, seeds) if mine else []
        model.train(was_training)
        found = []
        for i, completion in zip(mine, answers, strict=True):
            ids, opened = self.prompts[i]
            response = parse_response(THINK * opened + self.tokenizer.decode(completion.tokens))
            found.append(Rollout(self.problems[i], ids, completion, response, NO_ANSWER))
        # nobody judges them
        lines = [{"step": loop.step, **record(r), "correct": None} for r in found]
        every = [line for rank in world.gather(list(zip(mine, lines, strict=True))) for line in rank]
        self.run.append(WATCHED, *(line for _, line in sorted(every, key=lambda pair: pair[0])))
        flops = forward_flops_of(self.rollouts.model_config, [r.length for r in found])
        loop.spend(evaluation=sum(world.gather(flops)))
