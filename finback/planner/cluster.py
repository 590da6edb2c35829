"""Plans one model's pre-training on named hardware, as plain values for JSON and text. Does not import torch."""

import dataclasses
from dataclasses import dataclass
from typing import Any, get_args

from finback.config import UserError
from finback.model.config import V3, ModelConfig
from finback.model.count import cache_bytes, forward_flops, parameters, router_biases, token_flops, training_flops
from finback.parallel.schedules import ScheduleName
from finback.planner import cost, memory, recommend, remarks
from finback.planner.cost import Step
from finback.planner.hardware import Fact, Machine, Site
from finback.planner.options import PlanOptions
from finback.planner.recommend import JudgedWorkload, Search
from finback.planner.workload import Workload, parse_mesh


@dataclass(frozen=True)
class ClusterPlan:
    """A plan, with what the picture needs in addition to the JSON values."""

    values: dict[str, Any]
    step: Step
    work: Workload


def plan(
    name: str,
    c: ModelConfig,
    work: Workload,
    tokens: float,
    site: Site,
    options: PlanOptions,
    source: str = "",
    given: bool = False,
) -> ClusterPlan:
    """Plans `tokens` tokens in steps of `work` at a site.

    If `given`, the layout and recomputation of `work` are used. Otherwise the options decide, and what they leave open is
    recommended.
    """
    machine, devices, known = site.machine, site.devices, site.known
    if work.precision == "fp8" and machine.fp8 is None:
        raise UserError("--precision", "fp8", f"{machine.name} has no FP8 products", "Use bf16.")
    if given:
        work.check(c)
        judged = recommend.judge(c, work, machine, known)
    else:
        judged = recommend.recommend(c, _search(c, work, site, options))
    share = cost.efficiency(c, judged.work, machine, known, options.skew)
    step = cost.step(c, judged.work, machine, share.value, known, options.skew)
    bill = cost.bill(c, judged.work, step.seconds, tokens, site, options.price)
    price = machine.price.value if options.price is None and machine.price else options.price
    facts = {key: value for key, value in dataclasses.asdict(machine).items() if isinstance(value, dict)}
    # share of each part of a step in the bill, in dollars if the price is known, else as a fraction
    sensitivity = {part: x * (bill["dollars"] or 1.0) for part, x in step.shares().items()}
    tokens_per_step = work.rows * work.length
    values = {
        "model": model_values(name, c, work.length),
        "machine": {"name": machine.name, "devices": devices, "facts": facts},
        "assumptions": {key: dataclasses.asdict(fact) for key, fact in (known | {"efficiency": share}).items()},
        "batch": {"rows": work.rows, "length": work.length, "tokens_per_step": tokens_per_step, "source": source},
        "layout": layout_values(judged.work, given or bool(options.mesh)),
        "memory": memory_values(judged, machine, known),
        "step": step_values(step),
        "schedules": schedule_values(c, judged.work, machine, share.value, known, options.skew),
        "run": bill | {"price": price, "sensitivity": sensitivity},
        "serving": memory.serving(c, devices, machine.memory.value, work.precision, known),
        "skew": options.skew,
        "remarks": remarks.of_step(c, judged, site, step),
    }
    return ClusterPlan(values, step, judged.work)


def workload(rows: int, length: int, site: Site, options: PlanOptions) -> Workload:
    """A step according to the options, without a layout."""
    precision = options.precision or ("fp8" if site.machine.fp8 else "bf16")
    return Workload(
        rows=rows,
        length=length,
        recompute=options.recompute or "none",
        precision=precision,
        optimizer=options.optimizer or "adamw",
    )


def _search(c: ModelConfig, work: Workload, site: Site, options: PlanOptions) -> Search:
    """The search space: everything that --mesh, --schedule and --recompute leave open."""
    change: dict[str, Any] = {"schedule": options.schedule.lower()} if options.schedule else {}
    fixed = {name for name in ("schedule", "recompute") if getattr(options, name)}
    if options.mesh:
        change |= parse_mesh(options.mesh, site.devices)
        fixed |= {"pp", "dp", "ep", "sharding"}
    try:
        start = recommend.with_layout(c, work, change, site.machine, options.micro_rows)
    except UserError:
        if options.mesh:
            raise
        start = dataclasses.replace(work, layout=dataclasses.replace(work.layout, **change))
    share = cost.efficiency(c, start, site.machine, site.known, options.skew)
    return Search(start, site, frozenset(fixed), options.micro_rows, share.value)


