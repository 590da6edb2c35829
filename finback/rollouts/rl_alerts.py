"""Warnings about an RL stage, from its metrics, for the page and `finback show`. Does not import torch."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from finback.rollouts import rl_health
from finback.runs.metrics_table import MetricsTable
from finback.runs.thinning import Line

Alert = tuple[str, str, int | None, str]  # kind, metric, first step, and text

# KL of old tokens, nats per token; beyond it, the ratios of a few tokens dominate an update
MOST_KL = 0.1
# largest age of tokens, in updates, without a correction; 0 to 2 is harmless according to the literature
UNCORRECTED = 2
WAITED = 20  # steps over which idle shares are averaged
MOST_IDLE = 0.5
MOST_CUT = 0.3  # share of tokens that a correction masks or bounds


def alerts(config: Mapping[str, Any], table: MetricsTable) -> Iterator[Alert]:
    """Mismatch of trainer and engine, old tokens, corrections that act often, idle time, and steps without a gradient.

    config: the stage's knobs as JSON.
    """
    steps = np.maximum.accumulate(table.carried("step")) if table.rows else np.zeros(0)
    yield from _gaps(config, table, steps)
    yield from _old(config, table, steps)
    yield from _cut(table, steps)
    yield from _waiting(config, table, steps)
    yield from _teaches_nothing(table, steps)


def _gaps(config: Mapping[str, Any], table: MetricsTable, steps: Line) -> Iterator[Alert]:
    """For steps with tokens of the newest weights; for all steps if max_gap is set."""
    asked = config.get("max_gap")
    allowed = rl_health.max_gap(asked, config.get("compute"))
    values, (rows, _) = table.filled("gap_max"), table.column("gap_max")
    over = np.flatnonzero((values > allowed) & ((table.filled("staleness_max") == 0) | (asked is not None)))
    if len(rows) and len(over):
        step = int(steps[over[0]])
        text = f"trainer and engine disagree by {values[over[0]]:.2g} at step {step}, more than max_gap {allowed:g}"
        yield "gap", "gap_max", step, text


def _old(config: Mapping[str, Any], table: MetricsTable, steps: Line) -> Iterator[Alert]:
    ages, kl = table.filled("staleness_max"), np.abs(table.filled("mismatch_kl"))
    over = np.flatnonzero((ages > 0) & (kl > MOST_KL))
    if len(over):
        step = int(steps[over[0]])
        text = f"tokens of older weights are {kl[over[0]]:.2g} nats from the trainer's weights at step {step}, more than {MOST_KL:g}"
        yield "mismatch", "mismatch_kl", step, f"{text}: lower max_staleness or lr, or add a correction"
    correction = (config.get("objective") or {}).get("correction") or {}
    # with these the clip is relative to the trainer's probabilities before the update, and so rests in a single one
    is_weighted = correction.get("mode", "none") != "none" or correction.get("geometric_mask") is not None
    is_single = config.get("updates", 1) == config.get("epochs", 1) == 1
    late = np.flatnonzero(ages > UNCORRECTED)
    if not len(late) or not correction:
        return
    step = int(steps[late[0]])
    text = f"tokens are {ages[late[0]]:.0f} updates old from step {step} on, and"
    advice = "correction=Correction(off_policy_mask_threshold=0.1)"
    if is_weighted and is_single:
        text = f"{text} with this correction the clip never acts: use {advice}, which keeps it, or lower lr"
        yield "staleness", "staleness_max", step, text
    elif not is_weighted and correction.get("off_policy_mask_threshold") is None:
        yield "staleness", "staleness_max", step, f"{text} nothing corrects for it: give the objective a {advice}"


def _cut(table: MetricsTable, steps: Line) -> Iterator[Alert]:
    for name, what in (("weights_cut", "bounds"), ("answers_masked", "masks")):
        values = table.filled(name)
        over = np.flatnonzero(values > MOST_CUT)
        if len(over):
            step = int(steps[over[0]])
            yield "correction", name, step, f"the correction {what} {values[over[0]]:.0%} of the tokens at step {step}"


def _waiting(config: Mapping[str, Any], table: MetricsTable, steps: Line) -> Iterator[Alert]:
    """Whether the trainer or the engines were mostly idle recently."""
    has_fleet = isinstance(config.get("rollouts"), dict) and config["rollouts"].get("type") == "Fleet"
    more = "add engines" if has_fleet else "use a fleet or more servers"
    fewer = "use fewer engines" if has_fleet else "fewer servers would do"
    for name, who, remedy in (
        ("trainer_idle", "the trainer waits for answers", more),
        ("engines_idle", "the engines wait for the trainer", f"{fewer}, or raise max_staleness"),
    ):
        _, values = table.column(name)
        if len(values) >= WAITED and (share := float(np.mean(values[-WAITED:]))) > MOST_IDLE:
            text = f"{who} {share:.0%} of the time in the last {WAITED} steps: {remedy}"
            yield "waiting", name, int(steps[-1]), text


def _teaches_nothing(table: MetricsTable, steps: Line) -> Iterator[Alert]:
    names = ("truncated", "groups_with_gradient", "accuracy", "well_formed")
    columns = [table.column(name)[1][-rl_health.NOTICED :] for name in names]
    if min(map(len, columns)) < rl_health.NOTICED:
        return
    causes = [rl_health.cause(dict(zip(names, map(float, row), strict=True))) for row in zip(*columns, strict=True)]
    if all(causes):
        text = f"the last {len(causes)} steps taught nothing: {causes[-1]}"
        yield "idle", names[1], int(steps[-1]), text
