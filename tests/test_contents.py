"""A resumed run continues with the files and code that it began with, or reports that they changed."""

import os
import subprocess
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from finback.config import UserError
from finback.data.clean import CleaningRules
from finback.data.corpus import Corpus, ExecutorConfig
from finback.data.sources import Files, Hub
from finback.hub import HubRows
from finback.parallel.mesh import World
from finback.runs.contents import code_digest
from finback.runs.files import read_json
from finback.runs.folder import StageRun, prepare_folder
from finback.runs.recipe import Recipe, Stage, claim, execute, load
from finback.tasks.code import Code
from finback.tasks.questions import Questions
from finback.tasks.task import Task
from tests.toy import environment


@dataclass(frozen=True, kw_only=True)
class Reads(Stage):
    """Lists the files that it reads and does nothing with them."""

    task: Task | None = None
    text: tuple[Files | Hub, ...] = field(default_factory=tuple)

    def run(self, run: StageRun) -> dict[str, Any]:
        return {}


def begin(root: Path, *stages: Stage) -> None:
    prepare_folder(root)
    plan = Recipe("reads", stages)
    claim(plan, root, 0)
    execute(plan, root, 0, World(), watch=lambda run: None, quiet=True)


LINE = '{"question": "4+5?", "answer": "9"}\n'


def test_a_changed_file_is_refused_when_a_run_goes_on(tmp_path: Path) -> None:
    path, runs = tmp_path / "mine.jsonl", tmp_path / "runs"
    for name, stage, knob in (
        ("a", Reads(name="reads", task=Questions(str(path))), "task.source"),
        ("b", Reads(name="reads", task=Code(str(path))), "task.path"),
        ("c", Reads(name="reads", text=(Files((f"{tmp_path}/*.jsonl",)),)), "text.0.paths"),
    ):
        path.write_text(LINE)
        begin(runs / name, stage)
        config = read_json(runs / name / "reads" / "config.json")
        path.touch()
        begin(runs / name, stage)
        path.write_text(LINE.replace("9", "8"))
        with pytest.raises(
            UserError, match=rf"^reads\.{knob} = 'sha256 .*': the content has changed since .* delete that"
        ):
            begin(runs / name, stage)
        path.write_text(LINE)
        begin(runs / name / "again", stage)
        assert read_json(runs / name / "again" / "reads" / "config.json") == config
        path.unlink()  # a finished stage no longer needs it
        begin(runs / name, stage)


