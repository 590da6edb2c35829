"""A pre-training stage on several ranks: the same losses, resumed at any step, and a model like any other."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from finback.checkpoint import models
from finback.config import UserError
from finback.model.logprobs import text_logprobs
from finback.model.moe import router_buffers
from finback.parallel.layout import Layout
from finback.parallel.mesh import World
from finback.runs import recipe as recipes
from finback.runs.files import read_json, read_lines
from finback.runs.folder import Interrupted, StageRun
from finback.stages.pretrain import Pretrain, Probe
from finback.stages.pretrain_setup import set_up
from finback.tasks.math import Chains
from finback.train.rates import Phase
from finback.train.sharded_trainer import ShardedTrainer
from tests.many import on_ranks
from tests.toy import CONFIG, WORDS, finback_process

RECIPE = """
from dataclasses import replace
from pathlib import Path
from finback.data.sources import Files
from finback.parallel.layout import Layout
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.prepare import Prepare
from finback.stages.pretrain import Pretrain, Probe
from finback.tasks.math import Chains
from finback.train.rates import Phase
from finback.train.sharded_trainer import ShardedTrainer
from tests.toy import CONFIG

recipe = [
    Prepare(name="prepare", text=(Files((str(Path(__file__).parent / "words.txt"),), name="words"),), vocab_size=320),
    Pretrain(name="base", data="prepare", model=replace(CONFIG, num_hidden_layers=3), mixture={"words": 1.0},
             batch_size=8, seq_len=16, compute="fp32",
             KNOBS, checkpoint_steps=6, layout=LAYOUT),
    Evaluate(name="after", start="base", exams=(Exam(name="sums", task=Chains(2, 3), problems=8, max_tokens=4),)),
]
"""


PHASES = "phases=(Phase(512, 0.0, 1.0), Phase(2048))"
# features that need more of a model than its loss and gradients
EVERYTHING = """max_tokens=1920, decay_tokens=320, warmup_tokens=512, batch_size_start=4, ramp_tokens=1280, packing="best_fit",
    document_mask=True, optimizer="adamw", adam_lr=3e-3, ema_decay=0.5, valid_tokens=640, keep_best=True,
    probe=Probe(task=Chains(2, 3), at_least=0.9, problems=5, every_tokens=640, max_tokens=6)"""
# losses that hardly change: any above their mean counts as a spike
SPIKES = """max_tokens=4480, decay_tokens=640, warmup_tokens=512, batch_size_start=4, ramp_tokens=1280, packing="best_fit",
    document_mask=True, optimizer="adamw", adam_lr=1e-6, spike_sigma=0.01, spike_patience=2"""
KNOBS = {"everything": EVERYTHING, "spikes": SPIKES}


def write(folder: Path, name: str, layout: str, knobs: str = PHASES) -> Path:
    """Writes a recipe with a layout, and its text."""
    (folder / "words.txt").write_text(WORDS, encoding="utf-8")
    path = folder / f"{name}.py"
    path.write_text(RECIPE.replace("LAYOUT", layout).replace("KNOBS", knobs), encoding="utf-8")
    return path


def run(folder: Path, name: str, layout: str, knobs: str = PHASES) -> list[dict[str, Any]]:
    """The metrics of a run on two ranks."""
    done = finback_process("run", write(folder, name, layout, knobs), "--runs", folder / "runs", "--ranks", 2)
    assert done.returncode == 0, done.stderr
    return read_lines(folder / "runs" / name / "base" / "metrics.jsonl")


def run_plainly(folder: Path, name: str, knobs: str) -> list[dict[str, Any]]:
    """The metrics of the whole model on one rank, in this process."""
    recipe, root = recipes.load(write(folder, name, "None", knobs)), folder / "runs" / name
    root.mkdir(parents=True)
    recipes.execute(recipe, root, 0, World(), lambda run: None, quiet=True)
    return read_lines(root / "base" / "metrics.jsonl")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    """The losses of the whole model on one rank, in this process."""
    folder = tmp_path_factory.mktemp("many")
    return folder, [r["loss"] for r in run_plainly(folder, "plain", PHASES)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[dict[str, Any]]]]:
    """The folder and metrics of one rank trained with named knobs."""

    @cache
    def trained(knobs: str) -> tuple[Path, list[dict[str, Any]]]:
        folder = tmp_path_factory.mktemp(knobs)
        return folder, run_plainly(folder, "whole", KNOBS[knobs])

    return trained


LAYOUTS = {
    "experts": "Layout(dp=2, ep=2)",
    "shared": "Layout(dp=2)",
    "zero1": 'Layout(dp=2, sharding="zero1")',
    "piped": "Layout(pp=2, micro_batches=2)",
    "both": 'Layout(pp=2, micro_batches=4, schedule="zbv", sharding="zero1")',
    "context": "Layout(cp=2, ep=2)",
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) for n in ("experts", "shared", "zero1", "piped", "context")]
)
def test_a_layout_trains_as_whole_copies_do(name: str, plain: tuple[Path, list[float]]) -> None:
    folder, losses = plain
    log = run(folder, name, LAYOUTS[name])
    assert len(log) == 20 and [r["loss"] for r in log] == pytest.approx(losses, abs=1e-5)
    stage = folder / "runs" / name / "base"
    assert (stage / "model.safetensors.index.json").is_file() and not (stage / "sharded").exists()
    bits = [
        read_json(folder / "runs" / n / "base/manifest.json")["results"]["bits_per_byte"]["words"]
        for n in (name, "plain")
    ]
    assert bits[0] == pytest.approx(bits[1], abs=1e-4)
    exams = [(folder / "runs" / n / "after/sums.jsonl").read_text() for n in (name, "plain")]
    assert [json.loads(line)["question"] for line in exams[0].splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["experts", "zero1", "piped"])
@pytest.mark.parametrize("config", ["V4_MANY", "SPARSE_MANY"])
def test_sparse_attention_trains_with_its_indexers(
    config: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """V4 and V3.2, whose indexers train along; the exported model equals one rank's.

    Ten steps only: later, rounding decides between nearly equal scores.
    """
    recipe = RECIPE.replace("tests.toy import CONFIG", f"tests.many import {config} as CONFIG")
    monkeypatch.setattr("tests.test_sharded.RECIPE", recipe.replace(", num_hidden_layers=3", ""))
    phases = PHASES.replace("2048", "768")
    expected = run_plainly(tmp_path, "plain", phases)
    found = run(tmp_path, name, LAYOUTS[name], phases)
    for key in ("loss", "mtp_loss", "grad_norm"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], abs=1e-5), key
    one, many = (models.load(tmp_path / "runs" / n / "base") for n in ("plain", name))
    tables = router_buffers(one)
    assert tables and all(torch.equal(table, router_buffers(many)[n]) for n, table in tables.items())
    tokens = torch.arange(2 * 24).view(2, 24)
    torch.testing.assert_close(text_logprobs(one, tokens), text_logprobs(many, tokens), atol=1e-3, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("knobs", KNOBS)
def test_a_layout_refuses_nothing_that_one_rank_can_do(knobs: str, name: str, whole: Any) -> None:
    """Ramp, document mask, AdamW, averages, validation, best model, probes; spikes and rewinds: all log lines equal."""
    folder, expected = whole(knobs)
    found = run(folder, name, LAYOUTS[name], KNOBS[knobs])
    timed = ("seconds", "tokens_per_second", "mfu")
    assert len(found) == len(expected)
    for line, one in zip(found, expected, strict=True):
        assert line.keys() == one.keys()
        for key in line.keys() - set(timed):
            assert line[key] == (one[key] if isinstance(one[key], str) else pytest.approx(one[key], abs=2e-5)), key
    seen = {"probe", "bits_per_byte_words"} if knobs == "everything" else {"skipped", "rewound_from"}
    assert seen <= {key for line in found for key in line}
    routers = [read_lines(folder / "runs" / n / "base/router.jsonl") for n in (name, "whole")]
    assert routers[0] == routers[1] and routers[0], "the routers of all layers must be logged"
    a, b = (read_json(folder / "runs" / n / "base/manifest.json")["results"] for n in (name, "whole"))
    assert (a["skipped_steps"], a["rewinds"]) == (b["skipped_steps"], b["rewinds"])
    assert a["bits_per_byte"]["words"] == pytest.approx(b["bits_per_byte"]["words"], abs=1e-5)
    for part in ("", "average", "best") if knobs == "everything" else ("",):
        ours, theirs = (models.load(folder / "runs" / n / "base" / part).state_dict() for n in (name, "whole"))
        assert ours.keys() == theirs.keys()
        assert all((ours[key] - tensor).abs().max() < 1e-3 for key, tensor in theirs.items()), part


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_shards(plain: tuple[Path, list[float]]) -> None:
    """Killed in the middle of training, then resumed under the same layout."""
    folder, losses = plain
    import subprocess
    import sys
    import time

    from tests.toy import environment

    path = write(folder, "killed", LAYOUTS["experts"])
    command = [sys.executable, "-m", "finback", "run", str(path), "--runs", str(folder / "runs"), "--ranks", "2"]
    child = subprocess.Popen(
        command, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True
    )
    shards = folder / "runs/killed/base/sharded"
    while not list(shards.glob("step-*/manifest.json")) and child.poll() is None:
        time.sleep(0.01)
    child.kill()
    child.wait()
    time.sleep(1)  # its ranks end shortly after it
    log = run(folder, "killed", LAYOUTS["experts"])
    assert [r["loss"] for r in log] == pytest.approx(losses, abs=1e-5)


AVERAGED = f"{PHASES}, ema_decay=0.5"


def _continued(folder: str, layouts: list[str], stops: list[int]) -> None:
    """Runs the recipe in one run folder under each layout in turn, up to the given steps."""
    world, root = World(dist.get_rank(), dist.get_world_size()), Path(folder) / "runs" / "change"
    for layout, stop in zip(layouts, stops, strict=True):
        if world.rank == 0:
            write(Path(folder), "change", layout, AVERAGED)
            root.mkdir(parents=True, exist_ok=True)
            recipes.claim(recipes.load(Path(folder) / "change.py"), root, 0)
        world.barrier()

        def watch(run: StageRun, stop: int = stop) -> None:
            log = run.log

            def count(step: int, **metrics: Any) -> None:
                log(step, **metrics)
                run.stop_requested = step == stop

            run.log = count  # type: ignore[method-assign]

        with suppress(Interrupted):
            recipes.execute(recipes.load(Path(folder) / "change.py"), root, 0, world, watch)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage on one rank, run to its end."""
    folder = tmp_path_factory.mktemp("unbroken")
    run_plainly(folder, "change", AVERAGED)
    return folder / "runs/change/base"


