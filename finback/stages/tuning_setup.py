"""Setup of SFT, distillation and RL: the trainer for their layout, and other frozen models."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from finback.checkpoint import models
from finback.config import UserError
from finback.kernels.formats import FORMATS
from finback.model import fp4
from finback.model.fp4 import Qat
from finback.model.lora import learnt_parameters
from finback.model.picking import Choices, follow
from finback.model.recompute import use_recompute
from finback.model.transformer import Transformer
from finback.parallel.layout import Layout
from finback.parallel.mesh import World
from finback.runs import adapters
from finback.runs.folder import StageRun
from finback.runs.recipe import Stage
from finback.stages.compile_check import check_compiler, check_knobs
from finback.train.heap import return_large_blocks
from finback.train.lean_adam import adam_of
from finback.train.precision import COMPUTE, check_qat, check_weights, use_bf16_weights
from finback.train.reference import Reference, reference_of
from finback.train.trainer import ReplicatedTrainer, Trainer

if TYPE_CHECKING:
    from finback.stages.grpo import GRPO
    from finback.stages.sft import SFT
    from finback.train.sharded_tuning import FrozenShare


def check_layout(stage: "SFT | GRPO") -> None:
    """Raises UserError for settings of layout and precision that fine-tuning and RL do not support."""
    layout, adapter = stage.layout, stage.adapter
    check_qat(stage.name, stage.qat, layout)
    check_weights(stage)
    if adapter is not None and stage.qat != "none":
        raise stage.wrong("qat", "rounds weights that learn, and an adapter's base does not", 'Use "none".')
    check_knobs(stage, {"recompute": "attention"})
    if stage.compile and (adapter is not None or stage.qat != "none"):
        raise stage.wrong("compile", "works only if all weights are trained, without qat", "Leave it out.")
    if layout is None:
        return
    if layout.pp > 1:
        remedy = "Use dp, cp and ep, which also shard the whole model."
        raise UserError(f"{stage.name}.layout.pp", layout.pp, "is supported in pre-training only", remedy)
    if layout.sharding == "zero1" and adapter is not None:
        problem = "would hold an adapter's base whole on every rank"
        raise UserError(f"{stage.name}.layout.sharding", layout.sharding, problem, 'Use "fsdp", or leave out layout.')
    if layout.sharding == "ddp":
        raise UserError(f"{stage.name}.layout.sharding", "ddp", "can be planned, not trained", 'Use "zero1".')
    if adapter is not None and adapter.base in FORMATS and layout.gather != "fp32":
        problem = f"{adapter.base} is gathered as it is stored"
        raise UserError(f"{stage.name}.layout.gather", layout.gather, problem, "Leave it out.")


def trainer_of(stage: "SFT | GRPO", run: StageRun, weight_decay: float, frozen: tuple[str, ...] = ()) -> Trainer:
    """A trainer for the model that `stage.start` names, or for an adapter on it; parameters whose names start with one of `frozen` do not learn."""
    folder, world = run.input(stage.start), World.of(run)
    if stage.adapter is not None:
        return_large_blocks()
    layout = world.checked_layout(stage.layout, f"{stage.name}.layout")
    if layout is not None:
        return _sharded(stage, run, layout, weight_decay, frozen)
    model = models.load_for_training(folder, stage.adapter, COMPUTE[stage.compute], run.seed("adapter"))
    if stage.weights == "bf16":
        use_bf16_weights(model)
    model = use_recompute(model.to(world.device), stage.recomputes or "none").train()
    if stage.qat != "none":
        fp4.checked(model.config, f"{stage.name}.qat")
        fp4.use_fp4(model)
    check_compiler(stage, run)
    if stage.compile:
        from finback.train import compiling  # takes seconds to import

        compiling.compile_blocks(model)
    named = [(name, p) for name, p in learnt_parameters(model) if not name.startswith(frozen)]
    adam = adam_of(named, weight_decay, stage.moments, run.seed("rounding"))
    return ReplicatedTrainer(model, world, [adam], named)


def _sharded(
    stage: "SFT | GRPO", run: StageRun, layout: Layout, weight_decay: float, frozen: tuple[str, ...]
) -> Trainer:
    from finback.train import sharded_adapter, sharded_tuning  # takes a second to import

    world, lora = World.of(run), stage.adapter
    base, begun = adapters.places(run.input(stage.start))
    if lora is None:
        _check_merged(stage, "start", begun)
    options = sharded_tuning.TuningOptions(
        optimizer="adamw",
        weight_decay=weight_decay,
        compute=stage.compute,
        qat=stage.qat,
        recompute=stage.recomputes or "none",
        frozen=frozen,
        base=None if lora is None else lora.base,
        moments=stage.moments,
        compile=stage.compile,
    )
    config, values = models.stored(base, world.rank, world.size)
    check_compiler(stage, run)
    if stage.qat != "none":
        config = fp4.checked(config, f"{stage.name}.qat")
    try:
        if lora is None:
            return sharded_tuning.ShardedTuner(config, layout, values, options, world.device.type)
        adapter = sharded_adapter.Adapter(lora, base, begun, run.seed("adapter"))
        return sharded_adapter.AdapterTuner(config, layout, values, adapter, options, world.device.type)
    except UserError as error:
        raise _of_layout(stage, error) from None


def _of_layout(stage: Stage, error: UserError, whose: str = "") -> UserError:
    """Turns an error about a layout into one about the stage's knob."""
    if not error.field.startswith("layout."):
        return error
    return UserError(f"{stage.name}.{error.field}", error.value, error.problem + whose, error.remedy)


