"""Plan against ledger: what `plan` says now of the recipe whose run folder this is, beside what each stage has spent.

The stages come back out of their config.json, so the recipe's file is not needed, which may have changed since.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from finback.config import UserError
from finback.model import config as models
from finback.planner import calibration_file, recipe_plan
from finback.planner.options import PlanOptions
from finback.planner.render import big, span, table
from finback.runs.declaration import DECLARATION
from finback.runs.files import read_json, read_lines
from finback.runs.ledger import cost
from finback.runs.recipe import Recipe, Stage
from finback.stages import distill, evaluate, extend, grpo, prepare, pretrain, reject, sft

MODULES = (distill, evaluate, extend, grpo, prepare, pretrain, reject, sft)
SPENT = {
    "tokens_trained": "tokens_trained",
    "tokens_generated": "tokens_generated",
    "flops": "flops",
    "seconds": "wall_seconds",
    "dollars": "money_usd",
}


def stage_of(config: dict[str, Any]) -> Stage:
    """A stage with the knobs of its config.json, enough of it to be planned: tasks and rewards are names of fields only."""
    known = {cls.__name__: cls for m in MODULES for cls in vars(m).values() if _is_stage(cls)}
    cls = known.get(config["type"], Stage)  # a recipe's own stage announces nothing that could be found here
    return _bare(cls, {k: _value(v) for k, v in config.items() if k not in ("type", DECLARATION)})


def _is_stage(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Stage) and value is not Stage


def _bare(cls: Any, values: dict[str, Any]) -> Any:
    """An object of a frozen dataclass without its checks: they were made when the stage ran, perhaps elsewhere."""
    made = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def _value(raw: Any) -> Any:
    if isinstance(raw, list):
        return tuple(map(_value, raw))
    if not isinstance(raw, dict) or "type" not in raw:
        return raw
    fields = {k: _value(v) for k, v in raw.items() if k != "type"}
    cls = getattr(models, raw["type"], SimpleNamespace)  # a model, or its scaling
    return cls(**fields)


def beside(root: Path, calibration: Path) -> dict[str, Any]:
    """For each stage of a run folder what is planned and what was spent; notes say why there is no plan."""
    summary = read_json(root / "summary.json")
    folders = [root / name for name in summary["stages"] if (root / name / "config.json").is_file()]
    found, notes = _plan(str(summary["recipe"]), folders, calibration)
    rows = {}
    for folder in folders:
        planned, paid = found.get(folder.name), cost(folder)
        plan = {k: planned.get(k) for k in SPENT} if planned else None
        rows[folder.name] = {"plan": plan, "ledger": {k: paid[v] for k, v in SPENT.items()}}
    return {"stages": rows, "notes": notes}


def planned(root: Path, calibration: Path) -> dict[str, dict[str, float]]:
    """What the stages that a run has begun were to take, of `SPENT`; nothing of those that announce nothing."""
    folders = sorted((p.parent for p in root.glob("*/config.json")), key=lambda f: (f / "config.json").stat().st_mtime)
    found, _ = _plan(root.name, folders, calibration)
    return {name: {k: stage[k] for k in SPENT if stage.get(k) is not None} for name, stage in found.items() if stage}


def _plan(name: str, folders: list[Path], calibration: Path) -> tuple[dict[str, Any], list[str]]:
    """The plan of each stage, and what is to be said of it."""
    known, notes = None, []
    try:
        known = calibration_file.read(calibration) if calibration.is_file() else None
    except UserError as error:
        notes.append(str(error))
    try:
        stages = tuple(stage_of(read_json(folder / "config.json")) for folder in folders)
        recipe = _bare(Recipe, {"name": name, "stages": stages, "file": None})
        found = recipe_plan.plan(recipe, PlanOptions(), known, _ranks(folders))
    except (UserError, TypeError, KeyError, AttributeError) as error:  # knobs of another version
        return {}, [*notes, f"no plan: {error}"]
    return found["stages"], [*notes, *found["notes"]]


def _ranks(folders: list[Path]) -> int:
    """How many ranks the run had, by its ledgers."""
    cores = [line.get("cores", 1) for folder in folders for line in read_lines(folder / "ledger.jsonl")]
    return int(max(cores, default=1))


def tell(values: dict[str, Any]) -> str:
    """Plan and ledger as a table; a plan's tokens are the most that a stage can take."""
    rows = [["stage", "", "trains", "generates", "FLOPs", "time", "$"]]
    for name, stage in values["stages"].items():
        for label in ("plan", "ledger"):
            s = stage[label] or dict.fromkeys(SPENT)
            dollars = "-" if s["dollars"] is None else f"{s['dollars']:,.4f}"
            amounts = [big(s[k]) if s[k] else "-" for k in ("tokens_trained", "tokens_generated", "flops")]
            time = span(s["seconds"]) if s["seconds"] else "-"
            rows.append([name if label == "plan" else "", label, *amounts, time, dollars])
    lines = ["Plan against ledger; a plan has the most tokens that a stage can take:"]
    lines += ["  " + line for line in table(rows)]
    return "\n".join([*lines, *(f"note: {text}" for text in values["notes"])])
