"""What machines can do: numbers with the place each was read. Nothing is guessed; what has no source is left out.

No torch here. Peaks are dense (no sparsity). Bandwidths are one way and per device, as a transfer meets them.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from finback.config import UserError, did_you_mean


@dataclass(frozen=True)
class Fact:
    """A number and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class Machine:
    """One device, the node it sits in and the network between nodes; None is not known."""

    name: str
    # bytes
    memory: Fact
    # FLOP/s
    bf16: Fact
    # bytes/s
    memory_bandwidth: Fact | None = None
    fp8: Fact | None = None
    # what fp32 products reach; given for CPUs, where training may be in fp32
    fp32: Fact | None = None
    # devices that the fast link joins
    node: Fact | None = None
    # bytes/s within a node
    link: Fact | None = None
    # bytes/s between nodes
    network: Fact | None = None
    watts: Fact | None = None
    # published for a V3-like model, of the bf16 peak, causal counting
    mfu: Fact | None = None
    # dollars per device-hour
    price: Fact | None = None

    def peak(self, precision: str) -> float:
        """FLOP/s that MFU is counted against: bf16's also for FP8 training, as DeepSeek counts."""
        return (self.fp32 if precision == "fp32" and self.fp32 else self.bf16).value


ISCA = "arXiv 2505.09343, table 4"
V3 = "arXiv 2412.19437, section 3"
HOPPER = "glennklockwood.com/garden/processors/h100, after NVIDIA's Hopper whitepaper"
AMPERE = "glennklockwood.com/garden/processors/A100, after NVIDIA's A100 datasheet"
BLACKWELL = "glennklockwood.com/garden/processors/B200, after NVIDIA's Blackwell brief (HGX, 1000 W)"
DATASHEETS = "github.com/astroC86/gpu-datasheet, after NVIDIA's datasheets"
ADA = "waredb.com/processor/nvidia-geforce-rtx-4090"
NVLINK_SHARE = "160 of 200 GB/s one way in V3's report, the same share assumed of"

_NODE = Fact(8, "HGX board: eight devices behind one switch; V3 report 3.2 says the same of H800")
_IB = Fact(50e9, "arXiv 2505.09343: one 400 Gb/s NIC per GPU; the same assumed here")

_H100 = Machine(
    "h100",
    memory=Fact(80e9, HOPPER),
    bf16=Fact(989.4e12, HOPPER),
    fp8=Fact(1978.9e12, HOPPER),
    memory_bandwidth=Fact(3.35e12, HOPPER),
    node=_NODE,
    link=Fact(360e9, f"{NVLINK_SHARE} 450 in {HOPPER}"),
    network=_IB,
    watts=Fact(700, HOPPER),
)

MACHINES = (
    Machine(
        "h800",
        memory=Fact(80e9, DATASHEETS),
        bf16=Fact(432e12 / 0.4373, f"{ISCA}: 432 TFLOPS are 43.73 % of it"),
        fp8=Fact(2 * 432e12 / 0.4373, f"{ISCA}, doubled: {HOPPER} has FP8 at twice BF16"),
        memory_bandwidth=Fact(3.35e12, DATASHEETS),
        node=Fact(8, V3),
        link=Fact(160e9, f"{V3}: what NVLink's 400 GB/s, both ways, bring"),
        network=Fact(50e9, f"{V3}: InfiniBand"),
        watts=Fact(700, f"{HOPPER}: H800 is the same chip"),
        mfu=Fact(0.3894, f"{ISCA}: causal, of the bf16 peak, V3 on 2048 H800"),
        price=Fact(2.0, "arXiv 2412.19437, table 1: the rent its authors assume"),
    ),
    _H100,
    dataclasses.replace(_H100, name="h200", memory=Fact(141e9, DATASHEETS), memory_bandwidth=Fact(4.8e12, DATASHEETS)),
    Machine(
        "a100",
        memory=Fact(80e9, AMPERE),
        bf16=Fact(312e12, AMPERE),
        memory_bandwidth=Fact(2.039e12, AMPERE),
        node=_NODE,
        link=Fact(240e9, f"{NVLINK_SHARE} 300 in {AMPERE}"),
        watts=Fact(400, AMPERE),
    ),
    Machine(
        "b200",
        memory=Fact(179e9, "docs.vultr.com/inference-cookbook, as measured there"),
        bf16=Fact(2250e12, BLACKWELL),
        fp8=Fact(4500e12, BLACKWELL),
        memory_bandwidth=Fact(8e12, BLACKWELL),
        node=_NODE,
        link=Fact(726e9, "github.com/deepseek-ai/DeepEP, V2: dispatch on SM100"),
        network=_IB,
        watts=Fact(1000, BLACKWELL),
    ),
    Machine(
        "4090",
        memory=Fact(24e9, ADA),
        bf16=Fact(165.15e12, ADA),
        fp8=Fact(330.3e12, ADA),
        memory_bandwidth=Fact(1.008e12, ADA),
        watts=Fact(450, "holynerdvana.blogspot.com/2022/10/nvidia-geforce-rtx-4090-specifications.html"),
    ),
)

