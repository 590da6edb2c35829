"""What a run folder can vouch for: every fact of the documents is looked up here, and what is not there is MISSING.

No torch here.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.model import config as models
from finback.model.config import ModelConfig
from finback.runs.files import read_lines
from finback.runs.folder import finished_stages
from finback.runs.ledger import WATTS_PER_CORE
from finback.runs.provenance import sha256

NOT_PROVIDED = "NOT PROVIDED"


class _Missing:
    """What nobody recorded; a value may well be None, which says that there is none."""

    def __repr__(self) -> str:
        return NOT_PROVIDED

    def __bool__(self) -> bool:
        return False


MISSING: Any = _Missing()

# Which sums each kind of stage writes into its ledger; a document that misses one says so.
SPENT = {
    "Prepare": (),
    "Pretrain": ("tokens_trained", "flops", "flops_training", "flops_recomputed", "flops_evaluation"),
    "SFT": ("tokens_trained", "flops", "flops_training"),
    "Distill": ("tokens_trained", "flops", "flops_training", "flops_auxiliary"),
    "GRPO": ("tokens_trained", "tokens_generated", "flops", "flops_training", "flops_generation", "flops_auxiliary"),
    "Reject": ("tokens_generated", "flops", "flops_generation"),
    "Evaluate": ("tokens_generated", "flops", "flops_evaluation"),
}
SPENT["Extend"] = SPENT["Pretrain"]
# Which results each kind of stage puts into its manifest, beside those with a table of their own.
RESULTS = {
    "Prepare": ("sources",),
    "Pretrain": (
        "tokens",
        "steps",
        "precision",
        "probe_reached",
        "probe_best",
        "probe_passed_at_tokens",
        "tokens_by_source",
        "router_last_100_steps",
        "bits_per_byte",
        "skipped_steps",
        "rewinds",
    ),
    "SFT": ("steps", "tokens", "lessons", "rows", "filled", "lessons_by_source", "too_long"),
    "Distill": ("steps", "tokens"),
    "GRPO": ("steps", "tokens_trained", "tokens_generated"),
    "Reject": ("kept", "sampled", "reasons", "questions_by_difficulty", "kept_by_difficulty"),
    "Evaluate": ("model", "evaluations"),
}
RESULTS["Extend"] = RESULTS["Pretrain"]
BEGUN = ("began", "software", "machine", "metered", "inputs")  # words in the first line of a ledger


@dataclass(frozen=True)
class StageFacts:
    """One finished stage as its files tell it."""

    folder: Path
    config: dict[str, Any]
    label: Any  # its name, by the manifest
    results: dict[str, Any]
    files: Any  # names, by the manifest
    ledger: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def kind(self) -> str:
        return str(self.config.get("type", "?"))

    @property
    def expected(self) -> tuple[str, ...]:
        """Keys that its results should have."""
        given_lessons = self.kind in ("SFT", "Distill") and not self.config.get("task")
        keys = RESULTS.get("SFT" if given_lessons else self.kind, ())
        if given_lessons and self.config.get("text"):
            keys += ("sources",)
        if self.kind == "Evaluate" and self.config.get("data"):
            keys += ("bits_per_byte",)
        return keys

    def result(self, key: str) -> Any:
        return self.results.get(key, MISSING)

    def spent(self, key: str) -> Any:
        """The sum over the ledger; MISSING where no line has it."""
        values = [line[key] for line in self.ledger if isinstance(line.get(key), (int, float))]
        return sum(values) if values else MISSING

    @property
    def device_hours(self) -> Any:
        """Hours of all devices; MISSING where a line does not say how long or on how many."""
        if not self.ledger or any("seconds" not in line or "cores" not in line for line in self.ledger):
            return MISSING
        return sum(line["seconds"] * line["cores"] for line in self.ledger) / 3600

    @property
    def watt_hours(self) -> Any:
        """Metered as far as it was, estimated for the rest; MISSING where it was metered and nobody knows how much."""
        hours = self.device_hours
        metered = (self.spent("metered_core_seconds"), self.spent("joules"))
        if hours is MISSING or (self.begun("metered") and MISSING in metered):
            return MISSING
        counted, joules = (value or 0.0 for value in metered)
        return joules / 3600 + max(0.0, hours - counted / 3600) * WATTS_PER_CORE

    def begun(self, key: str) -> Any:
        """A word of the ledger's newest beginning: when, with what software, on what machine, from which commit."""
        return next((line[key] for line in reversed(self.ledger) if key in line), MISSING)

    def inputs(self) -> Iterator[tuple[str, str]]:
        """Names of what it reads, by the knob that names them."""
        for knob in ("data", "start", "teacher", "vocabulary"):
            if isinstance(self.config.get(knob), str) and self.config[knob]:
                yield knob, self.config[knob]
        for name in self.config.get("kept") or ():
            yield "kept", str(name)

    def metrics(self) -> list[dict[str, Any]]:
        return read_lines(self.folder / "metrics.jsonl")

    @cached_property
    def model(self) -> Any:
        """The ModelConfig of what it made; MISSING where it made none, UserError where it is damaged."""
        path = self.folder / "model.json"
        if not path.is_file():
            return MISSING
        try:
            return models.from_json(_object(path))
        except (KeyError, TypeError) as error:
            raise _torn(path, f"no model's shapes ({error})") from None


