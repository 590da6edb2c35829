"""`finback plan` on the command line: fast answers without torch, one JSON object, figures, clear refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finback.config import UserError
from finback.parallel.schedules import SCHEDULES
from finback.planner import command, picture, presets
from finback.planner.options import PlanOptions
from finback.planner.simulate import Durations, simulate
from tests.toy import ROOT, environment, finback, finback_process, write_recipe

V3 = ("plan", "V3", "--on", "h800:2048")
PUBLISHED = (*V3, "--mesh", "pp=16,ep=64", "--schedule", "dualpipe")


def test_the_671b_preset_answers_without_torch() -> None:
    code = (
        "import sys; sys.argv = ['finback', 'plan', 'v3', '--on', 'h800:2048']\n"
        "from finback import cli\n"
        "try: cli.main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules and 'matplotlib' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0 and "671,026,419,200" in done.stdout, done.stderr


def test_v3_as_published(tmp_path: Path) -> None:
    image = tmp_path / "v3.png"
    done = finback(*PUBLISHED, "--json", "--picture", image)
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert set(values) == {
        "model",
        "machine",
        "assumptions",
        "batch",
        "layout",
        "memory",
        "step",
        "schedules",
        "run",
        "serving",
        "skew",
        "remarks",
        "published",
        "picture",
    }
    assert values["layout"]["mesh"] == "pp=16,dp=128,ep=64,zero=1" and values["layout"]["recompute"] == "selective"
    assert values["memory"]["fits"] and values["memory"]["free_share"] >= 0.1
    assert all(abs(claim["off"]) < 0.1 and claim["rule"] for claim in values["published"])
    assert values["run"]["dollars"] == pytest.approx(5.328e6, rel=0.1)  # V3's table 1, pre-training
    assert all(fact["source"] for fact in values["machine"]["facts"].values())
    assert image.read_bytes().startswith(b"\x89PNG")


def test_1f1b_without_recomputation_does_not_fit() -> None:
    done = finback(*V3, "--mesh", "pp=16,ep=64", "--schedule", "1f1b", "--recompute", "none")
    assert done.returncode == 0 and "DOES NOT FIT" in done.stdout


def test_price_and_tokens() -> None:
    arguments = (*PUBLISHED, "--json", "--tokens", "1T", "--price")
    cheap, dear = (json.loads(finback(*arguments, price).stdout)["run"] for price in ("1", "3"))
    assert dear["dollars"] == pytest.approx(3 * cheap["dollars"]) and cheap["tokens"] == 1e12
    assert cheap["dollars"] == pytest.approx(180e3, rel=0.1)


BAD = [
    ((*V3, "--price", "-1"), ["--price", "-1"]),
    ((*V3, "--price", "nan"), ["--price", "nan"]),
    (("plan", "v3", "--on", "h900:8"), ["h900", "Did you mean 'h800'?"]),
    (("plan", "v3", "--on", "h800:0"), ["h800:0", "not a number of devices"]),
    (("plan", "v3", "--on", "h800:many"), ["many"]),
    ((*V3, "--mesh", "pp=15"), ["--mesh", "2048 devices"]),
    ((*V3, "--mesh", "pp=16,tp=8"), ["tensor parallelism", "not supported"]),
    ((*V3, "--mesh", "pp=16,ep=48"), ["48", "256 experts"]),
    ((*V3, "--schedule", "dualpip"), ["dualpip", "Did you mean 'dualpipe'?"]),
    ((*V3, "--recompute", "some"), ["some", "selective"]),
    ((*V3, "--precision", "fp4"), ["fp4", "fp8"]),
    (("plan", "small", "--on", "a100", "--precision", "fp8"), ["a100", "no FP8"]),
    ((*V3, "--tokens", "lots"), ["lots", "14.8T"]),
    ((*V3, "--tokens", "-1T"), ["-1T"]),
    ((*V3, "--rows", "-4"), ["--rows", "-4"]),
    ((*V3, "--skew", "-1"), ["--skew"]),
    ((*V3, "--assume", "puee=1"), ["puee", "Did you mean 'pue'?"]),
    (("plan", "v3"), ["--on", "h800:2048"]),
    (("plan", "v33", "--on", "h800:8"), ["v33", "Did you mean 'v3'?"]),
    (("plan",), ["nothing to plan", "--calibrate"]),
    (("plan", "recipes/tinny.py"), ["tinny.py", "tiny.py"]),
    (("plan", "tiny", "--on", "4090", "--length", "5000"), ["--length", "1024"]),
    (("plan", "recipes/tiny.py", "--calibration", "README.md"), ["README.md", "damaged"]),
    (("plan", "recipes/tiny.py", "--calibration", "nowhere.json"), ["nowhere.json", "--calibrate"]),
    (("plan", "tiny", "--on", "4090", "--picture", "x.png"), ["--picture", "no pipeline"]),
    ((*V3, "--picture", "x.doc"), ["--picture", ".png"]),
    ((*V3, "--picture", "/nowhere/x.png"), ["--picture", "no such folder"]),
]


def test_bad_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Runs in one process; the next test starts a process for what needs one."""
    from finback import cli

    for arguments, expected in BAD:
        monkeypatch.setattr(sys, "argv", ["finback", *arguments])
        monkeypatch.chdir(ROOT)
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        assert end.value.code == 2 and said.out == "", (arguments, said.out)
        assert "Traceback" not in said.err and all(word in said.err for word in expected), (arguments, said.err)
        assert len(said.err.splitlines()) == 1


