"""How many engines keep a trainer busy: by hand, from a run's logs, and from published rates."""

import json
from pathlib import Path
from typing import Any

import pytest

from finback.config import UserError
from finback.model.config import V3
from finback.planner import command, engines, hardware, recipe_plan
from finback.planner.engines import OverlappedStep, balance, overlapped, wanted
from finback.planner.options import PlanOptions
from finback.rollouts.fleet import Fleet
from finback.runs.declaration import DECLARATION
from finback.runs.recipe import Recipe, config_json
from finback.stages.grpo import GRPO
from finback.stages.prepare import Prepare, TaskText
from finback.stages.pretrain import Pretrain
from finback.tasks.math import Chains
from tests.toy import CONFIG


def test_steps_one_behind_the_other_by_hand() -> None:
    """Generating takes 3 s and learning 2 s: a step takes 5 s in sequence, and 3 s, the longer of both, overlapped."""
    assert overlapped(3, 2, 0, 3) == [
        OverlappedStep(0, 3, 3, 5),
        OverlappedStep(5, 8, 8, 10),
        OverlappedStep(10, 13, 13, 15),
    ]
    assert overlapped(3, 2, 1, 4) == [
        OverlappedStep(0, 3, 3, 5),
        OverlappedStep(3, 6, 6, 8),
        OverlappedStep(6, 9, 9, 11),
        OverlappedStep(9, 12, 12, 14),
    ]
    assert overlapped(1, 4, 1, 4)[-1] == OverlappedStep(9, 10, 13, 17), "answers must wait for recent weights"


def test_engines_by_hand() -> None:
    """30,000 tokens at 1,000 per second and engine in 10 s of learning: three engines."""
    assert wanted(30_000, 10, 1_000) == 3 and wanted(30_900, 10, 1_000) == 3 and wanted(32_000, 10, 1_000) == 4
    assert wanted(100, 10, 1_000) == 1
    assert balance(30_000, 10, 1_000, 3, 1) == pytest.approx(
        {"engines": 3, "generating": 10, "step": 10, "trainer_idle": 0, "engines_idle": 0}
    )
    assert balance(30_000, 10, 1_000, 3, 0) == pytest.approx(
        {"engines": 3, "generating": 10, "step": 20, "trainer_idle": 0.5, "engines_idle": 0.5}
    )
    assert balance(30_000, 10, 1_000, 2, 4) == pytest.approx(
        {"engines": 2, "generating": 15, "step": 15, "trainer_idle": 1 / 3, "engines_idle": 0}
    )


def recipe(**knobs: Any) -> Recipe:
    task: dict[str, Any] = {"start": "base", "task": Chains(2, 3), "steps": 10}
    text = TaskText(name="sums", tasks=(Chains(2, 3),), documents=9)
    prepare = Prepare(name="d", tasks=(text,), vocab_size=320)
    base = Pretrain(name="base", data="d", model=CONFIG, mixture={"sums": 1.0})
    return Recipe("r", (prepare, base, GRPO(name="zero", **task | knobs)))


def ran(root: Path, **rollouts: Any) -> Path:
    """A run whose steps generate 6,000 tokens in 4 s on two engines, and learn from them for 3 s."""
    folder = root / "run" / "zero"
    folder.mkdir(parents=True)
    stage = recipe(**rollouts).stages[2]
    (folder / "config.json").write_text(json.dumps(config_json(stage)))
    row = {"generating_seconds": 4.0, "generated_per_second": 1500.0, "update_seconds": 3.0}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": s, **row}) + "\n" for s in range(1, 4)))
    (folder / "ledger.jsonl").write_text(json.dumps({"seconds": 20.0, "cores": 2}) + "\n")
    (root / "run" / "recipe.json").write_text(json.dumps({"recipe": "r", "seed": 0, "stages": ["zero"]}))
    return root / "run"


@pytest.mark.parametrize("rollouts", [{"rollouts": Fleet(2)}, {}])
def test_rates_of_a_run(rollouts: Any, tmp_path: Path) -> None:
    """750 tokens per second and engine, for a fleet's two or two ranks'. 6,000 tokens in 3 s need 2.67 engines."""
    root = ran(tmp_path, **rollouts)
    (met,) = engines.measured(root).values()
    assert (met.tokens, met.learning, met.rate) == pytest.approx((6000, 3, 750))
    values = recipe_plan.plan(recipe(rollouts=Fleet(4), max_staleness=1), PlanOptions(measured=root), None, 1)
    found = values["stages"]["zero"]["engines"]
    assert found["wanted"]["engines"] == 3 and found["source"] == "measured"
    assert found["given"] == pytest.approx(
        {"engines": 4, "generating": 2, "step": 3, "trainer_idle": 0, "engines_idle": 1 / 3}
    )
    assert any("3 engines keep the trainer busy" in note and "the recipe's 4" in note for note in values["notes"])


def test_published_rates_and_the_picture(tmp_path: Path) -> None:
    """V3 on H800: 1,850 tokens per second and device, as published. A smaller model generates more."""
    machine, _ = hardware.find("h800:8")
    assert engines.published(V3, machine)[0] == pytest.approx(1850, rel=0.02)
    image = tmp_path / "engines.png"
    options = PlanOptions(on="h800:8", picture=image)
    values, text = command.recipe(recipe(rollouts=Fleet(4)), options, tmp_path / "none")
    found = values["stages"]["zero"]["engines"]
    assert found["rate"] > 1850 and "DeepSeek, March 2025" in found["source"] and found["given"]["engines"] == 4
    assert image.stat().st_size > 5_000 and f"Picture: {image}" in text
    assert "engines" not in values["stages"]["base"]


def test_what_is_not_known_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--measured = .*no RL stage has logged a step there"):
        engines.measured(tmp_path)
    with pytest.raises(UserError, match=r"--picture = .*the engines of this recipe are unknown"):
        command.recipe(recipe(), PlanOptions(picture=tmp_path / "p.png"), tmp_path / "none")
    assert DECLARATION in config_json(recipe().stages[2])
