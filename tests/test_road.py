"""The whole road at toy size, its summary, and the samples that RL writes."""

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from finback.config import UserError
from finback.data.messages import Response
from finback.engine.request import Completion
from finback.model.transformer import Transformer
from finback.report import samples
from finback.rollouts.rollouts import Rollout
from finback.runs import recipe as recipes
from finback.runs.files import read_lines
from finback.stages.draft_acceptance import mtp_acceptance
from finback.stages.evaluate import Exam
from finback.tasks.math import Chains
from finback.tasks.task import Problem, Verdict
from tests.road import write_road
from tests.toy import CONFIG, ROOT, finback, finback_process


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished toy road on two ranks with only a loopback interface; summary.txt has its output."""
    folder = tmp_path_factory.mktemp("road")
    wrapper = ("unshare", "-rn", "sh", "-c", 'ip link set lo up && "$@"', "sh") if can_unshare() else ()
    done = finback_process("run", write_road(folder), "--runs", folder / "runs", "--ranks", 2, wrapper=wrapper)
    assert done.returncode == 0, done.stderr
    (folder / "summary.txt").write_text(done.stdout)
    return folder


def can_unshare() -> bool:
    """Whether this system permits a network namespace."""
    return shutil.which("unshare") is not None and not subprocess.run(["unshare", "-rn", "true"]).returncode


def test_two_ranks_need_only_loopback(walked: Path) -> None:
    if not can_unshare():
        pytest.skip("this system does not permit a network namespace")
    assert (walked / "runs/toy/summary.json").is_file()


def test_the_summary_has_a_line_for_every_model(walked: Path) -> None:
    summary = (walked / "summary.txt").read_text()
    lines = summary.splitlines()
    head = next(line for line in lines if line.startswith("model"))
    assert "language" in head and "tokens" in head
    for name in ("zero", "dev2", "on-policy"):
        row = next(line for line in lines if line.startswith(f"{name} ") and "(" in line)
        assert "%" in row
    assert "Rejection sampling 'cold' kept" in summary and "finback chat" in summary
    assert summary.count("max violation") == 1, "the dense student has no router"
    assert "The first problem of the exam 'sums'" in summary


def test_results_say_what_was_learnt_from(walked: Path) -> None:
    stages = json.loads((walked / "runs/toy/summary.json").read_text())["stages"]
    kept = stages["cold"]["results"]
    assert kept["sampled"] == 400 and sum(kept["reasons"].values()) == 400
    assert stages["dev1"]["results"]["lessons_by_source"] == {"cold": kept["kept"]}
    for name in ("dev1", "distilled", "on-policy"):
        assert stages[name]["cost"]["tokens_trained"] == stages[name]["results"]["tokens"] > 0
    metrics = read_lines(walked / "runs/toy/dev2/metrics.jsonl")
    assert {"reward_accuracy", "reward_language", "entropy", "kl", "clip_share", "expert_load", "gap_max"} <= metrics[
        0
    ].keys()
    assert all(m["gap_max"] <= 1e-4 for m in metrics) and all(m["answers"] >= 16 for m in metrics)


def test_samples_are_shown_with_what_they_earned(walked: Path) -> None:
    run = walked / "runs/toy"
    shown = finback("show", run, "--samples", "--count", 1)
    assert shown.returncode == 0, shown.stderr
    for words in ("zero, step 1:", "zero, step 6:", "dev2, step 4:", "advantage", "earned", "before and after"):
        assert words in shown.stdout
    one = finback("show", run, "--samples", "--stage", "dev2", "--step", 2, "--json")
    records = json.loads(one.stdout)["samples"]
    assert {r["stage"] for r in records} == {"dev2"} and {r["step"] for r in records} == {2}
    assert len(records) >= 16


def test_samples_that_are_not_there_are_named(walked: Path, tmp_path: Path) -> None:
    run = walked / "runs/toy"
    with pytest.raises(UserError, match=r"--stage = 'zeor'.*Did you mean 'zero'"):
        samples.find(run, "zeor")
    with pytest.raises(UserError, match=r"--step = 99.*dev2 has 1 to 4"):
        samples.find(run, "dev2", 99)
    with pytest.raises(UserError, match="no RL stage has written any"):
        samples.find(tmp_path)
    refused = finback("show", tmp_path / "nowhere", "--samples")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr


RECIPES = sorted(path.name for path in (ROOT / "recipes").glob("*.py"))


@pytest.mark.parametrize("name", [n for n in RECIPES if n in ("r1.py", "tiny.py")])
def test_recipes_that_start_from_nothing_are_whole(name: str) -> None:
    shown = finback("show", ROOT / "recipes" / name, "--json")
    assert shown.returncode == 0, shown.stderr
    assert json.loads(shown.stdout)["recipe"] == name.removesuffix(".py")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_lacks(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recipes that start from a user's model or file name it in one line if it does not exist."""
    monkeypatch.chdir(tmp_path)
    try:
        recipes.load(ROOT / "recipes" / name)
    except UserError as error:
        assert "input" in error.field, error


def test_a_task_of_ones_own_is_forty_lines_and_runs(walked: Path, tmp_path: Path) -> None:
    source = (ROOT / "recipes/your_task.py").read_text()
    assert len(source.splitlines()) <= 40
    words = ("cat", "dog", "tree", "sun", "rain")
    lines = [json.dumps({"question": f"{a} {b}", "answer": f"{a[::-1]} {b[::-1]}"}) for a in words for b in words] + [
        json.dumps({"question": f"{a} {b} {c}", "answer": "x"}) for a in words for b in words for c in words
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    recipe = tmp_path / "your_task.py"
    recipe.write_text(
        source.replace("problems=20", "problems=8").replace(
            "steps=50, prompts_per_step=16", "steps=2, prompts_per_step=4"
        )
    )
    base = walked / "runs/toy/base"
    settings = [x for stage in ("rl", "before") for x in ("--set", f"{stage}.start={base}")]
    done = finback("run", recipe, "--runs", tmp_path / "runs", "--ranks", 1, *settings)
    assert done.returncode == 0, done.stderr
    assert "held out" in done.stdout


@pytest.mark.slow
def test_adapters_are_taught_by_their_recipe(tmp_path: Path) -> None:
    less = ("base.max_tokens=20000", "base.decay_tokens=4000", "base.warmup_tokens=2000", "rl.steps=2", "rl.patience=0")
    settings = [word for text in less for word in ("--set", text)]
    done = finback("run", ROOT / "recipes/lora.py", "--runs", tmp_path, "--ranks", 1, *settings)
    assert done.returncode == 0, done.stderr
    written = {path.name for path in (tmp_path / "lora/rl").iterdir()}
    assert "adapter_model.safetensors" in written and "model.safetensors" not in written
    assert "sums" in done.stdout


def test_exams_cannot_take_the_names_of_the_stages_own_files() -> None:
    for name in ("config", "manifest", "ledger", "metrics", "samples", "..", " "):
        with pytest.raises(UserError, match=r"exam\.name"):
            Exam(name=name, task=Chains())


def test_drafts_of_a_model_with_two_mtp_depths_are_counted() -> None:
    model = Transformer(replace(CONFIG, num_nextn_predict_layers=2)).initialise(0).eval()
    completion = Completion([5, 6, 7], [0.0] * 3, "stop")
    problem = Problem("?", "1", "?")
    one = Rollout(problem, [1, 2, 3], completion, Response("", "", False, True), Verdict(False, False))
    assert mtp_acceptance(model, [one])[1] == 2
