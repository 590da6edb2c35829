"""Sets up pre-training: initial weights, precision, and the trainer for its layout."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from finback.checkpoint import models
from finback.checkpoint.shares import Stored
from finback.config import UserError
from finback.data.tokenizer import Tokenizer
from finback.model import count, fp4
from finback.model.config import CSA, ModelConfig
from finback.model.dsa_training import teach_indexers, with_indexers
from finback.model.recompute import use_recompute
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.runs import processor
from finback.runs.files import read_json, write_json
from finback.runs.folder import StageRun
from finback.stages.compile_check import check_compiler
from finback.stages.pretraining import Pretraining
from finback.train import rates
from finback.train.optim import BETAS, Adam, Muon, is_matrix
from finback.train.precision import choose_expert_kernel, dtype_of, use_bf16_weights, use_expert_kernel, use_fp8
from finback.train.sharded_options import ShardedOptions
from finback.train.trainer import ReplicatedTrainer

if TYPE_CHECKING:
    from finback.stages.pretrain import Pretrain

Precision = Literal["fp32", "bf16", "fp8"]


def set_up(stage: "Pretrain", run: StageRun) -> Pretraining:
    """The training of a stage, sharded by its layout or with the full model on every rank."""
    world = World.of(run)
    layout = world.checked_layout(stage.layout, f"{stage.name}.layout")
    return (_replicated if layout is None else _sharded)(stage, run, world)


def _replicated(stage: "Pretrain", run: StageRun, world: World) -> Pretraining:
    for name in ("batch_size", "batch_size_start"):
        if any(rows % world.size for _, rows in rates.pairs_of(getattr(stage, name))):
            remedy = f"Use a multiple of {world.size}, or other --ranks."
            raise stage.wrong(name, f"does not divide among {world.size} ranks", remedy)
    if stage.model is not None:
        config, start = _fresh(stage, stage.model, run), None
    else:
        start = models.load(_start(stage, run))
        config = stage.adapted(start.config)
    if stage.qat != "none":
        config = fp4.checked(config, f"{stage.name}.qat")
    precision = _precision(stage, config, run, world)
    dtype = dtype_of(precision)
    model = _with_values(stage, config, dtype, start, run.seed("weights"))
    model = (use_fp8(model) if precision == "fp8" else model).to(world.device)
    if stage.weights == "bf16":
        use_bf16_weights(model)
    use_recompute(model, stage.recompute).train()
    _use_expert_kernel(stage, run, world, model)
    if stage.qat != "none":
        fp4.use_fp4(model)
    check_compiler(stage, run)
    if stage.compile:
        from finback.train import compiling  # takes seconds to import

        compiling.compile_blocks(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    matrices = [(n, p) for n, p in named if is_matrix(n, p)]
    seed = run.seed("rounding")
    others = Adam([(n, p) for n, p in named if not is_matrix(n, p)], BETAS, weight_decay=0.0, seed=seed)
    first: Muon | Adam
    if stage.optimizer == "adamw":
        first = Adam(matrices, BETAS, stage.weight_decay, seed)
    else:
        first = Muon(matrices, world, stage.weight_decay, compute=dtype, form=stage.muon_form, seed=seed)
    trainer = ReplicatedTrainer(model, world, (first, others), named, ema_decay=stage.ema_decay)
    return Pretraining(stage, run, trainer, precision)


def _with_values(
    stage: "Pretrain", config: ModelConfig, compute: torch.dtype, start: Transformer | None, seed: int
) -> Transformer:
    """A model with random weights or those of `start`; parameters that the stage does not train are frozen."""
    if start is None:
        model = Transformer(config, compute).initialise(seed)
    elif config.index_topk and not start.config.index_topk:
        model = with_indexers(start, config, compute, seed)
    else:
        model = start.with_config(config, compute)
    _prepare(stage, config, model)
    return model


def _prepare(stage: "Pretrain", config: ModelConfig, model: Transformer) -> None:
    """Freezes the parameters that a stage does not train, in place, and sets up the training of indexers."""
    for knob in () if config.index_topk else ("sparse_from", "indexer_tokens"):
        if getattr(stage, knob):
            raise stage.wrong(knob, "the model has no indexers", "Use 0, or a model with index_topk.")
    teaches = _teaches_indexers(stage, config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage.learns(name) and (teaches or ".indexer." not in name))
    if teaches and config.index_topk:
        teach_indexers(model, stage.attention_at(0))


@dataclasses.dataclass(frozen=True)
class PretrainingOptions(ShardedOptions):
    """Options of pre-training, where `prepare` selects the parameters that learn."""

    prepare: Callable[[Transformer], None] = lambda model: None

    def put_on(self, model: Transformer) -> Transformer:
        self.prepare(model)
        return super().put_on(model)


def _teaches_indexers(stage: "Pretrain", config: ModelConfig) -> bool:
    """Whether indexers learn: V4's only if rows are long enough for selection, or if the stage trains them."""
    picks = stage.longest // config.compress_rate_csa > config.index_topk
    asked = stage.indexer_tokens > 0 or stage.attention_at(0) == "warm-up"
    return config.attention != "compressed" or asked or (CSA in config.layer_types and picks)


