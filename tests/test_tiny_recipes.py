"""The recipes of V3.2, V4 and long texts from end to end, at a size of seconds."""

import subprocess
import sys
from pathlib import Path

import pytest

from finback.runs.files import read_json
from finback.runs.recipe import load
from tests.documents import small_corpus, toy_settings
from tests.toy import ROOT, environment, finback


def run(name: str) -> Path:
    """A finished run of a recipe in the working directory, on a few of the packaged dialogues."""
    recipe, packages = ROOT / "recipes" / name, Path("packages").absolute()
    if not packages.is_dir():
        small_corpus(Path.cwd())
    command = [sys.executable, "-m", "finback", "run", str(recipe), "--ranks", "1", *toy_settings(recipe)]
    paths = environment() | {"PYTHONPATH": f"{packages}:{ROOT}"}
    done = subprocess.run(command, env=paths, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return Path("runs") / recipe.stem


@pytest.mark.slow
def test_sparse_roads_run_behind_the_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """V3.2's starts from the quickstart's model, V4's reads its text."""
    monkeypatch.chdir(tmp_path)
    run("tiny.py")
    for name, kind in (("v32_tiny.py", "DeepseekV32ForCausalLM"), ("v4_tiny.py", "DeepseekV4ForCausalLM")):
        folder = run(name)
        results = read_json(folder / "after" / "manifest.json")["results"]
        assert [exam["n"] for exam in results["evaluations"]] == [4, 4]
        exported = finback("export", folder, Path("out") / name)
        assert exported.returncode == 0, exported.stderr
        assert read_json(Path("out") / name / "config.json")["architectures"] == [kind]


@pytest.mark.slow
def test_a_needle_is_asked_for_in_texts_of_eight_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense short rows, dense long ones, indexers alone, then sparse; both models take the exams of all lengths."""
    monkeypatch.chdir(tmp_path)
    folder = run("long.py")
    lengths = [stage.seq_len for stage in load(ROOT / "recipes/long.py").stages if hasattr(stage, "seq_len")]
    assert lengths == [62, 510, 510, 510]
    for name, topk in (("longer", 0), ("sparse", 32)):
        config = read_json(folder / name / "model.json")
        assert config["index_topk"] == topk and config["max_position_embeddings"] == 512
    for name in ("dense-exam", "sparse-exam"):
        exams = read_json(folder / name / "manifest.json")["results"]["evaluations"]
        assert [exam["exam"] for exam in exams] == ["1 x", "2 x", "4 x", "8 x"] and all(e["n"] == 4 for e in exams)
