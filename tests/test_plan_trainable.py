"""Whatever can be trained can be planned, over the trainer's own lists of choices; what is recommended can be trained."""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from finback.config import UserError
from finback.model.config import TINY, V2_LITE, V3, ModelConfig
from finback.parallel.layout import Layout
from finback.planner import cluster, hardware, recipe_plan
from finback.planner.options import PlanOptions
from finback.planner.workload import Optimizer, Precision, Recompute
from finback.runs.recipe import config_json
from finback.stages.pretrain import Pretrain

# choices about the data, which change no amount of work
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
    """Every choice by itself, and none."""
    yield {}
    for name, values in choices(cls).items():
        yield from ({name: value} for value in values if name not in OF_DATA)


def layouts() -> Iterator[Layout | None]:
    """Every kind of layout that training accepts, and none."""
    yield None
    for chosen in varied(Layout):
        layout = Layout(pp=2, dp=2, ep=2, micro_batches=4, **chosen)
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
    """The knobs that a plan prints, as a recipe would read them."""
    found: dict[str, Any] = eval(f"dict({knobs})", {"Layout": Layout})
    return found


def test_the_planner_knows_the_trainers_words() -> None:
    known = choices(Pretrain)
    for name, words in (("recompute", Recompute), ("compute", Precision), ("optimizer", Optimizer)):
        assert set(known[name]) - {"auto"} <= set(get_args(words)), name
    assert set(known) == {"optimizer", "recompute", "compute", "compile", "expert_kernel", *OF_DATA}, (
        "a new choice is to be planned"
    )


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
            assert printed(away["plan"]["layout"]["knobs"]) == {"layout": layout, "recompute": stage.recompute}
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
    assert knobs["layout"] == found.work.layout and knobs["recompute"] in choices(Pretrain)["recompute"]
