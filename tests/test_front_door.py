"""The names of `import finback`: fast to import, independent of import order, with the verbs as plain functions."""

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import finback
from finback.checkpoint import models
from finback.config import UserError
from finback.data import tokenizer
from finback.runs.folder import Interrupted, StageRun
from finback.runs.recipe import Stage, load
from tests.toy import WORDS, environment, toy_model, write_recipe

CELL = """
import runpy
import finback

stages = runpy.run_path("toy.py")["recipe"][:2]
small = ["base.max_tokens=512", "base.decay_tokens=256", "base.warmup_tokens=256"]
done = finback.run(stages, "runs", name="cell", settings=small)
assert finback.run(stages, "runs", name="cell", settings=small) == done
llm = finback.LLM("runs/cell")
answer = llm.chat("1+2=?", finback.SamplingParams(0.0, max_tokens=8))
assert str(answer) == answer.text and len(answer.tokens) == len(answer.logprobs)
asked = dict(sampling_params=finback.SamplingParams(1.0, max_tokens=8), think=True, seed=3)
pieces = list(llm.stream([{"role": "user", "content": "1+2=?"}], **asked))
assert pieces[0] == "<think>" and llm.chat("1+2=?", **asked).reasoning in "".join(pieces)
first, second = llm.generate(["1+", "1+"], finback.SamplingParams(1.0, max_tokens=6))
(alone,) = llm.generate("1+", finback.SamplingParams(1.0, max_tokens=6), seed=1)
assert alone.tokens == second.tokens != first.tokens, "the same seed, whatever else is answered"
assert max(abs(a - b) for a, b in zip(alone.logprobs, second.logprobs, strict=True)) < 1e-4
model, tokenizer = finback.load("runs/cell")
assert model.config.vocab_size == tokenizer.vocab_size == 320 and model.embed.requires_grad
print(done)
"""


def python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs code that is not in a file, like a notebook's."""
    command = [sys.executable, "-"]
    return subprocess.run(
        command, input=code, cwd=folder, env=environment(), capture_output=True, text=True, timeout=600
    )


def test_a_cell_trains_two_steps_and_asks_the_model(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    done = python(f"exec({CELL!r})", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout and "base" in done.stdout
    lines = (tmp_path / "runs/cell/base/metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if "loss" in json.loads(line)]) == 2


def test_names_are_the_same_whatever_was_imported_before(tmp_path: Path) -> None:
    """A submodule with the name of a function would replace it on the package as soon as it is imported."""
    code = """
import sys, types, finback
assert "torch" not in sys.modules and set(finback.__all__) < set(dir(finback))
before = {name: getattr(finback, name) for name in finback.__all__}
import finback.cli, finback.planner.command, finback.comparison.compare, finback.runs.recipe
for name, value in before.items():
    assert getattr(finback, name) is value and callable(value) and not isinstance(value, types.ModuleType), name
"""
    first = python(code, tmp_path)
    assert first.returncode == 0, first.stderr
    second = python(f"import finback.cli, finback.planner, finback.comparison, finback.runs\n{code}", tmp_path)
    assert second.returncode == 0, second.stderr
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        finback.trainer  # noqa: B018


@dataclass(frozen=True, kw_only=True)
class Pressed(Stage):
    """Sends Ctrl-C to its own process on the first run."""

    def run(self, run: StageRun) -> dict[str, Any]:
        seen = run.folder / "seen"
        if not seen.exists():
            seen.touch()
            signal.raise_signal(signal.SIGINT)
            if run.check_stop():
                raise Interrupted
        return {"done": True}


def test_ctrl_c_stops_at_a_safe_point_and_the_same_call_continues(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="the same call continues"):
        finback.run([Pressed(name="pressed")], tmp_path)
    assert signal.getsignal(signal.SIGINT) is before and not (tmp_path / "recipe/summary.json").exists()
    assert finback.run([Pressed(name="pressed")], tmp_path)["stages"]["pressed"]["results"] == {"done": True}


def test_stages_are_planned_and_several_ranks_need_a_file(tmp_path: Path) -> None:
    stages = load(write_recipe(tmp_path)).stages
    planned = finback.plan(stages, on="h100:1")
    assert str(planned) == finback.plan(str(tmp_path / "toy.py"), on="h100:1").text.replace("toy", "recipe")
    assert finback.plan("tiny", on="h100:1")["model"]["name"] == "tiny"
    with pytest.raises(UserError, match="recipe file"):
        finback.run(list(stages), tmp_path, ranks=2)
    with pytest.raises(UserError, match="no model named"):
        finback.compare(tasks=["gsm8k"])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda path: finback.plan("tiny", rowz=1), r"rowz = 'given': no such option\. Did you mean 'rows'"),
        (lambda path: finback.compare("m", tasks="gsm8k", problem=1), "Did you mean 'problems'"),
        (lambda path: finback.run(["x"], path), "recipe = 'x': not a stage"),
        (lambda path: finback.run([Pressed(name="a")], path, name="../x"), "name = '../x'"),
        (lambda path: finback.run([Pressed(name="a")], path, settings="a.name"), "--set = 'a.name'"),
        (lambda path: finback.run([Pressed(name="a")], path, ranks=-1), "ranks = -1"),
        (lambda path: finback.load(path, dtype="fp99"), "dtype = 'fp99'"),
        (lambda path: finback.LLM(path).generate([1]), "prompts = 1: neither a text nor a list of token ids"),
        (lambda path: finback.LLM(path).generate(1), "prompts = 1: neither a text"),
        (lambda path: finback.LLM(path).generate([["a"]]), "prompts = .'a'.: neither a text"),
    ],
)
def test_what_python_asks_wrongly_is_named(call: Any, words: str, tmp_path: Path) -> None:
    models.save(tmp_path, toy_model())
    tokenizer.train([WORDS], 320, tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=words):
        call(tmp_path)
