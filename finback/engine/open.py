"""Opening a model to answer: its weights, its tokenizer, the tokens that end an answer, and the engine for it."""

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

# few requests that come one by one, and that may begin alike
ANSWERING = EngineConfig(rows=32, chunk=512, reuse=True, speculate=True)


def load(
    path: str | Path, dtype: InferenceDtype = "fp32", adapters: Mapping[str, Path] | None = None
) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer at a path: a run, a stage, a Hugging Face folder or a GGUF file.

    A model in fp32 can be trained. The others only answer, laid out as this machine reads them fastest, and so does one
    with the adapters of some folders, by name, of which each request may have its own.
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
    """An engine that answers with the model at a path, and its tokenizer; adapters as for `load`.

    Unless `config` says how large it is, the cache has room for `rows` whole windows, as far as a quarter of the free
    memory takes them, and for one, as far as half of it does.
    """
    model, tokenizer = load(path, dtype, adapters)
    if config.tokens is None:
        window = model.config.max_position_embeddings
        room = max(1024, min(window, affordable(model, 2)), min(config.rows * window, affordable(model, 4)))
        config = replace(config, tokens=room)
    return Engine(model, stops_of(tokenizer), config, tokenizer), tokenizer


def stops_of(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end an answer. In DeepSeek's form the mark of a new turn does too: a small model sometimes goes on with it."""
    turns = () if tokenizer.template else (tokenizer.ids[mark] for mark in (USER, ASSISTANT) if mark in tokenizer.ids)
    return frozenset((*tokenizer.stops, *turns))


def adapter_tokenizer(folder: Path, base: Tokenizer) -> Tokenizer:
    """The tokenizer of an adapter in a folder: its own, with its template and stops, or its base's where it brings none."""
    if not (folder / "tokenizer.json").is_file():
        return base
    found = Tokenizer(folder)
    if found.vocabulary != base.vocabulary:
        remedy = "Take tokenizer.json out of the folder to have the base's."
        raise UserError("--adapter", str(folder), "its tokenizer.json has another vocabulary than its base's", remedy)
    return found
