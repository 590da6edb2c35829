"""What SFT reads from its sources: unusable records and exam questions are left out, counted and named."""

import json
from pathlib import Path
from typing import Any

import pytest

from finback.config import UserError
from finback.data.messages import Lesson
from finback.data.sources import Files
from finback.data.tokenizer import Tokenizer
from finback.parallel.mesh import World
from finback.runs.files import read_lines
from finback.runs.folder import StageRun
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.lessons import LessonReader
from finback.stages.sft import SFT
from finback.suites import catalogue
from finback.tasks.choice import Choice
from finback.tasks.math import Chains
from finback.tasks.questions import Questions
from finback.tasks.task import canonical, is_held_out
from tests.test_tuning import stage_folder, tune


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return path


def read(root: Path, path: Path, *exams: Exam, **knobs: Any) -> tuple[list[Lesson], dict[str, Any]]:
    """The lessons of a file in a recipe with these exams, and the results about them."""
    stage_folder(root, 1, "base")
    stage = SFT(name="tuned", start="base", text=(Files((str(path),), name="mine"),), **knobs)
    run = StageRun(root, "tuned", 0, World())
    run.folder.mkdir(exist_ok=True)
    run.stages = (stage, *([Evaluate(name="after", start="tuned", exams=exams)] if exams else []))
    reader = LessonReader(stage, run, Tokenizer(root / "base"))
    return reader.read().get("mine", []), reader.results


GOOD = {"question": "4+5?", "answer": 9}
BAD = ("{", {"text": "no turns"}, {"question": "\ud800?", "answer": "9"}, {"question": "a", "answer": ""})


def test_what_cannot_be_used_is_counted_and_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "mine.jsonl", GOOD, *BAD, GOOD)
    lessons, results = read(tmp_path, path)
    assert len(lessons) == 2
    assert results["sources"]["mine"]["documents"] == {"kept": 2, "unusable": 4}
    assert results["unusable"]["mine"]["records"] == 4
    named = read_lines(tmp_path / "tuned" / "unusable.jsonl")
    assert [each["where"] for each in named] == [f"{path}:{line}" for line in (2, 3, 4, 5)]
    assert [each["why"].split(" (")[0] for each in named] == [
        "record: not JSON",
        "record: no usable field",
        "messages[0].content: half a character",
        "messages: the answer is empty",
    ]
    said = capfd.readouterr().err
    assert "4 records of mine are unusable" in said and all(each["where"] in said for each in named)


def test_a_source_of_which_nothing_can_be_used_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.jsonl", *BAD[1:])
    with pytest.raises(
        UserError, match=rf"tuned\.text = 'mine': it has no usable records: {path}:1 \(record: no usable field"
    ):
        read(tmp_path, path)


def test_empty_answers_within_a_dialogue_are_counted(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]
    path = write(tmp_path / "mine.jsonl", {"messages": [*turns, turns[0], {"role": "assistant", "content": "b"}]})
    lessons, results = read(tmp_path, path)
    assert len(lessons) == 1 and results["empty_answers"] == 1


QUESTIONS = [{"question": f"What is {i} and {i} more?", "answer": str(2 * i)} for i in range(200)]
HELD_OUT = [record for record in QUESTIONS if is_held_out(canonical(str(record["question"])))]


def test_an_exams_questions_are_not_learnt(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "mine.jsonl", *QUESTIONS)
    exams = (
        Exam("own", task=Questions(str(path), instruction="Box it."), problems=3),
        Exam("sums", task=Chains(2, 3), problems=20),
    )
    lessons, results = read(tmp_path, path, *exams)
    assert HELD_OUT and len(lessons) == len(QUESTIONS) - len(HELD_OUT)
    assert results["contaminated"] == {"mine": {"own": len(HELD_OUT)}}
    assert results["sources"]["mine"]["documents"] == {"kept": len(lessons), "contaminated": len(HELD_OUT)}
    assert f"{len(HELD_OUT)} records of mine contain exam questions and are left out: own" in capfd.readouterr().err
    assert len(read(tmp_path, path)[0]) == len(QUESTIONS)
    with pytest.raises(UserError, match=r"tuned\.text = 'mine': it has no usable records: all contain .* exam all"):
        read(tmp_path, path, Exam("all", suite=str(path)))


