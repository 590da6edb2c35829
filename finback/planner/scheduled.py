"""Pre-training whose rows, batch or attention change with tokens, planned part by part."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from finback.model.count import attending_densely
from finback.planner.planned_stage import PlannedStage
from finback.runs.recipe import Work
from finback.train.rates import Steps, level, pairs_of

SUMMED = ("tokens_trained", "flops", "seconds", "device_hours", "dollars", "kwh")
LONGEST = "rows grow: time and cost are sums over all lengths, step and layout are those of the longest"


def parts(stage: PlannedStage) -> list[PlannedStage]:
    """The stage split where its row length, batch size or attention changes; indexers of dense parts select everything."""
    if not stage.pretrains:
        return [stage]
    rows, lengths = (_steps(stage.knobs[name]) for name in ("batch_size", "seq_len"))
    sparse_from, warm_up = (int(stage.knobs.get(name) or 0) for name in ("sparse_from", "indexer_tokens"))
    limit = stage.work.tokens_trained
    # a recipe checks that rows reach this length
    sparse = warm_up + next((start for start, length in pairs_of(lengths) if length >= sparse_from), limit)
    changes = {start for steps in (rows, lengths) for start, _ in pairs_of(steps)} | {sparse}
    starts = sorted(start for start in changes if start == 0 or start < limit)
    if len(starts) == 1 and not sparse:
        return [stage]
    found = []
    for start, end in itertools.pairwise([*starts, limit]):
        knobs = stage.knobs | {"batch_size": level(rows, start), "seq_len": level(lengths, start)}
        model = attending_densely(stage.model) if stage.model and start < sparse else stage.model
        found.append(dataclasses.replace(stage, knobs=knobs, model=model, work=Work(tokens_trained=end - start)))
    return found


def joined(planned: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Combines the plans of a stage's parts into one."""
    if len(planned) == 1:
        return planned[0]
    values = dict(planned[-1])
    for name in SUMMED:
        known = [part[name] for part in planned if part.get(name) is not None]
        if len(known) == len(planned):
            values[name] = sum(known)
    if "memory_bytes" in values:
        values["memory_bytes"] = max(part["memory_bytes"] for part in planned)
    if "fits" in values:
        values["fits"] = all(part["fits"] for part in planned)
    notes = dict.fromkeys(note for part in planned for note in part.get("notes", ()))
    return values | {"notes": [*notes, LONGEST]}


def _steps(raw: Any) -> Steps:
    """A knob from config.json, where tuples are lists."""
    return tuple((int(start), int(value)) for start, value in raw) if isinstance(raw, list) else int(raw)