@dataclass(frozen=True)
class RunFacts:
    """A finished run: its stages in order, and the one whose model the documents are about."""

    root: Path
    recipe: Any
    seed: Any
    stages: tuple[StageFacts, ...]
    chosen: StageFacts

    @property
    def model(self) -> ModelConfig:
        return self.chosen.model

    def stage(self, name: str) -> StageFacts | None:
        return next((s for s in self.stages if s.name == name.partition("/")[0]), None)

    @property
    def chain(self) -> list[StageFacts]:
        """The stages whose updates are in the model, the last one first."""
        found, stage = [], self.stage(self.chosen.name)
        while stage is not None and stage not in found:
            found.append(stage)
            stage = self.stage(str(stage.config.get("start") or ""))
        return found

    @property
    def base(self) -> str:
        """The checkpoint from elsewhere that the model began as; empty when it began at random."""
        start = str(self.chain[-1].config.get("start") or "")
        return start if start and self.stage(start) is None else ""

    @cached_property
    def lineage(self) -> list[StageFacts]:
        """All stages that the model comes from, its data's and lessons' too, in the order of the run; no teacher."""
        found = self.chain
        for stage in found:
            for knob, name in stage.inputs():
                other = self.stage(name)
                if knob != "teacher" and other is not None and other not in found:
                    found.append(other)
        return [s for s in self.stages if s in found]

    @cached_property
    def files(self) -> list[tuple[str, str]]:
        """What the model consists of, with digests."""
        folder = self.chosen.folder
        paths = [*sorted(folder.glob("*.safetensors")), folder / "model.json", folder / "tokenizer.json"]
        return [(path.name, sha256(path)) for path in paths if path.is_file()]

    @property
    def sources(self) -> list[tuple[StageFacts, str, dict[str, Any]]]:
        """Every data set that the model was taught with: the stage that read it, its name and its record."""
        found = []
        for stage in self.lineage:
            records = stage.results.get("sources")
            for name, record in records.items() if isinstance(records, dict) else ():
                found.append((stage, name, record if isinstance(record, dict) else {}))
        return found

    @property
    def exams(self) -> list[tuple[StageFacts, dict[str, Any]]]:
        """Every evaluation of the model."""
        mine = [s for s in self.stages if s.kind == "Evaluate" and s.config.get("start") == self.chosen.name]
        lists = [(s, s.results.get("evaluations")) for s in mine]
        return [(s, e) for s, es in lists if isinstance(es, list) for e in es if isinstance(e, dict)]


def read(root: Path, model: str = "") -> RunFacts:
    """A run folder's facts about the model of one stage, its newest by default; UserError when torn or foreign."""
    if not root.is_dir():
        raise UserError("run", str(root), "no such folder", "Name a run folder such as runs/tiny.")
    if not (root / "recipe.json").is_file():
        problem = "not a run folder: it has no recipe.json"
        raise UserError("run", str(root), problem, "Name one that `finback run` made, such as runs/tiny.")
    marker = _object(root / "recipe.json")
    begun = {p.parent.name for p in root.glob("*/config.json")}
    done = {p.name for p in finished_stages(root)}
    if not done or begun - done:
        problem = f"not finished: {', '.join(sorted(begun - done)) or 'no stage'}"
        raise UserError("run", str(root), problem, "Run the recipe again; it goes on where it stopped.")
    stages = tuple(_stage(root / name) for name in _order(root, done))
    makers = [s for s in stages if (s.folder / "model.json").is_file()]
    chosen = [s for s in makers if s.name == model] or ([] if model else makers[-1:])
    if not chosen:
        known = ", ".join(s.name for s in makers) or "none"
        raise UserError("--model", model, "no stage of this run made such a model", f"Known: {known}.")
    return RunFacts(root, marker.get("recipe", MISSING), marker.get("seed", MISSING), stages, _whole(chosen[0]))


def _whole(stage: StageFacts) -> StageFacts:
    assert stage.model is not MISSING, "only what made a model is chosen"
    return stage


def _order(root: Path, done: set[str]) -> list[str]:
    """Stages as the recipe has them, which summary.json knows; those it lacks behind them by their age."""
    path = root / "summary.json"
    listed = _object(path).get("stages", {}) if path.is_file() else {}
    return [
        *(name for name in listed if name in done),
        *(p.name for p in finished_stages(root) if p.name not in listed),
    ]


def _stage(folder: Path) -> StageFacts:
    config = _object(folder / "config.json") if (folder / "config.json").is_file() else {}
    if not config.get("type"):
        raise _torn(folder / "config.json", "missing, or not the knobs of a stage")
    manifest = _object(folder / "manifest.json")
    results = manifest.get("results", {})
    if not isinstance(results, dict):
        raise _torn(folder / "manifest.json", "its results are no object")
    ledger = [line for line in read_lines(folder / "ledger.jsonl") if isinstance(line, dict)]
    label = manifest.get("stage", MISSING)
    return StageFacts(folder, config, label, results, manifest.get("files", MISSING), ledger)


def _object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _torn(path, f"damaged ({error})") from None
    if not isinstance(value, dict):
        raise _torn(path, "not an object")
    return value


def _torn(path: Path, problem: str) -> UserError:
    return UserError("run", str(path), problem, "Delete that stage's folder and run the recipe again.")
