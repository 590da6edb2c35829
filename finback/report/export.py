"""Exports a model: weights, config, tokenizer, generation settings and card in a new folder."""

import shutil
from pathlib import Path
from typing import Any

from finback.checkpoint import export as weights
from finback.checkpoint import models
from finback.checkpoint.export import Format
from finback.checkpoint.hf_config import read_config
from finback.checkpoint.models import WeightDtype, find_model
from finback.data.tokenizer import Tokenizer
from finback.data.tokenizer_files import CONFIG, GENERATION, other_forms
from finback.data.tokenizer_files import ids as ids_of
from finback.report.gguf_file import export_gguf
from finback.report.model_card import write_card
from finback.report.options import ExportOptions
from finback.runs.adapters import tokenizer_place
from finback.runs.files import is_gguf
from finback.runs.hub_models import model_name

# precision for loading: no more memory than the result needs; FP8 is passed through unchanged
_WEIGHTS: dict[Format, WeightDtype] = {"fp32": "fp32", "bf16": "bf16", "fp8": "fp8"}


def export_as(options: ExportOptions) -> list[Path]:
    """Exports a model in the requested format. Returns the files written."""
    if options.format == "gguf":
        return export_gguf(options.model, options.folder, options.type)
    return export_model(options.model, options.folder, options.dtype)


def export_model(path: Path, folder: Path, fmt: Format) -> list[Path]:
    """Exports the model at `path` (for a run, its newest). Returns the files written. A missing tokenizer is skipped."""
    source = find_model(path)
    weights.check_target(folder)
    own = (source / "model.json").is_file()
    model = models.load(source, weights="fp32" if own else _WEIGHTS[fmt])
    place = tokenizer_place(source)
    has_tokenizer = is_gguf(place) or (place / "tokenizer.json").is_file()
    tokenizer = Tokenizer(place) if has_tokenizer else None

    def extras(part: Path) -> None:
        if tokenizer is not None:
            tokenizer.export(part)
        else:
            _copy_tokenizer(place, part)
        card = write_card(model.config, folder.name, _public(source), fmt)
        (part / "README.md").write_text(card, encoding="utf-8")

    return weights.export(model, folder, fmt, extras, _settings(source, tokenizer, fmt))


def _copy_tokenizer(place: Path, to: Path) -> None:
    """Copies a tokenizer that finback cannot read, with its settings."""
    settings = (GENERATION, CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
    kept = other_forms(place)
    for name in (*kept, *(settings if kept else (GENERATION,))):
        if (place / name).is_file():
            shutil.copyfile(place / name, to / name)


def _public(source: Path) -> str:
    """A model's name with its run's name: a published card must not reveal local paths."""
    return "/".join(source.resolve().parts[-2:]) if (source / "model.json").is_file() else model_name(source)


def _settings(source: Path, tokenizer: Tokenizer | None, fmt: Format) -> dict[str, Any]:
    """Entries of config.json besides the model: special ids, and the layout of FP8 scales that are passed through."""
    raw = read_config(source) if source.is_dir() and not (source / "model.json").is_file() else {}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    found: dict[str, Any] = {n: raw[n] for n in names if raw.get(n) is not None}
    if tokenizer is not None:
        ids = dict(zip(names, (tokenizer.bos, tokenizer.eos, tokenizer.pad), strict=True))
        if tokenizer.eos >= 0 and tokenizer.eos not in ids_of(found.get("eos_token_id")):
            found.pop("eos_token_id", None)  # the tokenizer's is more reliable
        found = {n: i for n, i in ids.items() if i >= 0} | found
    if fmt == "fp8" and "quantization_config" in raw:
        found["quantization_config"] = raw["quantization_config"]
    return found
