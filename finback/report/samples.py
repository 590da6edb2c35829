"""What a model said while it was being trained: answers of RL steps with what each earned. Reads run folders only."""

from pathlib import Path
from typing import Any

from finback.config import UserError, did_you_mean
from finback.report.exams import answer_line, of_kind
from finback.runs.files import read_json, read_lines


def find(root: Path, stage: str = "", step: int = 0) -> list[dict[str, Any]]:
    """Records of samples.jsonl, with their stage; of all RL stages and the first, middle and last step of each,
    or of one stage or one step. UserError names the stages or steps that there are."""
    if (root / "samples.jsonl").is_file():
        root, stage = root.parent, stage or root.name  # the folder of a stage
    kept = sorted((p.parent for p in root.glob("*/samples.jsonl")), key=lambda p: p.stat().st_mtime_ns)
    names = [p.name for p in kept]
    if not names:
        raise UserError("samples", str(root), "no RL stage has kept any", "Run a recipe with a GRPO stage.")
    if stage and stage not in names:
        raise UserError("--stage", stage, "has no samples", did_you_mean(stage, names))
    found, last = [], []
    for folder in kept:
        if stage in ("", folder.name):
            records = read_lines(folder / "samples.jsonl")
            there = sorted({r["step"] for r in records}) or [0]  # 0: killed in its first step
            last.append(f"{folder.name} has 1 to {there[-1]}")
            wanted = {step} if step else {there[0], there[len(there) // 2], there[-1]}
            found += [{"stage": folder.name, **r} for r in records if r["step"] in wanted]
    if not found:
        raise UserError("--step", step, "no samples of it", f"{', '.join(last)}.")
    return found


def describe(root: Path, stage: str = "", step: int = 0, count: int = 2) -> str:
    """`count` questions of each step as text: every answer with its chain, what it earned and its advantage; then what
    the models before and after said to the same held-out problems."""
    parts = []
    for name, number in dict.fromkeys((r["stage"], r["step"]) for r in find(root, stage, step)):
        records = find(root, name, number)
        for question in list(dict.fromkeys(r["question"] for r in records))[:count]:
            answers = [r for r in records if r["question"] == question]
            head = f"{name}, step {number}: {question}  (gold: {answers[0]['gold']})"
            parts.append("\n".join([head, *map(_answer, answers)]))
    return "\n\n".join([*parts, *_before_after(root, count)])


def _answer(r: dict[str, Any]) -> str:
    earned = " + ".join(f"{name} {value:.2g}" for name, value in r["reward"].items() if value) or "nothing"
    credit = "replaced" if r["advantage"] is None else f"advantage {r['advantage']:+.2f}"
    return f"{answer_line('', r, width=0)}\n      earned {earned}; {credit}; {r['tokens']} tokens, {r['finish']}"


def _before_after(root: Path, count: int) -> list[str]:
    """The same problems before and after, from the first and the last exam."""
    summary = root / "summary.json"
    stages = read_json(summary)["stages"] if summary.is_file() else {}
    taken = [(name, stages[name]["results"]) for name in of_kind(stages, "evaluation")]
    if len(taken) < 2:
        return []
    (first, before), (last, after) = taken[0], taken[-1]
    exam = before["evaluations"][0]["exam"]
    pairs = zip(read_lines(root / first / f"{exam}.jsonl"), read_lines(root / last / f"{exam}.jsonl"), strict=False)
    lines = [
        f"{then['question']}  (gold: {then['gold']})\n{answer_line(before['model'], then)}\n{answer_line(after['model'], now)}"
        for then, now in list(pairs)[:count]
    ]
    return [f"Held-out problems of the exam '{exam}', before and after:", *lines] if lines else []
