"""Whatever can be trained can be planned, by the trainer's own lists of choices; recommendations can be trained."""

import dataclasses
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from finback.config import UserError
from finback.model.config import TINY, V2_LITE, V3, ModelConfig
from finback.model.count import parameters
from finback.parallel.layout import Layout
from finback.planner import cluster, hardware, memory, recipe_plan
from finback.planner.options import PlanOptions
from finback.planner.workload import Optimizer, Precision, Recompute, Workload
from finback.runs.recipe import config_json
from finback.stages.pretrain import Pretrain, Probe
from finback.tasks.math import Chains

# choices about the data, which do not change the amount of work
OF_DATA = {"packing", "document_mask", "keep_best"}
CALIBRATION: dict[str, Any] = {
    "measured": {
        **{f"passes_{name}": {"products": 1e-11, "layers": 1e-4} for name in ("fp32", "bf16")},
        **{f"update_{name}": {"parameters": 1e-9} for name in ("fp32", "bf16")},
        "exchange": {"fixed": 1e-4, "byte": 1e-9},
    },
    "gemm_flops_per_second": {"fp32": {"64": 4e11}, "bf16": {"64": 8e11}},
    "training_flops_per_second": {"fp32": 2e11, "bf16": 3e11},
    "memory_bytes": 16e9,
    "memory_bytes_per_second": 1e10,
    "process_bytes": 3e8,
    "ranks": 4,
    "date": "a day",
    "cpu": "one",
    "torch": "2",
    "load_average": 0.0,
}


def choices(cls: type) -> dict[str, tuple[Any, ...]]:
    """The fields of a dataclass that take one of a few values."""
    hints = get_type_hints(cls)
    some = {f.name: get_args(hints[f.name]) for f in fields(cls) if get_origin(hints[f.name]) is Literal}
    return some | {f.name: (False, True) for f in fields(cls) if hints[f.name] is bool}


def varied(cls: type) -> Iterator[dict[str, Any]]:
    """No choice, and each choice by itself."""
    yield {}
    for name, values in choices(cls).items():
        yield from ({name: value} for value in values if name not in OF_DATA)


def layouts() -> Iterator[Layout | None]:
    """No layout, and every kind that training accepts."""
    yield None
    for chosen in varied(Layout):
        if chosen.get("reduce") == "bf16":
            chosen["sharding"] = "zero1"
        layout = Layout(pp=2, dp=2, ep=2, micro_batches=4, **chosen)
        if layout.offload:  # fine-tuning and RL only
            continue
        try:
            layout.check_trainable(TINY, 16, 4)
        except UserError:
            continue
        yield layout


def stages(layout: Layout | None) -> Iterator[Pretrain]:
    """Every kind of pre-training with a layout that its own checks accept."""
    for chosen in varied(Pretrain):
        try:
            yield Pretrain(
                name="base",
                data="x",
                model=TINY,
                mixture={"a": 1.0},
                batch_size=16,
                seq_len=64,
                layout=layout,
                **chosen,
            )
        except UserError:
            continue


def printed(knobs: str) -> dict[str, Any]:
    """The knobs that a plan prints, parsed as a recipe would."""
    found: dict[str, Any] = eval(f"dict({knobs})", {"Layout": Layout})
    return found


def test_the_planner_knows_the_trainers_words() -> None:
    known = choices(Pretrain)
    for name, words in (("recompute", Recompute), ("compute", Precision), ("optimizer", Optimizer)):
        assert set(known[name]) - {"auto"} <= set(get_args(words)), name
    assert set(known) == {
        "optimizer",
        "muon_form",
        "recompute",
        "compute",
        "compile",
        "qat",
        "weights",
        "expert_kernel",
        *OF_DATA,
    }, "the planner must know every choice"


@pytest.mark.parametrize("layout", list(layouts()), ids=str)
def test_what_can_be_trained_can_be_planned(layout: Layout | None) -> None:
    seen = 0
    for stage in stages(layout):
        configs, seen = [config_json(stage)], seen + 1
        away = recipe_plan.plan_configs("r", configs, PlanOptions(on="h100:4"), None, 1)["stages"]["base"]
        here = recipe_plan.plan_configs("r", configs, PlanOptions(), CALIBRATION, 4)["stages"]["base"]
        for values in (away, here):
            assert values["seconds"] > 0 and values["memory_bytes"] > 0 and "refused" not in values, stage
        if layout is not None:
            compute = "bf16" if stage.compute == "auto" else stage.compute
            same = {"layout": layout, "recompute": stage.recompute, "compute": compute}
            assert printed(away["plan"]["layout"]["knobs"]) == same
        if stage.compute in ("fp32", "bf16"):
            assert away["plan"]["layout"]["precision"] == stage.compute
    assert seen, "no stage accepts this layout"


