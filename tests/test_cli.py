"""Bad input on the command line: exit code 2, one line with field, value and remedy, no traceback, nothing written."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import finback as front_door
from finback import __version__, extras
from finback.config import UserError
from finback.model.config import ModelConfig
from finback.report import doctor, front_page, objects
from finback.runs.recipe import load
from finback.train import compiling
from tests.toy import RECIPE, ROOT, environment, finback, write_recipe

BAD = [
    (["--set", "zero.stpes=9"], ["zero.stpes", "steps"]),
    (["--set", "zreo.steps=9"], ["zreo", "zero"]),
    (["--set", "zero.steps=many"], ["zero.steps", "many"]),
    (["--set", "zero.steps"], ["zero.steps", "stage.field=value"]),
    (["--set", "base.model.hidden_sizes=9"], ["hidden_sizes", "hidden_size"]),
    (["--set", "base.data=before"], ["before", "comes later"]),
    (["--runs", "/proc/nowhere"], ["/proc/nowhere", "--runs"]),
    (["--sets", "x"], ["--sets"]),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[" ".join(b[0]) for b in BAD])
def test_bad_options(arguments: list[str], words: list[str], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    done = finback("run", recipe, "--runs", tmp_path / "runs", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert "Traceback" not in done.stderr and all(word in done.stderr for word in words), done.stderr
    assert not (tmp_path / "runs").exists()


def test_bad_recipes(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    changes = [
        ("steps=8", "stpes=8", ["stpes", "steps", "line"]),
        (" steps=8", " steps='8'", ["zero.steps", "'8'", "int"]),
        ('start="base", exams', 'start="zero", exams', ["before input", "zero", "later"]),
        ('name="after"', 'name="before"', ["before", "two stages"]),
        ("recipe = [", "recipe = [[", ["line"]),
        ("words.txt", "words.bin", ["words.bin", "no such file"]),
    ]
    for old, new, words in changes:
        path = tmp_path / "bad.py"
        path.write_text(RECIPE.replace(old, new, 1))
        done = finback("run", path, "--runs", tmp_path / "runs", "--ranks", 1)
        assert done.returncode == 2 and "Traceback" not in done.stderr, (new, done.stderr)
        assert all(word in done.stderr for word in words), (new, done.stderr)
        assert not list((tmp_path / "runs").rglob("manifest.json"))
    done = finback("run", tmp_path / "toys.py")
    assert done.returncode == 2 and f"Did you mean '{tmp_path / 'toy.py'}'?" in done.stderr


def test_a_bad_text_file(tmp_path: Path) -> None:
    recipe, words = write_recipe(tmp_path), tmp_path / "words.txt"
    words.write_bytes(b"")
    done = finback("run", recipe, "--runs", tmp_path / "runs", "--ranks", 1)
    assert done.returncode == 2 and "empty" in done.stderr and "words.txt" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    # in this process, since each rank of a command imports torch
    for content, problem in (b"\x00\xff\xfe\x80" * 50, "UTF-8"), (b"a\0b", "NUL"):
        words.write_bytes(content)
        with pytest.raises(UserError, match=f"words.txt.*{problem}"):
            front_door.run(load(recipe).stages, tmp_path / "runs")
    assert not list((tmp_path / "runs").rglob("*.bin")) and not list((tmp_path / "runs").rglob("manifest.json"))


def test_a_run_folder_of_another_recipe_or_seed_is_left_alone(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    root = tmp_path / "runs/toy"
    root.mkdir(parents=True)
    marker = root / "recipe.json"
    marker.write_text(json.dumps({"recipe": "other", "seed": 0}))
    done = finback("run", recipe, "--runs", tmp_path / "runs")
    assert done.returncode == 2 and "other" in done.stderr and "--runs" in done.stderr
    marker.write_text(json.dumps({"recipe": "toy", "seed": 5}))
    done = finback("run", recipe, "--runs", tmp_path / "runs", "--seed", 6)
    assert done.returncode == 2 and "seed 5" in done.stderr
    assert [p.name for p in root.iterdir() if p.name != ".lock"] == ["recipe.json"]


def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finback.config import UserError
    from finback.runs import folder as run

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(run.shutil, "disk_usage", lambda path: usage._replace(free=5 * 2**20))
    with pytest.raises(UserError, match=r"only 5 MB free, 200 MB needed"):
        run.prepare_folder(tmp_path / "runs/toy")


def test_show() -> None:
    recipe = finback("show", "recipes/tiny.py", "--set", "zero.steps=7")
    assert recipe.returncode == 0 and "steps = 7" in recipe.stdout
    parsed = json.loads(finback("show", "recipes/tiny.py", "--json").stdout)
    assert [stage["type"] for stage in parsed["stages"]] == ["Prepare", "Pretrain", "Evaluate", "GRPO", "Evaluate"]


def test_show_explains_whatever_stands_in_a_recipe() -> None:
    """Knobs with defaults and comments, inherited ones too; a redefined default keeps the comment of its base class."""
    stage = finback("show", "Sparsify").stdout
    assert "index_topk: int  (must be given)\n    earlier tokens that each token will attend to" in stage
    assert "adam_lr: float = 0.001" in stage and "seq_len: Steps = 128\n    tokens per row" in stage
    assert "weight_decay: float = 0.0\n    weight decay of hidden matrices" in stage
    for name in ("Questions", "Code", "Chains", "Reward", "Objective", "Layout", "ModelConfig", "Hub", "Validation"):
        shown = json.loads(finback("show", name, "--json").stdout)
        assert shown["object"] == name and shown["doc"] and shown["knobs"], name
    everything = objects.objects()
    described = [
        objects.describe(cls.__name__) for cls in everything if cls is not ModelConfig
    ]  # its fields have Hugging Face's names
    assert [(one.name, knob.name) for one in described for knob in one.knobs if not knob.comment] == []
    assert all(objects.describe(cls.__name__).as_text() for cls in everything) and len(everything) > 35
    assert objects.describe("grpo") == objects.describe("GRPO")
    typo = finback("show", "GPRO")
    assert typo.returncode == 2 and "'GRPO'" in typo.stderr


def test_the_front_page_and_help() -> None:
    welcome = finback().stdout
    assert all(words in welcome for words in ("quickstart", "finback run recipes/tiny.py", "finback doctor"))
    assert max(map(len, welcome.splitlines())) <= 80
    assert "chat" in finback("--help").stdout and finback("help", "run").stdout == finback("run", "-h").stdout
    assert "--install-completion" in finback("help").stdout
    for arguments, words in (
        (("run",), "Missing argument 'RECIPE'. `finback help run` explains it."),
        (("serv",), "No such command 'serv'. Did you mean 'serve'? `finback help` explains them."),
        (("help", "serv"), "Did you mean 'serve'?"),
        (("run", "recipes/tyny.py"), "Did you mean 'recipes/tiny.py'?"),
        (("run", "nothing-like-it"), "recipes/tiny.py"),
    ):
        done = finback(*arguments)
        assert done.returncode == 2 and words in done.stderr, done.stderr
    assert "conftest" not in finback("run", "tests/nosuch.py").stderr  # a file without a recipe is not imported


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists every optional part, and names for each missing one a command that fits this installation."""
    monkeypatch.setattr(compiling, "why_not", lambda: "no compiler")
    monkeypatch.setattr(extras, "_is_installed", lambda package: package != "pyarrow")
    found = json.loads(finback("doctor", "--json").stdout)["findings"]
    by_name = {finding["what"]: finding for finding in found}
    assert set(extras.PURPOSES) < set(by_name) and {"GPU", "bf16", "C++ kernels", "Chromium"} < {*by_name, "GPU"}
    assert not by_name["compile"]["ok"] and "g++" in by_name["compile"]["remedy"]
    assert not by_name["data"]["ok"] and by_name["hub"]["ok"]
    assert by_name["data"]["remedy"] == f"Run: {sys.executable} -m pip install 'pyarrow>=20'"
    assert "finback[" not in json.dumps(found)
    monkeypatch.setattr(doctor, "columns", lambda: 60)
    narrow = doctor.text([doctor.Finding("bf16", False, "word " * 30, "Run: " + "x" * 90)]).splitlines()
    assert [len(line) <= 60 for line in narrow] == [True, True, True, False, True, True]  # a command is not wrapped


