"""Generation against transformers and llama.cpp, in one run: tokens per second and time to first token at 1, 8, 32 rows.

    python benchmarks/serving.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf [--llama PYTHON] [--large] [--rounds 3] [--minutes 9]

(a) SmolLM2-135M from GGUF files (the given one, and Q8_0 and Q4_K_M written here; with --large also Q4_0 and Q8_0 of a
model of 1.5 B random parameters), not converted: finback and llama.cpp (--llama names a Python that has xllamacpp); (b)
the same model in the same precision: finback and transformers' generate; (c) a V3-style mixture of experts of 115 M
parameters against transformers; (d) the share of the memory bandwidth measured in the same rounds that finback reaches
at one row. Contestants take turns; ratios are formed within a round. No round begins after --minutes.
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
    """One contestant, which waits on a pipe for commands."""

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
    """Bytes per second that all cores read together from a block far larger than their caches."""
    block = torch.ones(64 << 20)
    torch.set_num_threads(CORES)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        best = min(best, time.perf_counter() - began)
    return block.numel() * 4 / best


def race(group: list[Process], options: argparse.Namespace, until: float) -> list[float]:
    """Runs the rounds of one group while there is time, at least one; returns the measured bandwidths."""
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
        if turn and time.monotonic() > until:
            break
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
    """Each contestant's figures, and the ratios of finback to the others."""
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
    parser.add_argument("--llama", help="a Python that has xllamacpp")
    parser.add_argument("--large", action="store_true", help="files of 1.5 B random parameters too")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    settings = {"rounds": options.rounds, "prompt_tokens": options.prompt, "new_tokens": options.new, "threads": CORES}
    results = header("serving", settings)
    began, length = time.monotonic(), 60 * options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        if options.gguf and options.llama:
            results["gguf"] = files(options, Path(scratch), began + 0.6 * length)
        if options.gguf:
            results["smollm2"] = smollm2(options, Path(scratch), began + 0.8 * length)
        group = [
            Process(sys.executable, kind, "moe", setting)
            for setting in ("bf16", "fp32")
            for kind in ("finback", "transformers")
        ]
        asked = [p.name for p in group]
        race(group, options, began + length)
        results["v3_style_moe"] = summary(group, options.new, _missing(asked, group))
    write(results, options.out)


def _missing(asked: list[str], group: list[Process]) -> list[str]:
    """Those that did not start or died in their first command."""
    return [name for name in asked if name not in [p.name for p in group]]


def files(options: argparse.Namespace, scratch: Path, until: float) -> dict[str, Any]:
    """Measures each GGUF file, not converted, with finback and with llama.cpp."""
    from finback.checkpoint import gguf_export, models
    from finback.data.gguf_vocabulary import keys
    from finback.data.tokenizer import Tokenizer
    from finback.model.config import ModelConfig
    from finback.model.transformer import Transformer

    made, words = {options.gguf.stem: options.gguf.resolve()}, Tokenizer(options.gguf)
    model = models.load(options.gguf)
    vocabulary = keys(words, model.config.vocab_size)
    plain: list[tuple[str, Transformer, Any]] = [("SmolLM2-135M", model, kind) for kind in ("q8_0", "q4_k_m")]
    if options.large:
        shape: dict[str, Any] = {"hidden_size": 1536, "num_hidden_layers": 28, "intermediate_size": 8960}
        heads: dict[str, Any] = {"num_attention_heads": 12, "num_key_value_heads": 2, "head_dim": 128}
        sizes: dict[str, Any] = {"vocab_size": model.config.vocab_size, "max_position_embeddings": 2048}
        config = ModelConfig(**shape, **heads, **sizes, attention="gqa", tie_word_embeddings=True)
        large = Transformer(config, param_dtype=torch.bfloat16).initialise(0)
        plain += [("1.5B", large, kind) for kind in ("q4_0", "q8_0")]
    for name, each, kind in plain:
        made[f"{name} {kind}"] = scratch / f"{name}-{kind}.gguf"
        gguf_export.write(each, made[f"{name} {kind}"], kind, vocabulary)
    found = {}
    for number, (name, file) in enumerate(made.items()):
        group = [
            Process(sys.executable, "finback", str(file), "kept"),
            Process(options.llama, "llama.cpp", str(file), "same"),
        ]
        asked = [p.name for p in group]
        left = max(0.0, until - time.monotonic()) / (len(made) - number)
        seen = race(group, options, time.monotonic() + left)
        found[name] = summary(group, options.new, _missing(asked, group))
        ours = [speeds(p, 1, options.new) for p in group if p.name == "finback kept"]
        shares = [file.stat().st_size * s / limit for s, limit in zip(ours[0] if ours else [], seen, strict=False)]
        found[name]["share_of_bandwidth_at_one_row"] = spread(shares) if shares else None
    return found


def smollm2(options: argparse.Namespace, scratch: Path, until: float) -> dict[str, Any]:
    folder = scratch / "smollm2"
    subprocess.run([sys.executable, "-m", "finback", "export", str(options.gguf), str(folder)], check=True)
    group = [Process(sys.executable, "finback", str(folder), s) for s in ("bf16", "fp32", "int8")]
    group += [Process(sys.executable, "transformers", str(folder), s) for s in ("bf16", "fp32")]
    asked = [p.name for p in group]
    seen = race(group, options, until)
    found = summary(group, options.new, _missing(asked, group))
    # at one row each weight is read once per token; the embedding is tied, so the head reads all of it
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