def test_a_refusal_is_one_line_and_exit_code_2() -> None:
    done = finback(*V3, "--price", "-1")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1


def test_a_recipe_on_this_machine_and_on_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = write_recipe(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    here = finback("plan", recipe, "--json", "--set", "zero.steps=4")
    assert here.returncode == 0, here.stderr
    values = json.loads(here.stdout)
    assert values["stages"]["zero"]["tokens_trained"] == 4 * 4 * 4 * 12 and "calibrate" in values["notes"][0]
    said = finback("plan", recipe, "--on", "h800:8").stdout
    assert (
        "Where the numbers are from (change one with --assume NAME=VALUE):" in said and "launch 5e-06: assumed" in said
    )
    assert (
        "note: base, before, zero, after: the efficiency comes from V3" in said
        and ": rough: FLOPs at the training rate" in said
    )
    away = finback("plan", recipe, "--on", "h800:8", "--json")
    values = json.loads(away.stdout)
    zero = values["stages"]["zero"]
    # 8 steps of 12 tokens and an update, in sequence, through 2 layers and 1 MTP module of 40 kernels of 5 us
    assert zero["seconds"] == pytest.approx(8 * (12 + 3) * 3 * 40 * 5e-6)
    assert (zero["tokens_generated"] + zero["tokens_trained"]) / zero["seconds"] < 1e6
    assert values["machine"]["facts"]["bf16"]["source"] and values["assumptions"]["efficiency"]["source"]
    away = finback("plan", recipe, "--on", "4090", "--price", "0.5", "--json")
    values = json.loads(away.stdout)
    assert values["stages"]["base"]["plan"]["memory"]["fits"] and values["total"]["dollars"] > 0
    assert not list(tmp_path.rglob("manifest.json"))  # a plan runs nothing


LAID_OUT = """
from finback.data.sources import Chitchat
from finback.model.config import TINY
from finback.parallel.layout import Layout
from finback.stages.prepare import Prepare
from finback.stages.pretrain import Pretrain

recipe = [
    Prepare(name="prepare", text=(Chitchat(),)),
    Pretrain(
        name="base", data="prepare", model=TINY, mixture={"chitchat": 1.0}, batch_size=16, recompute="attention",
        layout=Layout(pp=2, dp=2, ep=2, schedule="%s", micro_batches=4, sharding="zero1"),
    ),
]
"""


def test_a_recipes_own_layout_is_planned(tmp_path: Path) -> None:
    recipe = tmp_path / "laid.py"
    recipe.write_text(LAID_OUT % "zb1p")
    done = finback("plan", recipe, "--on", "h100:4", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["stages"]["base"]["plan"]["layout"]
    assert found["mesh"] == "pp=2,dp=2,ep=2,zero=1" and found["given"]
    assert (found["schedule"], found["recompute"], found["optimizer"]) == ("zb1p", "attention", "muon")
    other = finback("plan", recipe, "--on", "h100:4", "--mesh", "fsdp=4", "--schedule", "1f1b", "--json")
    assert json.loads(other.stdout)["stages"]["base"]["plan"]["layout"]["mesh"] == "pp=1,dp=4,ep=1,zero=3"
    wrong = finback("plan", recipe, "--on", "h100:8")
    assert wrong.returncode == 2 and "has 4 ranks, not 8" in wrong.stderr and wrong.stderr.count("\n") == 1


def test_v3s_recipe_is_planned_and_does_not_run(tmp_path: Path) -> None:
    # V3's own recomputation; V3 kept its average of the weights on the CPU; here only block recomputation leaves room
    command = "plan", "recipes/v3.py", "--on", "h800:2048", "--recompute", "selective", "--json"
    values = json.loads(finback(*command, "--mesh", "pp=16,ep=64", "--schedule", "dualpipe").stdout)
    post_training = 5e3 * 2
    assert values["total"]["dollars"] + post_training == pytest.approx(5.576e6, rel=0.1)
    assert values["stages"]["extend-128k"]["refused"], "480 rows do not divide among 128 ranks"
    # with its own layouts, which split the rows of the extensions over ranks, every phase is planned step by step
    own = json.loads(finback(*command).stdout)
    phases = [own["stages"][name] for name in ("pretrain", "extend-32k", "extend-128k")]
    assert all(phase["how"] == "step by step" for phase in phases)
    assert [phase["layout"] for phase in phases] == [
        f"pp=16,dp={dp},{cp}ep=64,zero=1" for dp, cp in ((128, ""), (16, "cp=8,"), (4, "cp=32,"))
    ]
    assert own["total"]["dollars"] + post_training == pytest.approx(5.576e6, rel=0.03)
    run = finback("run", ROOT / "recipes" / "v3.py", "--runs", tmp_path, "--ranks", 1)
    assert run.returncode == 2 and "can be planned, not run" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize("name", sorted(SCHEDULES))
def test_pictures(name: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule.svg"
    picture.draw(simulate(SCHEDULES[name].table(4, 8), Durations(1, 2, 1, 2.5)), f"{name} on 4 ranks", path)
    text = path.read_text(encoding="utf-8")
    assert f"{name} on 4 ranks" in text and ("backward, weights" in text) == SCHEDULES[name].splits


def test_presets_are_found_whatever_their_case() -> None:
    assert presets.find("V2_Lite") is presets.PRESETS["v2-lite"]
    for name, preset in presets.PRESETS.items():
        values, text = command.preset(PlanOptions(what=name, on="h800:2048", rows=4096, price=1.0))
        assert values["model"]["name"] == preset.name and "GFLOPs to train" in text


def test_counts_of_tokens() -> None:
    assert presets.count("14.8T", "--tokens") == 14.8e12 and presets.count("2e6", "--tokens") == 2e6
    for text in ("", "T", "1e30", "0", "1X"):
        with pytest.raises(UserError, match="--tokens"):
            presets.count(text, "--tokens")


@pytest.mark.slow
def test_calibration_at_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    ranks = str(min(2, os.cpu_count() or 1))
    done = finback_process("plan", "recipes/tiny.py", "--calibrate", "--calibration", path, "--ranks", ranks, "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)
    assert values["stages"]["base"]["step_seconds"] > 0 and values["total"]["dollars"] > 0
    assert json.loads(path.read_text(encoding="utf-8"))["seconds"] < 60
