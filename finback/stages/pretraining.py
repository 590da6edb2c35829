"""A pre-training run: one step top to bottom, probes and validation, loss spikes, and the final output."""

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch

from finback.data.loader import Loader
from finback.data.tokenizer import Tokenizer
from finback.engine.request import SamplingParams
from finback.model.count import attending_densely, recomputed_flops, training_flops_of
from finback.model.dsa_training import Attention, divergence, is_taught, set_attention
from finback.parallel.served_weights import ServedWeights
from finback.rollouts.drawing import Window
from finback.rollouts.here import EngineRollouts
from finback.runs.files import METRICS, ROUTER, read_lines
from finback.runs.folder import StageRun
from finback.stages.anticipation import Anticipation
from finback.stages.compress import bits_by_source
from finback.stages.exam_questions import askable
from finback.stages.validation import answered
from finback.tasks import task as tasks
from finback.tasks.task import Problem
from finback.train import rates, router_health
from finback.train.batch import Batch, of_rows
from finback.train.loop import Loop, Training
from finback.train.loss import LossTerms
from finback.train.precision import dtype_of
from finback.train.spikes import Spikes
from finback.train.trainer import Trainer

if TYPE_CHECKING:
    from finback.stages.pretrain import Pretrain, Probe

STATE = ("decay_start", "passed_at", "best_probe", "tokens", "best_bits", "skipped", "rewinds")
REWINDS = 5  # after this many, the weights or learning rates are at fault, and other data will not help


