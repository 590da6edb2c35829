"""Caveats of a plan, and where it has no basis. Does not import torch."""

from finback.model.config import ModelConfig
from finback.planner import cost
from finback.planner.cost import Step
from finback.planner.hardware import MACHINES, Site
from finback.planner.recommend import JudgedWorkload
from finback.planner.workload import Precision

REACHED = MACHINES["h800"].mfu
ROUGH = (
    "rough: FLOPs at the training rate, and at least the time of its consecutive passes; answers of different lengths, and "
    "reading the weights for few answers at a time, take longer"
)
HIDDEN = "FSDP's gathering is assumed to overlap with compute as far as there is enough compute"


def of_model(c: ModelConfig, precision: Precision, site: Site) -> list[str]:
    """Remarks on a model at a site, independent of the layout: the source of its efficiency."""
    found = []
    if "efficiency" not in site.known and "mfu" not in site.known:
        if site.machine.name != "h800":
            found.append("the efficiency was measured on H800 only; pass --assume mfu=… if you know this machine's")
        if precision != "fp8":
            found.append(
                "the efficiency is that of V3's FP8 training; bf16 reaches less (NeMo Automodel: 250 TFLOPS on H100, 25 %)"
            )
        if c.hidden_size < 2048:
            found.append("the efficiency comes from V3's large matrices; small ones reach less of the peak")
        if c.attention != "mla" or not c.n_routed_experts:
            found.append(
                "no basis: the efficiency is that of V3, a mixture of experts with latent attention; other models may differ "
                "(Llama 3 405B: MFU of 38 to 43 % on 8,192 and 16,384 H100, with tensor parallelism; arXiv 2407.21783, table 4)"
            )
    if site.devices > 2 * cost.V3_WORKLOAD.layout.ranks:
        found.append(
            f"no basis: the figures were measured on {cost.V3_WORKLOAD.layout.ranks:,} devices; on {site.devices:,} "
            "networks are slower and devices fail more often, which is not counted"
        )
    return found


def of_step(c: ModelConfig, judged: JudgedWorkload, site: Site, step: Step) -> list[str]:
    """Remarks on a step with a layout."""
    work, known = judged.work, site.known
    found = of_model(c, work.precision, site)
    if work.layout.sharding == "fsdp":
        found.append(HIDDEN)
    if work.precision == "fp8" and work.layout.ep > 1 and work.layout.pipeline.copies == 1:
        found.append(
            "the plan sends tokens to their experts in FP8, as V3 does; finback sends them in bf16, twice the bytes"
        )
    if work.masked:
        found.append("separate documents: attention is planned over whole rows; by document it takes less")
    if work.probed:
        found.append("a probe gathers the whole fp32 model on every rank; its memory is counted, its time is not")
    if not judged.fits:
        found.append("no basis: it does not fit, so time and cost are those of a run that is not possible")
    slots = c.num_hidden_layers + c.num_nextn_predict_layers
    started = 3 * cost.launch_seconds(slots / work.layout.pp, known) * work.layout.micro_batches
    if started > 0.3 * step.seconds:
        found.append("small steps: kernel launches take much of the time (see the assumption launch)")
        return found
    assert REACHED is not None, "the reference machine has a published MFU"
    if "efficiency" not in known and "mfu" not in known and step.mfu < REACHED.value / 2:
        found.append(
            f"no basis: an MFU of {step.mfu:.1%} is less than half of the {REACHED.value:.1%} that V3 reached; other layouts, "
            "with tensor parallelism for example, may be several times as fast"
        )
    return found