def test_exams_of_one_name_in_several_stages_are_all_looked_at(tmp_path: Path) -> None:
    one, two = (write(tmp_path / f"{q}.jsonl", {"question": f"{q}5?", "answer": "9"}) for q in "ab")
    path = write(tmp_path / "mine.jsonl", GOOD, *({"question": f"{q}5?", "answer": "9"} for q in "ab"))
    stages = [
        Evaluate(name=name, start="base", exams=(Exam("file", suite=str(asked)),))
        for name, asked in (("before", one), ("after", two), ("again", two))
    ]
    stage_folder(tmp_path, 1, "base")
    stage = SFT(name="tuned", start="base", text=(Files((str(path),), name="mine"),))
    run = StageRun(tmp_path, "tuned", 0, World(), quiet=True)
    run.folder.mkdir()
    run.stages = stages
    reader = LessonReader(stage, run, Tokenizer(tmp_path / "base"))
    assert len(reader.read()["mine"]) == 1 and reader.results["contaminated"] == {"mine": {"file": 2}}


def test_an_exams_question_is_found_in_other_words_around_it(tmp_path: Path) -> None:
    long = "A whale swims four miles to the harbour and five miles back to the river. How far does it swim in all?"
    asked = write(tmp_path / "exam.jsonl", {"question": long, "answer": "9"}, {"question": "4+5?", "answer": "9"})
    records = (
        {"instruction": "Solve step by step.", "input": long.upper().replace(".", " "), "output": "9"},
        {
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "Think of this:\n4+5\nIt is 9."},
            ]
        },
        {"prompt": "A whale swims four miles to the harbour. How far?", "completion": "4"},
    )
    lessons, results = read(tmp_path, write(tmp_path / "mine.jsonl", *records), Exam("file", suite=str(asked)))
    assert len(lessons) == 1 and results["contaminated"] == {"mine": {"file": 2}}


@pytest.mark.parametrize(
    ("question", "text", "found"),
    [
        ("Who wrote Hamlet?", "Question: Who  wrote hamlet? Answer:", True),
        ("Who wrote Hamlet?", "Who wrote Hamlet? Think first.\nGo.", True),
        ("Who wrote Hamlet", "Tell me: who wrote Hamlet.", True),
        ("Who wrote Hamlet", "Who wrote Hamlet and when?", False),
        ("Who wrote Hamlet", "Who wrote Hamlets?", False),
        ("北京是哪一个国家的首都城市呢", "请回答北京是哪一个国家的首都城市呢请快", True),
        ("What is 8 minus 3 plus 5?", "What is 8 minus 3 plus 5 plus 4?", False),
        ("What is 1 and 1 more?", "What is 11 and 1 more?", False),
        ("8-3+5+4-6+2=?", "Sum: 8-3+5+4-6+2=?", False),
    ],
)
def test_an_exams_short_question_is_found_within_a_line(question: str, text: str, found: bool, tmp_path: Path) -> None:
    asked = write(
        tmp_path / "exam.jsonl", {"question": question, "answer": "9"}, {"question": "Another one", "answer": "9"}
    )
    path = write(tmp_path / "mine.jsonl", GOOD, {"question": text, "answer": "9"})
    _, results = read(tmp_path, path, Exam("file", suite=str(asked)))
    assert results["contaminated"] == ({"mine": {"file": 1}} if found else {})


def test_a_choices_question_is_found_without_its_choices(tmp_path: Path) -> None:
    records = [{"question": f"Which is {i}?", "choices": [str(i), "none"], "answer": str(i)} for i in range(60)]
    task = Choice(str(write(tmp_path / "quiz.jsonl", *records)))
    bare = [{"question": r["question"], "answer": r["answer"]} for r in records]
    held_out = sum(is_held_out(problem.key) for problem in task.all_problems)
    _, results = read(tmp_path, write(tmp_path / "mine.jsonl", *bare), Exam("quiz", task=task))
    assert held_out and results["contaminated"] == {"mine": {"quiz": held_out}}


def test_traces_with_a_files_question_are_left_out(tmp_path: Path) -> None:
    asked = write(tmp_path / "exam.jsonl", *({"question": f"{i}?", "answer": str(i)} for i in range(0, 60, 3)))
    stage = tune(tmp_path).stage
    run = StageRun(tmp_path, "tuned", 0, World())
    run.stages = (Evaluate(name="after", start="tuned", exams=(Exam("file", suite=str(asked)),)),)
    reader = LessonReader(stage, run, Tokenizer(tmp_path / "base"))
    assert len(reader.read()["kept"]) == 40 and reader.results["contaminated"] == {"kept": {"file": 20}}


def test_a_table_is_an_exam_too(tmp_path: Path) -> None:
    path = tmp_path / "quiz.TSV"
    path.write_text("question\tanswer\n4+5?\t9\n5+6?\t11\n")
    problems = catalogue.load(str(path), None, 0).problems
    assert [(p.key, p.answer) for p in problems] == [("4+5?", "9"), ("5+6?", "11")]
