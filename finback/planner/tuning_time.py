"""The time that a layout and host memory add to fine-tuning and RL: exposed transfers. Does not import torch."""

from finback.config import UserError
from finback.model.count import parameters
from finback.parallel.layout import Layout
from finback.planner import traffic, tuning
from finback.planner.hardware import Site
from finback.planner.planned_stage import PlannedStage
from finback.planner.workload import Workload


def check_ranks(stage: PlannedStage, site: Site, on: str) -> None:
    """Raises UserError if a stage's layout has another number of ranks than devices."""
    if stage.layout is not None and stage.layout.ranks != site.devices:
        problem = f"the layout of {stage.name} has {stage.layout.ranks} ranks, not {site.devices}"
        raise UserError("--on", on, problem, f"Use {stage.layout.ranks} devices, or change the layout.")


def updates(stage: PlannedStage) -> int:
    """Number of optimizer steps of a stage."""
    knobs, work = stage.knobs, stage.work
    rows = int(knobs.get("batch_size") or 0) * stage.length
    if work.tokens_trained and rows and "steps" not in knobs:
        return -(-work.tokens_trained // rows)
    return int(knobs.get("updates") or 1) * int(knobs.get("epochs") or 1) * int(knobs.get("steps") or 1)


def _passes(stage: PlannedStage, layout: Layout) -> float:
    """Number of rounds in which each rank of a layout runs `micro_batches` passes."""
    rows = layout.dp * layout.micro_batches
    return stage.work.tokens_trained / (rows * tuning.pass_tokens(stage.knobs, layout) * layout.cp)


def on_host(stage: PlannedStage, site: Site, computing: float) -> float:
    """Seconds of transfers between device and host beyond `computing` seconds of passes, and of AdamW on the host.

    With `offload` each pass fetches the shard twice and returns its gradients. AdamW reads parameter, gradient and moments
    and writes all but the gradient, 28 bytes. With moments="host", the moments of weights on the device are
    transferred in both directions, 16 bytes.
    """
    layout, knobs, c = stage.layout, stage.knobs, stage.model
    if c is None or not stage.work.tokens_trained or not tuning.is_tuned(stage):
        return 0.0
    adapter, pace, holders = knobs.get("adapter"), site.known["host"].value, layout.holders if layout else 1
    learnt = tuning.learnt_numbers(c, adapter, layout.ep if layout else 1) if adapter else parameters(c) / holders
    travelling = updates(stage) * 16 * learnt if knobs.get("moments") == "host" else 0.0
    if layout is None or not layout.offload or layout.ranks == 1:
        return travelling / pace
    stored = tuning.frozen_bytes(c, adapter) / holders if adapter else 4.0 * learnt
    moved = _passes(stage, layout) * (2 * stored + (0.0 if adapter else 4.0 * learnt))
    stepped = travelling if adapter else updates(stage) * 28 * learnt
    return max(moved / pace - computing, 0.0) + stepped / pace


def beside_products(stage: PlannedStage, site: Site, computing: float) -> float:
    """Seconds of all-to-all, of gathering beyond `computing` seconds of passes, and of full copies for generation.

    ZeRO-1 exchanges gradients and weights, both in fp32, once per update and after its passes. The small gradients of an
    adapter are ignored.
    """
    layout, knobs, c = stage.layout, stage.knobs, stage.model
    if layout is None or c is None or layout.ranks == 1:
        return 0.0
    precision = "fp32" if knobs.get("compute", "fp32") == "fp32" else "bf16"
    work = Workload(
        layout=layout,
        rows=layout.dp * layout.micro_batches,
        length=tuning.pass_tokens(knobs, layout) * layout.cp,
        recompute=knobs.get("recompute") or ("block" if knobs.get("adapter") else "none"),
        precision=precision,  # type: ignore[arg-type]
    )
    sent, passes = traffic.of(c, work, site.machine), _passes(stage, layout)
    width = tuning.gathered_width(layout, knobs.get("adapter"))
    # traffic assumes gradients and twice the weights in the gathered dtype; a frozen base has weights only
    share = 2 * width / (4 + 2 * width) if knobs.get("adapter") else 1.0
    exchanged = max(passes * sent.exchange_seconds * share - computing, 0.0)
    if layout.sharding != "fsdp":  # traffic assumes weights in the precision of the passes
        gradient, weight = traffic.gradient_width(work), 4 if precision == "fp32" else 2
        exchanged = updates(stage) * sent.exchange_seconds * (gradient + 4) / (gradient + weight)
    wire = traffic.wire(site.machine, layout.ranks, inside=layout.ranks <= traffic.per_node(site.machine))
    received = tuning.copy_bytes(c, knobs) * (layout.ranks - 1) / layout.ranks if tuning.copies(knobs, layout) else 0.0
    copies = 1 if knobs.get("adapter") or not knobs.get("task") else int(knobs.get("steps") or 1)
    around = passes * (sent.dispatch_seconds + sent.context_seconds)
    return around + exchanged + copies * received / wire
