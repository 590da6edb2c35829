"""Run folders as the page lists them: their names, progress and cost. Read-only; does not import torch."""

from pathlib import Path
from typing import Any

from finback.runs import reader
from finback.runs.ledger import BASIS, money, sums, unknown
from finback.runs.reader import StageFolder
from finback.serve.errors import ApiError

DEEPEST = 3  # levels below the runs folder to search for runs


class Runs:
    """The run folders under a folder. A request's name is looked up among them, never turned into a path."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folders(self) -> dict[str, Path]:
        """Run folders by name, the latest first; symbolic links are not followed."""
        found: list[tuple[float, str, Path]] = []
        here = self.root.resolve()
        waiting = [(here, 0)]
        while waiting:
            folder, depth = waiting.pop()
            if reader.is_run(folder):
                name = folder.relative_to(here).as_posix() if folder != here else here.name
                found.append((reader.changed(folder), name, folder))
            elif depth < DEEPEST:
                waiting += [(inner, depth + 1) for inner in reader.inside(folder, lenient=True)]
        return {name: folder for _, name, folder in sorted(found, key=lambda f: (-f[0], f[1]))}

    def find(self, name: str) -> Path:
        """The folder of a run; ApiError 404 if there is none with this name."""
        folder = self.folders().get(name)
        if folder is None:
            raise ApiError(404, "no such run", "run")
        return folder

    def stages(self, run: str) -> list[StageFolder]:
        """The stages of a run; ApiError 404 if there is none with this name."""
        return reader.stages(self.find(run), lenient=True)

    def stage(self, run: str, name: str) -> StageFolder:
        """A stage of a run; ApiError 404 if there is none with this name."""
        for stage in self.stages(run):
            if stage.name == name:
                return stage
        raise ApiError(404, "no such stage", "stage")


def overview(name: str, root: Path, begun: list[StageFolder]) -> dict[str, Any]:
    """A run's entry in the list: the stages that have begun, with state and cost."""
    busy = reader.is_locked(root)
    listed = [stage_state(stage, busy and stage is begun[-1]) for stage in begun]
    recipe = reader.recipe(root, lenient=True)
    running = any(s["state"] == "running" for s in listed)
    damaged = reader.damaged(root)
    torn = damaged or any(s["state"] == "torn" for s in listed)
    done = bool(listed) and all(s["state"] == "done" for s in listed) and reader.has_summary(root)
    return {
        "name": name,
        "recipe": str(recipe.get("recipe", "?")),
        "seed": recipe.get("seed"),
        "stages": listed,
        "torn": damaged,
        "state": "running" if running or busy else "torn" if torn else "done" if done else "stopped",
        "changed": reader.changed(root),
        "seconds": sum(s["seconds"] for s in listed),
        "money": sum(s["money"] for s in listed),
        "unknown": (left_out := [text for s in listed for text in s["unknown"]]),
        "basis": "; ".join([BASIS, *(f"unknown and NOT included: {text}" for text in left_out)]),
    }


def stage_state(stage: StageFolder, busy: bool) -> dict[str, Any]:
    """A stage's state, and its cost according to the ledger."""
    ledger = stage.ledger()
    spent = sums(ledger)
    return {
        "name": stage.name,
        "kind": stage.type,
        "state": "torn" if stage.torn else "done" if stage.is_finished else "running" if busy else "stopped",
        "torn": stage.torn,
        "seconds": spent["seconds"],
        "money": money(spent),
        "unknown": unknown(ledger),
        "cores": cores(ledger),
        "has_metrics": stage.has_metrics,
        "exams": stage.exams,
        "has_samples": stage.has_samples,
        "watches": stage.watches,
        **{name: spent.get(name, 0) for name in ("tokens_trained", "tokens_generated", "flops")},
    }


def cores(ledger: list[dict[str, Any]]) -> float:
    """Number of cores of a stage; 1 until its ledger records it."""
    found = ledger[0].get("cores") if ledger else None
    return max(1.0, float(found)) if isinstance(found, int | float) else 1.0
