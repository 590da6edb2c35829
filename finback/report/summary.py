"""The summary of a run: costs, accuracy before and after RL, components of the gain, sample problems, a picture."""

from pathlib import Path
from typing import Any

from finback.report.exams import MANY, accuracy_table, first_exam, first_problem, problem_pairs, scored, share
from finback.rollouts import rl_alerts
from finback.runs import reader
from finback.runs.declaration import DECLARATION
from finback.runs.files import METRICS, SUMMARY, is_number
from finback.runs.ledger import shown
from finback.runs.metrics_table import MetricsTable
from finback.runs.progress import clock
from finback.runs.reader import StageFolder
from finback.runs.terminal import table

SAMPLES = 3
PAID = {
    "wall_seconds",
    "tokens_trained",
    "tokens_generated",
    "tokens_per_second",
    "mfu",
    "energy_wh",
    "money_usd",
    "basis",
}
PLANTED = "Pre-training planted both habits, guessing and thinking; RL selects the one that pays and sharpens it."


def summarize(root: Path) -> str:
    """The summary of a run as text; writes <root>/learning.png if there is an RL stage."""
    finished = reader.summary(root)["stages"]
    stages = [stage for stage in reader.stages(root) if stage.name in finished]
    exams, learning, trained = (
        [stage for stage in stages if stage.kind == kind]
        for kind in ("evaluation", "reinforcement learning", "pre-training")
    )
    older = [stage.name for stage in stages if DECLARATION not in stage.config_json]
    parts = [_costs(finished, root / SUMMARY)]
    if older:
        parts.append(
            f"Made by an older finback, so only costs are shown here: {', '.join(older)}. Results: {root / SUMMARY}"
        )
    parts.append("\n".join(entry["text"] for entry in finished.values() if entry.get("text")))
    parts.append("\n".join(text for stage in learning for text in _alerts(stage)))
    if len(exams) >= MANY:
        parts += [accuracy_table(exams), first_problem(exams)]
    elif len(exams) >= 2:
        before, after = exams[0], exams[-1]
        parts += [_before_after(before, after), _gain(scored(before)[1][0], scored(after)[1][0])]
        if parts[-1] and learning and trained:
            parts[-1] += f"\n{PLANTED}"
        problems = problem_pairs(before, after, ("before", "after"), SAMPLES, width=6)
        title = f"The first {SAMPLES} held-out problems of the exam '{first_exam(exams)}':"
        parts.append("\n\n".join([title, *problems]))
    if learning and (picture := draw(root, learning)):
        parts.append(f"Picture: {picture}")
    if len(exams) >= MANY:
        models = ", ".join(stage.name for stage in stages if stage.declaration.trains)
        parts.append(f"Chat with one of them: finback chat {root}/STAGE, with STAGE one of {models}")
    else:
        parts.append(f"Chat with it: finback chat {root}")
    return "\n\n".join(part for part in parts if part)


def _alerts(stage: StageFolder) -> list[str]:
    """The warnings that the page also shows."""
    table = MetricsTable(stage.folder / METRICS)
    while not table.complete and table.tail.path.is_file():
        table.update(1.0)
    return [f"Look at '{stage.name}': {text}." for *_, text in rl_alerts.alerts(stage.config, table)]


def _costs(stages: dict[str, Any], path: Path) -> str:
    costs = {name: stage.get("cost") for name, stage in stages.items()}
    for name, paid in costs.items():
        if not isinstance(paid, dict) or not paid.keys() >= PAID:
            raise reader.torn(path, f"has no cost of {name}")
    seconds, money = (sum(c[key] for c in costs.values()) for key in ("wall_seconds", "money_usd"))
    rows = [
        [
            name,
            clock(c["wall_seconds"]),
            f"{c['tokens_trained'] + c['tokens_generated']:,}",
            f"{c['tokens_per_second']:,.0f}",
            f"{c['mfu']:.0%}" if c["mfu"] else "-",
            shown(f"{c['energy_wh']:.2f}", c, "energy"),
            shown(f"{c['money_usd']:.4f}", c, "money"),
        ]
        for name, c in costs.items()
    ]
    every = {"unknown": [text for c in costs.values() for text in c.get("unknown", ())]}
    total = ["all", clock(seconds), "", "", "", "", shown(f"{money:.4f}", every, "money")]
    text = table([*rows, total], ("stage", "wall", "tokens", "tokens/s", "MFU", "Wh", "$"))
    if costs:
        text += f"\nEnergy and money are an {next(iter(costs.values()))['basis']}."
    return f"{text}\nUnknown and not included: {', '.join(every['unknown'])}." if every["unknown"] else text


