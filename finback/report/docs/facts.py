"""Facts that a run folder proves, for the documents; what is not recorded is MISSING.

Does not import torch.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.model import config as models
from finback.model.config import ModelConfig
from finback.runs import reader
from finback.runs.files import is_number, read_json
from finback.runs.ledger import lacks, money, sums, unknown, watt_hours
from finback.runs.provenance import sha256
from finback.runs.reader import StageFolder

NOT_PROVIDED = "NOT PROVIDED"


class _Missing:
    """A value that was not recorded, and any sum with it. None, in contrast, means that there is none."""

    def __repr__(self) -> str:
        return NOT_PROVIDED

    def __bool__(self) -> bool:
        return False

    def __add__(self, other: Any) -> "_Missing":
        return self

    __radd__ = __mul__ = __truediv__ = __add__


MISSING: Any = _Missing()

BEGUN = ("began", "software", "machine", "metered", "inputs")  # keys in the first row of a ledger


class StageFacts(StageFolder):
    """A finished stage as documents cite it; values that were not recorded are MISSING."""

    def recorded(self, key: str) -> Any:
        """An entry of its manifest."""
        return (self.manifest or {}).get(key, MISSING)

    @cached_property
    def spent_lines(self) -> list[dict[str, Any]]:
        """Its ledger, read once."""
        return self.ledger()

    def result(self, key: str) -> Any:
        """An entry of the manifest's results, or MISSING."""
        return self.results.get(key, MISSING)

    def spent(self, key: str) -> Any:
        """The sum over the ledger; MISSING if no row has the key, or a part of the amount is unknown."""
        if key == "flops_auxiliary" and self._lacks("FLOPs"):
            return MISSING
        values = [line[key] for line in self.spent_lines if is_number(line.get(key))]
        return sum(values) if values else MISSING

    @property
    def teachers(self) -> list[str]:
        """Models and servers whose probabilities it learned from."""
        named = self.config.get("teacher")
        every = list(named.values()) if isinstance(named, dict) and "type" not in named else [named]
        return [", ".join(each["urls"]) if isinstance(each, dict) else each for each in every if each is not None]

    def _lacks(self, what: str) -> bool:
        return lacks({"unknown": unknown(self.spent_lines)}, what)

    @property
    def _is_timed(self) -> bool:
        """Whether every row of its ledger has a duration and a number of devices."""
        return bool(self.spent_lines) and all({"seconds", "cores"} <= line.keys() for line in self.spent_lines)

    @property
    def device_hours(self) -> Any:
        """Hours over all devices, external engines' cores included; MISSING if a row lacks a duration or a number of devices."""
        if not self._is_timed:
            return MISSING
        if any(line.get("external_seconds") and "external_core_seconds" not in line for line in self.spent_lines):
            return MISSING
        return (
            sum(line["seconds"] * line["cores"] + line.get("external_core_seconds", 0) for line in self.spent_lines)
            / 3600
        )

    @property
    def dollars(self) -> Any:
        """Money; MISSING if a part of it is unknown."""
        if not self._is_timed:
            return MISSING
        return MISSING if self._lacks("money") else money(sums(self.spent_lines))

    @property
    def watt_hours(self) -> Any:
        """Energy, metered if possible and estimated otherwise; MISSING if it was metered but the amount is unknown."""
        metered = (self.spent("metered_core_seconds"), self.spent("joules"))
        if not self._is_timed or (self.begun("metered") and MISSING in metered):
            return MISSING
        return MISSING if self._lacks("energy") else watt_hours(self.spent_lines)

    def begun(self, key: str) -> Any:
        """An entry of the ledger's newest start: time, software, machine, commit."""
        return next((line[key] for line in reversed(self.spent_lines) if key in line), MISSING)

    @cached_property
    def model(self) -> Any:
        """The ModelConfig of its model; MISSING if it has none, UserError if it is damaged."""
        path = self.folder / "model.json"
        if not path.is_file():
            return MISSING
        try:
            return models.from_json(read_json(path))
        except (KeyError, TypeError, AttributeError) as error:
            raise reader.torn(path, f"not the config of a model ({error})") from None


