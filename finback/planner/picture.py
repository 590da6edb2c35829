"""Gantt charts: a pipeline's schedule with one row per rank; and a trainer with the engines that generate for it."""

from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.planner.engines import SHOWN, overlapped
from finback.planner.simulate import Timeline

# one color per kind of work, also distinct in lightness; overlapped pairs show both, one above the other
COLOURS = {"F": "#f2b134", "B": "#2f6690", "I": "#3a9bb5", "W": "#9bc1a3"}
WORDS = {"F": "forward", "B": "backward", "I": "backward, input", "W": "backward, weights"}
SUFFIXES = (".png", ".pdf", ".svg")
MOST_NUMBERS = 600  # operations up to which each is labelled with its micro-batch


def check(path: Path) -> None:
    """Raises UserError unless a picture can be written to this path."""
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise UserError("--picture", str(path), "not an image file", f"End it with {', '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise UserError("--picture", str(path), "no such folder", "Make it first.")


def draw(timeline: Timeline, title: str, path: Path) -> None:
    """Writes the picture of a simulated schedule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    ranks = len(timeline.ranks)
    figure, axes = plt.subplots(figsize=(14, 1.6 + 0.32 * ranks), layout="constrained")
    number = sum(len(slots) for slots in timeline.ranks) <= MOST_NUMBERS
    for rank, slots in enumerate(timeline.ranks):
        # bars of one kind and position form one object
        bars: dict[tuple[str, int, int], list[tuple[float, float]]] = {}
        for start, end, slot in slots:
            for row, op in enumerate(slot):
                bars.setdefault((op.kind, row, len(slot)), []).append((start, end - start))
                if number:
                    axes.text(
                        (start + end) / 2,
                        rank - 0.43 + 0.86 * (row + 0.5) / len(slot),
                        str(op.micro_batch),
                        ha="center",
                        va="center",
                        fontsize=4,
                        color="white" if op.kind == "B" else "black",
                        clip_on=True,
                    )
        for (kind, row, of), spans in bars.items():
            place = (rank - 0.43 + 0.86 * row / of, 0.86 / of)
            axes.broken_barh(spans, place, facecolors=COLOURS[kind], edgecolor="white", linewidth=0.3)
    shown = {op.kind for slots in timeline.ranks for _, _, slot in slots for op in slot}
    kinds = [kind for kind in COLOURS if kind in shown]
    axes.legend(
        handles=[Patch(color=COLOURS[k], label=WORDS[k]) for k in kinds],
        ncols=len(kinds),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        frameon=False,
        fontsize=8,
    )
    axes.set(xlabel="seconds", ylabel="pipeline rank", yticks=range(ranks), xlim=(0, timeline.makespan))
    axes.set_ylim(ranks - 0.4, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, pad=24)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_engines(found: dict[str, Any], title: str, path: Path) -> None:
    """Writes the picture of an RL stage from `engines.planned`.

    It shows the recommended engines in turn with the trainer and overlapped with it, and the recipe's engines.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    best, given, asked = found["wanted"], found.get("given"), found["max_staleness"]
    ways = [("in turn", best, 0), (f"max_staleness={max(1, asked)}", best, max(1, asked))]
    ways += [(f"the recipe's, max_staleness={asked}", given, asked)] if given else []
    figure, rows = plt.subplots(len(ways), 1, figsize=(11, 1.5 * len(ways) + 0.6), sharex=True, layout="constrained")
    for axes, (name, way, staleness) in zip(rows, ways, strict=True):
        steps = overlapped(way["generating"], found["learning"], staleness, SHOWN)
        colours = [COLOURS["F"], COLOURS["W"]] * (SHOWN // 2)
        axes.broken_barh([(s.asked, s.answered - s.asked) for s in steps], (-0.4, 0.8), facecolors=colours)
        axes.broken_barh([(s.begun, s.learnt - s.begun) for s in steps], (0.6, 0.8), facecolors=colours)
        axes.set(yticks=(0, 1), yticklabels=(f"{way['engines']:.0f} engines", "trainer"), ylim=(1.6, -0.6))
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(name, fontsize=9, loc="left")
    rows[-1].set(xlabel=f"seconds; {SHOWN} steps", xlim=(0, None))
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)
