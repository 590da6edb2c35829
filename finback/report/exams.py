"""What each evaluated model of a run scores, and what each answers to the same problem."""

from typing import Any

from finback.runs.reader import StageFolder
from finback.runs.terminal import table

MANY = 3  # evaluated models from which on a summary has one row per model


def accuracy_table(exams: list[StageFolder]) -> str:
    """One line per evaluated model: every exam's accuracy with its interval, then length, thinking and language."""
    taken = [(stage.results["model"], stage.results["evaluations"]) for stage in exams]
    names = list(dict.fromkeys(e["exam"] for _, evaluations in taken for e in evaluations))
    has_language = any("language" in e for _, evaluations in taken for e in evaluations)
    rows = []
    for model, evaluations in taken:
        found, first = {e["exam"]: e for e in evaluations}, evaluations[0]
        row = [
            model,
            *(share(found.get(name)) for name in names),
            f"{first['mean_tokens']:.1f}",
            f"{first['thinks']:.0%}",
        ]
        language = first.get("language")
        rows.append([*row, "-" if language is None else f"{language:.1%}"] if has_language else row)
    head = ["model", *names, "tokens", "thinks", *(["language"] if has_language else [])]
    return f"held-out problems\n{table(rows, head)}"


def share(exam: dict[str, Any] | None) -> str:
    if exam is None:
        return "-"
    low, high = exam["interval"]
    return f"{exam['accuracy']:.1%} ({low:.0%}-{high:.0%})"


def first_exam(exams: list[StageFolder]) -> str:
    """The name of the first exam that a run's first evaluation gave."""
    return str(exams[0].results["evaluations"][0]["exam"])


def first_problem(exams: list[StageFolder]) -> str:
    """The first problem of the first exam, and what every model answered, right or not."""
    name = first_exam(exams)
    given = [(stage.results["model"], records[0]) for stage in exams if (records := stage.answers(name))]
    if not given:
        return ""
    problem = given[0][1]
    lines = [f"The first problem of the exam '{name}': {problem['question']}  (gold: {problem['gold']})"]
    return "\n".join([*lines, *(answer_line(model, record) for model, record in given)])


def problem_pairs(before: StageFolder, after: StageFolder, labels: tuple[str, str], most: int, width: int) -> list[str]:
    """The first problems of an exam, whatever became of them, each with what both models answered."""
    name = first_exam([before])
    pairs = zip(before.answers(name), after.answers(name), strict=False)
    return [
        f"{then['question']}  (gold: {then['gold']})\n{answer_line(labels[0], then, width)}\n"
        f"{answer_line(labels[1], now, width)}"
        for then, now in list(pairs)[:most]
    ]


def answer_line(label: str, record: dict[str, Any], width: int = 14) -> str:
    """One answer on one line, its chain before it."""
    chain = record["thinking"].replace("\n", "  ")
    shown = f"<think> {chain} </think> " if record["thinks"] else ""
    return f"  {label:{width}}  {shown}{record['answer']}   {'right' if record['correct'] else 'WRONG'}"
