"""What tests of fine-tuning and RL on layouts share: stages on a tiny model, on one rank and on many, and results."""

import pickle
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from finback.checkpoint import models
from finback.data import tokenizer
from finback.model.config import ModelConfig
from finback.model.logprobs import text_logprobs
from finback.model.lora import LoRA, adapter_parameters
from finback.model.transformer import Transformer
from finback.parallel.layout import Layout
from finback.parallel.mesh import World
from finback.runs.folder import StageRun
from finback.stages.distill import Distill
from finback.stages.grpo import GRPO
from finback.stages.grpo_training import Reinforcement
from finback.stages.sft import SFT
from finback.tasks.math import Chains
from finback.tasks.task import Mixture
from finback.train.grpo_loss import Objective
from finback.train.loop import Loop
from finback.train.trainer import Trainer
from tests.test_tuning import write_traces
from tests.toy import CONFIG, WORDS

SPREAD = replace(CONFIG, num_attention_heads=4, initializer_range=0.15)
EXACT = LoRA(rank=4, alpha=8.0, base="fp32")
TIMED = {
    "seconds",
    "tokens_per_second",
    "mfu",
    "generated_per_second",
    "update_seconds",
    "sync_bytes",
    "sync_seconds",
    "learnt_per_second",
    "generating_seconds",
}


@dataclass(frozen=True)
class Tuned:
    """A stage under test: its class, and the knobs that differ from those common to the class."""

    kind: type[SFT] | type[GRPO]
    knobs: dict[str, Any] = field(default_factory=dict)


LESSONS = {"traces": ("kept",), "batch_size": 3, "seq_len": 48, "epochs": 4, "lr": 3e-4, "balance_alpha": 0.05}
ANSWERS = {
    "task": Chains(2, 3),
    "prompts_per_step": 4,
    "num_generations": 4,
    "max_tokens": 10,
    "lr": 3e-4,
    "steps": 100,
}
KNOBS: dict[Any, dict[str, Any]] = {
    SFT: LESSONS | {"bias_speed": 0.02},
    Distill: LESSONS | {"teacher": "other", "hard": 0.3},
    GRPO: ANSWERS | {"bias_speed": 0.02, "micro_tokens": 200},
}
# on-policy; a step may have no question of a domain, and a rank no question at all
SEVERAL = {
    "traces": (),
    "task": Mixture((Chains(2, 2), Chains(3, 3)), weights=(1, 3)),
    "teacher": {"chains-2": "other", "chains-3": "base"},
    "prompts_per_step": 3,
    "max_tokens": 8,
}
LEARNT = {
    "sft": Tuned(SFT),
    "sft in pieces": Tuned(SFT, {"recompute": "block", "mtp_weight": 0.0}),
    "sft on the host": Tuned(SFT, {"moments": "host"}),
    "distill": Tuned(Distill),
    "distill from several": Tuned(Distill, SEVERAL),
    "grpo": Tuned(GRPO, {"objective": Objective(beta=0.1), "reference_steps": 3, "epochs": 2}),
    "grpo by answer": Tuned(
        GRPO, {"objective": Objective(average="answer", ratio="sequence", beta=0.0), "top_k": 20, "temperature": 0.8}
    ),
    "grpo shared": Tuned(GRPO, {"share_prompts": True, "objective": Objective(beta=0.1), "top_k": 20}),
    "grpo shared and replayed": Tuned(GRPO, {"share_prompts": True, "routing_replay": True}),
    "grpo replayed": Tuned(GRPO, {"routing_replay": True}),
    "grpo indexed": Tuned(GRPO, {"routing_replay": True, "indexer_replay": True}),
    "lora sft": Tuned(SFT, {"adapter": EXACT, "bias_speed": 0.0}),
    "dora sft": Tuned(SFT, {"adapter": replace(EXACT, dora=True, targets=("attention",)), "bias_speed": 0.0}),
    "dora sft on nf4": Tuned(
        SFT, {"adapter": replace(EXACT, dora=True, targets=("attention",), base="nf4"), "bias_speed": 0.0}
    ),
    "qlora sft": Tuned(SFT, {"adapter": replace(EXACT, base="nf4"), "bias_speed": 0.0}),
    "qlora grpo": Tuned(GRPO, {"adapter": replace(EXACT, base="int8"), "bias_speed": 0.0}),
    "lora distill": Tuned(Distill, {"adapter": EXACT}),
    # starts from the run "moved" that the test of checkpoints writes
    "lora on lora": Tuned(SFT, {"adapter": EXACT, "start": "moved", "bias_speed": 0.0}),
    "lora grpo": Tuned(GRPO, {"adapter": EXACT, "objective": Objective(beta=0.1), "bias_speed": 0.0}),
}
# stages that start from the base, whose model has no indexers
STEPWISE = tuple(name for name in LEARNT if name not in ("lora on lora", "grpo indexed"))


def prepared(root: Path, config: ModelConfig = SPREAD) -> Path:
    """Creates a folder with two finished stages, "base" and "other", and the traces of a third."""
    for name, seed in (("base", 1), ("other", 2)):
        folder = root / name
        folder.mkdir(parents=True)
        tokenizer.train([WORDS], 320, folder / "tokenizer.json")
        models.save(folder, Transformer(config).initialise(seed))
        (folder / "manifest.json").write_text("{}")
    write_traces(root)
    return root


def stopped_at(looped: Loop, stop: int) -> Loop:
    """Runs a training from its checkpoint to a step and writes a checkpoint there."""
    state = looped.restore()
    if state is not None:
        looped.training.load_state(state)
    while looped.step < stop:
        looped.advance()
    looped.checkpoint()
    return looped


