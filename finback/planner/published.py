"""Numbers that DeepSeek published, next to the planner's from first principles. Does not import torch."""

from dataclasses import dataclass

from finback.model.config import V2, V3, V3_2, V4_FLASH, V4_PRO
from finback.model.count import cache_bytes, parameters, router_biases, training_flops
from finback.model.decode_flops import fp8_flops
from finback.parallel.layout import Layout
from finback.planner import cost, hardware
from finback.planner.hardware import Fact


@dataclass(frozen=True)
class Claim:
    """A published number, ours, and the rule by which ours was computed."""

    what: str
    published: float
    ours: float
    rule: str
    source: str

    @property
    def off(self) -> float:
        """Relative difference."""
        return self.ours / self.published - 1


V3_TOKENS = 14.8e12
LONG = 2**20  # tokens
# context extension (V3 report 4.3): 1000 steps each with these (rows, tokens per row)
EXTENSION = ((1920, 32768), (480, 131072))
POST_TRAINING_HOURS = 5e3  # its number of tokens is not published
# R1's supplement, B.4.4: (devices, hours) of each run; device-hours alone for generating SFT data
R1_RUNS = ((512, 198), (512, 80))
R1_DATA_HOURS = 5e3


def claims(known: dict[str, Fact]) -> list[Claim]:
    """All claims. Hours depend on the MFU that the ISCA paper measured, which is an input here."""
    return [*_of_models(), *_of_runs(known)]


def _of_models() -> list[Claim]:
    causal = "3 x (2 x active parameters without the input embedding + attention over T/2 keys), T = 4096, without MTP"
    v3, v2 = (training_flops(model, 2048, mtp=False) / 1e9 for model in (V3, V2))
    isca = "arXiv 2505.09343"
    size, cache = parameters(V3, mtp=False) + router_biases(V3), "latent and rotary key, bf16, 61 layers"
    without, tensors = "without the MTP module, with the routers' biases", "sum over the released tensors"
    return [
        Claim("V3 parameters", 671_026_419_200, size, without, tensors),
        Claim("V3 GFLOPs per token", 250.5, v3, causal, f"{isca}, table 2 (250)"),
        Claim("V2 GFLOPs per token", 155.3, v2, causal, f"{isca}, table 2 (155)"),
        Claim("V3 cache bytes per token", 70_272, cache_bytes(V3), cache, f"{isca}, table 1"),
        *_of_long_texts(),
    ]


def _of_long_texts() -> list[Claim]:
    """V4's products for decoding one token after 2^20 others, as shares of V3.2's."""
    rule, sparse = "products with weights 1, head and attention 2, indexer 1 (V4: 1/2)", fp8_flops(V3_2, LONG)
    shares = (("V4-Flash", V4_FLASH, 10.0), ("V4-Pro", V4_PRO, 27.0))
    return [
        Claim(
            f"{name} FLOPs at 1M, % of V3.2's",
            share,
            100 * fp8_flops(model, LONG) / sparse,
            rule,
            "DeepSeek-V4 report, 1",
        )
        for name, model, share in shares
    ]


def _of_runs(known: dict[str, Fact]) -> list[Claim]:
    h800, work = hardware.MACHINES["h800"], cost.V3_WORKLOAD
    assert h800.price is not None and h800.mfu is not None, "V3's machine is known"
    # V3's published layout with a simulated schedule
    step = cost.step(V3, work, h800, cost.efficiency(V3, work, h800, known).value, known)
    site, price = hardware.Site(h800, work.layout.ranks, known), h800.price.value
    hours = cost.bill(V3, work, step.seconds, V3_TOKENS, site, None)["device_hours"]
    # context extension at the MFU of pre-training
    speed = h800.bf16.value * h800.mfu.value * 3600
    extended = [1000 * rows * n * training_flops(V3, n / 2, mtp=False) / speed for rows, n in EXTENSION]
    total = hours + sum(extended) + POST_TRAINING_HOURS
    r1 = sum(devices * h for devices, h in R1_RUNS) + R1_DATA_HOURS
    mfu = f"FLOPs over MFU {h800.mfu.value:.2%} of the bf16 peak"
    parts = "context extension at the same MFU and its own lengths; post-training's 5K hours as published"
    made = f"512 x 198 h, 512 x 80 h and 5K hours of data at ${price:g}"
    v3 = "arXiv 2412.19437"
    return [
        Claim("V3 H800-hours per trillion tokens", 180e3, hours / V3_TOKENS * 1e12, mfu, f"{v3}, section 1"),
        Claim("V3 dollars in all", 5.576e6, total * price, f"{mfu}; {parts}; ${price:g} per hour", f"{v3}, table 1"),
        Claim("R1 dollars", 294e3, r1 * price, made, "R1 supplement, B.4.4"),
    ]


def is_v3s(layout: Layout) -> bool:
    """Whether a layout is the one in V3's report."""
    ours = cost.V3_WORKLOAD.layout
    return (layout.pp, layout.dp, layout.ep, layout.schedule) == (ours.pp, ours.dp, ours.ep, ours.schedule)
