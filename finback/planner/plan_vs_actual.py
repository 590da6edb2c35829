"""Plan and actual: the current plan of a run folder's stages, and what each has spent according to its ledger.

A stage is planned from its config.json, so the recipe file, which may have changed, is not needed.
"""

from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.planner import calibration_file, recipe_plan
from finback.planner.options import PlanOptions
from finback.planner.render import big, span
from finback.runs import reader
from finback.runs.ledger import cost, shown
from finback.runs.reader import StageFolder
from finback.runs.terminal import table

SPENT = {
    "tokens_trained": "tokens_trained",
    "tokens_generated": "tokens_generated",
    "flops": "flops",
    "seconds": "wall_seconds",
    "dollars": "money_usd",
}


def plan_and_actual(root: Path, calibration: Path) -> dict[str, Any]:
    """Plan and actual of each stage of a run folder; notes explain missing plans."""
    summary = reader.summary(root)
    begun = [stage for stage in reader.stages(root) if stage.name in summary["stages"]]
    found, notes = _plan(str(summary["recipe"]), begun, calibration)
    rows = {}
    for stage in begun:
        planned, paid = found.get(stage.name), cost(stage.folder)
        plan = {k: planned.get(k) for k in SPENT} if planned else None
        actual = {k: paid[v] for k, v in SPENT.items()}
        rows[stage.name] = {"plan": plan, "actual": actual, "unknown": paid["unknown"]}
    return {"stages": rows, "notes": notes}


def planned(root: Path, calibration: Path) -> dict[str, dict[str, float]]:
    """The planned costs (`SPENT`) of the stages that have begun and that have a plan."""
    begun = [stage for stage in reader.stages(root, lenient=True) if not stage.torn]
    found, _ = _plan(root.name, begun, calibration)
    return {name: {k: stage[k] for k in SPENT if stage.get(k) is not None} for name, stage in found.items() if stage}


def _plan(name: str, begun: list[StageFolder], calibration: Path) -> tuple[dict[str, Any], list[str]]:
    """The plan of each stage, and notes."""
    known, notes = None, []
    try:
        known = calibration_file.read(calibration) if calibration.is_file() else None
    except UserError as error:
        notes.append(str(error))
    try:
        configs = [stage.config_json for stage in begun]
        found = recipe_plan.plan_configs(name, configs, PlanOptions(), known, _ranks(begun))
    except UserError as error:
        return {}, [*notes, f"no plan: {error}"]
    except (TypeError, KeyError, AttributeError) as error:
        problem = "a stage's config.json was written by another version of finback"
        return {}, [*notes, f"no plan: {problem} ({type(error).__name__}: {error})"]
    return found["stages"], [*notes, *found["notes"]]


def _ranks(begun: list[StageFolder]) -> int:
    """Number of ranks of the run, from its ledgers."""
    cores = [line.get("cores", 1) for stage in begun for line in stage.ledger()]
    return max(1, int(max(cores, default=1)))


def text(values: dict[str, Any]) -> str:
    """Plan and ledger as a table; planned tokens are upper bounds."""
    rows = []
    for name, stage in values["stages"].items():
        for label in ("plan", "actual"):
            s = stage[label] or dict.fromkeys(SPENT)
            dollars = "-" if s["dollars"] is None else f"{s['dollars']:,.4f}"
            dollars = shown(dollars, stage, "money") if label == "actual" else dollars
            amounts = [big(s[k]) if s[k] else "-" for k in ("tokens_trained", "tokens_generated", "flops")]
            time = span(s["seconds"]) if s["seconds"] else "-"
            rows.append([name if label == "plan" else "", label, *amounts, time, dollars])
    title = "Plan and actual; a plan has the most tokens that a stage can take:"
    lines = table(rows, ("stage", "", "trains", "generates", "FLOPs", "time", "$"), indent=2)
    return "\n".join([title, lines, *(f"note: {text}" for text in values["notes"])])
