"""Answers of RL steps, with the reward and advantage of each."""

from pathlib import Path
from typing import Any

from finback.config import UserError, did_you_mean
from finback.report.exams import answer_line, first_exam, problem_pairs, scored
from finback.runs import reader


def find(root: Path, stage: str = "", step: int = 0) -> list[dict[str, Any]]:
    """Records of samples.jsonl with their stage: of the first, middle and last step of every RL stage, or only of one
    `stage` or one `step`. UserError lists the stages or steps that exist."""
    if not reader.is_run(root) and reader.is_run(root.parent):
        root, stage = root.parent, stage or root.name  # root is the folder of a stage
    sampled = {s.name: s for s in reader.stages(root) if s.has_samples}
    if not sampled:
        raise UserError("samples", str(root), "no RL stage has written any", "Run a recipe with a GRPO stage.")
    if stage and stage not in sampled:
        raise UserError("--stage", stage, "has no samples", did_you_mean(stage, sampled))
    found, last = [], []
    for name in [stage] if stage else sampled:
        records = sampled[name].answers()
        there = sorted({r["step"] for r in records}) or [0]  # 0: killed in the first step
        last.append(f"{name} has 1 to {there[-1]}")
        wanted = {step} if step else {there[0], there[len(there) // 2], there[-1]}
        found += [{"stage": name, **r} for r in records if r["step"] in wanted]
    if not found:
        raise UserError("--step", step, "no samples of this step", f"{', '.join(last)}.")
    return found


def describe(root: Path, stage: str = "", step: int = 0, count: int = 2) -> str:
    """`count` questions of each step as text: every answer with its chain, rewards and advantage; then the answers of the models
    before and after to the same held-out problems."""
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
    advantage = "replaced" if r["advantage"] is None else f"advantage {r['advantage']:+.2f}"
    return f"{answer_line('', r, width=0)}\n      earned {earned}; {advantage}; {r['tokens']} tokens, {r['finish']}"


def _before_after(root: Path, count: int) -> list[str]:
    """Answers to the same problems before and after, from the first and the last evaluation."""
    exams = [s for s in reader.stages(root) if s.kind == "evaluation" and s.is_finished]
    if len(exams) < 2:
        return []
    labels = scored(exams[0])[0], scored(exams[-1])[0]
    lines = problem_pairs(exams[0], exams[-1], labels, count, width=14)
    return [f"Held-out problems of the exam '{first_exam(exams)}', before and after:", *lines] if lines else []
