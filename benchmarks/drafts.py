"""Drafts from MTP or n-grams: how many are accepted, and how much they gain at 1, 4 and 16 rows on a model trained here.

    python benchmarks/drafts.py runs/tiny/zero [--rounds 5] [--draft ngram]

Held-out sums, greedy and sampled; the engines answer the same prompts with the same seeds, in turn, and must give the
same answers. The engine decides by itself whether to draft; `always` overrides that decision.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any, get_args

import torch
from driver import CORES, say
from record import header, spread, write

from finback.checkpoint import inference
from finback.data.messages import encode_prompt
from finback.data.tokenizer import Tokenizer
from finback.data.turn import Message
from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import Request, SamplingParams
from finback.engine.speculate import Drafting
from finback.tasks import task as tasks
from finback.tasks.math import Chains


def answer(engine: Engine, prompts: list[list[int]], rows: int, temperature: float) -> tuple[float, list[Request]]:
    """Seconds for all prompts, `rows` at a time, and the finished requests."""
    began, done = time.perf_counter(), []
    for start in range(0, len(prompts), rows):
        requests = [
            engine.submit(p, SamplingParams(temperature, 96), start + i)
            for i, p in enumerate(prompts[start : start + rows])
        ]
        while engine.busy:
            engine.step()
        done += requests
    return time.perf_counter() - began, done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a stage's folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--draft", choices=get_args(Drafting), default="mtp")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(CORES)
    model, tokenizer = inference.load_for_inference(options.model, "fp32"), Tokenizer(options.model)
    problems = tasks.distinct(Chains(6, 8), "held_out", options.prompts, 1)
    prompts = [encode_prompt([Message("user", p.question)], tokenizer)[0] for p in problems]
    results = header(
        "drafts",
        {"model": str(options.model), "rounds": options.rounds, "prompts": options.prompts, "draft": options.draft},
    )
    results["rows"] = {}
    for rows in (1, 4, 16):
        for temperature in (0.0, 1.0):
            found = race(model, tokenizer, prompts, rows, temperature, options.rounds, options.draft)
            results["rows"][f"{rows}, temperature {temperature:g}"] = found
            say(f"{rows} rows, temperature {temperature:g}: {found}")
    write(results, options.out)


def race(
    model: Any,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    rows: int,
    temperature: float,
    rounds: int,
    draft: Drafting,
) -> dict[str, Any]:
    """Tokens per second of the engine without drafts, with them, and with its own decision."""
    engines = {
        kind: Engine(
            model, tokenizer.stops, EngineConfig(rows=rows, tokens=rows * 512, speculate=kind != "plain", draft=draft)
        )
        for kind in ("plain", "always", "decides")
    }
    engines["always"].speculation.choose = lambda rows: "draft"  # type: ignore[union-attr, method-assign]
    seconds: dict[str, list[float]] = {kind: [] for kind in engines}
    said: dict[str, list[Request]] = {}
    for turn in range(rounds + 1):  # the first warms up
        for kind in list(engines) if turn % 2 else reversed(list(engines)):
            took, said[kind] = answer(engines[kind], prompts, rows, temperature)
            seconds[kind] += [took] if turn else []
    alike = sum(a.tokens == b.tokens for a, b in zip(said["plain"], said["always"], strict=True))
    drafted, accepted = sum(s.drafted for s in said["always"]), sum(s.accepted for s in said["always"])
    made = sum(len(s.tokens) for s in said["plain"])
    return {
        "acceptance": accepted / drafted if drafted else None,
        "tokens": made,
        "answers_alike": alike / len(prompts),
        "tokens_per_second": {kind: made / statistics.median(times) for kind, times in seconds.items()},
        "always_over_plain": spread([a / b for a, b in zip(seconds["plain"], seconds["always"], strict=True)]),
        "decides_over_plain": spread([a / b for a, b in zip(seconds["plain"], seconds["decides"], strict=True)]),
    }


if __name__ == "__main__":
    main()
