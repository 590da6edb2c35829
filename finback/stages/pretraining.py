"""The loop of pre-training: its state between steps, what a checkpoint saves and restores, and one step top to bottom."""

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finback.checkpoint import models, store
from finback.config import UserError
from finback.data.loader import Loader
from finback.data.tokenizer import Tokenizer
from finback.engine.engine import Engine
from finback.engine.request import SamplingParams
from finback.kernels.probe import gemm_peak
from finback.model.config import ModelConfig
from finback.model.count import forward_flops, recomputed_flops, training_flops
from finback.model.recompute import use_recompute
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.runs.files import read_json, write_json
from finback.runs.folder import Interrupted, StageRun
from finback.runs.ledger import spent
from finback.runs.progress import Progress
from finback.stages.compress import bits_by_source, tokens_compressed
from finback.stages.rollout import rollout
from finback.tasks import task as tasks
from finback.train import rates as schedule
from finback.train import router_health
from finback.train.ema import EMA
from finback.train.optim import Adam, Gradients, Muon, is_matrix
from finback.train.precision import rates, use_fp8
from finback.train.spikes import Spikes, Verdict
from finback.train.step import Losses, backward, backward_rows, counts

if TYPE_CHECKING:
    from finback.stages.pretrain import Pretrain, Probe

STATE = ("decay_start", "passed_at", "best_probe", "tokens", "best_bits", "skipped", "rewinds")
REWINDS = 5  # after so many the weights or the rates are at fault, and no other data will help