@pytest.mark.parametrize(
    ("on", "model", "rows", "length"),
    [
        ("h800:2048", V3, 15360, 4096),
        ("h100:8", V2_LITE, 512, 4096),
        ("a100:16", TINY, 64, 128),
        ("4090", TINY, 64, 128),
    ],
)
def test_what_is_recommended_can_be_trained(on: str, model: ModelConfig, rows: int, length: int) -> None:
    options = PlanOptions(on=on, assume=("network=25e9",))
    site = hardware.site(on, options.assume)
    work = cluster.workload(rows, length, site, options)
    found = cluster.plan("x", model, work, 1e9, site, options)
    found.work.layout.check_trainable(model, rows, site.devices)
    knobs = printed(found.values["layout"]["knobs"])
    assert (
        knobs.get("layout", found.work.layout) == found.work.layout
        and knobs["recompute"] in choices(Pretrain)["recompute"]
    )


EVERYTHING: dict[str, Any] = {
    "ema_decay": 0.9,
    "probe": Probe(Chains(2, 3), 0.5),
    "document_mask": True,
    "batch_size_start": 1024,
    "ramp_tokens": 10**9,
}


@pytest.mark.parametrize(
    ("on", "knobs"), [("h100:1", {}), ("h100:16", {"compile": True}), ("h100:16", EVERYTHING | {"compute": "fp8"})]
)
def test_what_is_recommended_for_a_stage_it_takes(on: str, knobs: dict[str, Any]) -> None:
    """The printed knobs fit the stage, and every step of its ramp fits the layout."""
    stage = Pretrain(name="base", data="x", model=V2_LITE, mixture={"a": 1.0}, batch_size=4096, seq_len=4096, **knobs)
    found = recipe_plan.plan_configs("r", [config_json(stage)], PlanOptions(on=on), None, 1)["stages"]["base"]
    assert "refused" not in found
    taken = dataclasses.replace(stage, **printed(found["plan"]["layout"]["knobs"]))
    devices = int(on.split(":")[1])
    assert (taken.layout is None) == (devices == 1)
    if taken.layout is not None:
        taken.layout.check_trainable(V2_LITE, stage.batch_size, devices)
        taken.layout.check_steps(V2_LITE, stage.batch_sizes, stage.batch_size)


def test_averages_and_probes_are_counted() -> None:
    """Four bytes per number of a rank's shard; after a step the whole model, if that is larger than the activations."""
    layout = Layout(pp=2, dp=4, ep=2, micro_batches=2, sharding="zero1")
    plain = Workload(layout, rows=8, length=64, precision="fp32")
    known = hardware.ASSUMPTIONS
    before, after = (
        memory.rank_memory(TINY, dataclasses.replace(plain, averaged=averaged), known) for averaged in (False, True)
    )
    for a, b, mine in zip(before, after, memory.rank_stages(TINY, layout), strict=True):
        assert b.optimizer - a.optimizer == pytest.approx(4 * (mine.plain / 4 + mine.routed / 2))
    probed = memory.rank_memory(TINY, dataclasses.replace(plain, probed=True), known)
    for rank in probed:
        assert rank.activations + rank.working == pytest.approx(4 * parameters(TINY))


def test_a_ramp_leaves_layouts_out() -> None:
    """Steps of 384 rows divide among 16 ranks, those of 24 rows do not."""
    site, options = hardware.site("h100:16", ()), PlanOptions(mesh="dp=16")
    work = cluster.workload(384, 4096, site, options)
    assert cluster.plan("x", V2_LITE, work, 1e9, site, options).work.layout.dp == 16
    with pytest.raises(UserError, match="rows = 24: does not divide among dp = 16 ranks"):
        cluster.plan("x", V2_LITE, dataclasses.replace(work, rows_start=24), 1e9, site, options)
