"""The C++ kernels of cpu.cpp, train.cpp and quants.cpp, compiled once with the machine's own compiler and kept in the user's cache.

Each replaces a dozen small operations, whose own cost would be more than half of a small model's step. `serves` and `ready`
say whether they take a tensor; where not, plain lines run. Compiling takes some seconds on first use. Without a compiler, or
with FINBACK_NATIVE=0 in the environment, `library` is None and callers take the plain form.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from finback.runs import processor

DTYPES = (torch.float32, torch.bfloat16)
# not -ffast-math: linked into a library it would change how the whole process rounds
FLAGS = ("-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-fPIC", "-c")
HEADER = Path(__file__).with_name("numbers.h")
# what is added up in vectors may be reordered in the first two, and must not be in the last
SOURCES = {
    Path(__file__).with_name("cpu.cpp"): ("-O3", "-fassociative-math", "-fno-signed-zeros"),
    Path(__file__).with_name("train.cpp"): ("-O3", "-fassociative-math", "-fno-signed-zeros"),
    Path(__file__).with_name("quants.cpp"): ("-O2", "-ffp-contract=off"),
}

# what each kernel takes: p pointer, i whole number, f fraction
SIGNATURES = {
    "attend": "i" + 6 * "p" + 10 * "i" + "f",
    "grouped_query": "i" + 11 * "p" + 7 * "i" + "ff",
    "latent": "i" + 12 * "p" + 10 * "i" + "ff",
    "add_norm": "i" + 6 * "p" + "iif",
    "norm_backward": "i" + 7 * "p" + "iii",
    "swiglu": "ippii",
    "swiglu_backward": "ippppii",
    "spread": "ippppiii",
    "gather": "ippppiii",
    "weigh": "ippppiii",
    "causal_softmax": "ippiiif",
    "softmax_backward": "ippiif",
    "cross_entropy": "ipppii",
    "token_logprobs": "i" + 5 * "p" + "iif",
    "token_logprobs_backward": "i" + 5 * "p" + "iif",
    "turn_heads": "ipppp" + 8 * "i",
    "part_heads": "ipppp" + 6 * "i",
    "part_heads_backward": "ipppp" + 6 * "i",
    "experts": "i" + 7 * "p" + 4 * "i",
    "round_tiles": "ipp" + 4 * "i",
    "quant_pack": "ippii",
    "quant_rows": "iipppii",
    "quant_forms": "p",
    "quant_product": "iipppip" + 3 * "i",
    "quant_feed_forward": "iipppippip" + 4 * "i",
}
KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_double}


def serves(x: Tensor) -> bool:
    """Whether the kernels take this tensor: on a CPU, fp32 or bf16, and not where torch.compile writes its own."""
    is_usual = x.device.type == "cpu" and x.dtype in DTYPES
    return is_usual and not torch.compiler.is_compiling() and library() is not None


def ready(x: Tensor) -> bool:
    """The same where nothing is recorded for a backward pass."""
    return not torch.is_grad_enabled() and serves(x)


def call(name: str, *arguments: Tensor | float | None) -> None:
    """Run a kernel; tensors are passed as their addresses, and have the dtypes and layouts its wrapper made sure of."""
    _function(name)(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


@cache
def _function(name: str) -> Callable[..., None]:
    found: Callable[..., None] = getattr(library(), f"finback_{name}")
    return found


@cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None where they cannot be had."""
    if os.environ.get("FINBACK_NATIVE") == "0" or sys.platform != "linux":
        return None
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        return None
    try:
        loaded = ctypes.CDLL(str(_built(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: there is no home
        print(f"finback: no native kernels ({error}); the plain ones are slower", file=sys.stderr)
        return None
    for name, kinds in SIGNATURES.items():
        function = getattr(loaded, f"finback_{name}")
        function.argtypes, function.restype = [KINDS[kind] for kind in kinds], None
    return loaded


def _built(compiler: str) -> Path:
    """The compiled library for these sources, these flags and this processor."""
    # -march=native depends on the processor, and a cache folder may be shared by machines that differ
    built_of = (
        *(source.read_bytes() for source in (*SOURCES, HEADER)),
        " ".join((compiler, *FLAGS, *(flag for own in SOURCES.values() for flag in own))).encode(),
        processor.name().encode(),
        *(f.encode() for f in sorted(processor.features())),
    )
    key = hashlib.sha256(b"\0".join(built_of))
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finback"
    target = folder / f"kernels-{key.hexdigest()[:16]}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        made = Path(scratch) / target.name

        def run(step: list[str]) -> None:
            subprocess.run([compiler, *step], check=True, capture_output=True, text=True, timeout=300)

        objects = [f"{made}.{source.stem}.o" for source in SOURCES]
        steps = [[*FLAGS, *own, str(source), "-o"] for source, own in SOURCES.items()]
        with ThreadPoolExecutor() as pool:
            deque(pool.map(run, ([*step, to] for step, to in zip(steps, objects, strict=True))), maxlen=0)
        # OpenMP's symbols stay open: torch has loaded its own runtime, and two of them fight for the cores
        run(["-shared", *objects, "-o", str(made)])
        made.replace(target)  # whole or not at all: several ranks may build at once
    return target