class Pretraining(Training):
    """The state of one pre-training run; a Loop calls `step`, a Trainer holds the model."""

    unit = "tokens"

    def __init__(self, stage: "Pretrain", run: StageRun, trainer: Trainer, precision: str) -> None:
        super().__init__(run, trainer, stage.limit, stage.checkpoint_steps, dtype_of(precision))
        self.keep, self.stage, self.config = stage.keep, stage, trainer.model.config
        self.precision = precision
        self.folder = run.input(stage.data)
        self.tokenizer = Tokenizer(self.folder)
        self.depths = self.config.num_nextn_predict_layers
        extra, order = 1 + self.depths, run.seed("order")
        # the longest rows first, so that a source that is too short for them is refused now
        self.loader = Loader(self.folder, stage.mixture, stage.longest, extra, order, stage.packing)
        self.loader.resize(stage.seq_len_at(0))
        self.spikes = Spikes(stage.spike_sigma, stage.spike_patience)
        self.anticipation: Anticipation | None = None
        if stage.anticipatory_steps:
            if not self.config.n_routed_experts:
                raise stage.wrong("anticipatory_steps", "the model has no routed experts", "Use 0.")
            ahead = Loader(self.folder, stage.mixture, stage.seq_len_at(0), extra, order, stage.packing)
            self.anticipation = Anticipation(self, ahead)
            trainer.extras = [*trainer.extras, self.anticipation]
        self.tokens, self.tokens_before = 0, 0  # after and before the last step
        self.attention: Attention = stage.attention_at(0)
        self.decay_start: int | None = None
        # tokens at which the probe was passed
        self.passed_at: int | None = None
        self.best_probe = 0.0
        # the probe's problems, drawn at its first use
        self.probed: list[Problem] = []
        self.best_bits: float | None = None
        self.skipped, self.rewinds = 0, 0

    def done(self, loop: Loop) -> float:
        return self.tokens

    def finished(self, loop: Loop) -> bool:
        if self.stage.phases:
            return self.tokens >= self.stage.limit
        return self.decay_start is not None and self.tokens >= self.decay_start + self.stage.decay_tokens

    # ---- one step --------------------------------------------------------------------------------------------------

    def step(self, loop: Loop) -> dict[str, Any]:
        """One step on the next rows; if it is skipped, `skipped` says why."""
        stage, trainer = self.stage, self.trainer
        rows, length = stage.batch_size_at(self.tokens), stage.seq_len_at(self.tokens)
        routed = nullcontext() if self.anticipation is None else self.anticipation.routed(loop)
        self.tokens_before, self.tokens = self.tokens, self.tokens + rows * length
        batch, counts = self._batch(rows, length, loop)
        mtp_weight, share = rates.level(stage.mtp_weight, self.tokens), len(batch.tokens) / rows
        trainer.zero()
        with routed:
            losses = trainer.backward(batch, LossTerms(counts, mtp_weight, stage.balance_alpha, share))
        norm = trainer.finish(stage.max_grad_norm)
        loss, mtp, balance = losses.tolist()
        metrics = {"tokens": self.tokens, "batch_size": rows, "loss": loss, "mtp_loss": mtp, "balance": balance}
        metrics["grad_norm"] = norm
        if isinstance(stage.seq_len, tuple):
            metrics["seq_len"] = length
        if self.config.index_topk and self.attention != "dense" and is_taught(trainer.model):
            metrics["indexer_loss"] = sum(self.world.gather(divergence(trainer.model))) / self.world.size
        verdict = self.spikes.judge(loss, norm)
        if verdict != "learn":
            trainer.forget_loads()
            self.skipped += 1
            self.run.say(f"{stage.name:10} step {loop.step} skipped: loss {loss:.3f}, gradient norm {norm:.3g}")
            return metrics | {"lr": 0.0, "skipped": verdict}
        trainer.update(*self.lrs)
        trainer.average()
        health = trainer.balance(rates.level(stage.bias_speed, self.tokens))
        if health.loads and loop.step % stage.router_steps == 0:
            described = router_health.describe(health, trainer.biases())
            self.run.append(ROUTER, {"step": loop.step, "tokens": self.tokens, **described})
        return metrics | {"lr": self.lrs[0], "max_violation": health.violation, "idle_experts": health.idle}

    def _attend(self) -> None:
        """Sets how the model attends in the next step, and in evaluation before it."""
        before, self.attention = self.attention, self.stage.attention_at(self.tokens)
        for model in self.trainer.models if self.config.index_topk else ():
            set_attention(model, self.attention)
        if before != self.attention:
            self.run.say(
                f"{self.stage.name:10} {self.tokens:,} tokens: attention changes from {before} to {self.attention}"
            )

    def _batch(self, rows: int, length: int, loop: Loop) -> tuple[Batch, list[float]]:
        """This rank's share of the step's rows, and the number of labels of the whole step for the trunk and each MTP depth."""
        stage, trainer = self.stage, self.trainer
        self.loader.resize(length)
        drawn = self.loader.draw(rows, trainer.data_rank, trainer.data_ranks, stage.document_mask)
        batch = of_rows(drawn, length)
        # a warm-up is counted as the dense attention that it is
        config = self.config if self.attention == "sparse" else attending_densely(self.config)
        if stage.packing == "stream" and not stage.document_mask:  # every row is full, so nothing needs counting
            counts = [float(rows * length)] * (1 + self.depths)
            flops = training_flops_of(config, [length]) * rows
        else:
            mine = torch.cat([batch.counts(self.depths), torch.zeros(1, dtype=torch.float64)])
            mine[-1] = training_flops_of(config, batch.lengths())
            same = self.world.size // trainer.data_ranks  # ranks that read the same rows, such as those of a pipeline
            *counts, flops = (self.world.sum_(mine) / same).tolist()
            counts = [max(1.0, count) for count in counts]
        again = recomputed_flops(config, (length + 1) / 2, stage.recompute)
        loop.spend(tokens=rows * length, training=flops, recomputed=rows * length * again)
        return batch.to(self.world.device), counts

    @property
    def lrs(self) -> tuple[float, float]:
        """This step's learning rates: (hidden matrices, the rest)."""
        stage = self.stage
        if stage.phases:
            factor = rates.along(stage.phases, self.tokens)
        else:
            factor = rates.warmup(self.tokens, stage.warmup_tokens)
            factor *= rates.decay(self.tokens, self.decay_start, stage.decay_tokens, stage.final_lr)
        matrices = stage.muon_lr if stage.optimizer == "muon" else stage.adam_lr
        return matrices * factor, stage.adam_lr * factor

    def note(self, metrics: dict[str, Any]) -> str:
        return f"loss {metrics['loss']:.3f}  MFU {metrics['mfu']:.0%}"

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def after(self, loop: Loop, metrics: dict[str, Any]) -> None:
        if metrics.get("skipped") == "rewind":  # the restored model was evaluated before
            self._rewind(loop)
            return
        self._attend()
        self._maybe_probe(loop, self.tokens_before)
        self._maybe_validate(loop, self.tokens_before)

    def _maybe_probe(self, loop: Loop, before: int) -> None:
        """Starts the decay if the probe is passed, or if only the decay still fits; `before`: tokens at the previous call."""
        stage, probe, run = self.stage, self.stage.probe, self.run
        if self.decay_start is not None or stage.phases:
            return
        if probe and self.tokens // probe.every_tokens > before // probe.every_tokens:
            accuracy = self._probe(probe, loop)
            self.best_probe = max(self.best_probe, accuracy)
            run.log(loop.step, tokens=self.tokens, probe=accuracy)
            run.say(f"{stage.name:10} {self.tokens:,} tokens: probe {accuracy:.0%} of {probe.at_least:.0%}")
            if accuracy >= probe.at_least:
                self.decay_start = self.passed_at = self.tokens
        if self.decay_start is None and self.tokens + stage.decay_tokens >= stage.max_tokens:
            self.decay_start = self.tokens
            if probe:
                run.say(
                    f"{stage.name:10} PROBE NOT REACHED: best {self.best_probe:.0%} of {probe.at_least:.0%} "
                    f"within max_tokens = {stage.max_tokens:,}; expect little from RL"
                )

    def _probe(self, probe: "Probe", loop: Loop) -> float:
        if not self.probed:
            window = Window(self.tokenizer, self.config, probe.max_tokens, think=True)
            drawn = tasks.distinct(probe.task, "train", probe.problems, self.run.seed("probe"))
            self.probed, _ = askable(probe.task, drawn, window, self.run, "probe: ")
        problems = self.probed
        sampling = SamplingParams(temperature=0.0, max_tokens=probe.max_tokens)
        given = self.tokenizer, probe.task, problems, [0] * len(problems), sampling, True, self.world
        model = set_attention(self.trainer.gathered(), self.attention)
        rollouts = EngineRollouts(ServedWeights(model), self.config, self.tokenizer)
        rollouts.update(loop.step)
        right, flops = answered(rollouts, *given)
        loop.spend(evaluation=flops)
        return sum(right) / len(right)

    def bits_per_byte(self, loop: Loop) -> dict[str, float]:
        """Bits per byte of each source's validation text."""
        trainer, sources = self.trainer, self.loader.shares
        part = trainer.data_rank, trainer.data_ranks
        bits, flops = bits_by_source(trainer.text_logprobs, self.config, self.folder, sources, self.world, part)
        loop.spend(evaluation=flops)
        return {name: value for name, value in bits.items() if value is not None}

    def _maybe_validate(self, loop: Loop, before: int) -> None:
        """Measures compression every `valid_tokens`, and stores the best model if `keep_best` is set."""
        stage, run = self.stage, self.run
        if not stage.valid_tokens or self.tokens // stage.valid_tokens == before // stage.valid_tokens:
            return
        bits = self.bits_per_byte(loop)
        run.log(loop.step, tokens=self.tokens, **{f"bits_per_byte_{name}": b for name, b in bits.items()})
        shares = {name: self.loader.shares[name] for name in bits}
        mean = sum(bits[n] * s for n, s in shares.items()) / sum(shares.values()) if shares else None
        if stage.keep_best and mean is not None and (self.best_bits is None or mean < self.best_bits):
            self.best_bits = mean
            self.trainer.export(run, run.folder / "best", self.tokenizer)

    # ---- saving and resuming ---------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in STATE}
        found = {"loader": self.loader.state(), "spikes": self.spikes.state(), **numbers}
        return found if self.anticipation is None else found | {"anticipation": {"left": self.anticipation.left}}

    def load_state(self, state: dict[str, Any]) -> None:
        self.loader.load_state(state["loader"])
        self.spikes.load_state(state["spikes"])
        for name in STATE:
            setattr(self, name, state[name])
        self._attend()
        if self.anticipation is not None:
            self.anticipation.resume(state["anticipation"])

    def _rewind(self, loop: Loop) -> None:
        """Returns to the weights of the last checkpoint and continues with the data that follow; logged and saved at once."""
        stage, run, here = self.stage, self.run, loop.step
        state = loop.restore()
        if state is None or self.rewinds >= REWINDS:
            row = f"{self.spikes.in_a_row} steps in a row up to {here}"
            problem = f"{row} had to be skipped, after {self.rewinds} rewinds"
            remedy = "Lower the learning rates, or raise spike_sigma if such losses are normal for your data."
            raise stage.wrong("muon_lr", problem, remedy)
        self.spikes.load_state(state["spikes"])
        for name in ("tokens", "decay_start", "passed_at"):
            setattr(self, name, state[name])
        self.rewinds += 1
        self._attend()
        if self.anticipation is not None:
            self.anticipation.start()
            how = f"by weights that are {stage.anticipatory_delay} updates old"
            run.say(f"{stage.name:10} experts are chosen {how} for {stage.anticipatory_steps} steps")
        self.world.barrier()  # every rank has read the checkpoint before it is replaced
        run.rewind(loop.step + 1)
        run.log(loop.step, tokens=self.tokens, rewound_from=here)
        run.say(f"{stage.name:10} rewound from step {here} to {loop.step}; the data in between are skipped")
        loop.checkpoint(always=True)

    def finish(self, loop: Loop) -> dict[str, Any]:
        """Writes the model and its moving average, and returns the results."""
        stage, run = self.stage, self.run
        if self.config.index_topk and self.attention == "dense":
            run.say(f"{stage.name:10} ENDED WITH DENSE ATTENTION at {self.tokens:,} tokens: indexers are untrained")
        self.trainer.export(run, run.folder, self.tokenizer)
        if stage.ema_decay:
            with self.trainer.averaged():
                self.trainer.export(run, run.folder / "average", self.tokenizer)
        bits = self.bits_per_byte(loop)
        loop.account()
        late = [r for r in read_lines(run.folder / METRICS) if "max_violation" in r][-100:]
        return {
            "tokens": self.tokens,
            "steps": loop.step,
            "precision": self.precision,
            "probe_reached": self.passed_at is not None if stage.probe else None,
            "probe_best": self.best_probe,
            "probe_passed_at_tokens": self.passed_at,
            "tokens_by_source": self.loader.tokens_by_source(),
            "router_last_100_steps": {
                k: max((r[k] for r in late), default=0) for k in ("max_violation", "idle_experts")
            },
            "bits_per_byte": bits,
            "skipped_steps": self.skipped,
            "rewinds": self.rewinds,
        }
