"""Seconds per GRPO step: finback against TRL's GRPOTrainer, same weights, questions, group, lengths and reward.

By default the weights are random and every answer has the full length: on both sides the end of a text is an id that
the model cannot produce. With --base, a finished stage's folder, answers end where that model ends them. The reward is
a hash of the answer, so that every group has a gradient.
"""

import argparse
import dataclasses
import os
import re
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import driver
import gemm
import qualify
import record
from driver import CORES, Contestant, Settings
from grpo_contestants import CHAINS, finback_contestants, prompts, save_base, trl_alone, trl_ranked
from text import prepare

from finback.checkpoint import models
from finback.model.config import ModelConfig
from finback.model.count import forward_flops, training_flops

RANKS, SINGLE = f"{CORES}x1", f"1x{CORES}"


def race(contestants: Sequence[Contestant], probes: Sequence[Contestant], rounds: int, steps: int) -> None:
    """Runs the alternating rounds; a turn is `steps` steps, and its split into parts is that of the slowest rank."""

    def take(contestant: Contestant, seconds: float, replies: list[Any]) -> None:
        into = contestant.record
        into.setdefault("seconds", []).append(seconds / steps)
        rollout = max(reply["rollout_seconds"] for reply in replies) / steps
        into.setdefault("rollout_seconds", []).append(rollout)
        into.setdefault("update_seconds", []).append(seconds / steps - rollout)
        for name, value in replies[0].items():
            if name != "rollout_seconds":
                into.setdefault(name, []).append(value)

    for number in range(rounds):
        driver.turns(probes, 1, None, gemm.take)
        driver.turns(contestants if number % 2 == 0 else list(reversed(contestants)), 1, steps, take)
        driver.say(f"round {number + 1} of {rounds}")


def summarise(
    contestants: Sequence[Contestant], peaks: dict[str, Any], config: ModelConfig, prompt_tokens: float
) -> dict[str, Any]:
    """Per contestant: settings, raw seconds, medians, the split, share of the GEMM peak of its layout."""
    out = {}
    for c in contestants:
        kept = {k: v for k, v in c.settings.items() if k not in ("folder", "base", "prompts", "group", "tokens")}
        entry = {"ranks": c.ranks, "threads": c.threads, **kept, **c.record}
        if c.record.get("seconds"):
            for part in ("seconds", "rollout_seconds", "update_seconds"):
                entry[f"{part}_per_step"] = record.spread(c.record[part])
            answers = c.settings["prompts"] * c.settings["group"]
            new = statistics.mean(c.record["mean_length"])
            length = prompt_tokens + new
            generated = answers * length * forward_flops(config, length / 2)
            read = c.settings["prompts"] if c.settings.get("share_prompts") else answers
            learnt = (answers * new + read * prompt_tokens) * training_flops(config, length / 2, mtp=False)
            peak = peaks[c.layout][c.settings["precision"]]["median"]
            for name, flops in (
                ("seconds", generated + learnt),
                ("rollout_seconds", generated),
                ("update_seconds", learnt),
            ):
                share = name.replace("seconds", "share_of_gemm_peak")
                entry[share] = flops / entry[f"{name}_per_step"]["median"] / peak
        out[c.name] = entry
    return out


def ratios(contestants: Sequence[Contestant]) -> list[Settings]:
    """The ratios that are reported, each formed within a round."""
    raced = {c.name: c for c in contestants if c.record.get("seconds") and c.alive}
    median = {name: statistics.median(c.record["seconds"]) for name, c in raced.items()}

    def best(*patterns: str) -> str:
        names = [n for n in raced if all(re.search(p, n) for p in patterns)]
        return min(names, key=median.__getitem__, default="")

    ours = f"finback fp32 {RANKS}"
    single, any_layout = best("^trl", f" {SINGLE}$"), best("^trl")
    pairs = [
        ("finback / TRL with its defaults", ours, f"trl defaults {SINGLE}", "seconds"),
        ("finback / TRL in fp32 without checkpointing", ours, f"trl fp32 {SINGLE}", "seconds"),
        ("finback / best TRL in one process", ours, single, "seconds"),
        ("finback / best TRL in any layout", ours, any_layout, "seconds"),
        ("best finback / best TRL, both in any precision and layout", best("^finback"), any_layout, "seconds"),
        ("rollout alone: finback / best TRL in any layout", ours, any_layout, "rollout_seconds"),
        ("update alone: finback / best TRL in any layout", ours, any_layout, "update_seconds"),
        ("one process each: finback / best TRL", f"finback fp32 {SINGLE}", single, "seconds"),
        ("finback: ranks / threads", ours, f"finback fp32 {SINGLE}", "seconds"),
    ]
    return [
        record.versus(label, over, under, raced[over].record[part], raced[under].record[part])
        for label, over, under, part in pairs
        if over in raced and under in raced and over != under
    ]


