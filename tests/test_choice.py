"""Multiple choice: exactly one letter is right, positions are not learnable, and ambiguous records are named."""

import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finback.config import UserError
from finback.tasks.choice import Choice, named
from finback.tasks.task import Problem, Task, Verdict, distinct, is_held_out
from tests.test_math_process import HOSTILE

RIGHT, WRONG, JUNK = Verdict(True, True), Verdict(False, True), Verdict(False, False)
CITIES = ["London", "Paris", "Rome", "Bern"]


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def drawn(path: Path, choices: list[Any], answer: Any, **knobs: Any) -> tuple[Choice, Problem]:
    task = Choice(write(path, {"question": "Where?", "choices": choices, "answer": answer}), **knobs)
    return task, task.draw(random.Random(0))


def shown(problem: Problem) -> list[str]:
    return [line[3:] for line in problem.question.splitlines() if re.match("[A-J][.] ", line)]


@pytest.mark.parametrize("answer", ["B", "b", 1, "1", "Paris", " Paris "])
@pytest.mark.parametrize("shuffle", [True, False])
def test_the_right_choice_keeps_its_letter(answer: Any, shuffle: bool, tmp_path: Path) -> None:
    task, problem = drawn(tmp_path / "a.jsonl", CITIES, answer, shuffle=shuffle)
    assert isinstance(task, Task) and hash(task) and task.name == "a"
    assert "ABCD"[shown(problem).index("Paris")] == problem.answer and sorted(shown(problem)) == sorted(CITIES)
    assert shuffle or shown(problem) == CITIES
    assert problem.question.splitlines()[0] == "Where?"
    assert problem.question.endswith("\nAnswer with the letter alone.")
    assert task.check(problem, problem.answer) == RIGHT and task.check(problem, "Paris") == RIGHT
    assert not any(task.check(problem, letter).correct for letter in set("ABCDE") - {problem.answer})


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("B)", "B"),
        ("b", "B"),
        (" B\n", "B"),
        ("**B**", "B"),
        ("Answer: B", "B"),
        ("The answer is B.", "B"),
        ("Final answer: (B)", "B"),
        ("Since it is large, \\boxed{B}", "B"),
        ("\\boxed{\\text{(B)}}", "B"),
        ("#### B", "B"),
        ("Paris", "B"),
        ("paris.", "B"),
        ("B. Paris", "B"),
        ("(B) Paris", "B"),
        ("\\boxed{Paris}", "B"),
        ("A. Paris", None),
        ("A or B", None),
        ("A, B", None),
        ("AB", None),
        ("B B", None),
        ("A\nB", None),
        ("\\boxed{A} \\boxed{B}", None),
        ("#### A\n#### B", None),
        ("E", None),
        ("Not A but B", None),
        ("London Paris", None),
        ("Paris, not London", None),
        ("", None),
        ("?", None),
        ("A. B", None),
        ("Answer: A. Answer: B", None),
        ("\u0392", None),  # a Greek capital
        ("ABCD", None),
        ("The answer is not B", None),
    ],
)
def test_exactly_one_letter(answer: str, letter: str | None) -> None:
    assert named(answer, CITIES) == letter


def test_choices_that_look_like_letters_or_each_other() -> None:
    assert named("A", ["B", "A"]) == "A"  # the letter counts, not the text
    assert named("us", ["US", "us"]) == "B" and named("Us", ["US", "us"]) is None
    assert named("3.", ["3", "4"]) == "A" and named("3.5", ["3.5", "35"]) == "A"


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_answers(attack: str) -> None:
    assert named(HOSTILE[attack], CITIES) is None


def test_the_place_tells_nothing(tmp_path: Path) -> None:
    records = [{"question": f"Question {i}?", "choices": CITIES, "answer": "A"} for i in range(400)]
    task = Choice(write(tmp_path / "a.jsonl", *records))
    problems = distinct(task, "train", 300, seed=0)
    places = Counter(p.answer for p in problems)
    assert set(places) == set("ABCD") and max(places.values()) < 110  # 75 each, within four sigma
    questions = {p.key: p.question for p in problems}
    again = Choice(write(tmp_path / "b.jsonl", *records[::-1]))
    both = [p for p in distinct(again, "train", 300, seed=1) if p.key in questions]
    assert len(both) > 200 and all(p.question == questions[p.key] for p in both)
    assert not any(is_held_out(p.key) for p in problems)


def test_another_order_is_the_same_problem_and_other_choices_are_not(tmp_path: Path) -> None:
    _, one = drawn(tmp_path / "a.jsonl", CITIES, "Paris")
    _, two = drawn(tmp_path / "b.jsonl", CITIES[::-1], "Paris")
    _, three = drawn(tmp_path / "c.jsonl", [*CITIES, "Oslo"], "Paris")
    assert one == two and one.key != three.key


@pytest.mark.parametrize("last", ["All of the above", "None of the above", "Both A and B", "A or B"])
def test_choices_that_speak_of_places_stay(last: str, tmp_path: Path) -> None:
    _, problem = drawn(tmp_path / "a.jsonl", [*CITIES, last], last)
    assert shown(problem) == [*CITIES, last] and problem.answer == "E"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"choices": CITIES, "answer": "E"}, r"a\.jsonl:1 answer = 'E': is none of the choices.*index from 0"),
        ({"choices": CITIES, "answer": 4}, r"answer = 4: is none"),
        ({"choices": CITIES, "answer": -1}, r"answer = -1: is none"),
        ({"choices": ["B", "A"], "answer": "A"}, r"answer = 'A': could be a letter or a text"),
        ({"choices": CITIES}, r"a\.jsonl:1 = 'answer': the record has no such field. Known: choices, question"),
        ({"answer": "A"}, r"a\.jsonl:1 = 'choices': the record has no such field"),
        ({"choices": ["a"], "answer": "A"}, r"choices = \['a'\]: not 2 to 10 different texts"),
        ({"choices": ["a", "a"], "answer": "A"}, "not 2 to 10 different"),
        ({"choices": ["a", ""], "answer": "A"}, "not 2 to 10 different"),
        ({"choices": "ab", "answer": "A"}, "not 2 to 10 different"),
        ({"choices": [str(i) for i in range(11)], "answer": "A"}, "not 2 to 10 different"),
    ],
)
def test_bad_records_are_named(record: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        Choice(write(tmp_path / "a.jsonl", {"question": "Where?", **record})).draw(random.Random(0))
