"""Pre-training: next token and multi-token prediction, Muon + AdamW, balance without auxiliary loss.

The learning rate warms up, stays, and decays once a probe is passed: the run ends because the model can do
something, not because a counter ran out. If the probe is never passed it ends at `max_tokens` and says so.
"""

import dataclasses
import math
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch

from finback.checkpoint import model as models
from finback.checkpoint import store
from finback.config import UserError, check_fields, check_positive
from finback.data.loader import Loader
from finback.data.tokenizer import Tokenizer
from finback.engine.engine import Engine
from finback.engine.sequence import Sampling
from finback.kernels.probe import gemm_peak
from finback.model.config import ModelConfig
from finback.model.count import training_flops
from finback.model.moe import max_violation
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.recipe import Stage, Work
from finback.run import Interrupted, Progress, StageRun, read_json, read_lines, spent, write_json
from finback.stages.compress import bits_per_byte
from finback.stages.rollout import rollout
from finback.tasks import task as tasks
from finback.tasks.task import Task
from finback.train import schedule
from finback.train.optim import Adam, Gradients, Muon, is_matrix
from finback.train.precision import COMPUTE, rates
from finback.train.step import backward


@dataclass(frozen=True)
class Probe:
    """What pre-training must reach: greedy accuracy on training-side problems with the chain opened for it."""

    task: Task
    at_least: float
    problems: int = 128
    every_tokens: int = 200_000
    max_tokens: int = 96

    def __post_init__(self) -> None:
        check_fields(self, "probe")
        check_positive(self, "probe", "problems", "every_tokens", "max_tokens")


@dataclass(frozen=True, kw_only=True)
class Pretrain(Stage):
    """Train a model from scratch on the shards of a prepare stage."""

    data: str
    model: ModelConfig
    mixture: dict[str, float]  # source name -> share of tokens
    probe: Probe | None = None
    max_tokens: int = 4_000_000  # hard end, decay included
    decay_tokens: int = 500_000
    warmup_tokens: int = 80_000
    rows: int = 32  # rows per step over all ranks
    length: int = 128  # tokens per row
    muon_lr: float = 8e-3
    adam_lr: float = 8e-3
    final_lr: float = 0.05  # where the decay ends, as a share of the rates above
    weight_decay: float = 0.05
    clip: float = 1.0
    mtp_weight: float = 0.3
    balance_alpha: float = 1e-4
    bias_speed: float = 0.003
    compute: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where a timed step says it pays
    checkpoint_steps: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, self.name, "max_tokens", "rows", "length", "checkpoint_steps")

    def inputs(self) -> tuple[str, ...]:
        return (self.data,)

    def work(self) -> Work:
        return Work(tokens_trained=self.max_tokens)

    def run(self, run: StageRun) -> dict[str, Any]:
        return _Pretraining(self, run).run()


