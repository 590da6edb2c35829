"""Plans a recipe stage by stage: on this machine by its calibration, or on named hardware.

A stage declares the maximal tokens it trains on and generates; its model is its own or that of the stage or checkpoint it
starts from. Pre-training is predicted step by step. Other stages are estimated from their FLOPs and the speed of training,
which is rough: their rows vary in length, and generation has other bottlenecks.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from finback.config import UserError
from finback.model.config import V3, ModelConfig
from finback.model.count import forward_flops, parameters, training_flops
from finback.planner import (
    calibration_file,
    cluster,
    cost,
    engines,
    hardware,
    remarks,
    scheduled,
    this_machine,
    tuning,
    tuning_time,
)
from finback.planner.hardware import Machine, Site
from finback.planner.options import PlanOptions
from finback.planner.planned_stage import PlannedStage, planned_stages
from finback.planner.this_machine import Shape
from finback.planner.workload import Precision
from finback.runs import processor
from finback.runs.ledger import DOLLARS_PER_CORE_HOUR, WATTS_PER_CORE
from finback.runs.recipe import Recipe, config_json

ROUGH = "rough"
Calibrated = dict[str, Any]
Met = dict[str, engines.MeasuredStep]


def plan(recipe: Recipe, options: PlanOptions, calibration: Calibrated | None, ranks: int) -> dict[str, Any]:
    """Costs of every stage and their sum; on this machine unless --on is given, as far as the calibration covers it."""
    return plan_configs(recipe.name, map(config_json, recipe.stages), options, calibration, ranks)


def plan_configs(
    name: str, configs: Iterable[dict[str, Any]], options: PlanOptions, calibration: Calibrated | None, ranks: int
) -> dict[str, Any]:
    """`plan` for stages given by their config.json."""
    planned = planned_stages(configs)
    known = None if options.on else calibration
    site = hardware.site(options.on, options.assume) if options.on else None
    if site is not None:
        of: Callable[[PlannedStage], dict[str, Any]] = partial(_on_hardware, site=site, options=options)
    else:
        of = partial(_here, options=options, calibration=known, ranks=ranks)
    stages = {stage.name: scheduled.joined([of(part) for part in scheduled.parts(stage)]) for stage in planned}
    met = engines.measured(options.measured) if options.measured is not None else {}
    for stage in planned:
        _add_engines(stages[stage.name], stage, None if site is None else site.machine, met)
    notes = [] if known is None else calibration_file.doubts(known)
    if known is None and not options.on:
        notes = ["not calibrated: run `finback plan --calibrate` once to get times"]
    notes += _notes(stages)
    total: dict[str, float | None] = {}
    for key in ("seconds", "device_hours", "dollars", "kwh", "flops"):
        given = [values[key] for values in stages.values() if values.get(key) is not None]
        total[key] = sum(given) if given else None
    basis = {"dollars_per_core_hour": DOLLARS_PER_CORE_HOUR, "watts_per_core": WATTS_PER_CORE}
    return {
        "recipe": name,
        "on": options.on or f"this machine, {ranks} ranks",
        "stages": stages,
        "total": total,
        "notes": notes,
        "calibration": known and {k: known[k] for k in ("date", "cpu", "torch", "ranks")},
        "basis": None if options.on else basis,
        **({} if site is None else _origins(stages, site)),
    }


def _add_engines(values: dict[str, Any], stage: PlannedStage, machine: Machine | None, met: Met) -> None:
    """Adds the number of engines that an RL stage needs; learning takes the training share of its time."""
    flops, seconds, model = values["flops"], values.get("seconds"), stage.model
    learning = seconds * _trained(stage, model) / flops if seconds and flops and model is not None else None
    if found := engines.planned(stage, learning, machine, met):
        values["engines"] = found
        values["notes"] = [*values.get("notes", ()), engines.text(found)]


def _notes(stages: dict[str, Any]) -> list[str]:
    """Notes on stages; a note that applies to several is given once."""
    found: dict[str, list[str]] = {}
    for stage, values in stages.items():
        for note in values.get("notes", ()):
            found.setdefault(note, []).append(stage)
    return [f"{', '.join(names)}: {note}" for note, names in found.items()]


def _origins(stages: dict[str, Any], site: Site) -> dict[str, Any]:
    """Sources of the numbers: the machine's properties, and assumptions."""
    facts = {key: value for key, value in dataclasses.asdict(site.machine).items() if isinstance(value, dict)}
    planned = [values["plan"]["assumptions"] for values in stages.values() if "plan" in values]
    assumed = {key: dataclasses.asdict(fact) for key, fact in site.known.items()}
    if not planned and site.machine.mfu is None:
        share = cost.efficiency(V3, cost.V3_WORKLOAD, site.machine, site.known)
        assumed["efficiency"] = dataclasses.asdict(share)
    return {
        "machine": {"name": site.machine.name, "devices": site.devices, "facts": facts},
        "assumptions": planned[-1] if planned else assumed,
        "rough": any(values.get("how") == ROUGH for values in stages.values()),
    }


