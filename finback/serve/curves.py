"""A stage's metrics for the page: axes, curves, heat maps, remaining time, and warnings. Does not import torch."""

import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np

from finback.rollouts import rl_alerts
from finback.rollouts.rl_alerts import Alert
from finback.runs.files import LEDGER
from finback.runs.ledger import dollars
from finback.runs.metrics_table import MetricsTable
from finback.runs.reader import StageFolder
from finback.runs.thinning import Line, smooth, thin

AXES = ("step", "tokens", "time", "cost")
RESULTS = "accuracy", "reward", "loss"  # metrics of model quality, if a stage has no results
QUIET = 120.0  # seconds without a new row after which a running stage counts as stalled; at least 20 steps' time
BLOCK = 50  # steps from which the normal spread is estimated
SPIKE = 12.0  # robust standard deviations above the preceding block
LISTED = 5  # most spikes to show


def axis(table: MetricsTable, name: str, cores: float) -> Line:
    """The x value of each row: its step, or cumulative tokens, seconds or dollars; monotonic."""
    if name == "step":
        return np.maximum.accumulate(table.carried("step")) if table.rows else np.zeros(0)
    if name == "tokens":
        return _tokens(table)
    seconds = _seconds(table)
    return seconds if name == "time" else seconds * dollars(cores)


def _tokens(table: MetricsTable) -> Line:
    if "tokens" in table.columns:
        return np.maximum.accumulate(table.carried("tokens"))
    for name in ("labels", "tokens_with_gradient"):
        if name in table.columns:
            return np.cumsum(np.nan_to_num(table.filled(name)))
    return np.zeros(table.rows)


def _seconds(table: MetricsTable) -> Line:
    if "seconds" in table.columns:
        each = table.filled("seconds")
    elif "tokens_per_second" in table.columns:
        rate, made = table.filled("tokens_per_second"), np.diff(_tokens(table), prepend=0.0)
        each = np.divide(made, rate, out=np.zeros(table.rows), where=rate > 0)
    else:
        each = np.zeros(table.rows)
    return np.cumsum(np.maximum(np.nan_to_num(each), 0.0))


def curve(
    table: MetricsTable, name: str, places: Line, weight: float, begin: float | None, end: float | None, points: int
) -> dict[str, Any]:
    """A curve between two x values, raw and smoothed: [x, y] pairs, thinned, None where NaN or infinite."""
    rows, y = table.column(name)
    x = places[rows.astype(np.int64)]
    smoothed = smooth(y, weight)  # before cutting, so that zooming does not change it
    first = max(0, int(np.searchsorted(x, begin, "left")) - 1) if begin is not None else 0
    last = min(len(x), int(np.searchsorted(x, end, "right")) + 1) if end is not None else len(x)
    x, y, smoothed = x[first:last], y[first:last], smoothed[first:last]
    chosen = thin(x, y, points)
    found: dict[str, Any] = {"name": name, "n": len(rows), "x": _plain(x[chosen]), "y": _plain(y[chosen])}
    if weight:
        found["smooth"] = _plain(smoothed[chosen])
    return found


def heat(table: MetricsTable, name: str, most: int) -> dict[str, Any]:
    """Nested values, such as the token share of each layer's experts, at up to `most` steps spread over the run."""
    rows, values = table.nested.get(name, ([], []))
    steps = axis(table, "step", 1.0)
    spread = np.unique(np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int))
    chosen: list[int] = spread.tolist() if rows else []
    matrices = [(int(steps[rows[i]]), _matrix(values[i])) for i in chosen]
    shaped = [(step, m) for step, m in matrices if m]
    return {"name": name, "steps": [s for s, _ in shaped], "values": [m for _, m in shaped]}


def _matrix(value: Any) -> list[list[float | None]]:
    """A list of equally long rows of numbers; [] for anything else."""
    if not isinstance(value, list) or not all(isinstance(row, list) for row in value):
        return []
    if len({len(row) for row in value}) != 1:
        return []
    return [[v if isinstance(v, int | float) and math.isfinite(v) else None for v in row] for row in value]


def latest(table: MetricsTable) -> dict[str, float | None]:
    """The last values of those curves in `RESULTS` that exist."""
    return {name: _plain(table.column(name)[1][-1:])[0] for name in RESULTS if name in table.columns}


