"""Globs find the files that Python's own glob finds, each once, and cyclic links do not loop forever."""

import glob
import json
import os
from pathlib import Path

import pytest

from finback.data import file_globs
from finback.data.sources import Files
from finback.stages.prepare import Prepare
from tests.test_data_prepare import run


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("a.txt", "b.md", "deep/c.txt", "deep/er/d.txt", "deep/er/e.md", "[odd]/f.txt", ".hidden/g.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name} is here.\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    [
        "*.txt",
        "**/*.txt",
        "**",
        "deep/**",
        "deep/**/*.md",
        "**/er/*",
        "*/**/d.txt",
        "**/**/*.txt",
        "./**/*.md",
        "**/[[]odd]/*",
    ],
)
@pytest.mark.parametrize("is_absolute", [False, True])
def test_globs_match_as_pythons_do(pattern: str, is_absolute: bool, tree: Path) -> None:
    pattern = f"{tree}/{pattern}" if is_absolute else pattern
    expected = sorted({Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()})  # noqa: PTH207
    assert file_globs.find((pattern,), "x") == (expected, {})


def test_links_that_go_round_are_named_and_end(tree: Path) -> None:
    """Two cyclic links in one folder, where Python's own glob follows 2^40 paths."""
    for name, target in {
        "deep/up": "..",
        "deep/er/up": "..",
        "deep/self": ".",
        "again": "deep",
        "x": "x",
        "y.txt": "z",
    }.items():
        (tree / name).symlink_to(target)
    found, skipped = file_globs.find(("**/*.txt",), "x")
    assert list(map(str, found)) == ["[odd]/f.txt", "a.txt", "deep/c.txt", "deep/er/d.txt"]
    assert skipped == {
        "again": "read as deep",
        "deep/up": "read as .",
        "deep/self": "read as deep",
        "deep/er/up": "read as deep",
        "y.txt": "a link that leads nowhere",
    }


def test_a_folder_behind_a_link_is_read(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    (other / "h.txt").write_text("far")
    (tree / "deep" / "far").symlink_to(other)
    assert [str(path) for path in file_globs.find(("deep/**/*.txt",), "x")[0]] == [
        "deep/c.txt",
        "deep/er/d.txt",
        "deep/far/h.txt",
    ]


def test_a_file_met_twice_is_read_once(tree: Path) -> None:
    (tree / "link.txt").symlink_to("a.txt")
    os.link("deep/c.txt", "hard.txt")
    found, skipped = file_globs.find(("a.txt", "*.txt", f"{tree}/a.txt", "deep/c.txt"), "x")
    assert list(map(str, found)) == ["a.txt", "hard.txt"]
    assert skipped == {
        "a.txt": "named twice",
        "link.txt": "read as a.txt",
        f"{tree}/a.txt": "read as a.txt",
        "deep/c.txt": "read as hard.txt",
    }


def test_prepare_names_what_it_reads_once(tree: Path) -> None:
    (tree / "deep" / "up").symlink_to("..")
    sources = (Files(("**/*.txt",), name="one"), Files(("a.txt",), name="two"))
    stage = Prepare(name="prepare", text=sources, vocab_size=300)
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finback.runs.folder.StageRun.say", lambda self, text: said.append(text))
        folder = run(stage, tree / "runs").folder
    record = json.loads((folder / "sources.json").read_text())
    assert record["one"]["skipped"] == {"deep/up": "read as ."} and "skipped" not in record["two"]
    assert record["one"]["documents"]["kept"] == 4
    assert any("one: 1 paths skipped (deep/up: read as .)" in line for line in said)
    assert any(f"two and one both read {tree}/a.txt" in line for line in said)