def begun(root: Path, name: str, layout: Layout | None, run_name: str = "") -> Any:
    """A stage's training object on the ranks of this process group."""
    given = LEARNT[name]
    knobs = {"start": "base", "layout": layout} | KNOBS[given.kind] | given.knobs
    stage = given.kind(name=run_name or "tuned", **knobs)
    world = World(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else World()
    run = StageRun(root, stage.name, 0, world, quiet=True)
    run.folder.mkdir(exist_ok=True)
    if isinstance(stage, SFT):
        return stage.training(run)
    return with_records(Reinforcement(stage, run), root / f"{name}.pickle")


def with_records(r: Reinforcement, path: Path) -> Reinforcement:
    """Replays the answers of an earlier run, or records those of this run, with rewards in a fixed pattern."""
    ask, calls = r.sampler.ask, iter(range(10**6))
    known = pickle.loads(path.read_bytes()) if path.is_file() else None
    noted: dict[Any, Any] = {}
    names = r.stage.reward.names

    def recorded(problems: Any, seeds: Any) -> Any:
        if known is not None:
            return [known[seed] for seed in seeds]
        for seed, group in zip(seeds, ask(problems, seeds), strict=True):
            group.parts = [dict.fromkeys(names, float(next(calls) % 3 == 0)) for _ in group.rollouts]
            noted[seed] = group
        path.with_suffix(".new").write_bytes(pickle.dumps(noted))
        return [noted[seed] for seed in seeds]

    r.sampler.ask = recorded  # type: ignore[method-assign]
    return r


@dataclass
class Outcome:
    """Metrics per step without times, the last step's gradients, the final weights, and log-probabilities."""

    metrics: list[dict[str, Any]]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    # log-probabilities of a text under the model that generates
    text: Tensor


def outcome(root: Path, name: str, layout: Layout | None, steps: int) -> Outcome:
    """Runs a stage for so many steps from its start."""
    training = begun(root, name, layout)
    loop = Loop(training)
    metrics = [loop.advance() for _ in range(steps)]
    metrics = [{k: v for k, v in each.items() if k not in TIMED} for each in metrics]
    trainer = training.trainer
    learnt, answers = (gradients(trainer), weights(trainer)), trainer.gathered().eval()
    return Outcome(metrics, *learnt, text_logprobs(answers, torch.arange(40).view(2, 20)).detach())


def gradients(trainer: Trainer) -> dict[str, Tensor]:
    """The clipped gradients of the last step, gathered."""
    parts = getattr(trainer, "learnt", None)
    named = (
        [(n, p) for n, p in trainer.model.named_parameters()] if parts is None else [(p.name, p.value) for p in parts]
    )
    there: dict[str, Any] = {n: p.grad for n, p in named if p.requires_grad and p.grad is not None}
    return {n: _whole(trainer, n, g) for n, g in there.items()}


def _whole(trainer: Trainer, name: str, gradient: Any) -> Tensor:
    """A gathered gradient, of which this rank may have a shard."""
    if name in getattr(trainer, "parted", ()):
        mesh = trainer.mesh.ep  # type: ignore[attr-defined]
        gradient = DTensor.from_local(gradient, mesh, [Shard(0)], run_check=False)
    found: Tensor = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found.clone()


def weights(trainer: Trainer) -> dict[str, Tensor]:
    """The trained weights, gathered."""
    whole = trainer.gathered()
    found = adapter_parameters(whole) or list(whole.state_dict().items())
    return {name: tensor.detach().clone() for name, tensor in found}


def compared(found: Outcome, one: Outcome, within: float = 1e-5) -> None:
    """Checks that every metric, gradient and weight of many ranks equals that of one."""
    for step, (line, expected) in enumerate(zip(found.metrics, one.metrics, strict=True), 1):
        assert line.keys() == expected.keys()
        for key, value in expected.items():
            ours, theirs = torch.tensor(line[key]), torch.tensor(value)
            assert ours.shape == theirs.shape, key
            size = max(1.0, *theirs.abs().flatten().tolist()) if theirs.numel() else 1.0
            assert not theirs.numel() or (ours - theirs).abs().max() <= within * size, (step, key, line[key], value)
    assert any(gradient.any() for gradient in one.gradients.values())
    assert (found.text - one.text).abs().max() <= within
    for part in ("gradients", "weights"):
        ours, theirs = getattr(found, part), getattr(one, part)
        assert ours.keys() == theirs.keys()
        for name in theirs:
            off = with_gradient(name, ours[name] - theirs[name]).abs().max()
            assert off <= within, (part, name, float(off))


def with_gradient(name: str, tensor: Tensor) -> Tensor:
    """Drops the parts with which V4's first layer reads and mixes its 4 streams. The streams are equal there, and the
    next norm removes the scale, so their gradient is rounding noise, which Adam turns into full steps."""
    if not name.startswith("blocks.0.attention_mix."):
        return tensor
    return tensor[1:2] if name.endswith(".scale") else tensor[4:8]


def on_layout(root: str, names: tuple[str, ...], layout: Layout, steps: int) -> None:
    """On every rank: compares stages under a layout with one rank's results."""
    for name in names:
        compared(outcome(Path(root), name, layout, steps), torch.load(Path(root) / f"{name}.pt", weights_only=False))


def alone(root: Path, names: tuple[str, ...], steps: int) -> None:
    """Writes one rank's results for these stages to files, with one thread; answers are recorded for other layouts."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for name in names:
        torch.save(outcome(root, name, None, steps), root / f"{name}.pt")
        noted = root / f"{name}.new"
        if noted.is_file():
            noted.rename(root / f"{name}.pickle")
    torch.set_num_threads(threads)
