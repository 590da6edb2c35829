"""What each evaluated model of a run scores, and what each answers to the same problem."""

from pathlib import Path
from typing import Any

from finback.runs.declaration import Kind
from finback.runs.files import read_lines

MANY = 3  # evaluated models from which on a summary has one row per model


def of_kind(stages: dict[str, Any], kind: Kind) -> list[str]:
    """Names of the stages of summary.json that declare a kind."""
    return [name for name, stage in stages.items() if stage.get("kind") == kind]


def accuracy_table(stages: dict[str, Any]) -> str:
    """One line per examined model: every exam's accuracy with its interval, then length, thinking and language."""
    taken = [stages[name]["results"] for name in of_kind(stages, "evaluation")]
    names = list(dict.fromkeys(e["exam"] for results in taken for e in results["evaluations"]))
    tells = any("language" in e for results in taken for e in results["evaluations"])
    width = max(5, *(len(results["model"]) for results in taken))
    head = f"{'model':{width}}" + "".join(f"  {name:>17}" for name in names)
    head += f"  {'tokens':>6}  {'thinks':>6}" + (f"  {'language':>8}" if tells else "")
    return "\n".join(["held-out problems", head, *(_row(results, names, width, tells) for results in taken)])


def _row(results: dict[str, Any], names: list[str], width: int, tells: bool) -> str:
    found = {e["exam"]: e for e in results["evaluations"]}
    first = results["evaluations"][0]
    cells = "".join(f"  {_share(found.get(name)):>17}" for name in names)
    line = f"{results['model']:{width}}{cells}  {first['mean_tokens']:>6.1f}  {first['thinks']:>6.0%}"
    if not tells:
        return line
    language = first.get("language")
    return f"{line}  {'-' if language is None else f'{language:.1%}':>8}"


def _share(exam: dict[str, Any] | None) -> str:
    if exam is None:
        return "-"
    low, high = exam["interval"]
    return f"{exam['accuracy']:.1%} ({low:.0%}-{high:.0%})"


def first_problem(root: Path, stages: dict[str, Any]) -> str:
    """The first problem of the first exam, and what every model said to it, right or not."""
    taken = [(name, stages[name]["results"]) for name in of_kind(stages, "evaluation")]
    exam = taken[0][1]["evaluations"][0]["exam"]
    lines: list[str] = []
    for name, results in taken:
        records = read_lines(root / name / f"{exam}.jsonl")
        if records:
            lines = lines or [
                f"The first problem of the exam '{exam}': {records[0]['question']}  (gold: {records[0]['gold']})"
            ]
            lines.append(answer_line(results["model"], records[0]))
    return "\n".join(lines)


def answer_line(label: str, record: dict[str, Any], width: int = 14) -> str:
    """One answer on one line, its chain before it."""
    chain = record["thinking"].replace("\n", "  ")
    shown = f"<think> {chain} </think> " if record["thinks"] else ""
    return f"  {label:{width}}  {shown}{record['answer']}   {'right' if record['correct'] else 'WRONG'}"
