"""Compiles the C++ kernels of this folder on first use, into the user's cache.

Each kernel replaces about a dozen small operations, whose overhead is more than half of a small model's step. `serves` and
`ready` return whether the kernels take a tensor; otherwise callers run their plain form. Compiling takes some seconds.
Without a compiler, or with FINBACK_NATIVE=0 in the environment, `library` returns None and every caller uses the plain form.
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
# not -ffast-math: a library linked with it makes the whole process flush subnormal numbers to zero
FLAGS = ("-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-fPIC", "-c")
HEADER = Path(__file__).with_name("numbers.h")
# the compiler may reorder sums in the first two; the others rely on their order
SOURCES = {
    Path(__file__).with_name("cpu.cpp"): ("-O3", "-fassociative-math", "-fno-signed-zeros"),
    Path(__file__).with_name("train.cpp"): ("-O3", "-fassociative-math", "-fno-signed-zeros"),
    Path(__file__).with_name("updates.cpp"): ("-O3", "-ffp-contract=off"),
    Path(__file__).with_name("quants.cpp"): ("-O2", "-ffp-contract=off"),
    Path(__file__).with_name("decode.cpp"): ("-O2", "-ffp-contract=off"),
}

# the arguments of each kernel: p pointer, i int64, f double
SIGNATURES = {
    "attend": "i" + 6 * "p" + 10 * "i" + "f",
    "grouped_query": "i" + 11 * "p" + 7 * "i" + "ff",
    "latent": "i" + 12 * "p" + 10 * "i" + "ff",
    "add_norm": "i" + 6 * "p" + "iif",
    "norm_backward": "i" + 7 * "p" + "iii",
    "swiglu": "ippiif",
    "swiglu_backward": "ippppiif",
    "spread": "ippppiii",
    "gather": "ippppiii",
    "weigh": "ippppiii",
    "causal_softmax": "ippiiif",
    "softmax_backward": "ippiif",
    "cross_entropy": "ipppii",
    "token_logprobs": "i" + 5 * "p" + "iif",
    "token_logprobs_backward": "i" + 5 * "p" + "iif",
    "rotate_heads": "ipppp" + 8 * "i",
    "split_heads": "ipppp" + 6 * "i",
    "split_heads_backward": "ipppp" + 6 * "i",
    "sinkhorn": "pppiiif",
    "mix_streams": "i" + 5 * "p" + "iiii",
    "mix_streams_backward": "i" + 9 * "p" + "iiii",
    "adamw": "ppi" + 5 * "f",
    "momentum": "piff",
    "along": "ppiff",
    "experts": "i" + 7 * "p" + 4 * "i",
    "round_tiles": "ipp" + 4 * "i",
    "quant_pack": "ippii",
    "quant_rows": "iipppii",
    "quant_forms": "p",
    "quant_product": "iipppip" + 3 * "i",
    "quant_feed_forward": "iipppippip" + 4 * "i",
    "decode_blocks": "iippipi" + 6 * "p" + 8 * "i" + "ff",
}
KINDS = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "f": ctypes.c_double}


def serves(x: Tensor) -> bool:
    """Whether the kernels take this tensor: fp32 or bf16 on a CPU, outside torch.compile, which generates its own code."""
    is_usual = x.device.type == "cpu" and x.dtype in DTYPES
    return is_usual and not torch.compiler.is_compiling() and library() is not None


def ready(x: Tensor) -> bool:
    """Whether the kernels take this tensor and autograd is off; for kernels without a backward pass."""
    return not torch.is_grad_enabled() and serves(x)


def call(name: str, *arguments: Tensor | float | None) -> None:
    """Runs a kernel. Tensors are passed as addresses, so the caller must ensure their dtypes and layouts."""
    _function(name)(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])


@cache
def _function(name: str) -> Callable[..., None]:
    found: Callable[..., None] = getattr(library(), f"finback_{name}")
    return found


@cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, or None if they are disabled or cannot be built."""
    if os.environ.get("FINBACK_NATIVE") == "0" or sys.platform != "linux":
        return None
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler is None:
        return None
    try:
        loaded = ctypes.CDLL(str(_built(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:  # RuntimeError: no home directory
        print(f"finback: no native kernels ({error}); using the slower plain forms", file=sys.stderr)
        return None
    for name, kinds in SIGNATURES.items():
        function = getattr(loaded, f"finback_{name}")
        function.argtypes, function.restype = [KINDS[kind] for kind in kinds], None
    return loaded


def _built(compiler: str) -> Path:
    """The path of the library for these sources, flags and processor; builds it if the cache lacks it."""
    # the key names the processor because of -march=native: machines that differ may share a cache folder
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
        # no -fopenmp here: OpenMP's symbols resolve to the runtime that torch has loaded, since two runtimes compete for cores
        run(["-shared", *objects, "-o", str(made)])
        made.replace(target)  # atomic, since several ranks may build at once
    return target
