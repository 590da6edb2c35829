"""Asynchronous sampling for GRPO (max_staleness): the next steps' groups are generated and checked while this one is learned."""

from typing import TYPE_CHECKING, Any

from finback.data.tokenizer import Tokenizer
from finback.parallel.mesh import World
from finback.rollouts.asking_ahead import AskingAhead, staleness
from finback.rollouts.generation import Rollouts
from finback.runs.folder import StageRun
from finback.stages.grpo_sampling import Group, GroupSampler

if TYPE_CHECKING:
    from finback.stages.grpo import GRPO

# all groups of a step that were sampled, and those that are learned from
_Step = tuple[list[Group], list[Group]]


class AheadSampler(GroupSampler):
    """Samples in a background thread; `sample` returns what is ready."""

    def __init__(self, stage: "GRPO", run: StageRun, rollouts: Rollouts, tokenizer: Tokenizer) -> None:
        if stage.resample and World.of(run).size > 1:
            problem = "ranks draw replacement questions together, but may be at different steps"
            raise stage.wrong("resample", problem, "Use 0, or max_staleness=0.")
        self.ahead = AskingAhead[_Step](run, stage.steps, stage.max_staleness)
        super().__init__(stage, run, self.ahead.asked(rollouts), tokenizer)
        self.ahead.load_state(self.order.state())

    def sample(self, step: int) -> _Step:
        """The groups of a step, waiting for them if needed. From now on the weights after step - 1 updates generate."""
        return self.ahead.take(step, self._make)

    def _make(self, step: int) -> tuple[_Step, dict[str, Any]]:
        return super().sample(step), self.order.state()

    def state(self) -> dict[str, Any]:
        """The question order after the last step that was taken."""
        return self.ahead.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.order.load_state(state)
        self.ahead.load_state(self.order.state())

    def ages(self, groups: list[Group], version: int) -> dict[str, Any]:
        """Age of the tokens for a trainer that has made `version` updates, and idle shares of trainer and engines."""
        answers = [r.completion for group in groups for r in group.rollouts]
        return staleness(answers, version, self.stage.max_staleness, self.world) | self.ahead.take_idle()

    def close(self) -> int:
        """Stops sampling. Returns the tokens that were generated for steps which will not be taken."""
        return self.ahead.close()
