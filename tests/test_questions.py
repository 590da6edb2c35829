"""Questions from files: gold answers pass, double and hostile answers earn nothing, bad files are refused by name."""

import contextlib
import dataclasses
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finback.config import UserError, as_json
from finback.tasks import answers
from finback.tasks.questions import Questions
from finback.tasks.rewards import Reward
from finback.tasks.task import Problem, Task, Verdict, distinct, is_held_out
from tests.test_math_process import HOSTILE

RIGHT, WRONG, JUNK = Verdict(True, True), Verdict(False, True), Verdict(False, False)
GSM8K = {
    "question": "Natalia sold 48 clips in April and half as many in May. How many altogether?",
    "answer": "In May she sold 48/2=<<48/2=24>>24 clips.\nAltogether <<48+24=72>>72.\n#### 72",
}
MATH = {
    "question": "What is $\\frac{1}{4}+\\frac{1}{4}$?",
    "answer": "The sum is $\\frac{2}{4}$, in lowest terms $\\boxed{\\frac{1}{2}}$.",
    "level": 3,
    "subject": "Algebra",
}
CAPITAL = {"question": "Which city is the capital of France?", "answer": "Paris"}


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return str(path)


def judge(gold: str, answer: str, question: str = "?") -> Verdict:
    return Questions("none.jsonl").check(Problem(question=question, answer=gold, key="?"), answer)


def problems(task: Questions) -> dict[str, Problem]:
    return {p.question: p for p in (task.draw(random.Random(seed)) for seed in range(50))}


def test_a_file_needs_no_function(tmp_path: Path) -> None:
    task = Questions(write(tmp_path / "mine.jsonl", GSM8K, MATH, CAPITAL, CAPITAL))
    drawn = problems(task)
    assert isinstance(task, Task) and task.name == "mine" and hash(task) == hash(dataclasses.replace(task))
    assert {p.answer for p in drawn.values()} == {"72", "\\frac{1}{2}", "Paris"}
    assert all(task.check(p, p.answer) == RIGHT for p in drawn.values())
    assert all(task.check(p, f"So \\boxed{{{p.answer}}}.") == RIGHT for p in drawn.values())
    assert not any(task.check(p, p.question).correct for p in drawn.values())
    clips, sums = drawn[GSM8K["question"]], drawn[str(MATH["question"])]
    assert clips.solution == "In May she sold 48/2=24 clips.\nAltogether 72." and not clips.tags
    assert sums.tags == {"difficulty": 3, "subject": "Algebra"}
    assert drawn[CAPITAL["question"]].solution == ""
    assert clips.key == GSM8K["question"].lower()


def test_other_fields_an_instruction_and_a_label(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"problem": " Two  and two? ", "result": 4})
    task = Questions(path, question_field="problem", answer_field="result", instruction="Box it.", label="sums")
    problem = task.draw(random.Random(0))
    assert task.name == "sums" and problem.question == "Two  and two?\nBox it." and problem.answer == "4"
    assert problem.key == "two and two?"  # a changed instruction does not move a problem across the split


