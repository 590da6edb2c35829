"""The ledger: cost by purpose, hardware and inputs, and energy where the machine can measure it."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finback.model.count import forward_flops, recomputed_flops, token_flops, training_flops
from finback.parallel.mesh import World
from finback.planner import plan_vs_actual, recipe_plan
from finback.planner.options import PlanOptions
from finback.runs import energy as counters
from finback.runs import ledger, provenance
from finback.runs.files import read_lines, write_json, write_lines
from finback.runs.folder import StageRun
from finback.runs.ledger import cost, spent
from finback.runs.reader import StageFolder
from finback.runs.recipe import config_json, load
from tests.toy import CONFIG, ROOT

TURN = 262_143_328_850  # µJ of a real package counter


def powercap(root: Path, **counters: int) -> Path:
    """A folder in the kernel's layout; maps the names of zones to their µJ."""
    for number, (name, value) in enumerate(counters.items()):
        folder = root / f"intel-rapl:{number}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "name").write_text(f"{name.replace('_', '-')}\n")
        (folder / "max_energy_range_uj").write_text(f"{TURN}\n")
        (folder / "energy_uj").write_text(f"{value}\n")
    return root


def test_joules_are_those_of_packages_and_memory(tmp_path: Path) -> None:
    energy = counters.Energy(powercap(tmp_path, package_0=5_000_000, core=1, dram=1_000_000, psys=7))
    powercap(tmp_path, package_0=8_000_000, core=900_000_000, dram=1_500_000, psys=900_000_000)
    assert energy.take() == 3.5 and energy.take() == 0
    assert energy.method == "RAPL of processor packages and memory"


def test_a_counter_that_turns_over_counts_on(tmp_path: Path) -> None:
    energy = counters.Energy(powercap(tmp_path, package_0=TURN - 2_000_000))
    powercap(tmp_path, package_0=1_000_000)
    assert energy.take() == 3


def test_a_counter_that_nobody_looked_at_for_too_long_is_not_believed(tmp_path: Path) -> None:
    energy = counters.Energy(powercap(tmp_path, package_0=0))
    energy.read(energy.at + 200)  # 262 kJ at 1,000 W take 262 s
    assert energy.certain
    energy.read(energy.at + 300)
    assert energy.take() is None
    assert energy.take() == 0, "the next reading counts again"


@pytest.mark.parametrize("broken", ["energy_uj", "name", "max_energy_range_uj"])
def test_a_machine_that_cannot_be_asked_meters_nothing(broken: str, tmp_path: Path) -> None:
    root = powercap(tmp_path, package_0=1)
    (root / "intel-rapl:0" / broken).unlink()
    assert counters.Energy(root).take() is None and counters.Energy(tmp_path / "none").take() is None


class Gpus:
    """Replaces torch with two GPUs, and pynvml, whose counters count millijoules."""

    cuda: Any

    def __init__(self) -> None:
        self.cuda, self.millijoules = self, {"GPU-a": 1000, "GPU-b": 5000}

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 2

    def get_device_name(self, number: int) -> str:
        return f"H{number}00"

    def get_device_properties(self, number: int) -> SimpleNamespace:
        return SimpleNamespace(uuid="ab"[number])

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        return self.millijoules[handle]


def test_joules_of_gpus_are_added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus()
    monkeypatch.setattr(counters, "cuda", lambda: gpus)
    monkeypatch.setattr(provenance, "cuda", lambda: gpus)
    monkeypatch.setitem(sys.modules, "pynvml", gpus)
    energy = counters.Energy(powercap(tmp_path, package_0=0))
    powercap(tmp_path, package_0=2_000_000)
    gpus.millijoules = {"GPU-a": 1500, "GPU-b": 8000}
    assert energy.take() == 2 + 0.5 + 3
    assert energy.method == "RAPL of processor packages and memory and NVML of 2 GPUs"
    assert provenance.machine()["gpus"] == ["H000", "H100"]
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert counters.Energy(tmp_path / "none").take() is None


