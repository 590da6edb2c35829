"""A stage as the planner sees it: its knobs from config.json, so that recipes and run folders are planned alike."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finback.model.config import ModelConfig, from_json
from finback.model.rope_scaling import KINDS
from finback.parallel.layout import Layout
from finback.runs import adapters, hub_models
from finback.runs.declaration import DECLARATION
from finback.runs.files import is_checkpoint, is_gguf, read_json
from finback.runs.recipe import Work

# a model config and its parts, by their names in config.json
CLASSES: dict[str, Any] = {cls.__name__: cls for cls in (ModelConfig, *KINDS.values())}


@dataclass(frozen=True)
class PlannedStage:
    """A stage, its maximal tokens, and the model that it trains or queries; None if unknown."""

    name: str
    # name of its class
    type: str
    # whether it is pre-training, which is planned step by step
    pretrains: bool
    knobs: dict[str, Any]
    work: Work
    model: ModelConfig | None
    # models whose probabilities it learns from, if they run in this process
    teachers: tuple[ModelConfig, ...] = ()

    @property
    def length(self) -> int:
        """Tokens per row; of rows that grow, the longest."""
        length = self.knobs.get("seq_len") or self.knobs.get("max_tokens") or 0
        return max(each for _, each in length) if isinstance(length, list) else int(length)

    @property
    def layout(self) -> Layout | None:
        """The layout of its model."""
        raw = self.knobs.get("layout")
        return Layout(**_fields(raw)) if raw else None


def planned_stages(configs: Iterable[dict[str, Any]]) -> list[PlannedStage]:
    """Stages in order, from their `runs.recipe.config_json`. KeyError or TypeError if another version wrote it."""
    found: dict[str, PlannedStage] = {}
    for config in configs:
        declared = config[DECLARATION]
        knobs = {k: v for k, v in config.items() if k not in ("type", DECLARATION)}
        work, pretrains = Work(**_fields(declared["work"])), declared["kind"] == "pre-training"
        model, teachers = _model(knobs, found), _teachers(knobs.get("teacher"), found)
        found[knobs["name"]] = PlannedStage(knobs["name"], config["type"], pretrains, knobs, work, model, teachers)
    return list(found.values())


def _model(knobs: dict[str, Any], earlier: dict[str, PlannedStage]) -> ModelConfig | None:
    """The stage's own model, or that of the stage or checkpoint it starts from."""
    if isinstance(own := knobs.get("model"), dict):
        model: ModelConfig = _value(own)
        data = earlier.get(knobs.get("data", ""))
        if data is not None and "vocab_size" in data.knobs:  # its tokenizer sets the upper bound
            model = dataclasses.replace(model, vocab_size=data.knobs["vocab_size"])
        return model
    return _named(knobs.get("start"), earlier)


def _teachers(named: Any, earlier: dict[str, PlannedStage]) -> tuple[ModelConfig, ...]:
    """The teacher, or one per domain; teachers on servers are not planned."""
    every = named.values() if isinstance(named, dict) and "type" not in named else (named,)
    return tuple(filter(None, (_named(each, earlier) for each in every)))


def _named(name: Any, earlier: dict[str, PlannedStage]) -> ModelConfig | None:
    """The model of an earlier stage or of a checkpoint."""
    if not isinstance(name, str):
        return None
    name = adapters.split(name)[0]
    return earlier[name].model if name in earlier else stored_model(Path(name))


def stored_model(path: Path) -> ModelConfig | None:
    """The model of a finished stage or of a Hugging Face checkpoint; None for anything else, such as a GGUF file.

    For models of the hub, only the config is fetched.
    """
    path = path if is_gguf(path) else hub_models.fetched(path, wanted=hub_models.CONFIGS)
    if (path / "model.json").is_file():
        return from_json(read_json(path / "model.json"))
    if adapters.is_adapter(path):
        return stored_model(adapters.places(path)[0])
    if path.is_dir() and is_checkpoint(path):
        from finback.checkpoint import hf_config

        return hf_config.model_config(hf_config.read_config(path))
    return None


def _fields(raw: dict[str, Any]) -> dict[str, Any]:
    return {k: _value(v) for k, v in raw.items() if k != "type"}


def _value(raw: Any) -> Any:
    """Restores a model or a part of it from `config.as_json`."""
    if isinstance(raw, list):
        return tuple(map(_value, raw))
    return CLASSES[raw["type"]](**_fields(raw)) if isinstance(raw, dict) and raw.get("type") in CLASSES else raw
