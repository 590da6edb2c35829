"""What this machine and this installation can do for finback, what is missing, and how to get it: `finback doctor`."""

import importlib
import os
import platform
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from finback import extras
from finback.kernels import native
from finback.runs import processor
from finback.runs.terminal import columns
from finback.tasks import sandbox
from finback.train import compiling

COMPILER = "Debian and Ubuntu: apt-get install g++ python3-dev"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    # False: something is slower or not to be had
    ok: bool
    found: str
    remedy: str = ""


def report(environment: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """All findings as JSON values and as text."""
    found = findings(environment)
    return {"findings": [asdict(f) for f in found]}, text(found)


def findings(environment: Mapping[str, str]) -> list[Finding]:
    """All of them; a few seconds, most of which torch's compiler takes. Nothing is written and no network is used."""
    return [*_machine(), *_speed(), *_features(environment)]


def text(found: list[Finding]) -> str:
    """For a terminal, as wide as it is; commands stay whole, to be copied."""
    width = max(len(f.what) for f in found)
    lines, room = [], max(20, columns() - width - 7)
    for f in found:
        first, *others = textwrap.wrap(f.found, room)
        lines.append(f"{'ok  ' if f.ok else '-   '} {f.what:{width}}  {first}")
        lines += [f"{'':{width + 7}}{other}" for other in others]
        if f.remedy:
            lines.append(f"     {'':{width}}  {f.remedy}")
    missing = sum(not f.ok for f in found)
    lines.append("")
    lines.append(f"{missing} of {len(found)} are not here; each is optional." if missing else "Everything is here.")
    return "\n".join(lines)


def _machine() -> Iterator[Finding]:
    versions = f"{platform.python_version()}, torch {torch.__version__} ({sys.executable})"
    yield Finding("Python", True, versions)
    memory, cores = psutil.virtual_memory(), len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    amount = f"{cores} cores, {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of memory free"
    yield Finding("processor", True, f"{processor.name()}; {amount}")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    low = "" if free >= 2 else "Runs need room for checkpoints: free some, or name another folder with --runs."
    yield Finding("disk", free >= 2, f"{free:,.1f} GiB free where you are", low)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            found = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}"
            yield Finding(f"GPU {index}", True, found)
    else:
        built = "for CUDA, which finds no device" if torch.version.cuda else "without CUDA"
        yield Finding("GPU", False, f"none that torch sees (torch is built {built}); everything runs on the processor")


def _speed() -> Iterator[Finding]:
    bf16 = processor.multiplies_bf16()
    found = "the processor multiplies bf16 itself; recipes use it for models from a width of 128 on"
    yield Finding(
        "bf16", bf16, found if bf16 else "the processor emulates bf16; recipes use fp32 unless they say otherwise"
    )
    if sys.platform != "linux":
        yield Finding("C++ kernels", False, "for Linux alone; the plain ones are slower")
    elif native.library() is not None:
        yield Finding("C++ kernels", True, "built: decoding and rollouts use them")
    else:
        yield Finding("C++ kernels", False, "no compiler that works: decoding and rollouts are slower", COMPILER)
    problem = compiling.why_not()
    yield Finding("compile", not problem, problem or "`compile=True` works in Pretrain", COMPILER if problem else "")


def _features(environment: Mapping[str, str]) -> Iterator[Finding]:
    for extra, purpose in extras.PURPOSES.items():
        missing = extras.missing(extra)
        named = ", ".join(r.partition(";")[0].strip() for r in missing)
        found = f"{purpose} (missing: {named})" if missing else purpose
        yield Finding(extra, not missing, found, extras.how_to_get(extra) if missing else "")
    why = sandbox.why_unavailable("bubblewrap")
    boundary = "programs that models write run behind a security boundary"
    remedy = "" if why is None else "Allow user namespaces, or run as a user that is not root."
    without = f"{why}: programs that models write run under resource limits alone"
    yield Finding("bubblewrap", why is None, boundary if why is None else without, remedy)
    try:
        importlib.import_module("transformers")
        yield Finding("transformers", True, "`finback verify` compares logits and ids with it")
    except ImportError:
        how = extras.how_to_install("transformers>=5")
        yield Finding("transformers", False, "`finback verify` compares nothing with it", how)
    browser = environment.get("FINBACK_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    without = "none: the page works in any browser; its tests and screenshots need one"
    yield Finding("Chromium", bool(browser), browser or without, "" if browser else "apt-get install chromium")