def product_seconds(flops: float, site: Site) -> float:
    """Seconds for `flops` FLOPs at the given MFU or the machine's, else at the efficiency derived from V3's MFU."""
    machine, devices, known = site.machine, site.devices, site.known
    share = known.get("mfu") or machine.mfu or cost.efficiency(V3, cost.V3_WORKLOAD, machine, known)
    return flops / (machine.bf16.value * share.value * devices)


def by_flops(flops: float, site: Site, options: PlanOptions, least: float = 0.0, beside: float = 0.0) -> dict[str, Any]:
    """Rough cost of `flops` FLOPs, which take at least `least` seconds, plus `beside` seconds of other work."""
    seconds = max(product_seconds(flops, site), least) + beside
    return {"seconds": seconds, **cost.spending(seconds, site, options.price), "how": "rough"}


def model_values(name: str, c: ModelConfig, length: int) -> dict[str, Any]:
    """Parameters and FLOPs of a model, by the papers' rule and by term."""
    plain, active = parameters(c, mtp=False), parameters(c, active=True, mtp=False)
    embedding = 0 if c.tie_word_embeddings else c.vocab_size * c.hidden_size
    return {
        "name": name,
        "parameters": plain,
        "parameters_with_router_biases": plain + router_biases(c),
        "parameters_with_mtp": parameters(c),
        "active": active,
        "active_without_input_embedding": active - embedding,
        "training_flops_per_token": training_flops(c, length / 2, mtp=False),
        "training_flops_per_token_with_mtp": training_flops(c, length / 2, mtp=True),
        "forward_flops_per_token": forward_flops(c, length / 2),
        "forward_products_with_mtp": dataclasses.asdict(token_flops(c, length / 2, mtp=True)),
        "counting": f"2 FLOPs per active weight, attention over T/2 = {length / 2:g} keys, training 3 x forward",
        "cache_bytes_per_token": cache_bytes(c),
    }


def layout_values(work: Workload, given: bool) -> dict[str, Any]:
    """The mesh and how a step runs on it, with the knobs of a stage that trains this way."""
    layout = work.layout
    values = dataclasses.asdict(work)
    return {
        **values.pop("layout"),
        **values,
        "tensor_parallelism": "not supported; V3 trains without it",
        "devices": layout.ranks,
        "stages": layout.stages,
        "micro_rows": work.micro_rows,
        "mesh": layout.mesh(),
        "given": given,
        "knobs": work.knobs(),
    }


def memory_values(judged: JudgedWorkload, machine: Machine, known: dict[str, Fact]) -> dict[str, Any]:
    """Bytes on every pipeline rank, and whether the fullest rank leaves the margin free."""
    worst = judged.worst
    return {
        "device_bytes": machine.memory.value,
        "fits": judged.fits,
        "free_share": 1 - worst.total / machine.memory.value,
        "margin": known["margin"].value,
        "worst_rank": judged.ranks.index(worst),
        "ranks": [dataclasses.asdict(rank) | {"total": rank.total} for rank in judged.ranks],
    }


def step_values(step: Step) -> dict[str, Any]:
    """A step's time by part, and its traffic."""
    sent = {k: v for k, v in dataclasses.asdict(step.traffic).items() if k != "load"}
    load = step.traffic.load
    routing = None if load is None else {k: v for k, v in dataclasses.asdict(load).items() if k != "per_rank"}
    return {
        "seconds": step.seconds,
        "mfu": step.mfu,
        "efficiency": step.efficiency,
        "shares": step.shares(),
        "durations": {k: getattr(step.durations, k) for k in ("f", "b", "w", "both", "send")},
        "traffic": sent,
        "routing": routing,
    }


def schedule_values(
    c: ModelConfig, work: Workload, machine: Machine, efficiency: float, known: dict[str, Fact], skew: float
) -> dict[str, Any]:
    """The same mesh under every schedule that it allows."""
    if work.layout.pp == 1:
        return {}
    found: dict[str, Any] = {}
    for name in get_args(ScheduleName):
        other = dataclasses.replace(work, layout=dataclasses.replace(work.layout, schedule=name))
        try:
            other.check(c)
        except UserError as error:
            found[name] = {"refused": str(error)}
            continue
        step = cost.step(c, other, machine, efficiency, known, skew)
        judged = recommend.judge(c, other, machine, known)
        d, schedule, stages = step.durations, other.layout.pipeline, other.layout.stages
        found[name] = {
            "step_seconds": step.seconds,
            "bubble_share": step.bubble / step.seconds,
            "bubble_formula_seconds": schedule.bubble(stages, d.f, d.b, d.w, d.f + d.b if d.both is None else d.both),
            "parameters": len(other.layout.stages_of(0)),
            "in_flight": max(rank.in_flight for rank in judged.ranks),
            "memory_bytes": judged.worst.total,
            "fits": judged.fits,
        }
    return found