class _Pretraining:
    """The state of one pre-training run between its steps; what a checkpoint saves and restores."""

    def __init__(self, stage: Pretrain, run: StageRun) -> None:
        self.stage, self.stage_run = stage, run
        assert isinstance(run.ranks, World), "training exchanges gradients over a World"
        self.world = run.ranks
        if stage.rows % self.world.size:
            raise UserError(
                f"{stage.name}.rows",
                stage.rows,
                f"does not divide among {self.world.size} ranks",
                "Use --ranks.",
            )
        self.folder = run.input(stage.data)
        self.tokenizer = Tokenizer(self.folder)
        config = dataclasses.replace(stage.model, vocab_size=self.tokenizer.vocab_size)
        self.precision = _choose_precision(stage, config, run, self.world)
        self.model = Transformer(config, COMPUTE[self.precision]).initialise(run.seed("weights"))
        named = list(self.model.named_parameters())
        matrices = [(n, p) for n, p in named if is_matrix(n, p)]
        others = [(n, p) for n, p in named if not is_matrix(n, p)]
        self.gradients = Gradients([p for _, p in named])
        self.muon = Muon(
            matrices, self.world, weight_decay=stage.weight_decay, compute=COMPUTE[self.precision]
        )
        self.adam = Adam(others, betas=(0.9, 0.95), weight_decay=0.0)
        extra = 1 + config.num_nextn_predict_layers
        self.loader = Loader(self.folder, stage.mixture, stage.length, extra, run.seed("order"))
        self.step = 0
        self.decay_start: int | None = None
        self.passed_at: int | None = None  # tokens when the probe was passed
        self.best_probe = 0.0
        self.saved_step, self.saved_time = 0, time.perf_counter()

    @property
    def tokens(self) -> int:
        return self.step * self.stage.rows * self.stage.length

    def run(self) -> dict[str, Any]:
        stage, run = self.stage, self.stage_run
        self._resume()
        peak = gemm_peak(COMPUTE[self.precision], torch.device("cpu"))
        flops = training_flops(self.model.config, stage.length / 2) * stage.rows * stage.length
        progress = Progress(run, stage.max_tokens, "tokens", spent(run.folder)["seconds"])
        mark = time.perf_counter()
        self.model.train()
        while not self._finished():
            metrics = self._train_step()
            seconds, mark = time.perf_counter() - mark, time.perf_counter()
            rate = stage.rows * stage.length / seconds
            mfu = flops / (seconds * peak * self.world.size)
            run.log(self.step, tokens=self.tokens, **metrics, tokens_per_second=rate, mfu=mfu)
            progress.show(self.tokens, f"loss {metrics['loss']:.3f}  MFU {mfu:.0%}")
            self._maybe_probe()
            stop = run.check_stop()
            if stop or self.step % stage.checkpoint_steps == 0:
                self._checkpoint(flops, peak)
            if stop:
                raise Interrupted
        self._checkpoint(flops, peak)
        return self._finish()

    def _train_step(self) -> dict[str, float]:
        stage, world = self.stage, self.world
        self.step += 1
        batch = self.loader.batch(stage.rows, world.rank, world.size)
        self.gradients.zero()
        losses = backward(self.model, batch, stage.mtp_weight, stage.balance_alpha)
        norm = self.gradients.finish(world, 1 / world.size, stage.clip)
        factor = schedule.warmup(self.tokens, stage.warmup_tokens)
        factor *= schedule.decay(self.tokens, self.decay_start, stage.decay_tokens, stage.final_lr)
        numbers = world.sum_(torch.stack([losses.main, losses.mtp, losses.balance])) / world.size
        if not math.isfinite(norm):
            raise UserError(
                f"{stage.name}.muon_lr",
                stage.muon_lr,
                f"the gradient is not finite at step {self.step}",
                "Lower it.",
            )
        self.muon.step(stage.muon_lr * factor)
        self.adam.step(stage.adam_lr * factor)
        loads = [world.sum_(router.load) for router in self.model.routers()]
        violation = max((max_violation(load) for load in loads), default=0.0)
        dead = sum(int((load == 0).sum()) for load in loads)
        for router in self.model.routers():
            router.update_bias(stage.bias_speed)
        loss, mtp, balance = numbers.tolist()
        return {
            "loss": loss, "mtp_loss": mtp, "balance": balance, "grad_norm": norm, "lr": stage.muon_lr * factor,
            "max_violation": violation, "idle_experts": dead,
        }  # fmt: skip

    def _finished(self) -> bool:
        if self.decay_start is not None:
            return self.tokens >= self.decay_start + self.stage.decay_tokens
        return False

    def _maybe_probe(self) -> None:
        """Start the decay when the probe is passed, or when only the decay still fits."""
        stage, probe, run = self.stage, self.stage.probe, self.stage_run
        if self.decay_start is not None:
            return
        per_step = stage.rows * stage.length
        if probe and self.tokens // probe.every_tokens > (self.tokens - per_step) // probe.every_tokens:
            accuracy = self._probe(probe)
            self.best_probe = max(self.best_probe, accuracy)
            run.log(self.step, tokens=self.tokens, probe=accuracy)
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

    def _probe(self, probe: Probe) -> float:
        problems = tasks.distinct(probe.task, "train", probe.problems, self.stage_run.seed("probe"))
        mine = problems[self.world.rank :: self.world.size]
        engine = Engine(self.model, self.tokenizer.stops)
        sampling = Sampling(temperature=0.0, max_tokens=probe.max_tokens)
        judged = rollout(engine, self.tokenizer, probe.task, mine, [0] * len(mine), sampling, think=True)
        right = self.world.sum_(torch.tensor(float(sum(r.verdict.correct for r in judged))))
        return right.item() / probe.problems

    def _checkpoint(self, flops: float, peak: float) -> None:
        """Save everything the next step depends on, and account for what was spent since the last time."""
        done = self.step - self.saved_step
        seconds_peak = (time.perf_counter() - self.saved_time) * peak * self.world.size
        self.saved_step, self.saved_time = self.step, time.perf_counter()
        meta = {
            "loader": self.loader.state(), "decay_start": self.decay_start, "passed_at": self.passed_at,
            "best_probe": self.best_probe,
        }  # fmt: skip
        if self.stage_run.is_writer and done:
            tensors = models.tensors_of(self.model)
            tensors |= self.muon.state() | self.adam.state()
            store.save_step(self.stage_run.folder, self.step, tensors, meta)
        tokens = done * self.stage.rows * self.stage.length
        self.stage_run.account(tokens_trained=tokens, flops=done * flops, peak_flops=seconds_peak)

    def _resume(self) -> None:
        found = store.load_newest(self.stage_run.folder)
        if found is not None:
            self.step, tensors, meta = found
            self.saved_step = self.step
            models.restore(self.model, tensors)
            self.muon.load_state(tensors)
            self.adam.load_state(tensors)
            self.loader.load_state(meta["loader"])
            self.decay_start, self.passed_at = meta["decay_start"], meta["passed_at"]
            self.best_probe = meta["best_probe"]
            self.stage_run.say(f"{self.stage.name:10} resumed at {self.tokens:,} tokens")
        self.stage_run.rewind(self.step + 1)

    def _finish(self) -> dict[str, Any]:
        stage, run = self.stage, self.stage_run
        bits = {name: bits_per_byte(self.model, self.folder, name, self.world) for name in self.loader.shares}
        if run.is_writer:
            models.save(run.folder, self.model)
            self.tokenizer.save(run.folder)
            store.clear(run.folder)
        drawn = self.loader.tokens_by_source()
        late = [r for r in read_lines(run.folder / "metrics.jsonl") if "max_violation" in r][-100:]
        return {
            "tokens": self.tokens, "steps": self.step, "precision": self.precision,
            "probe_reached": self.passed_at is not None if stage.probe else None,
            "probe_best": self.best_probe, "probe_passed_at_tokens": self.passed_at,
            "tokens_by_source": drawn,
            "router_last_100_steps": {k: max((r[k] for r in late), default=0) for k in ("max_violation", "idle_experts")}, "bits_per_byte": {k: v for k, v in bits.items() if v is not None},
        }  # fmt: skip


def _choose_precision(stage: Pretrain, config: ModelConfig, run: StageRun, world: World) -> str:
    """fp32 or bf16, decided once per stage and written down, so that resuming cannot differ."""
    path = run.folder / "precision.json"
    if stage.compute != "auto":
        return stage.compute
    if path.is_file():
        return str(read_json(path)["chosen"])
    measured = rates(config, stage.rows // world.size, stage.length)
    # bf16 must win clearly, and on every rank: it costs digits
    chosen = "bf16" if all(world.gather(measured["bf16"] > 1.15 * measured["fp32"])) else "fp32"
    if run.is_writer:
        write_json(path, {"chosen": chosen, "tokens_per_second_per_rank": measured})
    run.ranks.barrier()
    text = ", ".join(f"{name} {rate:,.0f}" for name, rate in measured.items())
    run.say(f"{stage.name:10} computes in {chosen}: {text} tokens/s per rank")
    return chosen
