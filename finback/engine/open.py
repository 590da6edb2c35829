"""Opens a model for generation: weights, tokenizer, end-of-sequence tokens, and an engine."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from finback.checkpoint.inference import InferenceDtype, load_for_inference
from finback.checkpoint.models import find_model
from finback.config import UserError
from finback.data.tokenizer import ASSISTANT, USER, Tokenizer
from finback.engine.engine import Engine, EngineConfig
from finback.engine.pages import affordable
from finback.model.transformer import Transformer

# for a few requests that arrive one by one and may share prefixes
ANSWERING = EngineConfig(rows=32, chunk=512, reuse=True, speculate=True)


def load(
    path: str | Path, dtype: InferenceDtype = "fp32", adapters: Mapping[str, Path] | None = None
) -> tuple[Transformer, Tokenizer]:
    """The model and tokenizer at a path: a run, a stage, a Hugging Face folder or a GGUF file.

    A model in fp32 without adapters can be trained. Otherwise the weights are laid out for fast inference on this machine.
    `adapters` maps names to folders; each request may choose one.
    """
    found = find_model(Path(path))
    tokenizer = Tokenizer(found)
    return load_for_inference(found, dtype, adapters), tokenizer


def open_engine(
    path: str | Path,
    dtype: InferenceDtype = "auto",
    config: EngineConfig = ANSWERING,
    adapters: Mapping[str, Path] | None = None,
) -> tuple[Engine, Tokenizer]:
    """An engine with the model at a path, and its tokenizer; `adapters` as for `load`.

    Unless `config` sets its size, the cache holds up to `rows` full windows within a quarter of the free memory, and at
    least one within half of it.
    """
    model, tokenizer = load(path, dtype, adapters)
    if config.tokens is None:
        window = model.config.max_position_embeddings
        room = max(
            1024,
            min(window, affordable(model, 2, config.choices)),
            min(config.rows * window, affordable(model, 4, config.choices)),
        )
        config = replace(config, tokens=room)
    return Engine(model, stops_of(tokenizer), config, tokenizer), tokenizer


def stops_of(tokenizer: Tokenizer) -> frozenset[int]:
    """Token ids that end an answer. In DeepSeek's format this includes the user mark: small models sometimes continue with it."""
    turns = () if tokenizer.template else (tokenizer.ids[mark] for mark in (USER, ASSISTANT) if mark in tokenizer.ids)
    return frozenset((*tokenizer.stops, *turns))


def adapter_tokenizer(folder: Path, base: Tokenizer) -> Tokenizer:
    """The tokenizer of an adapter's folder with its template and stop tokens, or the base's if the folder has none."""
    if not (folder / "tokenizer.json").is_file():
        return base
    found = Tokenizer(folder)
    if found.vocabulary != base.vocabulary:
        remedy = "Remove tokenizer.json from the folder to use the base's."
        raise UserError("--adapter", str(folder), "its tokenizer.json does not have the vocabulary of its base", remedy)
    return found
