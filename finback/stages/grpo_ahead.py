"""GRPO's asking ahead: groups of the next steps are sampled and checked while the trainer learns from this one (max_staleness)."""

from typing import TYPE_CHECKING, Any

from finback.data.tokenizer import Tokenizer
from finback.parallel.mesh import World
from finback.rollouts.asking_ahead import AskingAhead, staleness
from finback.rollouts.generation import Rollouts
from finback.runs.folder import StageRun
from finback.stages.grpo_sampling import Group, GroupSampler

if TYPE_CHECKING:
    from finback.stages.grpo import GRPO

# all groups of a step that were asked, and those that are learnt from
_Step = tuple[list[Group], list[Group]]


class AheadSampler(GroupSampler):
    """Samples in a thread of its own; `sample` gives what is there."""

    def __init__(self, stage: "GRPO", run: StageRun, rollouts: Rollouts, tokenizer: Tokenizer) -> None:
        if stage.resample and World.of(run).size > 1:
            problem = "ranks draw other questions together, and may be at different steps"
            raise stage.wrong("resample", problem, "Use 0, or max_staleness=0.")
        self.ahead = AskingAhead[_Step](run, stage.steps, stage.max_staleness)
        super().__init__(stage, run, self.ahead.asked(rollouts), tokenizer)
        self.ahead.load_state(self.order.state())

    def sample(self, step: int) -> _Step:
        """The groups of a step, once they are there; from now on weights after step - 1 updates answer."""
        return self.ahead.take(step, self._make)

    def _make(self, step: int) -> tuple[_Step, dict[str, Any]]:
        return super().sample(step), self.order.state()

    def state(self) -> dict[str, Any]:
        """The order of questions behind the last step that was taken."""
        return self.ahead.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.order.load_state(state)
        self.ahead.load_state(self.order.state())

    def ages(self, groups: list[Group], version: int) -> dict[str, Any]:
        """How old their tokens are for a trainer that has made `version` updates, and who has waited."""
        answers = [r.completion for group in groups for r in group.rollouts]
        return staleness(answers, version, self.stage.max_staleness, self.world) | self.ahead.take_idle()

    def close(self) -> int:
        """Ask nothing more; tokens that were made for steps that nobody will take."""
        return self.ahead.close()
