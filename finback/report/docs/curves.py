"""Curves of a run's logs as SVG, for light and dark, in the web page's colours. No torch here."""

import html
import math
from collections.abc import Sequence
from typing import Any

from finback.report.docs.blocks import Curve

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 260, 64, 36, 12, 12
POINTS = 400  # drawn at most; of more, the lowest and highest of each stretch
COLOURS = (("#2a55cc", "#93b2ff"), ("#c2500a", "#ffa56b"), ("#14713f", "#6fcf97"), ("#8633c9", "#cf9bff"))
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#5b6474}.g{stroke:#dde1e8}"
    + "".join(f".s{i}{{stroke:{light}}}" for i, (light, _) in enumerate(COLOURS))
    + "@media(prefers-color-scheme:dark){text{fill:#9aa3b2}.g{stroke:#323742}"
    + "".join(f".s{i}{{stroke:{dark}}}" for i, (_, dark) in enumerate(COLOURS))
    + "}"
)
Point = tuple[float, float]

# What is drawn of each kind of stage: title -> metrics that share an axis.
DRAWN: dict[str, dict[str, tuple[str, ...]]] = {
    "Pretrain": {"loss": ("loss", "mtp_loss"), "router health: max violation": ("max_violation",)},
    "SFT": {"loss": ("loss", "mtp_loss")},
    "GRPO": {
        "share of answers": ("accuracy", "thinks", "well_formed", "truncated"),
        "reward": ("reward",),
        "tokens per answer": ("length",),
        "entropy (nats per token)": ("entropy",),
        "trainer against engine (nats per token)": ("gap_mean",),
        "router health: max violation": ("max_violation",),
    },
}
DRAWN |= {"Extend": DRAWN["Pretrain"], "Distill": DRAWN["SFT"]}


def of_stage(name: str, kind: str, metrics: Sequence[dict[str, Any]]) -> list[Curve]:
    """The curves of one stage over its steps; metrics that were not logged, or are no numbers, are left out."""
    found = []
    for title, keys in DRAWN.get(kind, {}).items():
        lines = {key: points for key in keys if (points := _points(metrics, key))}
        dense = not any(y for _, y in lines.get("max_violation", [(0, 1)]))  # has no routers to be out of balance
        if lines and not dense:
            slug = f"{name}-{keys[0]}"
            found.append(Curve(slug, f"{name}: {title}", draw(lines, f"{name}: {title}")))
    return found


def _points(metrics: Sequence[dict[str, Any]], key: str) -> list[Point]:
    pairs = [(m.get("step"), m.get(key)) for m in metrics]
    return [(float(x), float(y)) for x, y in pairs if _is_number(x) and _is_number(y)]  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def thinned(points: list[Point], most: int = POINTS) -> list[Point]:
    """At most so many points, which keep every stretch's lowest and highest: no spike is lost."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    found: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        found += sorted(ends)
    return found


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def draw(lines: dict[str, list[Point]], title: str) -> str:
    """An SVG of one or several lines, {name: [(x, y)]}, whose axis of y begins at 0 where it is not far away."""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    x_range, y_range = (min(xs), max(xs)), (min(*ys, 0.0) if min(ys) < max(ys) / 2 else min(ys), max(ys))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>",
    ]
    for value in ticks(*y_range):
        y = _place(value, y_range, HEIGHT - BOTTOM, TOP)
        parts.append(f'<line class="g" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
    for value in ticks(*x_range):
        x = _place(value, x_range, LEFT, WIDTH - RIGHT)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{value:,.4g}</text>')
    for i, (name, points) in enumerate(lines.items()):
        path = " ".join(
            f"{_place(x, x_range, LEFT, WIDTH - RIGHT):.1f},{_place(y, y_range, HEIGHT - BOTTOM, TOP):.1f}"
            for x, y in thinned(points)
        )
        colour = i % len(COLOURS)
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