def progress(stage: StageFolder, table: MetricsTable) -> dict[str, Any]:
    """A stage's progress: its step, the last step according to its knobs, and seconds left at the recent pace."""
    steps, tokens = axis(table, "step", 1.0), axis(table, "tokens", 1.0)
    seconds = _seconds(table)
    done: dict[str, Any] = {"step": int(steps[-1]) if len(steps) else 0, "of": None, "unit": "steps", "left": None}
    knob = stage.declaration.length
    line, unit = (tokens, "tokens") if "tokens" in knob else (steps, "steps")
    total = stage.config.get(knob)
    if isinstance(total, int | float) and total > 0:
        at = float(line[-1]) if len(line) else 0.0
        done |= {"at": at, "of": total, "unit": unit, "left": _left(line, seconds, float(total))}
    return done


def _left(line: Line, seconds: Line, total: float) -> float | None:
    """Seconds until a growing curve reaches a total, at the pace of its last 50 rows."""
    recent = line[-50:], seconds[-50:]
    grown, took = (float(part[-1] - part[0]) if len(part) > 1 else 0.0 for part in recent)
    return max(0.0, total - float(line[-1])) / grown * took if grown > 0 and took > 0 else None


def alerts(stage: StageFolder, table: MetricsTable, running: bool) -> list[dict[str, Any]]:
    """Warnings: NaN, spikes, RL problems, a stall."""
    found = [*_non_finite(table), *rl_alerts.alerts(stage.config, table)]
    for name in () if "reward" in table.columns else ("loss", "grad_norm"):
        found += _spikes(table, name)
    if running:
        found += _stall(table)
    return [dict(zip(("kind", "name", "step", "text"), alert, strict=True)) for alert in found]


def damage(stage: StageFolder) -> list[dict[str, Any]]:
    """The unreadable parts of a stage: a torn file, or broken rows of the ledger."""
    found = [("ledger", LEDGER, None, fault) for fault in stage.ledger_faults[:LISTED]]
    if stage.torn:
        text = f"{stage.torn} is torn: delete the folder {stage.name} and run the recipe again"
        found = [("torn", stage.torn, None, text), *found]
    return [dict(zip(("kind", "name", "step", "text"), alert, strict=True)) for alert in found]


def _non_finite(table: MetricsTable) -> Iterator[Alert]:
    steps = axis(table, "step", 1.0)
    for name, (rows, numbers) in table.columns.items():
        bad = np.flatnonzero(~np.isfinite(np.array(numbers)))
        if len(bad):
            step = int(steps[int(rows[bad[0]])])
            yield "nan", name, step, f"{name} is NaN or infinite at step {step}"


def _spikes(table: MetricsTable, name: str) -> Iterator[Alert]:
    """The highest values that are far above the preceding block, measured by its median and median deviation."""
    rows, y = table.column(name)
    whole = np.append(y, np.full(-len(y) % BLOCK, np.nan)).reshape(-1, BLOCK)
    known = np.isfinite(whole[:-1]).any(axis=1)  # blocks with finite values
    if not known.any():
        return
    before, after = whole[:-1][known], whole[1:][known]
    before = np.where(np.isfinite(before), before, np.nan)
    middle = np.nanmedian(before, axis=1)
    spread = np.nanmedian(np.abs(before - middle[:, None]), axis=1) * 1.4826
    limit = middle + SPIKE * np.maximum(spread, 1e-3 * np.abs(middle))
    highest = np.where(np.isfinite(after), after, -np.inf)
    top = np.argmax(highest, axis=1)
    value = highest[np.arange(len(top)), top]
    over = np.flatnonzero(value > limit)
    size = value[over] / np.maximum(np.abs(middle[over]), 1e-12)
    first = (np.flatnonzero(known) + 1) * BLOCK  # start of each following block
    steps = axis(table, "step", 1.0)
    for i in over[np.argsort(-size)][:LISTED]:
        step = int(steps[int(rows[first[i] + top[i]])])
        yield "spike", name, step, f"{name} rose to {value[i]:.3g} at step {step}, from about {middle[i]:.3g}"


def _stall(table: MetricsTable) -> Iterator[Alert]:
    seconds = _seconds(table)
    usual = float(np.median(np.diff(seconds[-50:]))) if len(seconds) > 2 else 0.0
    try:
        silent = time.time() - table.tail.path.stat().st_mtime
    except OSError:
        return
    if silent >= max(QUIET, 20 * usual):
        yield "stall", "step", None, f"nothing logged for {silent / 60:.0f} minutes"


def _plain(values: Line) -> list[float | None]:
    return [v if math.isfinite(v) else None for v in values.tolist()]