def test_every_kind_of_file_gives_the_same(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = write(tmp_path / "a.jsonl", GSM8K, CAPITAL)
    (tmp_path / "a.json").write_text(json.dumps([GSM8K, CAPITAL]))
    table = sys.modules["pyarrow"].Table.from_pylist([GSM8K, CAPITAL])
    parquet.write_table(table, tmp_path / "a.parquet")
    expected = {p.key: p for p in problems(Questions(lines)).values()}
    for name in ("a.json", "a.parquet"):
        assert {p.key: p for p in problems(Questions(str(tmp_path / name))).values()} == expected


def test_sides_never_share_a_question(tmp_path: Path) -> None:
    records = [{"question": f"How much is {i} and {i}?", "answer": str(2 * i)} for i in range(300)]
    task = Questions(write(tmp_path / "a.jsonl", *records, *records))
    held_out = distinct(task, "held_out", 20, seed=0)
    assert all(is_held_out(p.key) for p in held_out)
    assert not {p.question for p in held_out} & {p.question for p in distinct(task, "train", 200, seed=0)}
    with pytest.raises(UserError, match="distinct held_out problems"):
        distinct(task, "held_out", 200, seed=0)


@pytest.mark.parametrize(
    ("gold", "answer", "verdict"),
    [
        ("1234", "1,234", RIGHT),
        ("1,234", "1234.0", RIGHT),
        ("1234", "12,34", WRONG),
        ("12", "$12", RIGHT),
        ("12", "\\$12.00", RIGHT),
        ("12", "12 dollars", RIGHT),
        ("12", "**12**", RIGHT),
        ("12", "12.", RIGHT),
        ("12", "x = 12", RIGHT),
        ("12", "12\\text{ cm}", RIGHT),
        ("12", "12 thousand", WRONG),
        ("12", "12 thirteen", JUNK),
        ("12", "12 or 13", JUNK),
        ("12", "12\\text{ or thirteen}", JUNK),
        ("12", "12 13", JUNK),
        ("12", "24/2", JUNK),
        ("12", "12 = 13", JUNK),
        ("12", "The answer is 12", RIGHT),
        ("12", "12.000000000000000000001", WRONG),
        ("12", "-12", WRONG),
        ("12", "It is \\boxed{12}", RIGHT),
        ("12", "\\boxed{12}, or rather \\boxed{12}", RIGHT),
        ("12", "\\boxed{12}, or rather \\boxed{13}", JUNK),
        ("12", "\\boxed{13} \\boxed{12}", JUNK),
        ("12", "\\boxed{\\boxed{12}}", RIGHT),
        ("12", "\\boxed{12", JUNK),
        ("12", "\\boxed{}", JUNK),
        ("12", "so\n#### 12", RIGHT),
        ("12", "#### 12\n#### 13", JUNK),
        ("12", "\u0661\u0662", RIGHT),
        ("12", "\u221212", WRONG),
        ("12 hours", "12", RIGHT),
        ("12 hours", "12 hour", RIGHT),
        ("12 hours", "12 minutes", WRONG),
        ("50%", "50 percent", RIGHT),
        ("0.5", "1/2", RIGHT),
        ("0.5", "50", WRONG),
        ("Paris", "paris", RIGHT),
        ("Paris", " Paris. ", RIGHT),
        ("Paris", "\\boxed{\\text{Paris}}", RIGHT),
        ("Paris", "London", WRONG),
        ("Paris", "Paris London", WRONG),
        ("Paris", "Paris, London", JUNK),
        ("Paris", "\\boxed{Paris} \\boxed{London}", JUNK),
        ("Kerr", "\u212aerr", RIGHT),  # a Kelvin sign counts as a K
        ("\\text{(B)}", "B", RIGHT),
        ("\\frac{1}{2}", "0.5", RIGHT),
        ("\\frac{1}{2}", "$\\dfrac{1}{2}$", RIGHT),
        ("\\frac{1}{2}", "\\frac{1}{2} \\text{ or } \\frac{1}{3}", JUNK),
        ("\\frac{1}{2}", "\\frac{1}{2} \\text{maybe 3}", JUNK),
        ("\\frac{1}{2}", "$\\frac12$ $\\frac13$", JUNK),
        ("\\frac{1}{2}", "", JUNK),
    ],
)
def test_answers_by_hand(gold: str, answer: str, verdict: Verdict) -> None:
    assert judge(gold, answer) == verdict


def test_repeating_the_question_earns_nothing() -> None:
    question = "Factor $x^2 + 2x$."
    assert judge("x(x+2)", "x^2+2x", question) == JUNK
    assert judge("x(x+2)", "(x+2)x", question) == RIGHT
    assert judge("\\frac{3}{4}", "3/4", "Which is larger, 3/4 or 2/3?") == RIGHT


def test_numbers_and_words_need_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finback.tasks.math_process.compare", lambda *_: pytest.fail("a worker was used"))
    assert judge("12", "2**9") == JUNK and judge("12", "13") == WRONG and judge("Paris", "\\frac12") == JUNK
    assert judge("x^2", "$x^2$") == RIGHT


@pytest.mark.parametrize("attack", HOSTILE)
@pytest.mark.parametrize("gold", ["12", "Paris", "x^2"])
def test_hostile_answers(gold: str, attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if attack in ("tower in LaTeX", "factorials"):  # five seconds each: test_math_process.py has them
        monkeypatch.setattr("finback.tasks.math_process.MAX_CHARACTERS", 0)
    start = time.monotonic()
    for text in (HOSTILE[attack], f"\\boxed{{{HOSTILE[attack]}}}", "\\boxed{" * 30_000, "#### \n" * 10_000):
        assert not judge(gold, text).correct
    assert time.monotonic() - start < 60 and not list(tmp_path.iterdir())


def count(record: dict[str, Any], answer: str) -> float:
    """A user's function: as many letters as requested; half of them score half, and more score nothing."""
    return len(answer) / record["letters"] * (len(answer) <= record["letters"])


def test_an_own_function(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"question": "Write three letters.", "letters": 3})
    task = Questions(path, checker=count)
    problem = task.draw(random.Random(0))
    assert problem.answer == "" and task.check(problem, "abc").correct and task.check(problem, "abcd").score == 0
    some = task.check(problem, "ab")
    assert not some.correct and some.score == pytest.approx(2 / 3)
    assert Reward().parts(some, "", False, 1, 2) == pytest.approx({"accuracy": 2 / 3, "form": 0.0})
    assert as_json(task)["checker"] == "count"
    assert task.check(Problem("?", "?", "of another file"), "abc") == JUNK


def test_named_parts_of_a_score(tmp_path: Path) -> None:
    def check(record: dict[str, Any], answer: str) -> dict[str, float]:
        return {"length": 0.25 * (len(answer) == 5), "words": 0.75 * (answer == record["answer"])}

    task = Questions(write(tmp_path / "a.jsonl", CAPITAL), checker=check)
    problem = task.draw(random.Random(0))
    assert task.check(problem, "Paris") == Verdict(True, True, {"length": 0.25, "words": 0.75})
    assert task.check(problem, "Milan") == Verdict(False, True, {"length": 0.25, "words": 0.0})
    assert not task.check(problem, "Rome").well_formed


class _Unshown:
    def __repr__(self) -> str:
        raise ValueError("no text")


async def _awaited(record: dict[str, Any], answer: str) -> bool:
    return True


FAULTS: dict[str, tuple[Callable[[dict[str, Any], str], Any], str]] = {
    "missing key": (lambda record, answer: record["gold"] == answer, "raised KeyError: 'gold'"),
    "swapped arguments": (lambda answer, record: record["answer"] == answer, "raised TypeError"),
    "no return": (lambda record, answer: None, "returned None; return True, False, a number"),
    "not a number": (lambda record, answer: float("nan"), "returned nan"),
    "over one": (lambda record, answer: 2.0, "returned 2.0"),
    "negative": (lambda record, answer: -1, "returned -1"),
    "parts over one": (lambda record, answer: {"a": 1.0, "b": 0.5}, "returned {'a': 1.0, 'b': 0.5}"),
    "words": (lambda record, answer: "yes", "returned 'yes'"),
    "a pair": (lambda record, answer: (True, "right"), "returned (True, 'right')"),
    "a list of numbers": (lambda record, answer: np.array([0.5, 0.5]), "raised ValueError"),
    "NaN of numpy": (lambda record, answer: np.float64("nan"), "nan"),
    "a part that is none": (lambda record, answer: {"form": None}, "returned {'form': None}"),
    "no parts": (lambda record, answer: {}, "returned {}"),
    "an end": (lambda record, answer: sys.exit(3), "raised SystemExit: 3"),
    "nothing that can be shown": (lambda record, answer: _Unshown(), "returned an object of _Unshown"),
    "async": (_awaited, "returned a coroutine (it is async)"),
}
SCORES: list[Any] = [
    np.bool_(True),
    np.float32(1),
    Fraction(1),
    Decimal(1),
    {"a": np.float32(0.5), "b": Fraction(1, 2)},
]


@pytest.mark.parametrize("score", SCORES)
def test_numbers_of_other_kinds_are_scores(score: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = Questions(write(tmp_path / "a.jsonl", CAPITAL), checker=lambda record, answer: score if answer else False)
    assert task.check(task.draw(random.Random(0)), "Paris").correct and not capsys.readouterr().err
    task = Questions(write(tmp_path / "a.jsonl", CAPITAL), checker=lambda record, answer: score, label="generous")
    assert task.check(task.draw(random.Random(0)), "Paris").correct
    assert "the checker of 'generous' rewards an empty answer" in capsys.readouterr().err


@pytest.mark.parametrize("fault", FAULTS)
def test_a_function_that_fails_is_heard(fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check, words = FAULTS[fault]
    task = Questions(write(tmp_path / "a.jsonl", {"question": "Capital?"}), checker=check, label="capitals")
    problem = task.draw(random.Random(0))
    assert [task.check(problem, f"Paris {i}") for i in range(3)] == [JUNK] * 3
    said = capsys.readouterr().err
    assert said.count("the checker of 'capitals' failed") == 1
    assert words in said and "a.jsonl:1" in said and "'Paris 0'" in said
    with pytest.raises(UserError, match=r"questions\.checker = 'capitals': 4 of 4 calls failed; first: it "):
        task.check(problem, "Paris 3")


def test_one_call_in_a_hundred_may_fail(tmp_path: Path) -> None:
    task = Questions(write(tmp_path / "a.jsonl", {"question": "?"}), checker=lambda record, answer: int(answer) == 1)
    problem = task.draw(random.Random(0))
    for i in range(1000):
        assert task.check(problem, "one" if i % 100 == 99 else "1").correct == (i % 100 != 99)
    with pytest.raises(UserError, match="11 of 1001 calls failed"):
        task.check(problem, "one")


def test_a_function_that_hangs_or_scribbles_is_wrong(tmp_path: Path) -> None:
    def scribble(record: dict[str, Any], answer: str) -> bool:
        if answer == "hang":
            while True:
                with contextlib.suppress(Exception):
                    time.sleep(0.01)
        right: bool = record.pop("answer") == answer
        return right

    task = Questions(write(tmp_path / "a.jsonl", CAPITAL), checker=scribble, timeout=60.0)
    problem = task.draw(random.Random(0))
    for _ in range(2):
        assert task.check(problem, "Paris") == RIGHT and task.check(problem, "London") == JUNK
    assert replace(task, timeout=0.2).check(problem, "hang") == JUNK
    assert task.check(problem, "Paris") == RIGHT
    verdicts: list[Verdict] = []
    thread = threading.Thread(target=lambda: verdicts.append(task.check(problem, "Paris")))
    thread.start()
    thread.join()
    assert verdicts == [RIGHT]


def test_a_function_that_refuses_the_golds_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", CAPITAL)
    with pytest.raises(UserError, match=r"1 of 1 records .*a\.jsonl:1: the checker raised KeyError: 'gold'"):
        Questions(path, checker=lambda record, answer: record["gold"] == answer).draw(random.Random(0))


def test_few_bad_golds_are_left_out_and_many_refused(tmp_path: Path) -> None:
    good = [{"question": f"How much is {i}?", "answer": str(i)} for i in range(100)]
    bad = {"question": "Tell me of whales.", "answer": "They are large. " * 20}
    task = Questions(write(tmp_path / "a.jsonl", *good, bad))
    assert "Tell me of whales." not in problems(task)
    with pytest.raises(UserError, match=r"2 of 102 records .*:101: the gold answer has more than 200.*####"):
        Questions(write(tmp_path / "b.jsonl", *good, bad, bad)).draw(random.Random(0))


def test_golds_are_found_where_they_are_marked() -> None:
    assert answers.gold("a\n#### b\n#### $5$") == ("5", "a\n#### b")
    assert answers.gold("x \\boxed{1} y \\boxed{\\frac{1}{2}}.") == (
        "\\frac{1}{2}",
        "x \\boxed{1} y \\boxed{\\frac{1}{2}}.",
    )
    assert answers.gold("\\boxed{3}") == ("3", "") and answers.gold(" 7 ") == ("7", "")
