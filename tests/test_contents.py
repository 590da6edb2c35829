"""A run goes on with the files and the code that it was begun with, or says that they changed."""

import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from finback.config import UserError
from finback.data.sources import Files
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
    """Names what it reads and does nothing with it."""

    task: Task | None = None
    text: tuple[Files, ...] = field(default_factory=tuple)

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
            UserError, match=rf"^reads\.{knob} = 'sha256 .*': the content is another than .* delete that"
        ):
            begin(runs / name, stage)
        path.write_text(LINE)
        begin(runs / name / "again", stage)
        assert read_json(runs / name / "again" / "reads" / "config.json") == config
        path.unlink()  # a finished stage needs it no longer
        begin(runs / name, stage)


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
    with pytest.raises(UserError, match=rf"^{refused} = 'sha256 .*': the content is another than"):
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
