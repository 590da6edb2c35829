"""Properties of machines, each with its source, from hardware.toml. Does not import torch."""

import dataclasses
import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finback.config import UserError, did_you_mean


@dataclass(frozen=True)
class Fact:
    """A number and its source."""

    value: float
    source: str


@dataclass(frozen=True)
class Machine:
    """One device, its node, and the network between nodes; None: unknown."""

    name: str
    # bytes
    memory: Fact
    # FLOP/s
    bf16: Fact
    # bytes/s
    memory_bandwidth: Fact | None = None
    fp8: Fact | None = None
    # measured fp32 FLOP/s, for CPUs, which may train in fp32
    fp32: Fact | None = None
    # devices connected by the fast link
    node: Fact | None = None
    # bytes/s within a node
    link: Fact | None = None
    # bytes/s between nodes
    network: Fact | None = None
    watts: Fact | None = None
    # published MFU of a V3-like model, relative to the bf16 peak, with causal counting
    mfu: Fact | None = None
    # dollars per device-hour
    price: Fact | None = None

    def peak(self, precision: str) -> float:
        """FLOP/s that MFU refers to: bf16's even for FP8 training, as DeepSeek counts."""
        return (self.fp32 if precision == "fp32" and self.fp32 else self.bf16).value


_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


def _facts(table: dict[str, tuple[float, str]]) -> dict[str, Fact]:
    return {name: Fact(value, source.format(**_TABLES["sources"])) for name, (value, source) in table.items()}


MACHINES = {name: Machine(name, **_facts(table)) for name, table in _TABLES["machines"].items()}
# what a plan needs besides the machine; each can be changed with --assume NAME=VALUE
ASSUMPTIONS = _facts(_TABLES["assumptions"])
SHARES = ("overlap", "margin", "efficiency", "mfu")
MAY_BE_ZERO = ("launch", "imbalance", "reserve", "overlap", "margin", "co2")
OF_MACHINE = ("memory", "link", "network", "watts", "mfu")  # machine properties that --assume can replace


def find(text: str) -> tuple[Machine, int]:
    """`h800:2048`, `2048xh800` -> machine and number of devices; 1 if no number is given. `rtx4090` is `4090`."""
    name, colon, count = text.partition(":")
    if not colon and (met := re.fullmatch(r"(\d+)x(.+)", text.lower())):
        count, name = met.groups()
        colon = "x"
    name = re.sub(r"^rtx[ _-]?", "", name.lower())
    if name not in MACHINES:
        raise UserError("--on", text, f"unknown hardware {name!r}", did_you_mean(name, MACHINES))
    if colon and not (count.isdecimal() and int(count) > 0):
        raise UserError("--on", text, "not a number of devices", "Write for example h800:2048.")
    return MACHINES[name], int(count) if colon else 1


@dataclass(frozen=True)
class Site:
    """Hardware, number of devices, and assumptions of a plan."""

    machine: Machine
    devices: int
    known: dict[str, Fact]


def site(on: str, settings: Sequence[str]) -> Site:
    """The site given by --on and --assume."""
    machine, devices = find(on)
    known, machine = assumptions(settings, machine)
    return Site(machine, devices, known)


def assumptions(settings: Sequence[str], machine: Machine) -> tuple[dict[str, Fact], Machine]:
    """Assumptions and machine after applying `name=value` settings.

    `efficiency` is the share of the peak reached while computing. By default it is derived from `mfu`: the published one for
    V3's own layout, or the given one for the planned layout.
    """
    known = dict(ASSUMPTIONS)
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in (names := {*known, "efficiency", *OF_MACHINE}):
            raise UserError("--assume", setting, f"no assumption {name!r}", did_you_mean(name, names))
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < math.inf or (value == 0 and name not in MAY_BE_ZERO):
            raise UserError("--assume", setting, "not a number above 0", f"Write for example {name}=0.2.")
        if name in SHARES and value > 1:
            raise UserError("--assume", setting, "a share above 1", "Use a share between 0 and 1.")
        fact = Fact(value, "given with --assume")
        if name in OF_MACHINE:
            machine = dataclasses.replace(machine, **{name: fact})  # type: ignore[arg-type]
        if name not in OF_MACHINE or name == "mfu":
            known[name] = fact
    return known, machine
