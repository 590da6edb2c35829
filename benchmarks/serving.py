"""Generation against transformers and llama.cpp, in one run: tokens per second and time to first token at 1, 8, 32 rows.

    python benchmarks/serving.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf [--llama PYTHON] [--rounds 3]

(a) SmolLM2-135M in the same precision: finback, transformers' generate and llama.cpp (from the Python that --llama names,
which has llama-cpp-python); (b) a V3-style mixture of experts of 115 M parameters against transformers; (c) the share of
the memory bandwidth measured in the same rounds that finback reaches at one row. Contestants take turns; ratios are
formed within a round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from driver import CORES, say
from record import header, spread, write

HERE = Path(__file__).parent
ROWS = (1, 8, 32)


class Process:
    """One contestant, asleep on a pipe until it is asked."""

    def __init__(self, python: str, kind: str, model: str, setting: str) -> None:
        self.name = f"{kind} {setting}"
        variables = os.environ | {
            "OMP_NUM_THREADS": str(CORES),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.process = subprocess.Popen(
            [python, str(HERE / "serving_contestants.py"), kind, model, setting],
            env=variables,
            cwd=HERE,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.answers: dict[int, list[dict[str, float]]] = {rows: [] for rows in ROWS}

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} died")
        return dict(json.loads(line))

    def ask(self, rows: int, prompt: int, new: int) -> dict[str, float]:
        assert self.process.stdin is not None
        print(json.dumps({"rows": rows, "prompt": prompt, "new": new}), file=self.process.stdin, flush=True)
        return self.hear()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=30)


def bandwidth() -> float:
    """Bytes per second that all cores read together from a block far larger than any cache they own."""
    block = torch.ones(64 << 20)
    torch.set_num_threads(CORES)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - began)
    return block.numel() * 4 / best


def race(group: list[Process], options: argparse.Namespace) -> list[float]:
    """All rounds of one group; the bandwidths seen meanwhile."""
    for process in list(group):
        try:
            process.hear()
            process.ask(1, 16, 4)
            say(f"{process.name} is ready")
        except (RuntimeError, BrokenPipeError) as error:
            say(f"FAILED: {error}")
            group.remove(process)
    seen = []
    for turn in range(options.rounds):
        seen.append(bandwidth())
        for rows in ROWS:
            for process in group if turn % 2 == 0 else reversed(group):
                answer = process.ask(rows, options.prompt, options.new)
                process.answers[rows].append(answer)
                speed = rows * (options.new - 1) / (answer["total"] - answer["first"])
                say(
                    f"round {turn + 1}, {rows} rows, {process.name}: {speed:.0f} tokens/s, first {answer['first']:.2f} s"
                )
    for process in group:
        process.stop()
    return seen


def speeds(process: Process, rows: int, new: int) -> list[float]:
    return [rows * (new - 1) / (a["total"] - a["first"]) for a in process.answers[rows]]


def summary(group: list[Process], new: int, failed: list[str]) -> dict[str, Any]:
    """Each contestant's figures, and the ratios of ours to the others."""
    found: dict[str, Any] = {"contestants": {}, "ratios": [], "failed": failed}
    for process in group:
        found["contestants"][process.name] = {
            str(rows): {
                "tokens_per_second": spread(speeds(process, rows, new)),
                "first_token_seconds": spread([a["first"] for a in process.answers[rows]]),
            }
            for rows in ROWS
        }
    ours = [p for p in group if p.name.startswith("finback")]
    for mine in ours:
        for theirs in (p for p in group if p not in ours):
            for rows in ROWS:
                pairs = list(zip(speeds(mine, rows, new), speeds(theirs, rows, new), strict=True))
                firsts = list(zip(mine.answers[rows], theirs.answers[rows], strict=True))
                found["ratios"].append(
                    {
                        "over": mine.name,
                        "under": theirs.name,
                        "rows": rows,
                        "tokens_per_second": statistics.median(a / b for a, b in pairs),
                        "first_token": statistics.median(b["first"] / a["first"] for a, b in firsts),
                    }
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gguf", type=Path, help="SmolLM2-135M-Instruct as a GGUF file")
    parser.add_argument("--llama", help="a Python that has llama-cpp-python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = {"rounds": options.rounds, "prompt_tokens": options.prompt, "new_tokens": options.new, "threads": CORES}
    results = header("serving", settings)
    with tempfile.TemporaryDirectory() as scratch:
        if options.gguf:
            results["smollm2"] = smollm2(options, Path(scratch))
        group = [
            Process(sys.executable, kind, "moe", setting)
            for setting in ("bf16", "fp32")
            for kind in ("finback", "transformers")
        ]
        asked = [p.name for p in group]
        race(group, options)
        results["v3_style_moe"] = summary(group, options.new, _missing(asked, group))
    write(results, options.out)


def _missing(asked: list[str], group: list[Process]) -> list[str]:
    """Those that could not start or died at their first work."""
    return [name for name in asked if name not in [p.name for p in group]]


def smollm2(options: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    folder = scratch / "smollm2"
    subprocess.run([sys.executable, "-m", "finback", "export", str(options.gguf), str(folder)], check=True)
    link = scratch / "model.gguf"
    link.symlink_to(options.gguf.resolve())
    group = [Process(sys.executable, "finback", str(folder), s) for s in ("bf16", "fp32", "int8")]
    group += [Process(sys.executable, "transformers", str(folder), s) for s in ("bf16", "fp32")]
    if options.llama:
        group += [Process(options.llama, "llama.cpp", str(link), s) for s in ("bf16", "f16", "q8_0")]
    asked = [p.name for p in group]
    seen = race(group, options)
    found = summary(group, options.new, _missing(asked, group))
    # at one row every weight is read once per token, and of the embedding one line; tied, so the head is the table
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    reached = [weights * speed / limit for speed, limit in zip(speeds(group[0], 1, options.new), seen, strict=True)]
    found["bandwidth"] = {
        "bytes_per_second": spread(seen),
        "bytes_per_token": weights,
        "share_reached_at_one_row": spread(reached),
    }
    return found


if __name__ == "__main__":
    main()
