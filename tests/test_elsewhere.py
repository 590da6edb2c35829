"""Stages on a device other than the CPU: all tensors are on the model's device, and results equal the CPU's."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finback.data.sources import Files
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.runs.files import read_json, read_lines
from finback.runs.recipe import Recipe, Stage, execute
from finback.stages.distill import Distill
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.stages.prepare import Prepare, TaskText
from finback.stages.pretrain import Pretrain
from finback.stages.sft import SFT
from finback.suites import compression
from finback.tasks.math import Chains
from finback.train.correction import Correction
from finback.train.grpo_loss import Objective
from tests.elsewhere import DEVICE, elsewhere
from tests.serving import small_tokenizer
from tests.toy import CONFIG, WORDS
from tests.tuned import TIMED

CHAINS = Chains(2, 3)
TALK = TaskText(name="talk", tasks=(CHAINS,), documents=40)
STAGES: tuple[Stage, ...] = (
    Pretrain(
        name="base",
        data="prepare",
        model=CONFIG,
        mixture={"words": 1.0},
        batch_size=4,
        seq_len=32,
        max_tokens=512,
        decay_tokens=128,
        warmup_tokens=128,
        compute="fp32",
        checkpoint_steps=2,
        ema_decay=0.5,
        recompute="block",
    ),
    Pretrain(
        name="whole",
        data="prepare",
        start="base",
        mixture={"words": 1.0},
        batch_size=4,
        seq_len=32,
        max_tokens=384,
        decay_tokens=128,
        warmup_tokens=128,
        compute="fp32",
        packing="best_fit",
        document_mask=True,
        optimizer="adamw",
    ),
    GRPO(
        name="zero",
        start="whole",
        task=CHAINS,
        steps=2,
        prompts_per_step=2,
        num_generations=4,
        max_tokens=8,
        resample=1,
        objective=Objective(beta=0.01, correction=Correction(mode="token_truncate")),
        bias_speed=0.001,
        max_gap=1e-4,
    ),
    SFT(name="taught", start="whole", text=(TALK,), batch_size=4, seq_len=64, epochs=1),
    Distill(name="like", start="base", teacher="taught", text=(TALK,), batch_size=4, seq_len=64, epochs=1),
    Evaluate(
        name="exam",
        start="like",
        exams=(Exam(name="sums", task=CHAINS, problems=6, max_tokens=8),),
        data="prepare",
        sources=("words",),
    ),
)


def numbers(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Returns every stage's log, without values that depend on time."""
    return {
        stage.name: [
            {k: v for k, v in line.items() if k not in TIMED and isinstance(v, float | int)}
            for line in read_lines(root / stage.name / "metrics.jsonl")
        ]
        for stage in STAGES[:-1]
    }


def test_everything_lies_where_the_model_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "words.txt").write_text(WORDS, encoding="utf-8")
    text = (Files((str(tmp_path / "words.txt"),), name="words"),)
    prepare = Prepare(name="prepare", text=text, tasks=(TALK,), vocab_size=320)
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    here, there = tmp_path / "here", tmp_path / "there"
    execute(Recipe("toy", (prepare, *STAGES)), here, 0, World(device=torch.device("cpu")), lambda _: None, True)
    execute(Recipe("toy", (prepare,)), there, 0, World(), lambda _: None, quiet=True)
    with elsewhere(monkeypatch):
        execute(Recipe("toy", (prepare, *STAGES)), there, 0, World(device=DEVICE), lambda _: None, True)
    for stage, lines in numbers(here).items():
        others = numbers(there)[stage]
        assert len(lines) == len(others) > 0, stage
        for line, other in zip(lines, others, strict=True):
            assert other == pytest.approx(line, rel=2e-3, abs=1e-4), stage
    bits = [read_json(root / "exam" / "manifest.json")["results"]["bits_per_byte"]["words"] for root in (here, there)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-3)


@pytest.mark.slow
def test_text_is_measured_where_the_model_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = small_tokenizer()
    suite = compression.load("", 3, 0)
    model = Transformer(replace(CONFIG, vocab_size=words.vocab_size)).initialise(0)
    here = compression.measure(model, words, suite)
    with elsewhere(monkeypatch) as device:
        there = compression.measure(model.to(device), words, suite)
    assert there.tokens == here.tokens and there.bits == pytest.approx(here.bits, rel=1e-4)


def test_what_lies_apart_may_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    with elsewhere(monkeypatch) as device:
        there = torch.ones(3).to(device)
        with pytest.raises(RuntimeError, match="meets one on another device"):
            there + torch.ones(3)
        assert (there + 1).cpu().tolist() == [2.0, 2.0, 2.0] == (there + torch.tensor(1.0)).tolist()
