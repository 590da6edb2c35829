"""The plan of a recipe, stage by stage: on this machine by its calibration, or on named hardware.

A stage's `work()` says how many tokens it trains on and generates at most, and its model is its own or that of the stage
or checkpoint it starts from. Pre-training is predicted step by step; other stages by their FLOPs and the rate at which
training runs, which is rough: their rows are of many lengths, and generating is bound by other things than training.
"""

import dataclasses
from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.model.config import ModelConfig, from_json
from finback.model.count import forward_flops, parameters, training_flops
from finback.planner import calibration_file, cluster, hardware, this_machine
from finback.planner.options import PlanOptions
from finback.planner.render import big, span, table
from finback.planner.this_machine import Shape
from finback.runs.files import is_checkpoint, read_json
from finback.runs.ledger import DOLLARS_PER_CORE_HOUR, WATTS_PER_CORE
from finback.runs.recipe import Recipe, Stage
from finback.stages.prepare import Prepare
from finback.stages.pretrain import Pretrain

ROUGH = "by FLOPs at the rate of training; rough"


def model_of(stage: Stage, recipe: Recipe) -> ModelConfig | None:
    """The model a stage trains or asks: its own, or that of where it starts; None where it has none."""
    own = getattr(stage, "model", None)
    if isinstance(own, ModelConfig):
        data = next((s for s in recipe.stages if s.name == getattr(stage, "data", None)), None)
        if isinstance(data, Prepare):  # its tokenizer decides, at most
            own = dataclasses.replace(own, vocab_size=data.vocab_size)
        return own
    start = getattr(stage, "start", None)
    if not isinstance(start, str):
        return None
    earlier = next((s for s in recipe.stages if s.name == start), None)
    return model_of(earlier, recipe) if earlier else _stored_model(Path(start))


def _stored_model(path: Path) -> ModelConfig | None:
    """The model of a finished stage or of a checkpoint in Hugging Face's form; None for what must be opened to know."""
    if (path / "model.json").is_file():
        return from_json(read_json(path / "model.json"))
    if path.is_dir() and is_checkpoint(path):
        from finback.checkpoint import hf

        return hf.model_config(hf.read_config(path))
    return None


def plan(recipe: Recipe, options: PlanOptions, calibration: dict[str, Any] | None, ranks: int) -> dict[str, Any]:
    """Every stage's cost and the sum; without --on on this machine, as far as a calibration tells."""
    stages = {}
    for stage in recipe.stages:
        model = model_of(stage, recipe)
        if options.on:
            stages[stage.name] = _on_hardware(stage, model, options)
        else:
            stages[stage.name] = _here(stage, model, options, calibration, ranks)
    names = ("seconds", "device_hours", "dollars", "kwh", "flops")
    total = {name: _total([s.get(name) for s in stages.values()]) for name in names}
    where = options.on or f"this machine, {ranks} ranks"
    notes = [] if calibration is None or options.on else calibration_file.doubts(calibration)
    if calibration is None and not options.on:
        notes = ["not calibrated: run `finback plan --calibrate` once, and times are known"]
    known = (
        None if calibration is None or options.on else {k: calibration[k] for k in ("date", "cpu", "torch", "ranks")}
    )
    return {
        "recipe": recipe.name,
        "on": where,
        "stages": stages,
        "total": total,
        "notes": notes,
        "calibration": known,
        "basis": {"dollars_per_core_hour": DOLLARS_PER_CORE_HOUR, "watts_per_core": WATTS_PER_CORE}
        if not options.on
        else None,
    }


