"""recipes/v3.py: the report's numbers at V3's size, and the same run scaled down, on one rank and on four."""

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from finback.model.config import V3, ModelConfig
from finback.runs import recipe as recipes
from finback.stages.extend import Extend
from finback.stages.prepare import Prepare
from finback.stages.pretrain import Pretrain
from finback.train.rates import along, level
from tests.toy import ROOT, finback_process

RECIPE = ROOT / "recipes/v3.py"
LR = 2.2e-4


def phases(*settings: str) -> tuple[Prepare, Pretrain, Extend, Extend]:
    prepare, pretrain, first, second = recipes.load(RECIPE, settings).stages
    assert isinstance(prepare, Prepare) and isinstance(pretrain, Pretrain)
    assert isinstance(first, Extend) and isinstance(second, Extend)
    return prepare, pretrain, first, second


def windows(pretrain: Pretrain, *extended: Extend) -> list[ModelConfig]:
    """The model's config after each phase."""
    assert pretrain.model is not None
    configs = [pretrain.model]
    for stage in extended:
        configs.append(stage.adapted(configs[-1]))
    return configs


def test_it_has_the_numbers_of_v3s_report() -> None:
    prepare, pretrain, first, second = phases()
    assert prepare.fim == 0.1 and pretrain.packing == "best_fit" and not pretrain.document_mask
    assert pretrain.limit == 14_800_000_000_000 and pretrain.seq_len == 4096
    warm = 2000 * 3072 * 4096
    rates = {warm // 2: 1.1e-4, warm: 2.2e-4, 10e12: 2.2e-4, 14.3e12: 2.2e-5, 14.6e12: 2.2e-5, 14.7e12: 7.3e-6}
    for tokens, rate in rates.items():
        assert pretrain.adam_lr * along(pretrain.phases, int(tokens)) == pytest.approx(rate), tokens
    assert [level(pretrain.mtp_weight, int(t)) for t in (0, 9.9e12, 10e12)] == [0.3, 0.3, 0.1]
    assert [level(pretrain.bias_speed, int(t)) for t in (0, 14.2e12, 14.3e12)] == [0.001, 0.001, 0.0]
    assert pretrain.batch_sizes == [3072, 6144, 9216, 12288, 15360] and pretrain.batch_size_at(469_000_000_000) == 15360
    for stage, rows, length in ((first, 1920, 32768), (second, 480, 131072)):
        assert (stage.batch_size, stage.seq_len, stage.limit) == (rows, length, 1000 * rows * length)
        assert stage.adam_lr * along(stage.phases, stage.limit) == pytest.approx(7.3e-6)
    assert windows(pretrain, first, second)[-1] == V3, "the final config.json must be V3's"
    assert windows(pretrain, first)[1].max_position_embeddings == 32768


@pytest.mark.parametrize(("size", "ranks"), [("v3", 2048), ("tiny", 4)])
def test_every_step_of_every_phase_fits_its_layout(size: str, ranks: int) -> None:
    _, *stages = phases(f"size={size}")
    configs = windows(*stages)  # type: ignore[arg-type]
    for stage, config in zip(stages, configs, strict=True):
        assert stage.layout is not None and stage.layout.ranks == ranks
        stage.layout.check_steps(config, stage.batch_sizes, stage.batch_size)
    assert [stage.layout.cp for stage in stages] == ([1, 8, 32] if size == "v3" else [1, 2, 2])  # type: ignore[union-attr]
    knobs = {f.name for f in dataclasses.fields(Pretrain)} - {"name", "model", "start", "phases"}
    large = phases("size=v3")[1]
    as_it_stands = {"packing", "optimizer", "weight_decay", "ema_decay", "compute", "document_mask", "balance_alpha"}
    assert as_it_stands <= knobs and all(getattr(stages[0], n) == getattr(large, n) for n in as_it_stands)


@pytest.mark.slow
def test_a_rank_count_that_does_not_fit_is_refused_by_its_knob(tmp_path: Path) -> None:
    """At V3's size it fails before any preparation; scaled down, the error names the layout."""
    done = finback_process("run", RECIPE, "--runs", tmp_path, "--ranks", 2)
    assert done.returncode == 2 and "size = 'v3': can be planned, not run" in done.stderr
    one = tmp_path / "one.py"
    one.write_text(
        f"""import runpy
from finback.data.sources import Files
from finback.stages.prepare import Prepare
_, pretrain, *_ = runpy.run_path({str(RECIPE)!r})["recipe"](size="tiny")
text = Files(({str(RECIPE)!r},), name="chitchat"), Files(({str(RECIPE)!r},), name="code")
recipe = [Prepare(name="prepare", text=text, vocab_size=320), pretrain]
""",
        encoding="utf-8",
    )
    done = finback_process("run", one, "--runs", tmp_path, "--ranks", 1)
    words = "pretrain.layout = 'pp=2,dp=2,ep=2,zero=1': pp x dp is 4, but there is 1 rank. Start it with --ranks 4"
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def benchmark_() -> Any:
    spec = importlib.util.spec_from_file_location("v3_ranks", ROOT / "benchmarks/v3_ranks.py")
    assert spec is not None and spec.loader is not None
    module, before = importlib.util.module_from_spec(spec), list(sys.path)
    sys.path.insert(0, str(ROOT / "benchmarks"))
    spec.loader.exec_module(module)
    sys.path[:] = before
    return module


@pytest.mark.slow
def test_shrunk_it_trains_on_four_ranks_as_on_one(benchmark_: Any, tmp_path: Path) -> None:
    """Losses, norms, loads and biases per step: a ramp, schedules, FIM, an average, two extensions with split rows."""
    lines = benchmark_.compared(tmp_path, "fp32")
    assert [line["phase"] for line in lines] == list(benchmark_.PHASES)
    assert all(line["holds"] for line in lines), lines
