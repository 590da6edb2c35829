"""Opening a model to answer: its weights, its tokenizer, the tokens that end an answer, and the engine for it."""

from dataclasses import replace
from pathlib import Path

from finback.checkpoint.inference import InferenceDtype, load_for_inference
from finback.checkpoint.models import find_model
from finback.data.tokenizer import ASSISTANT, USER, Tokenizer
from finback.engine.engine import Engine, EngineConfig, affordable
from finback.model.transformer import Transformer

# few requests that come one by one, and that may begin alike
ANSWERING = EngineConfig(rows=32, chunk=512, reuse=True, speculate=True)


def load(path: str | Path, dtype: InferenceDtype = "fp32") -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer at a path: a run, a stage, a Hugging Face folder or a GGUF file.

    A model in fp32 can be trained. The others only answer, laid out as this machine reads them fastest.
    """
    found = find_model(Path(path))
    tokenizer = Tokenizer(found)
    return load_for_inference(found, dtype), tokenizer


def open_engine(
    path: str | Path, dtype: InferenceDtype = "auto", config: EngineConfig = ANSWERING
) -> tuple[Engine, Tokenizer]:
    """An engine that answers with the model at a path, and its tokenizer.

    Unless `config` says how large it is, the cache has room for `rows` whole windows, as far as a quarter of the free
    memory takes them, and for one, as far as half of it does.
    """
    model, tokenizer = load(path, dtype)
    if config.tokens is None:
        window = model.config.max_position_embeddings
        room = max(1024, min(window, affordable(model, 2)), min(config.rows * window, affordable(model, 4)))
        config = replace(config, tokens=room)
    # In DeepSeek's form the mark of a new turn ends an answer too: a small model sometimes goes on with the next turn.
    turns = () if tokenizer.template else (tokenizer.ids[mark] for mark in (USER, ASSISTANT) if mark in tokenizer.ids)
    return Engine(model, (*tokenizer.stops, *turns), config, tokenizer), tokenizer
