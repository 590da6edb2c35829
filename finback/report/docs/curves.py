"""Curves of a run's logs as SVG, for light and dark, in the web page's colors. Does not import torch."""

import html
import math

import numpy as np

from finback.report.docs.blocks import TEMPLATES, Figure
from finback.runs import metrics_table
from finback.runs.metrics_table import MetricsTable
from finback.runs.reader import StageFolder
from finback.runs.thinning import Line, thin

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 260, 64, 36, 12, 12
POINTS = 400  # most points per line
COLOURS = 4  # classes s0 to s3 of curves.css
Point = tuple[float, float]


def of_stage(stage: StageFolder) -> list[Figure]:
    """The curves that a stage declares, over its steps; missing, NaN and infinite values are skipped."""
    table, found = metrics_table.read(stage.metrics_file), []
    steps = np.full(table.rows, np.nan)
    rows, numbers = table.column("step")
    steps[rows.astype(np.int64)] = numbers
    for title, names in stage.declaration.curves.items():
        lines = {name: line for name in names if len((line := _line(table, steps, name))[0])}
        # a dense model has no routers
        if lines and ("max_violation" not in lines or any(lines["max_violation"][1])):
            title = f"{stage.name}: {title}"
            found.append(Figure(f"{stage.name}-{names[0]}", title, draw(lines, title)))
    return found


def _line(table: MetricsTable, steps: Line, name: str) -> tuple[Line, Line]:
    """Steps and values of a metric where both are finite, thinned."""
    rows, y = table.column(name)
    x = steps[rows.astype(np.int64)]
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    chosen = thin(x, y, POINTS)
    return x[chosen], y[chosen]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def draw(lines: dict[str, tuple[Line, Line]], title: str) -> str:
    """An SVG of one or more lines, {name: (x, y)}; the y axis starts at 0 if that is close."""
    xs, ys = (np.concatenate([line[axis] for line in lines.values()]).tolist() for axis in (0, 1))
    x_range, y_range = (min(xs), max(xs)), (min(*ys, 0.0) if min(ys) < max(ys) / 2 else min(ys), max(ys))
    style = (TEMPLATES / "curves.css").read_text(encoding="utf-8").replace("\n", "")
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{html.escape(title)}</title><style>{style}</style>",
    ]
    for value in ticks(*y_range):
        y = _place(value, y_range, HEIGHT - BOTTOM, TOP)
        parts.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks(*x_range):
        x = _place(value, x_range, LEFT, WIDTH - RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:,.4g}</text>')
    for i, (name, line) in enumerate(lines.items()):
        path = " ".join(
            f"{_place(x, x_range, LEFT, WIDTH - RIGHT):.1f},{_place(y, y_range, HEIGHT - BOTTOM, TOP):.1f}"
            for x, y in zip(*line, strict=True)
        )
        colour = i % COLOURS
        parts.append(f'<polyline class="s{colour}" fill="none" stroke-width="1.8" points="{path}"/>')
        x = LEFT + 150 * i
        parts.append(
            f'<line class="s{colour}" stroke-width="3" x1="{x}" x2="{x + 18}" y1="{HEIGHT - 8}" y2="{HEIGHT - 8}"/>'
        )
        parts.append(f'<text x="{x + 24}" y="{HEIGHT - 4}">{html.escape(name.replace("_", " "))}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">step</text></svg>')
    return "".join(parts)


def _place(value: float, span: Point, first: float, last: float) -> float:
    low, high = span
    return first if high == low else first + (value - low) / (high - low) * (last - first)