def _before_after(before: StageFolder, after: StageFolder) -> str:
    (old, then), (new, now) = scored(before), scored(after)
    heads = [f"{word}: {Path(model).name}"[:20] for word, model in (("before", old), ("after", new))]
    known = {e["exam"]: e for e in then}
    rows = [[e["exam"], str(e["n"]), share(known[e["exam"]]), share(e)] for e in now if e["exam"] in known]
    metrics = [
        ("response tokens", "mean_tokens", "{:.1f}"),
        ("cut off", "truncated", "{:.1%}"),
        ("answers that think", "thinks", "{:.0%}"),
        ("  right when thinking", "accuracy_thinking", "{:.1%}"),
        ("  right when guessing", "accuracy_guessing", "{:.1%}"),
        ("MTP drafts accepted", "mtp_acceptance", "{:.0%}"),
    ]
    for label, key, form in metrics:
        rows.append([label, "", *(form.format(e[key]) if is_number(e.get(key)) else "-" for e in (then[0], now[0]))])
    bits = [stage.results.get("bits_per_byte") or {} for stage in (before, after)]
    sources = [source for source in bits[1] if all(is_number(each.get(source)) for each in bits)]
    rows += [[f"bits per byte, {source}", "", *(f"{each[source]:.3f}" for each in bits)] for source in sources]
    return table(rows, ("held-out problems", "n", *heads))


def _gain(a: dict[str, Any], b: dict[str, Any]) -> str:
    """Splits the change in an exam's accuracy into thinking more often and thinking better."""
    if not all(map(is_number, (a.get("accuracy_thinking"), a.get("accuracy_guessing"), b.get("accuracy_thinking")))):
        return ""
    often = (b["thinks"] - a["thinks"]) * (a["accuracy_thinking"] - a["accuracy_guessing"])
    better = b["thinks"] * (b["accuracy_thinking"] - a["accuracy_thinking"])
    total = b["accuracy"] - a["accuracy"]
    rest = total - often - better
    return (
        f"What the gain of {100 * total:+.0f} points is made of: {100 * often:+.0f} from thinking more often, "
        f"{100 * better:+.0f} from thinking better, {100 * rest:+.0f} from guessing better."
    )


def draw(root: Path, learning: list[StageFolder]) -> Path | None:
    """Writes learning.png: accuracy and response length over RL steps; None if nothing was logged."""
    path = root / "learning.png"
    logs = [stage.metrics_file for stage in learning]
    drawn = path.stat().st_mtime_ns if path.is_file() else 0
    if all(log.is_file() and log.stat().st_mtime_ns <= drawn for log in logs):  # nothing was logged since it was drawn
        return path
    logged = {stage.name: [r for r in stage.metrics() if "accuracy" in r] for stage in learning}
    steps = [record for records in logged.values() for record in records]
    if not steps:
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, left = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    x = range(1, len(steps) + 1)
    right = left.twinx()
    (a,) = left.plot(x, [100 * r["accuracy"] for r in steps], color="tab:blue", label="accuracy")
    (t,) = left.plot(x, [100 * r["thinks"] for r in steps], color="tab:cyan", ls="--", label="answers that think")
    (n,) = right.plot(x, [r["length"] for r in steps], color="tab:orange", label="response length")
    begin = 0
    for name, records in logged.items() if len(logged) > 1 else ():  # several RL stages follow each other
        left.axvline(begin + 0.5, color="tab:gray", lw=0.8)
        left.text(begin + 1, 3, name, fontsize=8, color="tab:gray")
        begin += len(records)
    left.set(xlabel="RL step", ylabel="% of sampled answers", ylim=(0, 102), title="RL on checkable rewards alone")
    right.set(ylabel="tokens per response", ylim=(0, None))
    left.legend(handles=[a, t, n], loc="lower right")
    left.grid(alpha=0.3)
    temporary = root / "learning.part.png"
    figure.savefig(temporary, dpi=120)
    pyplot.close(figure)
    temporary.replace(path)
    return path
