"""Exam results of a run's evaluated models, and their answers to the same problems."""

from typing import Any

from finback.runs.files import MANIFEST, is_number
from finback.runs.reader import StageFolder, torn
from finback.runs.terminal import table

MANY = 3  # from this many evaluated models on, a summary has one row per model
MEASURED = ("n", "accuracy", "mean_tokens", "thinks")  # numeric results of every exam


def scored(stage: StageFolder) -> tuple[str, list[dict[str, Any]]]:
    """The model that an evaluation examined, and its exams' results; UserError if the manifest has none."""
    match stage.results:
        case {"model": model, "evaluations": [_, *_] as exams} if all(map(_is_result, exams)):
            return str(model), exams
    raise torn(stage.folder / MANIFEST, "has no results of an evaluation")


def _is_result(exam: Any) -> bool:
    match exam:
        case {"exam": str(), "interval": [low, high], **measured}:
            return all(map(is_number, (low, high, *map(measured.get, MEASURED))))
    return False


def accuracy_table(exams: list[StageFolder]) -> str:
    """One line per evaluated model: accuracy with interval for every exam, then length, thinking and language."""
    taken = [scored(stage) for stage in exams]
    names = list(dict.fromkeys(e["exam"] for _, evaluations in taken for e in evaluations))
    has_language = any("language" in e for _, evaluations in taken for e in evaluations)
    rows = []
    for model, evaluations in taken:
        found, first = {e["exam"]: e for e in evaluations}, evaluations[0]
        language = f"{first['language']:.1%}" if is_number(first.get("language")) else "-"
        shares = [share(found.get(name)) for name in names]
        row = [model, *shares, f"{first['mean_tokens']:.1f}", f"{first['thinks']:.0%}"]
        rows.append([*row, language] if has_language else row)
    head = ["model", *names, "tokens", "thinks", *(["language"] if has_language else [])]
    return f"held-out problems\n{table(rows, head)}"


def share(exam: dict[str, Any] | None) -> str:
    """An exam's accuracy with its interval, or "-" without an exam."""
    if exam is None:
        return "-"
    low, high = exam["interval"]
    return f"{exam['accuracy']:.1%} ({low:.0%}-{high:.0%})"


def first_exam(exams: list[StageFolder]) -> str:
    """The name of the first exam in a run's first evaluation."""
    return str(scored(exams[0])[1][0]["exam"])


def first_problem(exams: list[StageFolder]) -> str:
    """The first problem of the first exam, with every model's answer."""
    name = first_exam(exams)
    given = [(scored(stage)[0], records[0]) for stage in exams if (records := stage.answers(name))]
    if not given:
        return ""
    problem = given[0][1]
    lines = [f"The first problem of the exam '{name}': {problem['question']}  (gold: {problem['gold']})"]
    return "\n".join([*lines, *(answer_line(model, record) for model, record in given)])


def problem_pairs(before: StageFolder, after: StageFolder, labels: tuple[str, str], most: int, width: int) -> list[str]:
    """The first problems of an exam, each with the answers of both models, right or wrong."""
    name = first_exam([before])
    pairs = zip(before.answers(name), after.answers(name), strict=False)
    return [
        "\n".join([f"{pair[0]['question']}  (gold: {pair[0]['gold']})", *map(answer_line, labels, pair, [width] * 2)])
        for pair in list(pairs)[:most]
    ]


def answer_line(label: str, record: dict[str, Any], width: int = 14) -> str:
    """One answer on one line, preceded by its chain."""
    chain = record["thinking"].replace("\n", "  ")
    shown = f"<think> {chain} </think> " if record["thinks"] else ""
    return f"  {label:{width}}  {shown}{record['answer']}   {'right' if record['correct'] else 'WRONG'}"