_BY_NAME = {machine.name: machine for machine in MACHINES}


def find(text: str) -> tuple[Machine, int]:
    """`h800:2048` -> the machine and how many of its devices; one without a number."""
    name, colon, count = text.partition(":")
    if name.lower() not in _BY_NAME:
        raise UserError("--on", text, f"unknown hardware {name!r}", did_you_mean(name.lower(), _BY_NAME))
    if colon and not (count.isdecimal() and int(count) > 0):
        raise UserError("--on", text, "not a number of devices", "Write for example h800:2048.")
    return _BY_NAME[name.lower()], int(count) if colon else 1


@dataclass(frozen=True)
class Site:
    """Where a plan's work runs, and what is assumed beyond the machine's facts."""

    machine: Machine
    devices: int
    known: dict[str, Fact]


def site(on: str, settings: Sequence[str]) -> Site:
    """The site that --on and --assume name."""
    machine, devices = find(on)
    known, machine = assumptions(settings, machine)
    return Site(machine, devices, known)


# What a plan needs beyond the machine; every one can be changed with --assume NAME=VALUE.
ASSUMPTIONS = {
    "pue": Fact(1.58, "journal.uptimeinstitute.com, survey of 2023: power of a whole site over that of its machines"),
    "co2": Fact(0.436, "Ember, Global Electricity Review 2023: kg CO2 per kWh, world, 2022"),
    "imbalance": Fact(0.1, "assumed: the fullest expert rank holds this much more than the mean"),
    "reserve": Fact(2e9, "assumed: bytes per device for context, communication buffers and fragments"),
    "overlap": Fact(1.0, "share of all-to-all that overlapping schedules hide; V3 report 3.2.1: nearly all"),
    "margin": Fact(0.1, "assumed: share of a device's memory that must stay free"),
}
SHARES = ("overlap", "margin", "efficiency", "mfu")
OF_MACHINE = ("memory", "link", "network", "watts", "mfu")  # facts of a machine that --assume replaces


def assumptions(settings: Sequence[str], machine: Machine) -> tuple[dict[str, Fact], Machine]:
    """The assumptions and the machine with `name=value` texts applied.

    `efficiency` is the share of the peak that is reached while computing. Without it, it follows from `mfu`: as
    published for V3's own layout, or as given for the layout that is planned.
    """
    known = dict(ASSUMPTIONS)
    for setting in settings:
        name, equals, text = setting.partition("=")
        if name not in (names := {*known, "efficiency", *OF_MACHINE}):
            raise UserError("--assume", setting, f"no assumption {name!r}", did_you_mean(name, names))
        fact = Fact(_number(setting, text if equals else ""), "given with --assume")
        if name in SHARES and fact.value > 1:
            raise UserError("--assume", setting, "more than the whole", "Use a share between 0 and 1.")
        if name in OF_MACHINE:
            machine = dataclasses.replace(machine, **{name: fact})  # type: ignore[arg-type]
        if name not in OF_MACHINE or name == "mfu":
            known[name] = fact
    return known, machine


def _number(setting: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    name = setting.partition("=")[0]
    if not 0 <= value < math.inf or (value == 0 and name not in ("imbalance", "reserve", "overlap", "margin", "co2")):
        raise UserError("--assume", setting, "not a number above 0", f"Write for example {name}=0.2.")
    return value
