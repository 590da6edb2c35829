"""Renders a report as Markdown: a table per suite, then the differences between contestants. Does not import torch."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from finback.suites.intervals import LEVEL

NONE = "–"
HEAD = (
    f"model, pass@1 ({LEVEL:.0%} interval), majority, pass@k, n x k, cut off, no answer of the requested form, tokens, "
    "s/answer, $/answer, $/solved, remarks"
).split(", ")

Tabulate = Callable[[Sequence[Sequence[str]], Sequence[str]], str]  # rows and their headers as text


def markdown(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """A Markdown table with padded columns, so that it is readable as plain text too."""
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (headers, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def render(report: dict[str, Any], table: Tabulate = markdown) -> str:
    """The report as text; sections that it lacks are left out."""
    parts = [_protocol(report["protocol"])] if report.get("suites") else []
    parts += [
        f"## {s['name']}\n\n{_suite(s)}\n\n{_results(report, s['name'], table)}" for s in report.get("suites", ())
    ]
    if report.get("contamination"):
        parts.append("## In the training text\n\n" + "\n".join(map(_found, report["contamination"])))
    if report.get("harness"):
        parts.append(_harness(report["harness"], table))
    if report.get("pairs"):
        parts.append("## Differences\n\n" + "\n".join(f"- {pair(each)}" for each in report["pairs"]))
    if report.get("contestants"):
        parts.append("## Who answered\n\n" + "\n".join(map(_contestant, report["contestants"])))
    if report.get("failures"):
        parts.append(_failures(report["failures"]))
    if "published" in report:
        parts.append(_published(report["published"], table))
    return "\n\n".join(parts)


def pair(each: dict[str, Any]) -> str:
    """One comparison as a sentence; it ranks the two only if the difference is significant."""
    low, high = each["interval"]
    gap = f"{100 * each['difference']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f}), n = {each['n']}"
    p_values = f"p = {each['p']:.2g}" + (f", {each['p_holm']:.2g} for all pairs" if each["p"] != each["p_holm"] else "")
    verdict = f"{each['better']} is better" if each["better"] else "cannot be distinguished"
    if each["no_answer"]:
        shares = " and ".join(f"{share:.0%} of the answers of {name}" for name, share in each["no_answer"].items())
        verdict = f"no verdict, because {shares} lack the requested form"
        p_values += "; if a model was trained on bare questions, use FILE?prompt=plain"
    return f"{each['suite']}: {each['one']} against {each['other']}: {verdict}; {gap}, {p_values}"


def percent(value: float | None) -> str:
    """12.3 %, or a dash."""
    return NONE if value is None else f"{100 * value:.1f} %"


def money(value: float | None) -> str:
    """Dollars with two significant digits; an unknown price is not 0."""
    if value is None:
        return "NOT PROVIDED"
    return f"${value:.2g}" if value < 0.1 else f"${value:,.2f}"


def _row(s: dict[str, Any]) -> list[str]:
    per_question = s["answers"] / s["n"] if s["n"] else 0
    at = {int(k): v for k, v in s["pass_at"].items() if int(k) > 1}
    remarks = list(s["flags"])
    if s["language"] is not None:
        remarks.append(f"{s['language']:.0%} of words in the expected language")
    interval = s["interval"]
    # if nothing was solved, the cost is known but a cost per solved question does not exist
    solved = NONE if s["dollars"] is not None and s["dollars_per_solved"] is None else money(s["dollars_per_solved"])
    return [
        s["contestant"],
        percent(s["accuracy"]) + (f" ({100 * interval[0]:.1f} to {100 * interval[1]:.1f})" if interval else ""),
        percent(s["majority"]),
        ", ".join(f"@{k} {percent(v)}" for k, v in sorted(at.items())[-1:]) or NONE,
        f"{s['n']} x {per_question:.3g}",
        percent(s["cut"]),
        percent(s["unparseable"]),
        NONE if s["tokens"] is None else f"{s['tokens']:,.0f}",
        NONE if s["seconds"] is None else f"{s['seconds']:.2g}",
        money(s["dollars_per_answer"]),
        solved,
        "; ".join(remarks) or NONE,
    ]


def _results(report: dict[str, Any], suite: str, table: Tabulate) -> str:
    measured = [c for c in report["compression"] if c["suite"] == suite]
    if not measured:
        return table([_row(s) for s in report["scores"] if s["suite"] == suite], HEAD)
    bits = [NONE if c["bits_per_byte"] is None else f"{c['bits_per_byte']:.4f}" for c in measured]
    return table([[c["contestant"], b] for c, b in zip(measured, bits, strict=True)], ("model", "bits per byte"))


def _found(c: dict[str, Any]) -> str:
    """The overlap of a suite with a corpus."""
    return (
        f"- {c['suite']} in {c['data']}: {c['overlapping']} of {c['questions']} questions share {c['ngram']} consecutive "
        f"words with it, {c['exact']} occur in full; {c['without_ngram']} are too short to check"
    )


def _protocol(p: dict[str, Any]) -> str:
    kind = "greedy" if p["temperature"] == 0 else f"temperature {p['temperature']:g}, top-p {p['top_p']:g}"
    think = {None: "left to the model", True: "on", False: "off"}[p["think"]]
    return (
        f"{p['samples']} sample{'s' if p['samples'] > 1 else ''} of each question, {kind}, {p['max_tokens']:,} tokens "
        f"at most, thinking {think}, seed {p['seed']}. Intervals are over questions. Answers that were cut off count as "
        "wrong; requests that failed are left out."
    )


def _suite(suite: dict[str, Any]) -> str:
    chance = "" if suite["chance"] is None else f" Blind guessing: {suite['chance']:.0%}."
    notes = "".join(f" {name}: {text}." for name, text in suite["notes"].items())
    found = f" Answer extraction: {suite['extraction'].rstrip('.')}." if suite["extraction"] else ""
    return (
        f"{suite['questions']} questions from {suite['source']} (licence {suite['licence']}, SHA-256 "
        f"{suite['sha256'][:12]}…), {suite['metric']}.{found}{chance}{notes}"
    )


def _harness(rows: Sequence[dict[str, Any]], table: Tabulate) -> str:
    head = ("model", "task", "metric", f"value ({LEVEL:.0%} interval)", "n", "shots", "by")
    lines = []
    for row in rows:
        value = f"{row['value']:.4g}"
        if row["interval"] is not None:
            value += f" ({row['interval'][0]:.4g} to {row['interval'][1]:.4g})"
        by = (str(row["n"]), str(row["shots"]), row["by"])
        lines.append([row["contestant"], row["task"], row["metric"], value, *by])
    return f"## Measured by lm-evaluation-harness\n\n{table(lines, head)}"


def _contestant(c: dict[str, Any]) -> str:
    identity = ", ".join(f"{k} {str(v)[:64]}" for k, v in c["identity"].items() if v not in (None, {}, ""))
    return f"- {c['name']}: {identity}. Price: {c['price']}."


def _failures(failures: Sequence[dict[str, Any]]) -> str:
    counts = Counter((f["contestant"], f["problem"]) for f in failures)
    lines = [f"- {name}: {count} x {problem}" for (name, problem), count in sorted(counts.items())]
    return "## Failed\n\nRunning the same command again retries these, and only these.\n\n" + "\n".join(lines)


def _published(rows: Sequence[dict[str, Any]], table: Tabulate) -> str:
    head = ("benchmark", "model", "score", "conditions", "source")
    note = "Measured by others under the stated conditions; compare only scores obtained under the same conditions."
    lines = [[str(row[name]) for name in head] for row in rows]
    return f"## Published\n\n{note}\n\n{table(lines, head) if lines else 'None on these benchmarks.'}"