def check(contestants: Sequence[Contestant], tokens: int) -> None:
    """The same model on both sides, and in the default run the same length of every answer."""
    raced = [c for c in contestants if c.record.get("seconds")]
    assert len({c.record["parameters"] for c in raced}) <= 1, "different models"
    for c in raced:
        assert not c.settings["fixed"] or set(c.record["mean_length"]) == {tokens}, f"{c.name}: lengths differ"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps per turn")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--tokens", type=int, help="longest answer; 32, or 96 with --base")
    parser.add_argument("--base", type=Path, help="folder of a finished stage: its weights, its tokenizer")
    parser.add_argument("--only", default="", help="take only contestants whose name matches this pattern")
    parser.add_argument("--smoke", action="store_true", help="four questions, eight tokens, one round")
    parser.add_argument("--out", type=Path, help="results file")
    options = parser.parse_args()
    options.tokens = options.tokens or (96 if options.base else 32)
    if options.smoke:
        options.rounds, options.steps, options.prompts, options.group, options.tokens = 1, 1, 4, 4, 8
    return options


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepares, selects TRL's settings by a trial, and races."""
    base = options.base or folder / "base"
    if not options.base:
        save_base(base, prepare(folder, CHAINS) / "tokenizer.json")
    config = dataclasses.replace(models.load(base).config, num_nextn_predict_layers=0)
    sizes = {name: getattr(options, name) for name in ("prompts", "group", "tokens")}
    results = record.header(
        "grpo-trained" if options.base else "grpo",
        {
            **sizes,
            "rounds": options.rounds,
            "steps_per_turn": options.steps,
            "model": dataclasses.asdict(config),
            "weights": "trained, answers end by themselves" if options.base else "random, answers of full length",
            "task": CHAINS.name,
            "temperature": 1.0,
            "beta": 0.0,
            "updates_per_batch": 1,
            "only": options.only,
        },
    )
    common = {"folder": str(folder), "base": str(base.resolve()), "fixed": not options.base, **sizes}
    field = driver.Field(options.only)
    probes = gemm.contestants()

    try:
        driver.start(probes)
        field.enter(finback_contestants(common), at_once=1)
        alone = field.enter(trl_alone(common))
        qualify.trial(alone, turns=1, command=1)
        qualify.retire(alone, [c for c in alone if c.name in (f"trl fp32 {SINGLE}", f"trl defaults {SINGLE}")])
        field.enter(trl_ranked(common, alone), at_once=1)
        race(field.contestants, probes, options.rounds, options.steps)
        check(field.contestants, options.tokens)
        prompt_tokens = statistics.mean(len(ids) for step in range(1, 11) for ids, _ in prompts(common, step))
        results["mean_prompt_tokens"] = prompt_tokens
        results["gemm_peak_flops"] = gemm.results(probes)
        results["contestants"] = summarise(field.contestants, results["gemm_peak_flops"], config, prompt_tokens)
        results["ratios"] = ratios(field.contestants)
    finally:
        for contestant in (*field.contestants, *probes):
            contestant.stop()
    return results


def main() -> None:
    """Run and write benchmarks/results/grpo-<cpu>.json."""
    options = _options()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder  # nothing is loaded from the hub or left on disk
        results = run(options, Path(folder))
    results["run_seconds"] = time.perf_counter() - begin
    record.write(results, options.out)
    for ratio in results["ratios"]:
        driver.say(f"{ratio['median']:6.2f}  {ratio['ratio']}: {ratio['over']} / {ratio['under']}")


if __name__ == "__main__":
    main()
