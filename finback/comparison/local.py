"""A contestant in files, answered by the built-in engine with as many questions in a batch as the cache holds."""

import functools
import gc
import hashlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from finback import __version__
from finback.checkpoint.inference import InferenceDtype
from finback.comparison.contestant import Answer, Failure, Price, parse_answer
from finback.comparison.protocol import EvalRequest, SamplingProtocol
from finback.data.messages import encode_prompt
from finback.data.openai_messages import read_messages
from finback.data.tokenizer import Tokenizer
from finback.engine.engine import Engine
from finback.engine.open import ANSWERING, load, open_engine
from finback.engine.request import Request, SamplingParams
from finback.engine.sampler import without_thinking
from finback.model.transformer import Transformer
from finback.runs import adapters
from finback.runs.ledger import DOLLARS_PER_CORE_HOUR
from finback.runs.provenance import sha256
from finback.suites import likelihood
from finback.suites.compression import measure
from finback.suites.suite import Suite

# the files that a model's answers depend on, in folders of stages and of Hugging Face
PATTERNS = (
    *("*.safetensors", "*.safetensors.index.json", "model.json", "config.json", adapters.CONFIG_FILE),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"),
)


@dataclass
class Local:
    """A stage's folder, a Hugging Face folder or a GGUF file; its model is in memory only while it answers."""

    path: Path
    name: str
    dtype: InferenceDtype = "auto"
    rows: int = 32
    price: Price = field(default_factory=Price)

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """The digest of the model's files, the dtype, the device and the versions that compute its answers."""
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        versions = {"finback": __version__, "torch": torch.__version__}
        return {"sha256": digest_of(self.path), "dtype": self.dtype, "device": device, **versions}

    def answers(self, asks: Sequence[EvalRequest], rules: SamplingProtocol) -> Iterator[Answer | Failure]:
        """Yields answers in order of completion; the model leaves memory when the iterator ends."""
        scored = [ask for ask in asks if ask.suite.continuations]
        if scored:
            yield from _likeliest(*load(self.path, self.dtype), scored)
        asks = [ask for ask in asks if not ask.suite.continuations]
        if not asks:
            return
        config = replace(ANSWERING, rows=self.rows, chunk=2048)
        engine, tokenizer = open_engine(self.path, self.dtype, config)
        prompts = [encode_prompt(read_messages(ask.messages), tokenizer, think=rules.think) for ask in asks]
        try:
            yield from _answers(engine, tokenizer, asks, prompts, rules)
        finally:
            del engine
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def compress(self, texts: Sequence[Suite]) -> list[float]:
        """Bits per byte of each suite's text."""
        model, tokenizer = load(self.path, self.dtype)
        return [measure(model, tokenizer, suite).bits_per_byte for suite in texts]


def _likeliest(model: Transformer, tokenizer: Tokenizer, asks: Sequence[EvalRequest]) -> Iterator[Answer]:
    """The letter of the likeliest choice for each question."""
    for ask in asks:
        problem, began = ask.suite.problems[ask.place], time.perf_counter()
        found = likelihood.measure(model, tokenizer, problem.question, ask.suite.continuations[problem.key])
        spent = time.perf_counter() - began
        cost: dict[str, Any] = {
            "prompt_tokens": found.prompt_tokens,
            "tokens": found.tokens,
            "seconds": spent,
            "busy": spent,
        }
        yield parse_answer(ask, found.letter, finish="stop", **cost)


def _answers(
    engine: Engine,
    tokenizer: Tokenizer,
    asks: Sequence[EvalRequest],
    prompts: Sequence[tuple[list[int], bool]],
    rules: SamplingProtocol,
) -> Iterator[Answer | Failure]:
    """Yields answers in order of completion. A step's seconds are split evenly over its batch, so they sum to the total."""
    window = engine.capacity
    left = deque(zip(asks, prompts, strict=True))
    under_way: dict[Request, tuple[EvalRequest, bool]] = {}
    busy: dict[Request, float] = {}
    try:
        while left or under_way:
            while left and len(under_way) < 2 * engine.config.rows:  # keeps one full batch waiting in the engine
                ask, (ids, opened) = left.popleft()
                room = min(rules.max_tokens, window - len(ids))
                if room < 1:
                    yield Failure(ask, f"the question has {len(ids)} tokens, and the model's window is {window}")
                    continue
                sampling = SamplingParams(rules.temperature, room, top_p=rules.top_p, stop=ask.suite.stop)
                if rules.think is False:
                    sampling = without_thinking(sampling, tokenizer)
                row = engine.submit(ids, sampling, ask.seed, thinking=opened)
                under_way[row], busy[row] = (ask, opened), 0.0
            began = time.perf_counter()
            engine.step()
            spent = time.perf_counter() - began
            at_work = [row for row in under_way if row.started]
            for row in at_work:
                busy[row] += spent / len(at_work)
            for row in [row for row in at_work if row.finish_reason is not None]:
                ask, opened = under_way.pop(row)
                cost: dict[str, Any] = {"prompt_tokens": len(row.prompt), "tokens": len(row.tokens)}
                cost |= {"seconds": row.last - row.started, "busy": busy.pop(row)}
                yield parse_answer(ask, row.text, opened=opened, finish=row.finish_reason, **cost)
    finally:
        for row in under_way:
            engine.cancel(row)


def digest_of(path: Path) -> str:
    """The SHA-256 of a model's files and their names; an adapter's digest includes its base."""
    base, adapter = adapters.places(path)
    if adapter is not None:
        return hashlib.sha256(f"{digest_of(base)} {_digest(adapter)}".encode()).hexdigest()
    return _digest(path)


def _digest(path: Path) -> str:
    files = [path] if path.is_file() else sorted({f for p in PATTERNS for f in path.glob(p)})
    if (path / "model.json").is_file():  # config.json then holds the stage's knobs, which do not affect answers
        files = [file for file in files if file.name != "config.json"]
    whole = hashlib.sha256()
    for file in files:
        whole.update(f"{file.name} {sha256(file)}\n".encode())
    return whole.hexdigest()


def price_here(per_hour: float | None) -> Price:
    """The price of this machine per hour: `per_hour`, else an estimate by cores; not provided on a GPU."""
    if per_hour is not None:
        return Price(per_hour=per_hour, basis=f"${per_hour:g} per hour of this machine, as given")
    if torch.cuda.is_available():  # GPU prices differ between providers by more than a factor of ten
        return Price(basis="NOT PROVIDED: pass the machine's price per hour as --price-hour")
    cores = torch.get_num_threads()
    basis = f"estimate: {cores} cores at ${DOLLARS_PER_CORE_HOUR:g} per core-hour; nothing was metered"
    return Price(per_hour=cores * DOLLARS_PER_CORE_HOUR, basis=basis)