def test_a_data_set_of_the_hub_that_moved_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares commits, online or in the cache; if the commit is unknown, as without a network, a run continues."""
    commits: list[str | None] = ["a" * 40]
    asked: list[Any] = []

    def load_dataset_builder(name: str, subset: str | None, **given: str | None) -> Any:
        asked.append((name, subset, given["revision"]))
        if commits[0] is None:
            raise ConnectionError("no network")
        return types.SimpleNamespace(hash=commits[0])

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset_builder=load_dataset_builder))
    stages = Reads(name="reads", task=Questions("hub:openai/gsm8k", subset="main"), text=(Hub("a/b@v1"),))
    begin(tmp_path / "runs", stages)
    assert asked == [("openai/gsm8k", "main", None), ("a/b", None, "v1")]
    commits[0] = None
    begin(tmp_path / "runs", stages)
    commits[0] = "b" * 40
    text = r"^reads\.task\.source = 'commit b{12}': the content has changed since .*reads was made, commit a{12}\."
    with pytest.raises(UserError, match=text):
        begin(tmp_path / "runs", stages)


def test_a_folder_read_as_a_data_set_is_known_by_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "train.jsonl").write_text(LINE)
    source = Hub(str(folder))
    assert [document.messages[1].content for document in source.documents()] == ["9"]
    begin(tmp_path / "runs", Reads(name="reads", text=(source,)))
    (folder / "train.jsonl").touch()
    begin(tmp_path / "runs", Reads(name="reads", text=(source,)))
    prepare = Corpus(StageRun(tmp_path, "prepare", 0, World(), quiet=True), CleaningRules(), None, ExecutorConfig())
    prepare.stage_run.folder.mkdir()
    assert [prepare.claim([source]) for _ in range(2)] == [False, True]
    (folder / "train.jsonl").write_text(LINE.replace("9", "8"))
    assert not prepare.claim([source]), "the partial output of a call on other rows is not reused"
    assert [document.messages[1].content for document in source.documents()] == ["8"]
    with pytest.raises(UserError, match=r"^reads\.text\.0\.path = 'sha256 .*': the content has changed since"):
        begin(tmp_path / "runs", Reads(name="reads", text=(source,)))


def test_another_commit_than_was_asked_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = types.SimpleNamespace(cache_files=[{"filename": f"/cache/a___b/default/0.0.0/{'c' * 40}/b-train.arrow"}])
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=lambda *_, **__: rows))
    assert HubRows("a/b@main").load("x") is HubRows("a/b@" + "c" * 40).load("x") is rows
    with pytest.raises(UserError, match=r"^x = 'a/b@d+': the cache has commit c{12}, not d{12}\."):
        HubRows("a/b@" + "d" * 40).load("x")


RECIPE = '''
import re
from tests.test_contents import Reads
from finback.tasks.questions import Questions
from finback.tasks.math import Chains
from dataclasses import dataclass

WORD = re.compile("[0-9]+")
LIMIT = 3

def number(text):
    found = WORD.findall(text)
    return int(found[-1]) if found and len(found[-1]) in {1, 2, LIMIT} else None

def check(record, answer):
    """Whether it is right."""
    return number(answer) == number(record["answer"])

@dataclass(frozen=True)
class Mine(Chains):
    def check(self, problem, answer):
        return super().check(problem, answer.strip())

recipe = [
    Reads(name="named", task=Questions("none.jsonl", checker=check)),
    Reads(name="lambda", task=Questions("none.jsonl", checker=lambda record, answer: len(answer) == 1)),
    Reads(name="task", task=Mine(2, 3)),
]
'''


@pytest.mark.parametrize(
    ("before", "after", "refused"),
    [
        ("    return number(answer)", "    # better\n\n    return number(answer)", ""),
        ("number(answer) ==", "number(answer.strip()) ==", r"named\.task\.checker"),
        ("found[-1])", "found[0])", r"named\.task\.checker"),
        ("LIMIT = 3", "LIMIT = 4", r"named\.task\.checker"),
        ("[0-9]+", "[0-9.]+", r"named\.task\.checker"),
        ("len(answer) == 1", "len(answer) == 2", r"lambda\.task\.checker"),
        ("answer.strip())", "answer.lower())", r"task\.task"),
    ],
)
def test_a_changed_checker_is_refused_when_a_run_goes_on(before: str, after: str, refused: str, tmp_path: Path) -> None:
    path = tmp_path / "reads.py"
    path.write_text(RECIPE)
    begin(tmp_path / "runs", *load(path).stages)
    assert before in RECIPE
    path.write_text(RECIPE.replace(before, after))
    again = load(path).stages
    if not refused:
        begin(tmp_path / "runs", *again)
        return
    with pytest.raises(UserError, match=rf"^{refused} = 'sha256 .*': the content has changed since"):
        begin(tmp_path / "runs", *again)


def outer(text: str) -> bool:
    return text in {"a", "b", "c", "d", "e"} and _inner(text)


def _inner(text: str) -> bool:
    return _inner(text[1:]) if text else True  # calls itself


def test_a_digest_is_the_same_in_every_process() -> None:
    program = "from finback.runs.contents import code_digest; from tests.test_contents import outer; print(code_digest(outer))"
    made = subprocess.run(
        [sys.executable, "-c", program],
        env=environment() | {"PYTHONHASHSEED": "7" if os.environ.get("PYTHONHASHSEED") != "7" else "8"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert made.stdout.strip() == code_digest(outer), made.stderr