def test_the_commit_of_a_recipe_and_whether_it_was_changed(tmp_path: Path) -> None:
    assert provenance.commit(tmp_path) is None
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    recipe = tmp_path / "mine.py"
    recipe.write_text("recipe = []")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout
    assert provenance.commit(recipe) == {"commit": head.strip(), "dirty": False}
    recipe.write_text("recipe = [1]")
    assert provenance.commit(recipe) == {"commit": head.strip(), "dirty": True}


def stage_run(root: Path) -> StageRun:
    run = StageRun(root, "a", 0, World(), quiet=True)
    run.folder.mkdir()
    return run


def test_a_stage_writes_what_it_is_made_with_and_from(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write_json(tmp_path / "base" / "manifest.json", {"stage": "base"})
    run = stage_run(tmp_path)
    run.begin(None, ("base", "nowhere"))
    (line,) = read_lines(run.folder / "ledger.jsonl")
    assert line["software"]["torch"] and line["software"]["finback"] and line["machine"]["cpu"]
    assert len(line["inputs"]["base"]) == 64 and line["inputs"]["nowhere"] is None
    assert line["commit"] is None and line["dirty"] is None, "without a recipe file there is no commit"
    assert spent(run.folder) == {"seconds": 0.0, "core_seconds": 0.0}, "text entries are not summed"


def test_flops_are_told_apart_by_purpose(tmp_path: Path) -> None:
    run = stage_run(tmp_path)
    run.account(flops=3.0, flops_training=2.0, flops_generation=1.0)
    run.account(flops_training=2.0)
    assert cost(run.folder)["flops_by"] == {"training": 4.0, "generation": 1.0}
    assert cost(run.folder)["flops"] == 3.0
    with pytest.raises(AssertionError, match="unknown purpose"):
        run.account(flops_of_something=1.0)


def test_metered_energy_takes_the_place_of_the_estimate(tmp_path: Path) -> None:
    text = (
        '{"seconds": 0, "cores": 2, "metered": "RAPL"}\n{"seconds": 10, "cores": 2, "joules": 500, "metered_core_seconds": 20}\n'
        '{"seconds": 30, "cores": 2}\n'
    )
    (tmp_path / "ledger.jsonl").write_text(text)
    told = cost(tmp_path)
    # 500 J measured, and 60 core-seconds at 12 W that were not measured
    assert told["energy_wh"] == round((500 + 60 * 12) / 3600, 3)
    assert "energy of 25% of the time metered by RAPL" in told["basis"]
    assert told["device_hours"] == 80 / 3600


def test_a_run_meters_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = powercap(tmp_path / "powercap", package_0=0)
    real = counters.Energy
    monkeypatch.setattr("finback.runs.folder.Energy", lambda: real(root))
    run = stage_run(tmp_path)
    run.begin(None, ())
    powercap(root, package_0=7_000_000)
    run.account(tokens_trained=5)
    total: dict[str, Any] = spent(run.folder)
    assert total["joules"] == 7 and total["metered_core_seconds"] == total["core_seconds"] > 0


def test_what_is_made_again_is_the_attention_or_the_blocks() -> None:
    again = {policy: recomputed_flops(CONFIG, 16, policy) for policy in ("none", "attention", "block")}
    p = token_flops(CONFIG, 16, mtp=True)
    assert again["none"] == 0
    assert again["attention"] == p.attention_linear + p.attention_scores
    assert again["block"] == p.total - p.head - p.join < forward_flops(CONFIG, 16, mtp=True)
    assert 3 * again["block"] < training_flops(CONFIG, 16)


@pytest.mark.parametrize("name", ["tiny", "r1"])
def test_stages_out_of_their_config_are_planned_as_the_recipe_is(name: str, tmp_path: Path) -> None:
    recipe = load(ROOT / "recipes" / f"{name}.py")
    for stage in recipe.stages:
        (tmp_path / stage.name).mkdir()
        write_json(tmp_path / stage.name / "config.json", config_json(stage))
        (tmp_path / stage.name / "ledger.jsonl").write_text('{"seconds": 2, "cores": 2, "tokens_trained": 7}\n')
    write_json(tmp_path / "summary.json", {"recipe": name, "stages": {s.name: {} for s in recipe.stages}})
    found = plan_vs_actual.plan_and_actual(tmp_path, tmp_path / "no-calibration.json")["stages"]
    wanted = recipe_plan.plan(recipe, PlanOptions(), None, 2)["stages"]
    assert any(stage["flops"] for stage in wanted.values())
    at_once = plan_vs_actual.planned(
        tmp_path, tmp_path / "no-calibration.json"
    )  # the plan that the page shows of a running recipe
    assert at_once == {
        name: {k: plan[k] for k in plan_vs_actual.SPENT if plan.get(k) is not None} for name, plan in wanted.items()
    }
    for stage_name, planned in wanted.items():
        assert found[stage_name]["plan"] == {k: planned.get(k) for k in plan_vs_actual.SPENT}
        assert found[stage_name]["actual"] == {
            "tokens_trained": 7,
            "tokens_generated": 0,
            "flops": 0,
            "seconds": 2,
            "dollars": 0.00004,
        }


def test_a_folder_that_cannot_be_planned_still_shows_its_ledger(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    other = {"type": "ModelConfig", "of": "another version"}
    write_json(tmp_path / "a" / "config.json", {"type": "Pretrain", "name": "a", "model": other})
    write_json(tmp_path / "summary.json", {"recipe": "old", "stages": {"a": {}}})
    (tmp_path / "torn.json").write_text("{")
    found = plan_vs_actual.plan_and_actual(tmp_path, tmp_path / "torn.json")
    assert found["stages"]["a"]["plan"] is None and found["stages"]["a"]["actual"]["seconds"] == 0
    damaged, unplanned = found["notes"]
    assert "damaged" in damaged and unplanned.startswith("no plan: ")
    assert "note: no plan: " in plan_vs_actual.text(found)


def test_a_counter_that_was_reset_adds_nothing(tmp_path: Path) -> None:
    for before, after, gap in (
        (200_000_000_000, 0, 1),
        (200_000_000_000, 5_000_000, 100),
        (90, 0, 60),
        (1 << 37, 7, 0),
    ):
        energy = counters.Energy(powercap(tmp_path, package_0=before))
        powercap(tmp_path, package_0=after)
        energy.read(energy.at + gap)
        assert energy.joules == 0 and energy.take() is None, "a reset counter gives no measurement"
        powercap(tmp_path, package_0=after + 2_000_000)
        assert energy.take() == 2, "it must count on from its new value"
    energy = counters.Energy(powercap(tmp_path, package_0=TURN - 9_000_000_000))
    powercap(tmp_path, package_0=6_000_000_000)
    energy.read(energy.at + 60)
    assert energy.certain and energy.joules == 15_000, "250 W over the turn"
    energy = counters.Energy(powercap(tmp_path, package_0=0))
    powercap(tmp_path, package_0=150_000_000_000)
    energy.read(energy.at + 60)
    assert energy.take() is None, "2,500 W is impossible"
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("-5\n")
    assert energy.take() is None


@pytest.mark.parametrize("later", [400, 10**9, None])
def test_a_gpu_that_was_reset_or_lost_adds_nothing(
    later: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = Gpus()
    monkeypatch.setattr(counters, "cuda", lambda: gpus)
    monkeypatch.setitem(sys.modules, "pynvml", gpus)
    energy = counters.Energy(tmp_path / "none")
    gpus.millijoules = {"GPU-b": 6000} | ({} if later is None else {"GPU-a": later})
    energy.read()
    assert energy.joules == 1 and energy.take() is None
    gpus.millijoules["GPU-a"] = 3000
    energy.read()
    gpus.millijoules["GPU-a"] = 5000
    energy.take()
    gpus.millijoules["GPU-a"] = 6000
    assert energy.take() == 1


def test_energy_follows_cpu_time_and_not_the_load_of_the_machine(tmp_path: Path) -> None:
    quiet, loaded = ({"seconds": s, "cores": 2, "cpu_seconds": 390.0} for s in (200.0, 380.0))
    for name, line in (("quiet", quiet), ("loaded", loaded)):
        (tmp_path / name).mkdir()
        write_lines(tmp_path / name / "ledger.jsonl", [line])
    assert cost(tmp_path / "quiet")["energy_wh"] == cost(tmp_path / "loaded")["energy_wh"] == 390 * 12 / 3600
    assert ledger.watt_hours([{"seconds": 300.0, "cores": 2}]) == 2, "an older ledger has only wall time"
    half = {"seconds": 10.0, "cores": 2, "joules": 36, "metered_core_seconds": 10.0, "cpu_seconds": 6.0}
    assert ledger.watt_hours([half]) == pytest.approx((36 + 3 * 12) / 3600)


def test_cpu_time_is_that_of_the_process_and_of_its_children(tmp_path: Path) -> None:
    run, other = stage_run(tmp_path), counters.CpuTime([("elsewhere", 1)])
    assert other.take() is None, "no counter exists here"
    run.begin(None, ())
    began = sum(os.times()[:4])
    subprocess.run([sys.executable, "-S", "-c", "sum(range(2_000_000))"], check=True)
    sum(range(1_000_000))
    run.account()
    mine = sum(os.times()[:4]) - began
    busy = read_lines(run.folder / "ledger.jsonl")[-1]["cpu_seconds"]
    assert busy > 0 and abs(busy - mine) < 0.15, "within ticks of 10 ms"
    twice = counters.CpuTime([(platform.node(), os.getpid()), ("elsewhere", 7)])
    assert twice.share == 0.5, "a remote rank counts like a local one"


BAD = ("-5", "NaN", "Infinity", "-Infinity", "1e999", '"7"', "null", "true", "[1]", "1" + "0" * 400)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("key", ["joules", "seconds", "cores", "tokens_trained", "flops_training", "cpu_seconds"])
def test_an_amount_that_cannot_be_is_left_out_and_said(key: str, value: str, tmp_path: Path) -> None:
    good = '{"seconds": 10, "cores": 2, "metered_core_seconds": 20, "joules": 500, "tokens_trained": 7, "flops_training": 3}'
    (tmp_path / "ledger.jsonl").write_text(f'{good}\n{{"metered": "", "{key}": {value}}}\n')
    found, told = ledger.read(tmp_path), cost(tmp_path)
    (fault,) = found.faults
    assert fault.startswith(f"line 2 of ledger.jsonl says {key} = ") and fault in told["basis"]
    assert told["energy_wh"] == round(500 / 3600, 3) and told["tokens_trained"] == 7
    assert StageFolder(tmp_path, {}).ledger() == found.lines and StageFolder(tmp_path, {}).ledger_faults == [fault]


def test_torn_lines_are_said_but_for_the_last(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    deep = "[" * 100_000
    path.write_bytes(
        b'{"seconds": 3, "cores": 1}\n{"seconds": 4, "co\n[]\n\xff\xfe\n' + deep.encode() + b'\n{"seconds": 5'
    )
    assert cost(tmp_path)["wall_seconds"] == 3
    assert [fault.split(" of")[0] for fault in ledger.read(tmp_path).faults] == [f"line {n}" for n in (2, 3, 4, 5)]
    path.write_text("7" * 5000 + "\n")
    assert cost(tmp_path)["wall_seconds"] == 0


def test_energy_without_its_gpus_says_so(tmp_path: Path) -> None:
    began: dict[str, Any] = {"seconds": 3.0, "cores": 1, "machine": {"gpus": ["H200"]}, "metered": ""}
    for metered, said in (("", True), ("RAPL of processor packages and memory", True), ("NVML of 1 GPUs", False)):
        write_lines(tmp_path / "ledger.jsonl", [began | {"metered": metered}])
        assert ("GPUs is NOT included" in cost(tmp_path)["basis"]) == said
    write_lines(tmp_path / "ledger.jsonl", [began | {"machine": {"gpus": []}}, {"machine": "old"}])
    assert "GPUs" not in cost(tmp_path)["basis"]
