"""A pipeline schedule as a Gantt picture: one row per rank, time to the right."""

from pathlib import Path

from finback.config import UserError
from finback.planner.simulate import Timeline

# one colour for each kind of work, of distinct lightness too; overlapped pairs show both, one above the other
COLOURS = {"F": "#f2b134", "B": "#2f6690", "I": "#3a9bb5", "W": "#9bc1a3"}
WORDS = {"F": "forward", "B": "backward", "I": "backward, input", "W": "backward, weights"}
SUFFIXES = (".png", ".pdf", ".svg")
MOST_NUMBERS = 600  # operations up to which each is labelled with its micro-batch


def check(path: Path) -> None:
    """UserError unless a picture can be written there."""
    if path.suffix.lower() not in SUFFIXES or path.is_dir():
        raise UserError("--picture", str(path), "not a picture's name", f"End it with {', '.join(SUFFIXES)}.")
    if not path.parent.is_dir():
        raise UserError("--picture", str(path), "no such folder", "Make it first.")


def draw(timeline: Timeline, title: str, path: Path) -> None:
    """Write the picture of a simulated schedule."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    ranks = len(timeline.ranks)
    figure, axes = plt.subplots(figsize=(14, 1.6 + 0.32 * ranks), layout="constrained")
    number = sum(len(slots) for slots in timeline.ranks) <= MOST_NUMBERS
    for rank, slots in enumerate(timeline.ranks):
        bars: dict[tuple[str, int, int], list[tuple[float, float]]] = {}  # all of one kind and place are one object
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