def _check_continued(stage: Path, unbroken: Path) -> None:
    """Checks that losses are within 1e-5, and that data, router biases, model and average equal the unbroken run's."""
    log, expected = (read_lines(folder / "metrics.jsonl") for folder in (stage, unbroken))
    assert [r["step"] for r in log] == list(range(1, 21))
    assert [r["loss"] for r in log] == pytest.approx([r["loss"] for r in expected], abs=1e-5)
    results, meant = (read_json(folder / "manifest.json")["results"] for folder in (stage, unbroken))
    assert results["tokens_by_source"] == meant["tokens_by_source"]
    for within in ("", "average"):
        mine, theirs = (models.load(folder / within).state_dict() for folder in (stage, unbroken))
        for name, tensor in theirs.items():
            assert (mine[name] - tensor).abs().max() <= 2e-4, name
    biases = [name for name in theirs if name.endswith("router.bias")]
    assert len(biases) == 3 and all(theirs[name].any() and torch.equal(mine[name], theirs[name]) for name in biases)
    assert not (stage / "sharded").exists() and not list(stage.glob("step-*"))


def test_a_layout_may_change_while_a_stage_is_half_done(tmp_path: Path, unbroken: Path) -> None:
    layouts = ["None", "Layout(dp=2, ep=2)", "Layout(pp=2, micro_batches=2)", "None"]
    on_ranks(2, _continued, str(tmp_path), layouts, [4, 9, 14, 0])
    _check_continued(tmp_path / "runs/change/base", unbroken)