def test_no_message_names_a_package_that_nobody_owns() -> None:
    sources = [*(ROOT / "finback").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    named = [str(p) for p in sources if "pip install finback" in p.read_text() or "finback[" in p.read_text()]
    assert [name for name in named if not name.endswith(("extras.py", "log.md"))] == []


def test_version_and_a_reader_that_leaves() -> None:
    assert finback("--version").stdout.strip() == __version__
    for given, unbuffered in (("show recipes/tiny.py", ""), ("help", ""), ("show Questions", "1")):
        command = f"{sys.executable} -m finback {given} | head -c 1; exit ${{PIPESTATUS[0]}}"
        values = environment() | {"PYTHONUNBUFFERED": unbuffered}
        piped = subprocess.run(["bash", "-c", command], env=values, capture_output=True, text=True, cwd=ROOT)
        assert (piped.returncode, piped.stderr) == (0, ""), given


def test_streams_that_are_closed_or_know_few_letters(monkeypatch: pytest.MonkeyPatch) -> None:
    few = io.TextIOWrapper(io.BytesIO(b"caf\xc3\xa9\n"), encoding="ascii")
    monkeypatch.setattr(sys, "stdin", few)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    front_page.open_streams()
    with sys.stdout, sys.stderr, few:
        print("…", flush=True)
        assert few.readline() == "caf\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}\n"


def test_chat_without_a_model(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        done = finback("chat", path)
        assert done.returncode == 2 and str(path) in done.stderr and "runs/tiny" in done.stderr


def test_a_rank_ends_without_taking_the_interpreter_down() -> None:
    """A rank exits with 0 even if its process would die by a signal at exit, as with threads that hold tensors."""
    code = "import atexit, os; atexit.register(os.abort); from finback.cli import main; main()"
    for rank, expected in (({"RANK": "1"}, 0), ({}, -6)):
        done = subprocess.run([sys.executable, "-c", code, "--version"], env=environment() | rank, capture_output=True)
        assert (done.returncode, done.stdout.decode().strip()) == (expected, __version__)
