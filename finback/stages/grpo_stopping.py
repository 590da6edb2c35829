"""When RL stops, how fast it learns until then, and which model stays."""

from typing import TYPE_CHECKING, Any

from finback.config import UserError
from finback.model.count import parameters
from finback.rollouts import rl_health
from finback.runs.files import METRICS, read_lines
from finback.stages.validation import Validator
from finback.stages.watching import Watcher
from finback.train import rates
from finback.train.loop import Loop

if TYPE_CHECKING:
    from finback.stages.grpo_training import Reinforcement

LARGE = 50_000_000  # parameters
SMALL_LR, LARGE_LR = 3e-4, 2e-6  # of the quickstart; of R1-Zero's kind on open checkpoints
ADAPTER = 10  # times as much for LoRA, at any rank (Schulman et al. 2025, "LoRA Without Regret")


class Stopping:
    """Watches one RL run: the gap between trainer and engine, steps that teach nothing, and the validation set."""

    def __init__(self, training: "Reinforcement") -> None:
        stage, run, trainer = training.stage, training.run, training.trainer
        self.stage, self.run = stage, run
        self.validator = Validator(stage.validation, run, trainer, training.tokenizer, training.rollouts)
        self.watcher = Watcher(training)
        # the step after which the learning rate falls, and over how many; the last third, or once the validation set stops it
        self.decay = stage.steps - stage.steps // 3, stage.steps // 3
        # steps in a row that taught nothing
        self.idle = 0
        self.learnt_out = False
        size = parameters(trainer.model.config)
        usual = (SMALL_LR if size < LARGE else LARGE_LR) * (1 if stage.adapter is None else ADAPTER)
        self.peak_lr = usual if stage.lr is None else stage.lr
        if stage.lr is None:
            run.say(f"{run.name:10} lr = {self.peak_lr:g}, the default for {size:,} parameters")

    @property
    def total(self) -> int:
        """Steps of the run, as far as is known."""
        return sum(self.decay)

    def lr(self, step: int) -> float:
        """A step's learning rate: up over the warm-up, level, and down at the end."""
        factor = rates.warmup(step, self.stage.warmup) * rates.decay(step, *self.decay, self.stage.final_lr)
        return self.peak_lr * factor

    def before(self, loop: Loop) -> None:
        """What the model says that the run starts from."""
        self.validator.before(loop)
        self.watcher.look(loop)

    def after(self, loop: Loop, metrics: dict[str, Any]) -> None:
        """UserError where trainer and engine disagree, or where RL has taught nothing for `patience` steps."""
        stage = self.stage
        allowed = rl_health.max_gap(stage.max_gap, stage.compute)
        # older weights are another model, and not another one than was meant
        is_older = stage.max_gap is None and metrics.get("staleness_max", 0) > 0
        if not is_older and not metrics["gap_mean"] <= allowed:  # also when it is NaN
            problem = f"trainer and engine differ by {metrics['gap_mean']:.2g} nats per token at step {loop.step}"
            remedy = "They must be the same model: report this with the run folder, or raise max_gap knowingly."
            raise UserError(f"{stage.name}.max_gap", allowed, problem, remedy)
        cause = rl_health.cause(metrics)
        self.idle = self.idle + 1 if cause else 0
        if self.idle == rl_health.NOTICED:
            self.run.say(f"{self.run.name:10} warning: nothing was learnt in {self.idle} steps: {cause}")
        if stage.patience and self.idle >= stage.patience:
            self.learnt_out = metrics["accuracy"] >= 1
            if not self.learnt_out:
                loop.checkpoint()
                remedy = "Mend the cause, or raise patience (0: never stop) and run the same command to go on."
                problem = f"nothing was learnt in the last {self.idle} steps: {cause}"
                raise stage.wrong("patience", problem, remedy)
        self.watcher.look(loop)
        self.validator.after(loop)
        if self.validator.stopped and loop.step < self.decay[0]:
            length = min(loop.step // 2, stage.steps - loop.step)
            self.decay = loop.step, length
            self.run.say(f"{self.run.name:10} validation has stopped rising: {length:,} more steps at a falling rate")

    def state(self) -> dict[str, Any]:
        """What the next steps depend on."""
        own = {"idle": self.idle, "learnt_out": self.learnt_out, "decay": self.decay}
        return own | {"validator": self.validator.state(), "watcher": self.watcher.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where another one stopped."""
        self.idle, self.learnt_out = state["idle"], state["learnt_out"]
        start, length = state.get("decay", self.decay)
        self.decay = start, length
        self.validator.load_state(state.get("validator", {}))
        self.watcher.load_state(state.get("watcher", {}))

    def finish(self, loop: Loop) -> dict[str, Any]:
        """Write the model that stays, and a warning where it is worse than before; what the validation set says of it."""
        found = self.validator.finish(loop)
        if not found and self.run.is_writer:
            lost = rl_health.lost(list(read_lines(self.run.folder / METRICS)), self.stage.num_generations)
            if lost:
                self.run.say(f"{self.run.name:10} warning: {lost}")
        return found
