"""Models in files: one model by three routes says the same, token for token; time and money add up; memory is freed."""

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

from finback.checkpoint.export import export
from finback.comparison import local
from finback.comparison.answer_store import Answer, Failure
from finback.comparison.protocol import EvalRequest, SamplingProtocol
from finback.model.transformer import Transformer
from finback.suites.suite import Suite, SuiteSource
from finback.tasks.task import Problem
from tests.comparing import Sums
from tests.serving import small_tokenizer
from tests.toy import CONFIG

GREEDY = SamplingProtocol(samples=1, temperature=0.0, max_tokens=16)
DIVERSE = SamplingProtocol(samples=3, temperature=1.0, top_p=0.9, max_tokens=16, seed=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights in Hugging Face's form, spread enough that no two answers are alike."""
    words = small_tokenizer()
    config = dataclasses.replace(CONFIG, vocab_size=words.vocab_size, initializer_range=0.3, num_nextn_predict_layers=0)
    path = tmp_path_factory.mktemp("models") / "toy"
    special = {"bos_token_id": words.bos, "eos_token_id": words.eos, "pad_token_id": words.pad}
    export(Transformer(config).initialise(4).eval(), path, "fp32", words.export, special)
    return path


def whales(n: int) -> Suite:
    """Questions of different lengths, some with marks that a user cannot forge."""
    rng, problems = random.Random(7), []
    for i in range(n):
        text = " ".join(rng.choices(["The whale sang.", "4+5=9", "Ärger", "?", "<think>", "\n"], k=rng.randint(1, 9)))
        problems.append(Problem(f"{i}: {text}", "1", f"whale {i}"))
    return Suite("whales", tuple(problems), Sums(), SuiteSource("random words", "MIT", f"{n:064x}"))


def said(found: list[Answer | Failure]) -> dict[tuple[str, int], tuple[str, str, str, int | None, int | None]]:
    assert all(isinstance(a, Answer) for a in found), found
    return {
        (a.question, a.sample): (a.thinking, a.text, a.finish, a.prompt_tokens, a.tokens)
        for a in found
        if isinstance(a, Answer)
    }


def in_process(
    folder: Path, wanted: list[EvalRequest], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Any], dict[str, list[int]]]:
    """Answers of the built-in engine, and their tokens by question."""
    tokens: dict[str, list[int]] = {}
    plain = local._answer