def _counted(stage: PlannedStage) -> dict[str, Any]:
    """A stage's tokens, parameters and FLOPs, which do not depend on hardware."""
    model, values = stage.model, {"flops": None, "stage": stage.type, **dataclasses.asdict(stage.work)}
    if model is None:
        return values
    trained = _trained(stage, model)
    generated = forward_flops(model, stage.length / 2) * stage.work.tokens_generated
    return values | {
        "parameters": parameters(model),
        "active": parameters(model, active=True, mtp=False),
        "flops": (trained + generated) or None,
    }


def _trained(stage: PlannedStage, model: ModelConfig) -> float:
    """Training FLOPs of a stage; frozen weights need no weight gradient."""
    trained = training_flops(model, stage.length / 2, mtp=stage.pretrains) * stage.work.tokens_trained
    return trained * 2 / 3 if stage.knobs.get("adapter") else trained


def _here(stage: PlannedStage, options: PlanOptions, calibration: Calibrated | None, ranks: int) -> dict[str, Any]:
    values = _counted(stage)
    if stage.model is None or calibration is None:
        return values
    if stage.pretrains:
        values |= pretraining(stage, calibration, ranks)
    elif flops := values["flops"]:
        rate = calibration["training_flops_per_second"][_measured(stage.knobs.get("compute", "fp32"))]
        here = calibration_file.site(calibration, ranks, "fp32")
        least = _least(stage, dataclasses.replace(here, known=here.known | {"launch": hardware.ASSUMPTIONS["launch"]}))
        seconds = max(flops / rate * calibration["ranks"] / ranks, least)
        values |= {"seconds": seconds, "how": ROUGH, "notes": [remarks.ROUGH]}
    if seconds := float(values.get("seconds") or 0):
        price = DOLLARS_PER_CORE_HOUR if options.price is None else options.price
        hours = seconds * ranks / 3600
        values |= {"device_hours": hours, "dollars": hours * price, "kwh": hours * WATTS_PER_CORE / 1000}
    return values


def _measured(compute: str, model: ModelConfig | None = None) -> Precision:
    """The calibrated precision that stands for a compute dtype; FP8 is emulated in bf16."""
    if compute == "auto" and model is not None:
        compute = processor.precision(model.hidden_size)
    return "fp32" if compute in ("fp32", "auto") else "bf16"


def pretraining(stage: PlannedStage, calibration: Calibrated, ranks: int) -> dict[str, Any]:
    """Seconds and memory of a pre-training stage on this machine, step by step.

    A layout for another number of ranks is planned without times.
    """
    knobs, notes = stage.knobs, []
    readers = ranks if stage.layout is None else stage.layout.dp
    if knobs["batch_size"] % readers:
        problem = f"does not divide among {readers} ranks"
        raise UserError(f"{stage.name}.batch_size", knobs["batch_size"], problem, "Use --ranks.")
    if knobs["compute"] == "fp8":
        notes.append("FP8 is emulated on this machine: it takes longer than bf16, but is planned as bf16")
    if knobs["compile"]:
        notes.append("compiled blocks take 0.85 to 0.95 of the planned time, plus up to a minute in the first step")
    if stage.layout is None:
        return _whole_copies(stage, calibration, ranks) | {"notes": notes}
    if stage.layout.ranks != ranks:
        return {"how": f"needs {stage.layout.ranks} ranks, not {ranks}", "notes": notes}
    # one rank per core
    precision = _measured(knobs["compute"], stage.model)
    options = PlanOptions(precision=precision, optimizer=knobs["optimizer"])
    planned = _laid_out(stage, calibration_file.site(calibration, ranks, precision), options)
    return planned | {"notes": [*notes, *planned["notes"]]}


def _whole_copies(stage: PlannedStage, calibration: Calibrated, ranks: int) -> dict[str, Any]:
    """Pre-training with the whole model on every rank."""
    knobs, model, process = stage.knobs, stage.model, calibration["process_bytes"]
    assert model is not None, "a stage that trains has a model"
    compute, rows = _measured(knobs["compute"], model), knobs["batch_size"] // ranks
    shape = Shape(model, rows, stage.length, compute, ranks, knobs["recompute"], knobs["optimizer"])
    shape = dataclasses.replace(shape, muon_form=knobs["muon_form"], weights=knobs["weights"])
    parts = this_machine.seconds(shape, calibration["measured"])
    step, tokens = sum(parts.values()), knobs["batch_size"] * stage.length
    memory = this_machine.memory(shape, process)
    return {
        "compute": compute,
        "step_seconds": step,
        "parts": parts,
        "tokens_per_second": tokens / step,
        "seconds": stage.work.tokens_trained / tokens * step,
        "memory": dataclasses.asdict(memory) | {"total": memory.total},
        "memory_bytes": memory.total * ranks,
        "fits": memory.total * ranks < calibration["memory_bytes"],
        "how": "step by step, from the calibration",
    }


