"""Plots accuracy, with intervals, against the cost of an answer: one plot per suite. Does not import torch."""

from pathlib import Path
from typing import Any

# the colours also differ in lightness, for readers who cannot tell hues apart; pipeline figures use the same ones
COLOURS = ("#2f6690", "#f2b134", "#3a9bb5", "#9bc1a3", "#81483f", "#6f6f6f")
SHAPES = ("o", "s", "^", "D", "v", "P", "X")


def draw(report: dict[str, Any], path: Path) -> None:
    """Writes the picture of a report. A contestant without a price is a dashed horizontal line, not a point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    suites = [suite["name"] for suite in report["suites"]]
    names = [c["name"] for c in report["contestants"]]
    across = min(3, len(suites))
    down = -(-len(suites) // across)
    figure, grid = plt.subplots(
        down, across, figsize=(5.2 * across, 3.8 * down + 0.6), layout="constrained", squeeze=False
    )
    for place, axes in enumerate(grid.flat):
        if place >= len(suites):
            axes.set_axis_off()
            continue
        chance = report["suites"][place]["chance"]
        _suite(axes, suites[place], [s for s in report["scores"] if s["suite"] == suites[place]], names, chance)
    labels = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _suite(axes: Any, name: str, scores: list[dict[str, Any]], names: list[str], chance: float | None) -> None:
    costs = [s["dollars_per_answer"] for s in scores if s["dollars_per_answer"]]
    for s in scores:
        if s["accuracy"] is None:
            continue
        index = names.index(s["contestant"])
        colour, shape = COLOURS[index % len(COLOURS)], SHAPES[index % len(SHAPES)]
        low, high = (100 * bound for bound in s["interval"])
        y, cost = 100 * s["accuracy"], s["dollars_per_answer"]
        if cost is None:
            axes.axhline(y, color=colour, linestyle="--", linewidth=1.2, label=f"{s['contestant']} (no price)")
            axes.axhspan(low, high, color=colour, alpha=0.12, linewidth=0)
        else:
            style = {"color": colour, "marker": shape, "markersize": 7, "capsize": 3, "linestyle": "none"}
            error = [[max(0.0, y - low)], [max(0.0, high - y)]]
            axes.errorbar([cost], [y], yerr=error, label=s["contestant"], **style)
    if chance is not None:
        axes.axhline(100 * chance, color="#999999", linestyle=":", linewidth=1, label="blind guessing")
    if costs and min(costs) > 0 and max(costs) / min(costs) > 5:
        axes.set_xscale("log")
    axes.set(xlabel="dollars per answer", ylabel="pass@1, %", ylim=(-3, 103))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(name, fontsize=10)
