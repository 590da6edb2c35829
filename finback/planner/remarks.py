"""Caveats of a plan, and where it has no basis. Does not import torch."""

from finback.model.config import ModelConfig
from finback.planner import cost
from finback.planner.cost import Step
from finback.planner.hardware import MACHINES, Site
from finback.planner.recommend import JudgedWorkload
from finback.planner.workload import Precision

REACHED = MACHINES["h800"].mfu
ROUGH = (
    "rough: FLOPs at the rate of training, and not less than its passes take one after the other; answers of many lengths, "
    "and reading weights for few answers at a time, take longer"
)
HIDDEN = "FSDP's gathering is taken to hide behind compute as far as there is any"


def of_model(c: ModelConfig, precision: Precision, site: Site) -> list[str]:
    """Remarks on a model at a site, independent of the layout: the source of its efficiency."""
    found = []
    if "efficiency" not in site.known and "mfu" not in site.known:
        if site.machine.name != "h800":
            found.append("efficiency was measured on H800 alone; give --assume mfu=… if you know this machine's")
        if precision != "fp8":
            found.append(
                "efficiency is that of V3's FP8 training; in bf16 less is reached (NeMo Automodel: 250 TFLOPS on H100, 25 %)"
            )
        if c.hidden_size < 2048:
            found.append("small matrices reach less of the peak than V3's, which the efficiency is from")
        if c.attention != "mla" or not c.n_routed_experts:
            found.append(
                "no basis: efficiency is that of V3, experts and latent attention; a dense model's may be another (Llama 3 "
                "405B: MFU of 38 to 43 % on 8,192 and 16,384 H100, with tensor parallelism; arXiv 2407.21783, table 4)"
            )
    if site.devices > 2 * cost.V3_WORKLOAD.layout.ranks:
        found.append(
            f"no basis: what is known was measured on {cost.V3_WORKLOAD.layout.ranks:,} devices; on {site.devices:,} "
            "networks are slower and devices fail oftener, which is not counted"
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
            "tokens are planned to go to their experts in FP8, as V3's; finback sends them in bf16, twice the bytes"
        )
    if work.masked:
        found.append("documents apart: attention is planned over whole rows; document by document it takes less")
    if work.probed:
        found.append(
            "a probe puts the whole model, in fp32, together on every rank; its memory is counted, its time is not"
        )
    if not judged.fits:
        found.append("no basis: it does not fit, so time and money are those of a run that cannot be made")
    slots = c.num_hidden_layers + c.num_nextn_predict_layers
    started = 3 * cost.launch_seconds(slots / work.layout.pp, known) * work.layout.micro_batches
    if started > 0.3 * step.seconds:
        found.append("small steps: kernels that have to start take much of the time, by the assumption of launch")
        return found
    assert REACHED is not None, "the reference machine has a published MFU"
    if "efficiency" not in known and "mfu" not in known and step.mfu < REACHED.value / 2:
        found.append(
            f"no basis: an MFU of {step.mfu:.1%} is less than half of the {REACHED.value:.1%} that V3 reached; this layout "
            "loses the rest, and others, tensor parallelism among them, may be several times as fast"
        )
    return found
