"""Published scores of V3, R1, its stages, the distilled students and closed rivals, each with its conditions. Does not import torch.

They were measured by their publishers with prompts and harnesses that are only partly described, so they stand beside a
measurement of one's own, not against it. Where two publications give two numbers, both are here.

published.json is a list of tables as they were printed: source, conditions, models, and for each benchmark a number for
each model, or null.
"""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Published:
    """One score as it was printed. Per cent, but for "rating"s; `suite` is ours that asks the same questions, if any."""

    model: str
    benchmark: str
    score: float
    conditions: str
    source: str
    suite: str = ""


_SUITES = {
    "MMLU": "mmlu",
    "MMLU-Pro": "mmlu-pro",
    "GPQA Diamond": "gpqa",
    "C-Eval": "ceval",
    "AIME 2024": "aime24",
    "MATH-500": "math500",
    "GSM8K": "gsm8k",
    "HumanEval": "humaneval",
    "MBPP": "mbpp",
    "LiveCodeBench 2024-08 to 2025-01": "livecodebench",
}


def rows(suite: str = "") -> tuple[Published, ...]:
    """All published scores, or those on the questions of one of our suites (its name alone, such as "math500")."""
    tables = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    every = (
        Published(model, name, float(score), table["conditions"], table["source"], _SUITES.get(name, ""))
        for table in tables
        for name, scores in table["scores"].items()
        for model, score in zip(table["models"], scores, strict=True)
        if score is not None
    )
    return tuple(row for row in every if row.suite == suite or not suite)