def _sharded(stage: "Pretrain", run: StageRun, world: World) -> Pretraining:
    from finback.train.sharded_trainer import ShardedTrainer  # takes a second to import

    assert stage.layout is not None, "a sharded trainer needs a layout"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values: int | Stored = run.seed("weights")
    if stage.model is not None:
        config = _fresh(stage, stage.model, run)
    else:
        config, values = models.stored(_start(stage, run), world.rank, world.size)
        had, config = config.index_topk, stage.adapted(config)
        if config.index_topk and not had:
            raise stage.wrong("layout", "indexers can be added to a model on one rank only", "Leave it out.")
    if stage.qat != "none":
        config = fp4.checked(config, f"{stage.name}.qat")
    precision = _precision(stage, config, run, world)
    check_compiler(stage, run)
    knobs = {f.name: getattr(stage, f.name) for f in dataclasses.fields(ShardedOptions)} | {"compute": precision}
    options = PretrainingOptions(**knobs, prepare=partial(_prepare, stage, config))
    if stage.probe is not None:
        whole = 4 * count.parameters(config) / 2**20
        run.say(f"{stage.name:10} each probe gathers the whole model, {whole:,.0f} MiB, on every rank temporarily")
    try:
        trainer = ShardedTrainer(config, stage.layout, stage.most_rows, values, options, device)
        stage.layout.check_steps(config, stage.batch_sizes, stage.most_rows)
    except UserError as error:
        field = error.field
        if field == "rows":  # rows per step come from this knob
            field = "batch_size_start" if stage.batch_size_start and error.value != stage.batch_size else "batch_size"
        elif not field.startswith("layout."):
            raise
        raise UserError(f"{stage.name}.{field}", error.value, error.problem, error.remedy) from None
    return Pretraining(stage, run, trainer, precision)


def _fresh(stage: "Pretrain", model: ModelConfig, run: StageRun) -> ModelConfig:
    """The config of a model that starts from random weights."""
    return dataclasses.replace(model, vocab_size=Tokenizer(run.input(stage.data)).vocab_size)


def _start(stage: "Pretrain", run: StageRun) -> Path:
    """The folder of `start`, after checking that it has the data's tokenizer."""
    folder = run.input(stage.start)
    if Tokenizer(folder).as_json() != Tokenizer(run.input(stage.data)).as_json():
        problem = f"does not have the tokenizer of the data of {stage.data!r}"
        raise stage.wrong("start", problem, "Give the prepare stage this model's tokenizer.")
    return folder


def _use_expert_kernel(stage: "Pretrain", run: StageRun, world: World, model: Transformer) -> None:
    """Sets the expert kernel; "auto" is resolved on GPUs only."""
    kernel, tokens = stage.expert_kernel, stage.most_tokens // world.size

    def choose() -> dict[str, Any]:
        measured = world.gather(choose_expert_kernel(model, tokens))
        return {"chosen": "grouped_mm" if set(measured) == {"grouped_mm"} else "loop"}

    if kernel == "auto" and world.device.type == "cuda":
        kernel = _decided(run, "expert_kernel", choose)
    use_expert_kernel(model, kernel, tokens)


def _precision(stage: "Pretrain", config: ModelConfig, run: StageRun, world: World) -> Precision:
    """The precision of the knob, or for "auto" what is faster on all ranks' devices at this width."""
    if stage.compute != "auto":
        return stage.compute
    able = torch.cuda.is_bf16_supported(including_emulation=False) if world.device.type == "cuda" else None

    def choose() -> dict[str, Any]:
        found = world.gather(processor.precision(config.hidden_size, able))
        return {"chosen": "bf16" if set(found) == {"bf16"} else "fp32"}

    # a stage that resumes on another machine keeps its precision
    return cast(Precision, _decided(run, "precision", choose))


def _decided(run: StageRun, name: str, choose: Callable[[], dict[str, Any]]) -> Any:
    """A choice that all ranks make together, once per stage. It is stored, so that resuming cannot change it."""
    path = run.folder / f"{name}.json"
    if path.is_file():
        return read_json(path)["chosen"]
    found = choose()
    if run.is_writer:
        write_json(path, found)
    run.ranks.barrier()
    return found["chosen"]