def _check_merged(stage: Stage, knob: str, adapter: Path | None) -> None:
    """Raises UserError if a model to be sharded consists of a base and a separate adapter."""
    if adapter is not None:
        problem = "an adapter cannot be merged into a sharded base"
        raise stage.wrong(knob, problem, "Use the merged model that `finback export` writes, or leave out layout.")


def frozen_share(
    stage: Stage, path: Path, trainer: Trainer, compute: torch.dtype, prefix: str, qat: Qat = "none"
) -> "FrozenShare":
    """The frozen model at a path, sharded like the trainer's; arguments as for FrozenShare."""
    from finback.train import sharded_tuning

    assert isinstance(trainer, sharded_tuning.UnevenRows), "a trainer on a layout"
    _check_merged(stage, prefix, adapters.places(path)[1])
    world = trainer.mesh.world
    config, values = models.stored(path, world.rank, world.size)
    try:
        return sharded_tuning.FrozenShare(config, trainer, values, compute, prefix, qat)
    except UserError as error:
        raise _of_layout(stage, error, f" of {path}") from None


def followed(stage: "GRPO", model: Transformer) -> Choices | None:
    """The choices that RL replays; raises UserError if the model makes no such choices."""
    kinds = {"routing_replay": ("experts", "routed experts"), "indexer_replay": ("entries", "indexers")}
    has = {"experts": model.config.n_routed_experts, "entries": model.config.indexers}
    asked = [name for name in kinds if getattr(stage, name)]
    for name in asked:
        kind, modules = kinds[name]
        if not has[kind]:
            raise stage.wrong(name, f"the model has no {modules}", "Leave it out.")
    return follow(model, [kinds[name][0] for name in asked])


def reference_model(stage: "GRPO", run: StageRun, trainer: Trainer) -> Reference:
    """The reference model of a policy at its start; checkpoints store it with the policy."""
    found: Reference
    if trainer.in_step and stage.adapter is None:
        found = frozen_share(stage, run.input(stage.start), trainer, COMPUTE[stage.compute], "reference", stage.qat)
    else:
        found = reference_of(trainer.model, "reference", World.of(run))
    trainer.extras.append(found)
    return found
