"""Every command and code block in README, guides, concepts and cookbook runs, and prints what the page shows.

`make test-slow` runs this; tests/documents.py explains how pages are run. A fast test checks that pages can be run.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import SHELLS, Reader, blocks, small_corpus, toy_settings
from tests.toy import ROOT

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*/*.md"))]
WITH_BLOCKS = [page for page in PAGES if blocks(page)]
# names that pages use for the reader's own checkpoint
MODELS = ("Qwen2.5-0.5B", "Qwen2.5-7B", "DeepSeek-R1-Distill-Qwen-1.5B", "PATH/TO/MODEL")

NOTEBOOKS = ROOT / ".venv/notebooks/bin/python"
MADE = (
    "finback run recipes/tiny.py",
    "finback export runs/tiny model",
    "finback export runs/tiny model.gguf --format gguf",
)


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_blocks_say_what_becomes_of_them(page: Path) -> None:
    """A block in a language that cannot run has a file name or a reason."""
    for block in blocks(page):
        keys = {key for key, _ in block.said}
        known = {"file", "output", "output, other numbers", "with", "where", "before", "exit", "not run"}
        assert keys <= known, f"{page.name}:{block.line}"
        assert block.language in ("python", *SHELLS) or keys & {"file", "not run"}, f"{page.name}:{block.line}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the recipes, a quickstart of toy size and copies of its model under the names that pages use."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(small_corpus(folder))
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        reader = Reader(folder)
        for command in MADE:
            reader.shell(command, "")
            assert reader.code == 0, reader.printed
        for name in MODELS:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(folder / "model")
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_page_does_what_it_says(page: Path, world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "reader"
    shutil.copytree(world, folder, symlinks=True)
    reader = Reader(folder)
    try:
        reader.read(page)
    finally:
        reader.stop()


@pytest.mark.slow
@pytest.mark.skipif(not NOTEBOOKS.is_file(), reason="make test-slow makes the environment of the notebooks")
def test_notebooks_run(world: Path, tmp_path: Path) -> None:
    """Runs every cell of every notebook on the toy-size quickstart."""
    folder = tmp_path / "reader"
    shutil.copytree(world, folder, symlinks=True)
    small = tuple(toy_settings(folder / "recipes/tiny.py")[1::2])
    settings = ("--set", f"SETTINGS = {small!r}", "--set", "EPOCHS, STEPS = 1, 1")
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    assert len(paths) == 3
    command = [NOTEBOOKS, ROOT / "scripts/notebooks.py", folder, *paths, *settings]
    done = subprocess.run(command, env=Reader(folder).environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
