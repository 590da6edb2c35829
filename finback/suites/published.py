"""Published scores of V3, R1, its stages, the distilled models and closed models, with their conditions. Does not import torch.

Their publishers measured them with prompts and harnesses that are only partly described, so they give context but do not
compare directly with a measurement. If two publications give different numbers, both are listed.

published.json is a list of tables as printed: source, conditions, models, and for each benchmark one number or null per
model.
"""

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Published:
    """One score as printed, in per cent unless the benchmark is a rating; `suite` is finback's with the same questions, or ""."""

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
    """All published scores, or those on the questions of one suite (its bare name, such as "math500")."""
    tables = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    every = (
        Published(model, name, float(score), table["conditions"], table["source"], _SUITES.get(name, ""))
        for table in tables
        for name, scores in table["scores"].items()
        for model, score in zip(table["models"], scores, strict=True)
        if score is not None
    )
    return tuple(row for row in every if row.suite == suite or not suite)
