"""Plans for this machine: formulas compared with the trainer, fits that recover their inputs, and invalid files."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from finback.config import UserError
from finback.model import recompute
from finback.model.config import TINY, ModelConfig
from finback.model.count import parameters, training_flops
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.planner import calibrate, calibration_file, recipe_plan, render, this_machine
from finback.planner.options import PlanOptions
from finback.planner.planned_stage import PlannedStage, planned_stages
from finback.planner.this_machine import Shape
from finback.runs import processor
from finback.runs import recipe as recipes
from finback.runs.recipe import config_json
from finback.stages.pretrain import Pretrain
from finback.train.optim import is_matrix
from finback.train.precision import COMPUTE, use_bf16_weights
from tests.toy import backward, write_recipe

DENSE = ModelConfig(
    vocab_size=512,
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=288,
    attention="gqa",
    num_key_value_heads=2,
    head_dim=24,
    max_position_embeddings=1024,
)
MODELS = {
    "mla": TINY,
    "no MTP": dataclasses.replace(TINY, num_nextn_predict_layers=0, num_hidden_layers=2),
    "no query latent": dataclasses.replace(TINY, q_lora_rank=None, n_shared_experts=0, vocab_size=300),
    "dense mla": dataclasses.replace(TINY, n_routed_experts=0, n_shared_experts=0, num_experts_per_tok=0),
    "gqa": DENSE,
    "heads with own keys": dataclasses.replace(DENSE, num_key_value_heads=4),
    "gqa, qk norm": dataclasses.replace(DENSE, qk_norm=True, attention_bias="qkv"),
}


def planned(stage: Pretrain) -> PlannedStage:
    return planned_stages([config_json(stage)])[0]


def kept_by_autograd(shape: Shape, patch: pytest.MonkeyPatch) -> int:
    """Bytes of distinct storages that the trainer's forward pass saves, without parameters and buffers."""
    model = Transformer(shape.model, COMPUTE[shape.compute]).initialise(0)
    if shape.weights == "bf16":
        use_bf16_weights(model)
    recompute.use_recompute(model, shape.recompute).train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    checkpoint = recompute.checkpoint

    def checkpointed(run: Any, *arguments: Any, **options: Any) -> Any:
        for argument in arguments[:1]:  # the others are rotary tables
            pack(argument)
        return checkpoint(run, *arguments, **options)

    patch.setattr(recompute, "checkpoint", checkpointed)
    width = shape.length + 1 + shape.model.num_nextn_predict_layers
    tokens = torch.randint(shape.model.vocab_size, (shape.rows, width), generator=torch.Generator().manual_seed(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backward(model, tokens, 0.3, 1e-4)
    return sum(t.untyped_storage().nbytes() for t in seen.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize(("rows", "length"), [(4, 48), (2, 160)])
def test_what_autograd_keeps_is_as_predicted(
    name: str, compute: str, rows: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for policy in get_args(recompute.Policy):
        shape = Shape(MODELS[name], rows, length, compute, recompute=policy)
        assert this_machine.saved_bytes(shape) == pytest.approx(kept_by_autograd(shape, monkeypatch), rel=0.03), policy


@pytest.mark.parametrize("name", MODELS)
def test_muons_matrices_are_the_optimizers(name: str) -> None:
    with torch.device("meta"):
        named = dict(Transformer(MODELS[name]).named_parameters())
    theirs = [p for n, p in named.items() if is_matrix(n, p)]
    assert this_machine.muon_parameters(MODELS[name]) == sum(p.numel() for p in theirs)
    shapes = {tuple(p.shape[-2:]) for p in theirs}
    assert {(a, b) for _, a, b in this_machine.matrices(MODELS[name])} == shapes


@pytest.mark.parametrize("name", MODELS)
def test_bf16_weights_take_what_is_planned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the model, and in what autograd no longer keeps: their casts."""
    for policy in get_args(recompute.Policy):
        shape = Shape(MODELS[name], 2, 32, "bf16", recompute=policy, weights="bf16")
        exact = dataclasses.replace(shape, weights="fp32")
        less = this_machine.saved_bytes(exact) - this_machine.saved_bytes(shape)
        assert less == kept_by_autograd(exact, monkeypatch) - kept_by_autograd(shape, monkeypatch), policy
    model = use_bf16_weights(Transformer(MODELS[name], torch.bfloat16))
    assert this_machine.memory(shape, 0.0).weights == sum(p.nbytes for p in model.parameters())


def test_memory_by_hand() -> None:
    shape = Shape(DENSE, 2, 32)
    found = this_machine.memory(shape, 100.0)
    p, muon = parameters(DENSE), this_machine.muon_parameters(DENSE)
    assert (found.process, found.weights, found.gradients) == (100, 4 * p, 4 * p)
    assert found.optimizer == 4 * muon + 8 * (p - muon)
    largest = 4 * 3 * 576 * 96  # Newton-Schulz batches gate and up of three layers
    assert found.working == 8 * muon + 3 * largest
    parts = dataclasses.asdict(found).values()
    assert found.total == sum(parts) and all(part > 0 for part in parts)


def test_newton_schulz_by_hand() -> None:
    # five steps of three products each for a matrix (s, t), s <= t: gram (s, t, s), its square (s, s, s), (s, s, t)
    c = dataclasses.replace(DENSE, num_hidden_layers=1)
    small, large = zip(*[(min(a, b), max(a, b)) for _, a, b in this_machine.matrices(c)], strict=True)
    total = sum(5 * 2 * (s * t * s + s * s * s + s * s * t) for s, t in zip(small, large, strict=True))
    assert this_machine.newton_schulz_flops(c, 1) == total
    assert total / 2 <= this_machine.newton_schulz_flops(c, 2) <= total  # work that does not halve falls to one rank


def test_a_fit_finds_what_was_put_in_and_nothing_below_zero() -> None:
    work = [{"a": x, "b": y, "none": 0.0} for x, y in ((1.0, 5.0), (3.0, 1.0), (2.0, 2.0), (9.0, 4.0))]
    found = calibrate.fit(work, [2 * row["a"] + 0.5 * row["b"] for row in work])
    assert found == {"a": pytest.approx(2.0), "b": pytest.approx(0.5)}
    # b would be negative, so it is left out
    found = calibrate.fit(work, [2 * row["a"] - 0.1 * row["b"] for row in work])
    assert list(found) == ["a"] and found["a"] > 0


def test_costs_are_the_best_that_are_not_negative() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    for seed in range(20):
        random = np.random.default_rng(seed)
        matrix, seconds = random.random((9, 5)), random.random(9) + 0.1
        work = [dict(zip("abcde", map(float, row), strict=True)) for row in matrix]
        found = calibrate.fit(work, list(seconds))
        best, _ = optimize.nnls(matrix / seconds[:, None], np.ones(9))
        assert [found.get(name, 0.0) for name in "abcde"] == pytest.approx(list(best), abs=1e-9)


def test_seconds_add_up() -> None:
    measured = {
        "passes_fp32": {"products": 1e-9, "layers": 0.5},
        "update_fp32": {"parameters": 1e-6},
        "exchange": {"fixed": 0.25, "byte": 1e-9},
    }
    shape = Shape(DENSE, 2, 32, "fp32", ranks=2)
    parts = this_machine.seconds(shape, measured)
    assert parts["passes"] == pytest.approx(1e-9 * this_machine.passes(shape)["products"] + 0.5 * 3)
    assert parts["update"] == pytest.approx(1e-6 * parameters(DENSE))
    both = 4 * (parameters(DENSE) + this_machine.muon_parameters(DENSE))
    assert parts["exchange"] == pytest.approx(0.25 + 1e-9 * both)
    assert this_machine.seconds(dataclasses.replace(shape, ranks=1), measured)["exchange"] == 0


def test_the_kinds_of_work_make_up_the_flops_of_training() -> None:
    shape = Shape(TINY, 4, 64)
    kinds = this_machine.passes(shape)
    flops = kinds["products"] + kinds["attention"]
    # count.py's rule includes the gains of norms, and attention multiplies the whole square here
    assert flops == pytest.approx(training_flops(TINY, 64) * shape.tokens, rel=0.01)


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real but short calibration: two models and small products."""
    path = tmp_path_factory.mktemp("cache") / "finback" / "calibration.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "references", lambda: [(TINY, 2, 32), (DENSE, 2, 64)])
        patch.setattr(calibrate, "GEMM_SIZES", (64,))
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        calibrate.calibrate(World(), path, lambda text: None)
        torch.set_num_threads(threads)
    return path


def test_a_calibration_is_kept_and_read(calibration: Path) -> None:
    found = calibration_file.read(calibration)
    assert found["torch"] == torch.__version__ and found["cpu"] == processor.name() and found["ranks"] == 1
    assert found["date"].endswith("UTC") and found["process_bytes"] > 50e6
    for dtype in ("fp32", "bf16"):
        assert found["gemm_flops_per_second"][dtype]["64"] > 1e8
    machine = calibration_file.machine(found, 1)
    assert machine.memory.value > 1e9 and "measured here" in machine.bf16.source
    assert machine.peak("fp32") == max(found["gemm_flops_per_second"]["fp32"].values())


def test_a_recipe_is_planned_by_its_calibration(calibration: Path, tmp_path: Path) -> None:
    recipe = recipes.load(write_recipe(tmp_path))
    found = calibration_file.read(calibration)
    values = recipe_plan.plan(recipe, PlanOptions(), found, 1)
    base, zero = values["stages"]["base"], values["stages"]["zero"]
    assert base["step_seconds"] > 0 and base["seconds"] == pytest.approx(base["step_seconds"] * 16384 / 256)
    assert base["compute"] == "bf16" and base["fits"] and base["memory_bytes"] > found["process_bytes"]
    assert zero["tokens_trained"] == 8 * 4 * 4 * 12 and zero["how"] == recipe_plan.ROUGH
    assert values["total"]["seconds"] == pytest.approx(
        sum(s["seconds"] for s in values["stages"].values() if "seconds" in s)
    )
    assert base["dollars"] == pytest.approx(base["seconds"] / 3600 * 0.04)
    text = render.recipe_text(values)
    assert all(name in text for name in values["stages"]) and "rough" in text
    two = recipe_plan.plan(recipe, PlanOptions(), found, 2)["stages"]["base"]
    assert two["parts"]["passes"] <= base["parts"]["passes"], "equal if the measured time does not depend on the rows"


def test_without_a_calibration_work_is_known_and_time_is_not(tmp_path: Path) -> None:
    values = recipe_plan.plan(recipes.load(write_recipe(tmp_path)), PlanOptions(), None, 2)
    assert values["stages"]["base"]["flops"] > 0 and "seconds" not in values["stages"]["base"]
    assert "--calibrate" in render.recipe_text(values) and values["total"]["seconds"] is None


def test_rows_that_do_not_divide_among_ranks(calibration: Path) -> None:
    stage = Pretrain(name="base", data="x", model=TINY, mixture={"a": 1.0}, batch_size=9)
    with pytest.raises(UserError, match=r"base.batch_size.*2 ranks"):
        recipe_plan.pretraining(planned(stage), calibration_file.read(calibration), 2)


def changed(found: dict[str, Any], change: str) -> str:
    if change == "torn":
        return json.dumps(found)[:400]
    if change == "foreign":
        return json.dumps({"benchmark": "pretrain"})
    if change == "list":
        return "[1, 2]"
    if change == "incomplete":
        found["measured"].pop("exchange")
    elif change == "negative":
        found["measured"]["update_fp32"]["parameters"] = -1.0
    elif change == "text":
        found["process_bytes"] = "much"
    elif change == "nameless":
        found["cpu"] = None
    return json.dumps(found)


@pytest.mark.parametrize("change", ["torn", "foreign", "list", "incomplete", "negative", "text", "nameless"])
def test_a_file_that_is_no_calibration(change: str, calibration: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.json"
    path.write_text(changed(calibration_file.read(calibration), change), encoding="utf-8")
    with pytest.raises(UserError, match=r"--calibration.*Run finback plan --calibrate"):
        calibration_file.read(path)


def test_doubts(calibration: Path) -> None:
    found = calibration_file.read(calibration) | {"load_average": 0.0}
    assert calibration_file.doubts(found, torch.__version__) == []
    assert len(calibration_file.doubts(found | {"cpu": "another", "load_average": 9.0, "models": 1}, "1.0")) == 4


def test_where_calibrations_lie() -> None:
    assert calibration_file.default_path({"XDG_CACHE_HOME": "/somewhere"}) == Path(
        "/somewhere/finback/calibration.json"
    )
    for environment in ({}, {"XDG_CACHE_HOME": ""}, {"XDG_CACHE_HOME": "relative"}):
        assert calibration_file.default_path(environment) == Path.home() / ".cache" / "finback" / "calibration.json"