def _on_hardware(stage: PlannedStage, site: Site, options: PlanOptions) -> dict[str, Any]:
    values = _counted(stage)
    if stage.model is None:
        return values
    known = remarks.of_model(stage.model, "bf16", site)
    if tuning.is_tuned(stage):
        tuning_time.check_ranks(stage, site, options.on)
        values |= {} if stage.layout is None else {"layout": stage.layout.mesh()}
        values |= tuning.judged(stage, site.machine.memory.value, site.known["reserve"].value, site.known)
        known += [values["change"]] if "change" in values else []
    if not stage.pretrains:
        if not values["flops"]:
            return values | {"notes": known[-1:] if "change" in values else []}
        computing = cluster.product_seconds(_trained(stage, stage.model), site)
        beside = tuning_time.beside_products(stage, site, computing) + tuning_time.on_host(stage, site, computing)
        rough = cluster.by_flops(values["flops"], site, options, _least(stage, site), beside)
        hidden = [remarks.HIDDEN] if stage.layout and stage.layout.sharding == "fsdp" else []
        return values | rough | {"notes": [*known, remarks.ROUGH, *hidden]}
    try:
        return values | _laid_out(stage, site, options)
    except UserError as error:
        if error.field not in ("rows", "layout.micro_batches"):
            raise
        # another stage of the recipe may fit this mesh; MFU does not count MTP
        counted = training_flops(stage.model, stage.length / 2, mtp=False) * stage.work.tokens_trained
        notes = [*known, f"no basis: no layout is possible ({error}), so it is FLOPs at the MFU of V3's own layout"]
        rough = cluster.by_flops(counted, site, options, _least(stage, site))
        return values | rough | {"refused": str(error), "notes": notes}


def _least(stage: PlannedStage, site: Site) -> float:
    """Lower bound of a stage's time in seconds, from its consecutive passes.

    A step generates one token of all its answers at a time, then updates; a stage without steps counts as one step.
    """
    knobs, work = stage.knobs, stage.work
    assert stage.model is not None, "a stage without a model takes no passes"
    limits = [int(exam.get("max_tokens") or 0) for exam in knobs.get("exams") or () if isinstance(exam, dict)]
    length = sum(limits) or int(knobs.get("max_tokens") or 0)
    steps = int(knobs.get("steps") or 1)
    generating = length * (1 + int(knobs.get("resample") or 0)) if work.tokens_generated else 0
    updates = tuning_time.updates(stage)
    return cost.least_seconds(stage.model, steps * generating + (3 * updates if work.tokens_trained else 0), site)


def _laid_out(stage: PlannedStage, site: Site, options: PlanOptions) -> dict[str, Any]:
    """Pre-training with the options' mesh, else with the stage's layout, else with a recommended layout."""
    knobs, given, model = stage.knobs, None if options.mesh else stage.layout, stage.model
    assert model is not None, "a stage that trains has a model"
    own = None if knobs["compute"] == "auto" else knobs["compute"]
    if own is None and (given is not None or knobs["compile"]):  # "auto" means bf16 on a GPU, and compile needs it
        own = "bf16"
    options = dataclasses.replace(
        options, precision=options.precision or own, optimizer=options.optimizer or knobs["optimizer"]
    )
    rows = options.rows or knobs["batch_size"]
    work = dataclasses.replace(
        cluster.workload(rows, options.length or stage.length, site, options),
        rows_start=0 if options.rows else knobs["batch_size_start"],
        averaged=knobs["ema_decay"] > 0,
        rounded=knobs["weights"] == "bf16",
        probed=knobs["probe"] is not None,
        masked=knobs["document_mask"],
        compiled=knobs["compile"],
    )
    if given is not None:
        if given.ranks != site.devices:
            problem = f"the recipe's layout has {given.ranks} ranks, not {site.devices}"
            raise UserError("--on", options.on, problem, f"Use {given.ranks} devices, or --mesh for another layout.")
        if options.schedule:
            given = dataclasses.replace(given, schedule=options.schedule.lower())  # type: ignore[arg-type]
        recompute = work.recompute if options.recompute else knobs["recompute"]
        work = dataclasses.replace(work, layout=given, recompute=recompute)
    tokens = stage.work.tokens_trained
    found = cluster.plan(stage.name, model, work, tokens, site, options, given=given is not None).values
    return {
        **{key: found["run"][key] for key in ("seconds", "device_hours", "dollars", "kwh")},
        "fits": found["memory"]["fits"],
        "mfu": found["step"]["mfu"],
        "memory_bytes": max(r["total"] for r in found["memory"]["ranks"]),
        "layout": found["layout"]["mesh"],
        "how": "step by step",
        "notes": found["remarks"],
        "plan": found,
    }
