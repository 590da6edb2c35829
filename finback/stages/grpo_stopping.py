"""Decides when RL stops, its learning rate until then, and which model is kept."""

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
SMALL_LR, LARGE_LR = 3e-4, 2e-6  # for the quickstart; for R1-Zero-style runs on open checkpoints
ADAPTER = 10  # times as much for LoRA, at any rank (Schulman et al. 2025, "LoRA Without Regret")


class Stopping:
    """Monitors an RL run: the gap between trainer and engine, steps without a gradient, and the validation set."""

    def __init__(self, training: "Reinforcement") -> None:
        stage, run, trainer = training.stage, training.run, training.trainer
        self.stage, self.run = stage, run
        self.validator = Validator(stage.validation, run, trainer, training.tokenizer, training.rollouts)
        self.watcher = Watcher(training)
        # last step at the full learning rate, and length of the decay: the last third, or from when validation stops improving
        self.decay = stage.steps - stage.steps // 3, stage.steps // 3
        # steps in a row without a gradient
        self.idle = 0
        self.learnt_out = False
        size = parameters(trainer.model.config)
        usual = (SMALL_LR if size < LARGE else LARGE_LR) * (1 if stage.adapter is None else ADAPTER)
        self.peak_lr = usual if stage.lr is None else stage.lr
        if stage.lr is None:
            run.say(f"{run.name:10} lr = {self.peak_lr:g}, the default for {size:,} parameters")

    @property
    def total(self) -> int:
        """Number of steps of the run, as currently planned."""
        return sum(self.decay)

    def lr(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, constant, linear decay."""
        factor = rates.warmup(step, self.stage.warmup) * rates.decay(step, *self.decay, self.stage.final_lr)
        return self.peak_lr * factor

    def before(self, loop: Loop) -> None:
        """Scores the model that the run starts from."""
        self.validator.before(loop)
        self.watcher.look(loop)

    def after(self, loop: Loop, metrics: dict[str, Any]) -> None:
        """Raises UserError if trainer and engine disagree, or if nothing was learned for `patience` steps."""
        stage = self.stage
        allowed = rl_health.max_gap(stage.max_gap, stage.compute)
        # older weights differ from the trainer's on purpose
        is_older = stage.max_gap is None and metrics.get("staleness_max", 0) > 0
        if not is_older and not metrics["gap_mean"] <= allowed:  # also when it is NaN
            problem = f"trainer and engine differ by {metrics['gap_mean']:.2g} nats per token at step {loop.step}"
            remedy = "They must be the same model: report this with the run folder, or raise max_gap if you know why they differ."
            raise UserError(f"{stage.name}.max_gap", allowed, problem, remedy)
        cause = rl_health.cause(metrics)
        self.idle = self.idle + 1 if cause else 0
        if self.idle == rl_health.NOTICED:
            self.run.say(f"{self.run.name:10} warning: nothing was learned in {self.idle} steps: {cause}")
        if stage.patience and self.idle >= stage.patience:
            self.learnt_out = metrics["accuracy"] >= 1
            if not self.learnt_out:
                loop.checkpoint()
                remedy = "Fix the cause, or raise patience (0: never stop), and run the same command to continue."
                problem = f"nothing was learned in the last {self.idle} steps: {cause}"
                raise stage.wrong("patience", problem, remedy)
        self.watcher.look(loop)
        self.validator.after(loop)
        if self.validator.stopped and loop.step < self.decay[0]:
            length = min(loop.step // 2, stage.steps - loop.step)
            self.decay = loop.step, length
            self.run.say(
                f"{self.run.name:10} validation has stopped improving: {length:,} more steps with a decaying learning rate"
            )

    def state(self) -> dict[str, Any]:
        """What the next steps depend on."""
        own = {"idle": self.idle, "learnt_out": self.learnt_out, "decay": self.decay}
        return own | {"validator": self.validator.state(), "watcher": self.watcher.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        self.idle, self.learnt_out = state["idle"], state["learnt_out"]
        start, length = state.get("decay", self.decay)
        self.decay = start, length
        self.validator.load_state(state.get("validator", {}))
        self.watcher.load_state(state.get("watcher", {}))

    def finish(self, loop: Loop) -> dict[str, Any]:
        """Writes the model that is kept, warns if it is worse than the start, and returns the validation results."""
        found = self.validator.finish(loop)
        if not found and self.run.is_writer:
            lost = rl_health.lost(list(read_lines(self.run.folder / METRICS)), self.stage.num_generations)
            if lost:
                self.run.say(f"{self.run.name:10} warning: {lost}")
        return found