def _total(values: list[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) if known else None


def _counted(stage: Stage, model: ModelConfig | None) -> dict[str, Any]:
    """What a stage does, whatever it runs on."""
    work = stage.work()
    values: dict[str, Any] = {
        "flops": None,
        "stage": type(stage).__name__,
        "tokens_trained": work.tokens_trained,
        "tokens_generated": work.tokens_generated,
    }
    if model is None:
        return values
    length = int(getattr(stage, "length", 0) or getattr(stage, "max_tokens", 0))
    trained = training_flops(model, length / 2, mtp=isinstance(stage, Pretrain)) * work.tokens_trained
    generated = forward_flops(model, length / 2) * work.tokens_generated
    return values | {
        "parameters": parameters(model),
        "active": parameters(model, active=True, mtp=False),
        "flops": (trained + generated) or None,
    }


def _here(
    stage: Stage, model: ModelConfig | None, options: PlanOptions, calibration: dict[str, Any] | None, ranks: int
) -> dict[str, Any]:
    values: dict[str, Any] = _counted(stage, model)
    if model is None or calibration is None:
        return values
    if isinstance(stage, Pretrain):
        values |= pretraining(stage, model, calibration, ranks)
    elif flops := values["flops"]:
        compute = getattr(stage, "compute", "fp32")
        rate = calibration["training_flops_per_second"]["fp32" if compute == "auto" else compute]
        values |= {"seconds": flops / rate * calibration["ranks"] / ranks, "how": ROUGH}
    if seconds := float(values.get("seconds") or 0):
        price = DOLLARS_PER_CORE_HOUR if options.price is None else options.price
        hours = seconds * ranks / 3600
        values |= {"device_hours": hours, "dollars": hours * price, "kwh": hours * WATTS_PER_CORE / 1000}
    return values


def pretraining(stage: Pretrain, model: ModelConfig, calibration: dict[str, Any], ranks: int) -> dict[str, Any]:
    """Seconds and memory of a pre-training stage on this machine, step by step."""
    if stage.rows % ranks:
        raise UserError(f"{stage.name}.rows", stage.rows, f"does not divide among {ranks} ranks", "Use --ranks.")
    shapes = {
        name: Shape(model, stage.rows // ranks, stage.length, name, ranks)
        for name in (("fp32", "bf16") if stage.compute == "auto" else (stage.compute,))
    }
    parts = {name: this_machine.seconds(shape, calibration["measured"]) for name, shape in shapes.items()}
    compute = stage.compute
    if compute == "auto":  # as stages/pretrain.py chooses: bf16 must win clearly
        compute = "bf16" if parts["bf16"]["passes"] * 1.15 < parts["fp32"]["passes"] else "fp32"
    step = sum(parts[compute].values())
    memory = this_machine.memory(shapes[compute], calibration["process_bytes"])
    if stage.compute == "auto":  # both are tried first, side by side
        memory = max(memory, this_machine.trial(shapes["fp32"], shapes["bf16"], calibration["process_bytes"]), key=_all)
    return {
        "compute": compute,
        "step_seconds": step,
        "parts": parts[compute],
        "tokens_per_second": stage.rows * stage.length / step,
        "seconds": stage.max_tokens / (stage.rows * stage.length) * step,
        "memory": dataclasses.asdict(memory) | {"total": memory.total},
        "memory_bytes": memory.total * ranks,
        "fits": memory.total * ranks < calibration["memory_bytes"],
        "how": "step by step, from the calibration",
    }


def _all(memory: this_machine.RankMemory) -> float:
    return memory.total


def _on_hardware(stage: Stage, model: ModelConfig | None, options: PlanOptions) -> dict[str, Any]:
    values = _counted(stage, model)
    if model is None:
        return values
    if not isinstance(stage, Pretrain):
        return values | (cluster.by_flops(values["flops"], options) if values["flops"] else {})
    try:
        found = _laid_out(stage, model, options)
    except UserError as error:
        if error.field not in ("rows", "layout.micro_batches"):
            raise
        # another stage of the recipe may well fit this mesh; MFU does not count MTP
        counted = training_flops(model, stage.length / 2, mtp=False) * stage.max_tokens
        return values | cluster.by_flops(counted, options) | {"refused": str(error)}
    run = found["run"]
    return values | {
        "seconds": run["seconds"],
        "device_hours": run["device_hours"],
        "dollars": run["dollars"],
        "kwh": run["kwh"],
        "fits": found["memory"]["fits"],
        "mfu": found["step"]["mfu"],
        "memory_bytes": max(r["total"] for r in found["memory"]["ranks"]),
        "layout": found["layout"]["mesh"],
        "how": "step by step",
        "plan": found,
    }


def _laid_out(stage: Pretrain, model: ModelConfig, options: PlanOptions) -> dict[str, Any]:
    """The plan of pre-training on the options' hardware, by the recipe's own layout where --mesh gives no other."""
    options = dataclasses.replace(options, optimizer=options.optimizer or stage.optimizer)
    work = cluster.workload(options.rows or stage.rows, options.length or stage.length, options)
    given = stage.layout if not options.mesh else None
    if given is not None:
        _, devices = hardware.find(options.on)
        if given.ranks != devices:
            problem = f"the recipe's layout has {given.ranks} ranks, not {devices}"
            raise UserError("--on", options.on, problem, f"Use {given.ranks} devices, or --mesh for another layout.")
        if options.schedule:
            given = dataclasses.replace(given, schedule=options.schedule.lower())  # type: ignore[arg-type]
        recompute = work.recompute if options.recompute else stage.recompute
        work = dataclasses.replace(work, layout=given, recompute=recompute)
    return cluster.plan(stage.name, model, work, stage.max_tokens, options, given=given is not None).values


def tell(values: dict[str, Any]) -> str:
    """A recipe's plan as a table."""
    rows = [["stage", "kind", "trains", "generates", "FLOPs", "time", "memory", "$", "energy", ""]]
    for name, s in values["stages"].items():
        memory = f"{s['memory_bytes'] / 1e9:,.2f} GB" if "memory_bytes" in s else "-"
        rows.append(
            [
                name,
                s["stage"],
                big(s["tokens_trained"]),
                big(s["tokens_generated"]),
                big(s.get("flops")) if s.get("flops") else "-",
                span(s["seconds"]) if s.get("seconds") else "-",
                memory + ("" if s.get("fits", True) else " TOO MUCH"),
                _money(s.get("dollars")),
                _energy(s.get("kwh")),
                _how(s),
            ]
        )
    t = values["total"]
    rows.append(
        [
            "all",
            "",
            "",
            "",
            big(t["flops"]) if t["flops"] else "-",
            span(t["seconds"]) if t["seconds"] else "-",
            "",
            _money(t["dollars"]),
            _energy(t["kwh"]),
            "",
        ]
    )
    lines = [f"{values['recipe']} on {values['on']}; tokens are the most a stage can take"]
    lines += ["  " + line for line in table(rows)]
    if values["basis"]:
        basis = values["basis"]
        lines.append(
            f"Money and energy by ${basis['dollars_per_core_hour']:g} and {basis['watts_per_core']:g} W per core and hour, estimates."
        )
    return "\n".join([*lines, *(f"note: {text}" for text in values["notes"])])


def _money(dollars: float | None) -> str:
    return "-" if dollars is None else f"{dollars:,.4f}" if dollars < 1 else f"{dollars:,.0f}"


def _energy(kwh: float | None) -> str:
    return big(kwh * 1000, "Wh") if kwh else "-"


def _how(s: dict[str, Any]) -> str:
    if s.get("how") == ROUGH:
        return "rough" + (", no layout for it on this mesh" if "refused" in s else "")
    if "step_seconds" in s:
        return f"{s['compute']}, {s['tokens_per_second']:,.0f} tokens/s"
    if "mfu" in s:
        return f"{s['layout']}, MFU {s['mfu']:.1%}"
    return "" if s.get("flops") or "parameters" not in s else "unknown before its data is there"
