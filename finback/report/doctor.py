"""`finback doctor`: what this machine and installation can do, what is missing, and how to install it."""

import importlib
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
    # False: something is slower or unavailable
    ok: bool
    found: str
    remedy: str = ""


def report(environment: Mapping[str, str]) -> tuple[dict[str, Any], str]:
    """All findings as JSON values and as text."""
    found = findings(environment)
    return {"findings": [asdict(f) for f in found]}, text(found)


def findings(environment: Mapping[str, str]) -> list[Finding]:
    """All findings. Takes a few seconds, mostly for torch's compiler; writes nothing and uses no network."""
    return [*_machine(), *_speed(), *_features(environment)]


def text(found: list[Finding]) -> str:
    """The findings as text for a terminal of any width; commands are never wrapped, so that they can be copied."""
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
    lines.append(f"{missing} of {len(found)} are missing; each is optional." if missing else "Nothing is missing.")
    return "\n".join(lines)


def _machine() -> Iterator[Finding]:
    versions = f"{platform.python_version()}, torch {torch.__version__} ({sys.executable})"
    yield Finding("Python", True, versions)
    memory = psutil.virtual_memory()
    amount = f"{processor.usable_cores()} cores, {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB of memory free"
    yield Finding("processor", True, f"{processor.name()}; {amount}")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    low = "" if free >= 2 else "Runs need room for checkpoints: free some space, or use another folder with --runs."
    yield Finding("disk", free >= 2, f"{free:,.1f} GiB free in this folder", low)
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            found = f"{device.name}, {device.total_memory / 2**30:.0f} GiB, compute capability {device.major}.{device.minor}"
            yield Finding(f"GPU {index}", True, found)
    else:
        built = "for CUDA, which finds no device" if torch.version.cuda else "without CUDA"
        yield Finding("GPU", False, f"torch finds none (it is built {built}); everything runs on the CPU")


def _speed() -> Iterator[Finding]:
    bf16 = processor.multiplies_bf16()
    found = "the processor multiplies bf16 natively; recipes use it from a width of 128 on"
    yield Finding("bf16", bf16, found if bf16 else "the processor emulates bf16; recipes that leave it open use fp32")
    if sys.platform != "linux":
        yield Finding("C++ kernels", False, "for Linux only; the plain kernels are slower")
    elif native.library() is not None:
        yield Finding("C++ kernels", True, "built: decoding and rollouts use them")
    else:
        yield Finding("C++ kernels", False, "no working compiler: decoding and rollouts are slower", COMPILER)
    problem = compiling.why_not()
    yield Finding(
        "compile",
        not problem,
        problem or "`compile=True` works in Pretrain, SFT, Distill and GRPO",
        COMPILER if problem else "",
    )


def _features(environment: Mapping[str, str]) -> Iterator[Finding]:
    for extra, purpose in extras.PURPOSES.items():
        missing = extras.missing(extra)
        named = ", ".join(r.partition(";")[0].strip() for r in missing)
        found = f"{purpose} (missing: {named})" if missing else purpose
        yield Finding(extra, not missing, found, extras.how_to_get(extra) if missing else "")
    why = sandbox.why_unavailable("bubblewrap")
    boundary = "code that models write runs behind a security boundary"
    remedy = "" if why is None else "Allow user namespaces, or run as a non-root user."
    without = f"{why}: code that models write runs under resource limits only"
    yield Finding("bubblewrap", why is None, boundary if why is None else without, remedy)
    try:
        importlib.import_module("transformers")
        yield Finding("transformers", True, "`finback verify` compares logits and ids with it")
    except ImportError:
        how = extras.how_to_install("transformers>=5")
        yield Finding("transformers", False, "`finback verify` cannot compare with it", how)
    browser = environment.get("FINBACK_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    without = "none: the page works in any browser; its tests and screenshots need one"
    yield Finding("Chromium", bool(browser), browser or without, "" if browser else "apt-get install chromium")