class Pretraining:
    """The state of one pre-training run between its steps."""

    def __init__(self, stage: "Pretrain", run: StageRun) -> None:
        self.stage, self.stage_run = stage, run
        assert isinstance(run.ranks, World), "training exchanges gradients over a World"
        self.world = run.ranks
        self._check_rows()
        self.folder = run.input(stage.data)
        self.tokenizer = Tokenizer(self.folder)
        self.set_up()
        extra = 1 + self.config.num_nextn_predict_layers
        order = run.seed("order")
        self.loader = Loader(self.folder, stage.mixture, stage.length, extra, order, stage.packing)
        self.spikes = Spikes(stage.spike_sigma, stage.spike_patience)
        self.step, self.tokens = 0, 0
        self.decay_start: int | None = None
        self.passed_at: int | None = None  # tokens when the probe was passed
        self.best_probe = 0.0
        self.best_bits: float | None = None
        self.skipped, self.rewinds = 0, 0
        self.worked, self.saved_time = 0, time.perf_counter()  # tokens since the last line of the ledger
        self.looked = 0  # tokens that were only looked at since then

    def set_up(self) -> None:
        """The model and what trains it."""
        stage = self.stage
        self.model = use_recompute(self._build().to(self.world.device), stage.recompute).train()
        if stage.compile:
            self._compile()
        self.config = self.model.config
        self.routers = self.model.routers()
        named = list(self.model.named_parameters())
        self.gradients = Gradients([p for _, p in named])
        self.matrices = self._matrices([(n, p) for n, p in named if is_matrix(n, p)])
        self.others = Adam([(n, p) for n, p in named if not is_matrix(n, p)], betas=(0.9, 0.95), weight_decay=0.0)
        self.average = EMA(self.model, stage.average) if stage.average else None

    def _compile(self) -> None:
        from finback.train import compiling  # seconds of imports that only it needs

        problem = compiling.why_not()
        if problem:
            raise UserError(
                f"{self.stage.name}.compile",
                True,
                f"does not work here: {problem}",
                "Install g++ and Python's headers (Debian: apt-get install g++ python3-dev), or leave it out.",
            )
        compiling.compile_blocks(self.model)
        self.stage_run.say(f"{self.stage.name:10} blocks are compiled in the first step, which may take a minute")

    def _check_rows(self) -> None:
        for name in ("rows", "rows_start"):
            if getattr(self.stage, name) % self.world.size:
                raise UserError(
                    f"{self.stage.name}.{name}",
                    getattr(self.stage, name),
                    f"does not divide among {self.world.size} ranks",
                    "Use --ranks.",
                )

    def _build(self) -> Transformer:
        """The model with its first weights: random ones, or those of `start`."""
        stage, run = self.stage, self.stage_run
        if stage.model is not None:
            config = dataclasses.replace(stage.model, vocab_size=self.tokenizer.vocab_size)
            self.precision = _choose_precision(stage, config, run, self.world)
            return self._rounded(Transformer(config, self.dtype).initialise(run.seed("weights")))
        model = self.started()
        self.precision = _choose_precision(stage, model.config, run, self.world)
        return self._rounded(model.with_config(stage.adapted(model.config), self.dtype))

    def started(self) -> Transformer:
        """The model of `start`, checked to speak the data's tokens."""
        stage, folder = self.stage, self.stage_run.input(self.stage.start)
        if Tokenizer(folder).as_json() != self.tokenizer.as_json():
            raise UserError(
                f"{stage.name}.start",
                stage.start,
                f"has another tokenizer than the data of {stage.data!r}",
                "Give the prepare stage this model's tokenizer.",
            )
        return models.load(folder)

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes from one operator to the next."""
        return torch.float32 if self.precision == "fp32" else torch.bfloat16

    def _rounded(self, model: Transformer) -> Transformer:
        return use_fp8(model) if self.precision == "fp8" else model

    def _matrices(self, named: list[tuple[str, torch.nn.Parameter]]) -> Muon | Adam:
        stage = self.stage
        if stage.optimizer == "adamw":
            return Adam(named, betas=(0.9, 0.95), weight_decay=stage.weight_decay)
        return Muon(named, self.world, weight_decay=stage.weight_decay, compute=self.dtype)

    def run(self) -> dict[str, Any]:
        """Train to the end, from wherever an interrupted call left off."""
        stage, run = self.stage, self.stage_run
        self._resume()
        self.peak = gemm_peak(self.dtype, self.world.device)
        self.flops = training_flops(self.config, stage.length / 2)  # of one token
        progress = Progress(run, stage.limit, "tokens", spent(run.folder)["seconds"])
        mark = time.perf_counter()
        while not self._finished():
            before = self.tokens
            metrics = self._train_step()
            seconds, mark = time.perf_counter() - mark, time.perf_counter()
            rate = (self.tokens - before) / seconds
            mfu = rate * self.flops / (self.peak * self.world.size)
            run.log(self.step, tokens=self.tokens, **metrics, tokens_per_second=rate, mfu=mfu)
            progress.show(self.tokens, f"loss {metrics['loss']:.3f}  MFU {mfu:.0%}")
            if metrics.get("skipped") == "rewind":
                self._rewind()
            self._maybe_probe()
            self._maybe_validate(before)
            stop = run.check_stop()
            if stop or self.step % stage.checkpoint_steps == 0:
                self._checkpoint()
            if stop:
                self.settle()
                raise Interrupted
        self._checkpoint()
        return self._finish()

    # ---- one step --------------------------------------------------------------------------------------------------

    def _train_step(self) -> dict[str, Any]:
        rows = self.stage.rows_at(self.tokens)
        self.step += 1
        self.tokens += rows * self.stage.length
        self.worked += rows * self.stage.length
        return {"rows": rows, **self.learn(rows)}

    def learn(self, rows: int) -> dict[str, Any]:
        """One step on so many rows; what there is to say of it, and under "skipped" what became of it instead."""
        stage, world = self.stage, self.world
        losses, norm = self._gradients(rows)
        numbers = world.sum_(torch.stack([losses.main, losses.mtp, losses.balance])) / world.size
        loss, mtp, balance = numbers.tolist()
        metrics = {"loss": loss, "mtp_loss": mtp, "balance": balance, "grad_norm": norm}
        verdict = self.judge(loss, norm)
        if verdict != "learn":
            router_health.forget(self.routers)
            return metrics | {"lr": 0.0, "skipped": verdict}
        self.matrices.step(self.rates[0])
        self.others.step(self.rates[1])
        if self.average is not None:
            self.average.update(self.model)
        seen = router_health.balance(self.routers, world, schedule.level(stage.bias_speed, self.tokens))
        if self.routers and self.step % stage.router_steps == 0:
            described = {"step": self.step, "tokens": self.tokens, **router_health.describe(seen, self.routers)}
            self.stage_run.log_router(described)
        return metrics | {"lr": self.rates[0], "max_violation": seen.violation, "idle_experts": seen.idle}

    def judge(self, loss: float, norm: float) -> Verdict:
        """Whether to learn from the step; says so if not."""
        verdict = self.spikes.judge(loss, norm)
        if verdict != "learn":
            self.skipped += 1
            told = f"step {self.step} skipped: loss {loss:.3f}, gradient norm {norm:.3g}"
            self.stage_run.say(f"{self.stage.name:10} {told}")
        return verdict

    @property
    def rates(self) -> tuple[float, float]:
        """This step's learning rates: of hidden matrices, and of the rest."""
        stage, factor = self.stage, self._factor()
        matrices = stage.muon_lr if stage.optimizer == "muon" else stage.adam_lr
        return matrices * factor, stage.adam_lr * factor

    def _gradients(self, rows: int) -> tuple[Losses, float]:
        """This rank's losses on its share of the step's rows; the gradient, whole on every rank, and its norm."""
        stage, world = self.stage, self.world
        self.gradients.zero()
        weight = schedule.level(stage.mtp_weight, self.tokens)
        if stage.packing == "stream" and not stage.document_mask:
            batch = self.loader.batch(rows, world.rank, world.size).to(world.device)
            losses = backward(self.model, batch, weight, stage.balance_alpha)
        else:
            losses = self._masked(rows, weight)
        return losses, self.gradients.finish(world, 1 / world.size, stage.clip)

    def _masked(self, rows: int, mtp_weight: float) -> Losses:
        """Rows with padding or with several documents, of which no rank has the same number of targets."""
        batch = self.loader.draw(rows, self.world.rank, self.world.size, self.stage.document_mask)
        mine = counts(batch, len(self.model.mtp))
        mean = self.world.sum_(mine.clone()) / self.world.size
        shares = (mine / mean.clamp(min=1)).tolist()
        alpha = self.stage.balance_alpha
        return backward_rows(self.model, batch.to(self.world.device), mtp_weight, alpha, shares)

    def _factor(self) -> float:
        """This step's share of the full learning rates."""
        stage = self.stage
        if stage.phases:
            return schedule.along(stage.phases, self.tokens)
        factor = schedule.warmup(self.tokens, stage.warmup_tokens)
        return factor * schedule.decay(self.tokens, self.decay_start, stage.decay_tokens, stage.final_lr)

    def _finished(self) -> bool:
        if self.stage.phases:
            return self.tokens >= self.stage.limit
        if self.decay_start is not None:
            return self.tokens >= self.decay_start + self.stage.decay_tokens
        return False

    # ---- looking at it ---------------------------------------------------------------------------------------------

    def _maybe_probe(self) -> None:
        """Start the decay when the probe is passed, or when only the decay still fits."""
        stage, probe, run = self.stage, self.stage.probe, self.stage_run
        if self.decay_start is not None or stage.phases:
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

    def _probe(self, probe: "Probe") -> float:
        problems = tasks.distinct(probe.task, "train", probe.problems, self.stage_run.seed("probe"))
        mine = problems[self.world.rank :: self.world.size]
        engine = Engine(self.model, self.tokenizer.stops)
        sampling = SamplingParams(temperature=0.0, max_tokens=probe.max_tokens)
        judged = rollout(engine, self.tokenizer, probe.task, mine, [0] * len(mine), sampling, think=True)
        read = sum(len(r.prompt) + len(r.completion.tokens) for r in judged)
        sums = torch.tensor([sum(r.verdict.correct for r in judged), read], dtype=torch.float64)
        right, looked = self.world.sum_(sums).tolist()
        self.looked += int(looked)
        return float(right) / probe.problems

    def bits(self) -> dict[str, float]:
        """How well the model compresses what was kept apart of each source."""
        return bits_by_source(self.model, self.folder, self.loader.shares, self.world)

    def _compress(self) -> dict[str, float]:
        """The same, accounted for."""
        bits = self.bits()
        self.looked += sum(tokens_compressed(self.folder, name) for name in bits)
        return bits

    def _flops_of_looking(self) -> float:
        """FLOPs of probes and validation since the last call."""
        looked, self.looked = self.looked, 0
        return looked * forward_flops(self.config, self.stage.length / 2)

    def _maybe_validate(self, before: int) -> None:
        """Compress validation text every `valid_tokens`, and keep the model that does it best if asked to."""
        stage, run = self.stage, self.stage_run
        if not stage.valid_tokens or self.tokens // stage.valid_tokens == before // stage.valid_tokens:
            return
        bits = self._compress()
        run.log(self.step, tokens=self.tokens, **{f"bits_per_byte_{name}": b for name, b in bits.items()})
        shares = {name: self.loader.shares[name] for name in bits}
        mean = sum(bits[n] * s for n, s in shares.items()) / sum(shares.values()) if shares else None
        if stage.keep_best and mean is not None and (self.best_bits is None or mean < self.best_bits):
            self.best_bits = mean
            self._save(run.folder / "best", self.model)

    # ---- saving and going on ---------------------------------------------------------------------------------------

    def _save(self, folder: Path, model: Transformer) -> None:
        """A model and its tokenizer in a folder, by the writer alone."""
        if self.stage_run.is_writer:
            folder.mkdir(exist_ok=True)
            self.tokenizer.save(folder)
            models.save(folder, model)

    def _checkpoint(self) -> None:
        """Save everything the next step depends on, and account for what was spent since the last time."""
        now = time.perf_counter()
        seconds_peak, self.saved_time = (now - self.saved_time) * self.peak * self.world.size, now
        if self.worked:
            self.save_step(self._meta())
        flops, tokens, self.worked = self.worked * self.flops, self.worked, 0
        again = tokens * recomputed_flops(self.config, self.stage.length / 2, self.stage.recompute)
        self.stage_run.account(
            tokens_trained=tokens,
            flops=flops,
            peak_flops=seconds_peak,
            flops_training=flops,
            flops_recomputed=again,
            flops_evaluation=self._flops_of_looking(),
        )

    def save_step(self, meta: dict[str, Any]) -> None:
        """Write a checkpoint of this step."""
        if self.stage_run.is_writer:
            average = self.average.state() if self.average is not None else {}
            tensors = models.tensors_of(self.model) | self.matrices.state() | self.others.state() | average
            store.save_step(self.stage_run.folder, self.step, tensors, meta, self.stage.keep)

    def settle(self) -> None:
        """Wait for what is still being written."""

    def load_step(self) -> tuple[int, dict[str, Any]] | None:
        """Take back the newest checkpoint's tensors; its step and what `_meta` said, or None where there is none."""
        found = store.load_newest(self.stage_run.folder, self.stage_run.say)
        if found is None:
            return None
        step, tensors, meta = found
        models.restore(self.model, tensors)
        self.matrices.load_state(tensors)
        self.others.load_state(tensors)
        if self.average is not None:
            self.average.load_state(tensors)
        return step, meta

    def _meta(self) -> dict[str, Any]:
        """What else the next step depends on, as JSON."""
        state = {name: getattr(self, name) for name in STATE}
        return {"loader": self.loader.state(), "spikes": self.spikes.state(), **state}

    def _resume(self) -> None:
        found = self.load_step()
        if found is not None:
            self.step, meta = found
            self.loader.load_state(meta["loader"])
            self.spikes.load_state(meta["spikes"])
            for name in STATE:
                setattr(self, name, meta[name])
            self.stage_run.say(f"{self.stage.name:10} resumed at {self.tokens:,} tokens")
        self.stage_run.rewind(self.step + 1)

    def _rewind(self) -> None:
        """Back to the weights of the last checkpoint, on with the data that follow; said, logged and saved at once."""
        stage, run = self.stage, self.stage_run
        here, found = self.step, self.load_step()
        if found is None or self.rewinds >= REWINDS:
            raise UserError(
                f"{stage.name}.muon_lr",
                stage.muon_lr,
                f"{self.spikes.in_a_row} steps in a row up to {here} were not to be learnt from, after {self.rewinds} rewinds",
                "Lower the learning rates, or raise spike_sigma if these losses are what the data are like.",
            )
        self.step, meta = found
        self.spikes.load_state(meta["spikes"])
        for name in ("tokens", "decay_start", "passed_at"):
            setattr(self, name, meta[name])
        self.rewinds += 1
        self.world.barrier()  # every rank has read what is replaced below
        run.rewind(self.step + 1)
        run.log(self.step, tokens=self.tokens, rewound_from=here)
        run.say(f"{stage.name:10} rewound from step {here} to {self.step}; the data in between are left out")
        self._checkpoint()

    def put_out(self) -> None:
        """Write the model, and its average beside it."""
        folder = self.stage_run.folder
        self._save(folder, self.model)
        if self.average is not None:
            self._save(folder / "average", self.average.model(self.model))

    def _finish(self) -> dict[str, Any]:
        stage, run = self.stage, self.stage_run
        self.put_out()
        bits = self._compress()
        run.account(flops_evaluation=self._flops_of_looking())
        late = [r for r in run.metrics() if "max_violation" in r][-100:]
        return {
            "tokens": self.tokens,
            "steps": self.step,
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


def _choose_precision(stage: "Pretrain", config: ModelConfig, run: StageRun, world: World) -> str:
    """fp32 or bf16, decided once per stage and written down, so that resuming cannot differ."""
    path = run.folder / "precision.json"
    if stage.compute != "auto":
        return stage.compute
    if path.is_file():
        return str(read_json(path)["chosen"])
    measured = rates(config, stage.rows // world.size, stage.length, world.device)
    # bf16 must win clearly, and on every rank: it costs digits
    chosen = "bf16" if all(world.gather(measured["bf16"] > 1.15 * measured["fp32"])) else "fp32"
    if run.is_writer:
        write_json(path, {"chosen": chosen, "tokens_per_second_per_rank": measured})
    run.ranks.barrier()
    text = ", ".join(f"{name} {rate:,.0f}" for name, rate in measured.items())
    run.say(f"{stage.name:10} computes in {chosen}: {text} tokens/s per rank")
    return chosen