@dataclass(frozen=True)
class RunFacts:
    """A finished run: its stages in order, and the stage whose model is documented."""

    root: Path
    recipe: Any
    seed: Any
    stages: tuple[StageFacts, ...]
    chosen: StageFacts

    @property
    def model(self) -> ModelConfig:
        """Config of the published model."""
        return self.chosen.model

    def stage(self, name: str) -> StageFacts | None:
        """The stage of a reference such as base or base/average; None if the run has no such stage."""
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
        """The external checkpoint that training started from; "" for random weights."""
        start = str(self.chain[-1].config.get("start") or "")
        return start if start and self.stage(start) is None else ""

    @cached_property
    def lineage(self) -> list[StageFacts]:
        """All stages that the model depends on, including its data's and lessons', in order; without teachers."""
        found = self.chain
        for stage in found:
            for name in stage.inputs:
                other = self.stage(name)
                if name not in stage.teachers and other is not None and other not in found:
                    found.append(other)
        return [s for s in self.stages if s in found]

    @cached_property
    def files(self) -> list[tuple[str, str]]:
        """The model's files with digests."""
        folder = self.chosen.folder
        paths = [*sorted(folder.glob("*.safetensors")), folder / "model.json", folder / "tokenizer.json"]
        return [(path.name, sha256(path)) for path in paths if path.is_file()]

    @property
    def sources(self) -> list[tuple[StageFacts, str, dict[str, Any]]]:
        """Every data set that the model was trained on: the stage that read it, its name and its record."""
        found = []
        for stage in self.lineage:
            records = stage.results.get("sources")
            for name, record in records.items() if isinstance(records, dict) else ():
                found.append((stage, name, record if isinstance(record, dict) else {}))
        return found

    def tokens_read(self, stage: StageFacts, name: str) -> Any:
        """Number of tokens of a prepared data set that the model was trained on, with repetitions."""
        readers = [
            s for s in self.chain if s.config.get("data") == stage.name and "tokens_by_source" in s.declaration.results
        ]
        counts = [s.result("tokens_by_source") for s in readers]
        if not all(isinstance(count, dict) for count in counts):
            return MISSING
        return _tokens([count.get(name, 0) for count in counts])

    @property
    def all_tokens_read(self) -> Any:
        """Tokens of all data sets that the model was trained on, without answers that it sampled itself."""
        readers = [s for s in self.chain if s.kind == "pre-training" or isinstance(s.results.get("sources"), dict)]
        counts = [s.result("tokens") for s in readers if s.kind != "data"]
        return _tokens(counts) if counts else MISSING

    @property
    def faults(self) -> list[str]:
        """Invalid entries in its ledgers."""
        return [f"{stage.name}: {fault}" for stage in self.stages for fault in stage.ledger_faults]

    @property
    def exams(self) -> list[tuple[StageFacts, dict[str, Any]]]:
        """Every evaluation of the model."""
        mine = [s for s in self.stages if s.kind == "evaluation" and s.config.get("start") == self.chosen.name]
        lists = [(s, s.results.get("evaluations")) for s in mine]
        return [(s, e) for s, es in lists if isinstance(es, list) for e in es if isinstance(e, dict)]


def _tokens(counts: list[Any]) -> Any:
    """The sum; MISSING if one of them is not a count."""
    return sum(map(int, counts)) if all(is_number(count) and count >= 0 for count in counts) else MISSING


def read(root: Path, model: str = "") -> RunFacts:
    """A run folder's facts about the model of one stage, by default its newest; UserError if it is torn or not a run."""
    recipe = reader.recipe(root)
    begun = [StageFacts(stage.folder, stage.config_json, stage.manifest) for stage in reader.stages(root)]
    left = [stage.name for stage in begun if not stage.is_finished]
    if left or not begun:
        problem = f"not finished: {', '.join(sorted(left)) or 'no stage'}"
        raise UserError("run", str(root), problem, "Run the recipe again; it continues where it stopped.")
    for stage in begun:
        if not isinstance((stage.manifest or {}).get("results", {}), dict):
            raise reader.torn(stage.folder, "its results are not an object")
    makers = [s for s in begun if s.model is not MISSING]
    chosen = [s for s in makers if s.name == model] or ([] if model else makers[-1:])
    if not chosen:
        known = ", ".join(s.name for s in makers) or "none"
        raise UserError("--model", model, "no stage of this run made such a model", f"Known: {known}.")
    return RunFacts(root, recipe.get("recipe", MISSING), recipe.get("seed", MISSING), tuple(begun), chosen[0])