CHANGES = {
    "fsdp and ep": (4, "Layout(dp=4, ep=2)"),
    "zero1": (2, 'Layout(dp=2, ep=2, sharding="zero1")'),
    "pipeline": (4, 'Layout(pp=2, dp=2, micro_batches=2, schedule="1f1b")'),
    "whole": (2, "None"),
}


@pytest.mark.slow
@pytest.mark.parametrize("before", CHANGES)
def test_a_checkpoint_of_any_layout_goes_on_under_the_others(tmp_path: Path, unbroken: Path, before: str) -> None:
    ranks, layout = CHANGES[before]
    work, begun = tmp_path / "work", tmp_path / "begun"  # the recipe contains the paths of its files
    work.mkdir()
    on_ranks(ranks, _continued, str(work), [layout], [9])
    work.rename(begun)
    for after, (ranks, layout) in CHANGES.items():
        if after != before:
            shutil.copytree(begun, work)
            on_ranks(ranks, _continued, str(work), [layout], [0])
            _check_continued(work / "runs/change/base", unbroken)
            shutil.rmtree(work)


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


def test_no_knob_is_refused_because_of_a_layout() -> None:
    """A layout accepts the knobs that one rank accepts, and refuses the others."""
    probe = {"phases": (), "probe": Probe(Chains(2, 3), 0.5), "ema_decay": 0.9, "valid_tokens": 64, "keep_best": True}
    rows = {
        "document_mask": True,
        "packing": "best_fit",
        "batch_size_start": 4,
        "ramp_tokens": 64,
        "optimizer": "adamw",
    }
    for knobs in (probe, rows, {"compute": "fp8"}, {"compile": True}, {"expert_kernel": "grouped_mm"}):
        assert stage(**knobs).layout == Layout(dp=2)
    with pytest.raises(UserError, match=r"base\.compute = 'fp8': cannot be compiled"):
        stage(compile=True, compute="fp8")


def test_a_layout_wants_its_ranks(tmp_path: Path, plain: tuple[Path, list[float]]) -> None:
    folder, _ = plain
    root = folder / "runs" / "plain"
    alone = StageRun(root, "alone", 0, World(), quiet=True)
    with pytest.raises(UserError, match=r"base\.layout = 'pp=1,dp=2.*: pp x dp is 2, but there is 1 rank.*--ranks 2"):
        stage().run(alone)
    assert not isinstance(set_up(stage(layout=Layout()), alone).trainer, ShardedTrainer), "one rank needs none"
    assert dataclasses.replace(stage(), layout=None).layout is None


@pytest.mark.slow
def test_a_layout_of_other_ranks_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "wrong", "Layout(dp=4)")
    refused = finback_process("run", path, "--runs", tmp_path / "runs", "--ranks", 2)
    assert refused.returncode == 2 and "pp x dp is 4, but there are 2 ranks" in refused.stderr
    assert "--ranks 4" in refused.stderr
