"""A pre-training stage whose model lies on several ranks: the same losses, resumed anywhere, a model like any other."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from finback.config import UserError
from finback.parallel.layout import Layout
from finback.parallel.mesh import World
from finback.runs import recipe as recipes
from finback.runs.files import read_json, read_lines
from finback.runs.folder import StageRun
from finback.stages.pretrain import Pretrain, Probe
from finback.tasks.math import Chains
from finback.train.rates import Phase
from tests.toy import CONFIG, WORDS, finback_process

RECIPE = """
from pathlib import Path
from finback.data.sources import Files
from finback.parallel.layout import Layout
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.prepare import Prepare
from finback.stages.pretrain import Pretrain
from finback.tasks.math import Chains
from finback.train.rates import Phase
from tests.toy import CONFIG

recipe = [
    Prepare(name="prepare", text=(Files((str(Path(__file__).parent / "words.txt"),), name="words"),), vocab_size=320),
    Pretrain(name="base", data="prepare", model=CONFIG, mixture={"words": 1.0}, batch_size=8, seq_len=16, compute="fp32",
             phases=(Phase(512, 0.0, 1.0), Phase(2048)), checkpoint_steps=6, layout=LAYOUT),
    Evaluate(name="after", start="base", exams=(Exam(name="sums", task=Chains(2, 3), problems=8, max_tokens=4),)),
]
"""


def write(folder: Path, name: str, layout: str) -> Path:
    """A recipe with a layout, and its text."""
    (folder / "words.txt").write_text(WORDS, encoding="utf-8")
    path = folder / f"{name}.py"
    path.write_text(RECIPE.replace("LAYOUT", layout), encoding="utf-8")
    return path


def run(folder: Path, name: str, layout: str) -> list[dict[str, Any]]:
    """Its metrics, on two ranks."""
    done = finback_process("run", write(folder, name, layout), "--runs", folder / "runs", "--ranks", 2)
    assert done.returncode == 0, done.stderr
    return read_lines(folder / "runs" / name / "base" / "metrics.jsonl")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The losses of the whole model on one rank, in this process."""
    folder = tmp_path_factory.mktemp("many")
    recipe, root = recipes.load(write(folder, "plain", "None")), folder / "runs/plain"
    root.mkdir(parents=True)
    recipes.execute(recipe, root, 0, World(), lambda run: None, quiet=True)
    return folder, [r["loss"] for r in read_lines(root / "base" / "metrics.jsonl")]


LAYOUTS = {
    "experts": "Layout(dp=2, ep=2)",
    "shared": "Layout(dp=2)",
    "zero1": 'Layout(dp=2, sharding="zero1")',
    "piped": "Layout(pp=2, micro_batches=2)",
}


@pytest.mark.parametrize(
    "name", ["experts", *(pytest.param(n, marks=pytest.mark.slow) for n in ("shared", "zero1", "piped"))]
)
def test_a_layout_trains_as_whole_copies_do(name: str, plain: tuple[Path, list[float]]) -> None:
    folder, losses = plain
    log = run(folder, name, LAYOUTS[name])
    assert len(log) == 20 and [r["loss"] for r in log] == pytest.approx(losses, abs=1e-5)
    stage = folder / "runs" / name / "base"
    assert (stage / "model.safetensors").is_file() and not (stage / "sharded").exists()
    bits = [
        read_json(folder / "runs" / n / "base/manifest.json")["results"]["bits_per_byte"]["words"]
        for n in (name, "plain")
    ]
    assert bits[0] == pytest.approx(bits[1], abs=1e-4)
    exams = [(folder / "runs" / n / "after/sums.jsonl").read_text() for n in (name, "plain")]
    assert [json.loads(line)["question"] for line in exams[0].splitlines()]


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_shards(plain: tuple[Path, list[float]]) -> None:
    """Stopped in the middle by a limit that is then lifted, gone on with under the same layout."""
    folder, losses = plain
    import subprocess
    import sys
    import time

    from tests.toy import environment

    path = folder / "killed.py"
    (folder / "killed.py").write_text(RECIPE.replace("LAYOUT", LAYOUTS["experts"]), encoding="utf-8")
    command = [sys.executable, "-m", "finback", "run", str(path), "--runs", str(folder / "runs"), "--ranks", "2"]
    child = subprocess.Popen(
        command, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    shards = folder / "runs/killed/base/sharded"
    while not list(shards.glob("step-*/manifest.json")) and child.poll() is None:
        time.sleep(0.01)
    child.kill()
    child.wait()
    time.sleep(1)  # its ranks follow it
    log = run(folder, "killed", LAYOUTS["experts"])
    assert [r["loss"] for r in log] == pytest.approx(losses, abs=1e-5)


def stage(**knobs: Any) -> Pretrain:
    settings = {
        "name": "base",
        "data": "prepare",
        "model": CONFIG,
        "mixture": {"words": 1.0},
        "compute": "fp32",
        "phases": (Phase(512),),
        "layout": Layout(dp=2),
    }
    return Pretrain(**settings | knobs)


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"ema_decay": 0.9}, r"base\.ema_decay = 0\.9: wants the whole model"),
        ({"phases": (), "probe": Probe(Chains(2, 3), 0.5)}, r"base\.probe"),
        ({"compute": "fp8"}, r"base\.compute = 'fp8'"),
    ],
)
def test_what_a_layout_cannot_serve_is_named(knobs: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        stage(**knobs)


def test_a_layout_wants_its_ranks(tmp_path: Path, plain: tuple[Path, list[float]]) -> None:
    folder, _ = plain
    root = folder / "runs" / "plain"
    alone = StageRun(root, "alone", 0, World(), quiet=True)
    with pytest.raises(UserError, match=r"base\.layout = .*needs ranks that communicate"):
        stage().run(alone)
    assert dataclasses.replace(stage(), layout=None).layout is None


@pytest.mark.slow
def test_a_layout_of_other_ranks_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "wrong", "Layout(dp=4)")
    refused = finback_process("run", path, "--runs", tmp_path / "runs", "--ranks", 2)
    assert refused.returncode == 2 and "pp x dp is 4, but there are 2 ranks" in refused.stderr
