"""The summary of a run: costs, accuracy before and after RL, what the gain is made of, sample problems, a picture."""

from pathlib import Path
from typing import Any

from finback.report.exams import MANY, accuracy_table, first_exam, first_problem, problem_pairs, share
from finback.runs import reader
from finback.runs.progress import clock
from finback.runs.reader import StageFolder

SAMPLES = 3
PLANTED = "Pre-training planted both habits, guessing and thinking; RL selects the one that pays and sharpens it."


def summarize(root: Path) -> str:
    """The summary of a run as text; draws <root>/learning.png when there is an RL stage."""
    told = reader.summary(root)["stages"]
    stages = [stage for stage in reader.stages(root) if stage.name in told]
    exams, learning, trained = (
        [stage for stage in stages if stage.kind == kind]
        for kind in ("evaluation", "reinforcement learning", "pre-training")
    )
    parts = [_costs(told), "\n".join(entry["text"] for entry in told.values() if entry.get("text"))]
    if len(exams) >= MANY:
        parts += [accuracy_table(exams), first_problem(exams)]
    elif len(exams) >= 2:
        before, after = exams[0], exams[-1]
        parts += [_before_after(before.results, after.results), _gain(before.results, after.results)]
        if parts[-1] and learning and trained:
            parts[-1] += f"\n{PLANTED}"
        problems = problem_pairs(before, after, ("before", "after"), SAMPLES, width=6)
        parts.append(
            "\n\n".join([f"The first {SAMPLES} held-out problems of the exam '{first_exam(exams)}':", *problems])
        )
    if learning and (picture := draw(root, learning)):
        parts.append(f"Picture: {picture}")
    if len(exams) >= MANY:
        models = ", ".join(stage.name for stage in stages if stage.declaration.trains)
        parts.append(f"Chat with one of them: finback chat {root}/STAGE, with STAGE one of {models}")
    else:
        parts.append(f"Chat with it: finback chat {root}")
    return "\n\n".join(part for part in parts if part)


def _costs(stages: dict[str, Any]) -> str:
    wide = max(10, *map(len, stages))
    lines = [f"{'stage':{wide}} {'wall':>7} {'tokens':>12} {'tokens/s':>9} {'MFU':>5} {'Wh':>6} {'$':>8}"]
    total_seconds = total_money = 0.0
    for name, stage in stages.items():
        c = stage["cost"]
        tokens = c["tokens_trained"] + c["tokens_generated"]
        mfu = f"{c['mfu']:.0%}" if c["mfu"] else "-"
        lines.append(
            f"{name:{wide}} {clock(c['wall_seconds']):>7} {tokens:>12,} {c['tokens_per_second']:>9,.0f} {mfu:>5} "
            f"{c['energy_wh']:>6.2f} {c['money_usd']:>8.4f}"
        )
        total_seconds, total_money = total_seconds + c["wall_seconds"], total_money + c["money_usd"]
    lines.append(f"{'all':{wide}} {clock(total_seconds):>7} {'':12} {'':9} {'':5} {'':6} {total_money:>8.4f}")
    basis = next(iter(stages.values()))["cost"]["basis"] if stages else ""
    return "\n".join([*lines, f"Energy and money are an {basis}."])


def _before_after(before: dict[str, Any], after: dict[str, Any]) -> str:
    heads = [f"{word}: {Path(r['model']).name}"[:20] for word, r in (("before", before), ("after", after))]
    lines = [f"{'held-out problems':26} {'n':>5}   {heads[0]:>20}   {heads[1]:>20}"]
    then = {e["exam"]: e for e in before["evaluations"]}
    lines += [
        f"{e['exam']:26} {e['n']:>5}   {share(then[e['exam']]):>20}   {share(e):>20}"
        for e in after["evaluations"]
        if e["exam"] in then
    ]
    first_then, first = before["evaluations"][0], after["evaluations"][0]
    rows = [
        ("response tokens", "mean_tokens", "{:.1f}"),
        ("cut off", "truncated", "{:.1%}"),
        ("answers that think", "thinks", "{:.0%}"),
        ("  right when thinking", "accuracy_thinking", "{:.1%}"),
        ("  right when guessing", "accuracy_guessing", "{:.1%}"),
        ("MTP drafts accepted", "mtp_acceptance", "{:.0%}"),
    ]
    for label, key, form in rows:
        values = [form.format(r[key]) if r.get(key) is not None else "-" for r in (first_then, first)]
        lines.append(f"{label:26} {'':5}   {values[0]:>20}   {values[1]:>20}")
    for source, value in after.get("bits_per_byte", {}).items():
        old = before.get("bits_per_byte", {}).get(source)
        if value is not None and old is not None:
            lines.append(f"{'bits per byte, ' + source:26} {'':5}   {old:>20.3f}   {value:>20.3f}")
    return "\n".join(lines)


def _gain(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Split the change in sampled accuracy into thinking more often and thinking better."""
    a, b = before["evaluations"][0], after["evaluations"][0]
    if None in (a["accuracy_thinking"], a["accuracy_guessing"], b["accuracy_thinking"]):
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
    """Write learning.png: accuracy and response length over RL steps; None when nothing was logged."""
    path = root / "learning.png"
    if path.is_file() and _is_newer(path, [stage.metrics_file for stage in learning]):
        return path
    logged = {stage.name: stage.metrics() for stage in learning}
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


def _is_newer(picture: Path, logs: list[Path]) -> bool:
    """Whether nothing was logged since a picture was drawn."""
    drawn = picture.stat().st_mtime_ns
    return all(log.is_file() and log.stat().st_mtime_ns <= drawn for log in logs)
