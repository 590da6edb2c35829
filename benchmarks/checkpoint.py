"""Importing a V3-style checkpoint: peak memory against the model's size, time against reading the files.

A synthetic checkpoint of the given size is written in four shards, which the page cache holds; imports and plain reads
alternate, each in a fresh process. A read is timed twice: "kept" leaves the bytes in memory as an import must,
"passed" reads through one small buffer and keeps nothing.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record

from finback.checkpoint.export import export
from finback.model.config import SMALL
from finback.model.count import parameters
from finback.model.transformer import Transformer

READ = """
import json, sys, time
begin = time.perf_counter()
block = memoryview(bytearray(1 << 24))
for path in sys.argv[1:]:
    with open(path, "rb", buffering=0) as handle:
        while handle.readinto(block):
            pass
passed = time.perf_counter() - begin
begin = time.perf_counter()
kept = [open(path, "rb", buffering=0).read() for path in sys.argv[1:]]
print(json.dumps({"passed": passed, "kept": time.perf_counter() - begin}))
"""
IMPORT = """
import json, sys, time
from pathlib import Path
from finback.checkpoint.models import load_audited
def peak():  # ru_maxrss is inherited over fork and exec, VmHWM is not
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
before = peak()
begin = time.perf_counter()
model, audit = load_audited(Path(sys.argv[1]), weights=sys.argv[2])
seconds = time.perf_counter() - begin
size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
print(json.dumps({"seconds": seconds, "model_bytes": size, "peak_rss": peak(), "rss_before": before, "holds": audit.holds}))
"""


def ask(code: str, *arguments: object) -> dict[str, Any]:
    """Runs code in a fresh process; returns its one line of JSON."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return dict(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def measure(folder: Path, kept: str, rounds: int) -> dict[str, Any]:
    """Imports in one target dtype, alternating with plain reads of the same files."""
    files = sorted(folder.glob("*.safetensors"))
    reads, imports = [], []
    for _ in range(rounds):
        reads.append(ask(READ, *files))
        imports.append(ask(IMPORT, folder, kept))
    target, shard = imports[0]["model_bytes"], max(f.stat().st_size for f in files)
    peak = max(i["peak_rss"] - i["rss_before"] for i in imports)
    return {
        "target": kept,
        "target_bytes": target,
        "largest_shard_bytes": shard,
        "peak_rss_above_start": peak,
        "limit_bytes": int(1.3 * target) + shard,
        "peak_over_target": peak / target,
        "memory_holds": peak <= 1.3 * target + shard,
        "import_seconds": record.spread([i["seconds"] for i in imports]),
        "read_seconds": {how: record.spread([r[how] for r in reads]) for how in ("kept", "passed")},
        "import_over_read": {
            how: record.spread([i["seconds"] / r[how] for i, r in zip(imports, reads, strict=True)])
            for how in ("kept", "passed")
        },
    }


def main() -> None:
    """Write benchmarks/results/checkpoint-<cpu>.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    begin = time.perf_counter()
    layers = max(2, round(options.gigabytes * 5e8 / parameters(SMALL) * SMALL.num_hidden_layers))
    config = dataclasses.replace(SMALL, num_hidden_layers=layers)
    results = record.header(
        "checkpoint", {"rounds": options.rounds, "layers": layers, "parameters": parameters(config)}
    )
    with tempfile.TemporaryDirectory() as name:
        model = Transformer(config).initialise(0)
        for fmt, targets in (("bf16", ("bf16", "fp32")), ("fp8", ("bf16", "fp8"))):
            folder = Path(name) / fmt
            total = 2 * parameters(config) if fmt == "bf16" else 1.15 * parameters(config)
            export(model, folder, fmt, shard_bytes=int(total / 4))  # type: ignore[arg-type]
            entry: dict[str, Any] = {"files": len(list(folder.glob("*.safetensors")))}
            entry["bytes"] = sum(f.stat().st_size for f in folder.glob("*.safetensors"))
            entry["imports"] = [measure(folder, kept, options.rounds) for kept in targets]
            results[f"from_{fmt}"] = entry
    results["run_seconds"] = time.perf_counter() - begin
    record.write(results, options.out)


if __name__ == "__main__":
    main()
