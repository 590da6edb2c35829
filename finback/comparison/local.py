"""A model in files, answered by the built-in engine: as many questions at a time as the cache holds."""

import gc
import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from finback import __version__
from finback.checkpoint import model as models
from finback.checkpoint.model import Answering
from finback.comparison.answer_store import Answer, Failure
from finback.comparison.contestant import Price
from finback.comparison.protocol import EvalRequest, SamplingProtocol
from finback.data.dialogue import dialogue
from finback.data.tokenizer import ASSISTANT, THINK, USER, Tokenizer
from finback.engine.engine import Engine, affordable
from finback.model.cache import PAGE
from finback.model.transformer import Transformer
from finback.suites.compression import measure
from finback.suites.suite import Suite

# what a model's answers depend on, in the folders of stages and in Hugging Face's
PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "model.json",
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass
class Local:
    """A stage's folder, a Hugging Face folder, or a GGUF file; it is in memory only while it answers."""

    path: Path
    name: str
    dtype: Answering = "auto"
    rows: int = 32
    price: Price = field(default_factory=Price)
    _files: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        """The digest of its files, and what computes."""
        self._files = self._files or digest_of(self.path)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return {
            "sha256": self._files,
            "dtype": self.dtype,
            "device": device,
            "finback": __version__,
            "torch": torch.__version__,
        }

    def answers(self, asks: Sequence[EvalRequest], rules: SamplingProtocol) -> Iterator[Answer | Failure]:
        """As they are whole; the model is gone from memory when the iterator ends."""
        if not asks:
            return
        tokenizer = Tokenizer(self.path)
        model = models.load_to_answer(self.path, self.dtype)
        prompts = [dialogue(list(ask.messages), tokenizer, think=rules.think) for ask in asks]
        engine = self._engine(model, tokenizer, max(len(ids) for ids, _ in prompts) + rules.max_tokens)
        try:
            yield from _answers(engine, tokenizer, asks, prompts, rules)
        finally:
            del engine, model
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def compress(self, texts: Sequence[Suite]) -> list[float]:
        """Bits per byte of each suite's text."""
        tokenizer, model = Tokenizer(self.path), models.load_to_answer(self.path, self.dtype)
        return [measure(model, tokenizer, suite).bits_per_byte for suite in texts]

    def _engine(self, model: Transformer, tokenizer: Tokenizer, longest: int) -> Engine:
        # a mark of a new turn ends this one, as it does where the model is served
        turns = [] if tokenizer.template else [tokenizer.ids.get(t, -1) for t in (USER, ASSISTANT)]
        longest = min(longest, model.config.max_position_embeddings) + 2 * PAGE
        room = max(longest, min(self.rows * longest, affordable(model, 4)))
        return Engine(
            model,
            (*tokenizer.stops, *turns),
            self.rows,
            tokenizer=tokenizer,
            tokens=room,
            chunk=2048,
            reuse=True,
            speculate=True,
        )


def _answers(
    engine: Engine,
    tokenizer: Tokenizer,
    asks: Sequence[EvalRequest],
    prompts: Sequence[tuple[list[int], bool]],
    rules: SamplingProtocol,
) -> Iterator[Answer | Failure]:
    """Answers as they end. A step's seconds are shared by those that were in the batch, so shares sum to the whole."""
    window = min(engine.model.config.max_position_embeddings, engine.pages.count * PAGE)
    mark = tokenizer.ids.get(THINK)
    banned = ((mark, -math.inf),) if rules.think is False and mark is not None else ()
    left = deque(zip(asks, prompts, strict=True))
