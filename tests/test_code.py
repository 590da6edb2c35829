"""The code task: programs are rewarded for what they do, and bad data are refused by file, line and field."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from finback.config import UserError
from finback.tasks.code import Code, program, same
from finback.tasks.task import Problem, Task, Verdict, distinct

RIGHT, WRONG, JUNK = Verdict(True, True), Verdict(False, True), Verdict(False, False)
SUM = "def solve(a, b):\n    return a + b"
ITEMS = [
    {
        "question": "Add.",
        "entry": "solve",
        "solution": SUM,
        "tests": [{"args": [1, 2], "expected": 3}, {"args": [0.5, 1], "expected": 1.5}],
    },
    {
        "question": "Echo.",
        "solution": "print(input())",
        "tests": [{"stdin": "one", "stdout": "one\n"}, {"stdin": "two\nthree", "stdout": "two"}],
    },
]
ADD, ECHO = Problem("Add.", SUM, "code: Add."), Problem("Echo.", "print(input())", "code: Echo.")


@pytest.fixture
def task(tmp_path: Path) -> Code:
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, ITEMS)) + "\n\n")
    return Code(str(tmp_path / "data.jsonl"))


def test_code_is_a_task_that_accepts_its_gold_answers(task: Code) -> None:
    assert isinstance(task, Task) and task.name == "code-data" and Code("x", label="y").name == "y"
    rng = random.Random(0)
    problems = {p.key: p for p in (task.draw(rng) for _ in range(50))}
    assert set(problems) == {ADD.key, ECHO.key} and problems[ADD.key].tags == {"source": "data.jsonl"}
    for problem in problems.values():
        assert task.check(problem, problem.answer) == RIGHT
        assert task.check(problem, f"So:\n```python\n{problem.answer}\n```\nDone.") == RIGHT


@pytest.mark.parametrize(
    ("problem", "answer", "verdict"),
    [
        (ADD, "def solve(a, b):\n    return a - b", WRONG),
        (ADD, "def solve(a, b):\n    return 3", WRONG),
        (ADD, "def other(a, b):\n    return a + b", JUNK),
        (ADD, "def solve(a, b) return a + b", JUNK),
        (ADD, "", JUNK),
        (ADD, "```python\n```", JUNK),
        (ADD, "if __name__ == '__main__':\n    input()\n" + SUM, RIGHT),
        (ECHO, "print('one')", WRONG),  # the second test expects another answer
        (ECHO, "print(input() + '  \\n\\n')", RIGHT),
        (ECHO, "print(input())\nraise SystemExit(1)", WRONG),
        (ECHO, "print(input(), end='')\nimport os, sys\nsys.stdout.flush()\nos._exit(0)", RIGHT),
        (ECHO, "print(input())\n" + "#" * 100_000, JUNK),
    ],
)
def test_programs_are_judged_by_what_they_do(problem: Problem, answer: str, verdict: Verdict, task: Code) -> None:
    assert task.check(problem, answer) == verdict


def test_the_last_block_counts_even_without_its_end() -> None:
    assert program("no block") == "no block" and program("```\na\n```\ntext\n```py\nb\nc\n```\n") == "b\nc"
    assert (
        program("```python\na\n```\n```python\nb") == "b" and program("```\na\n```python\nb\n```") == "a\n```python\nb"
    )
    assert program("Use `x`.\r\n```python\r\na\r\n```\r\n") == "a\r"


def test_values_are_equal_as_json_values() -> None:
    for value in (1, 1.0, "1", True, None, [1], {"a": [1, 2.5]}, -0.0, 10**30):
        assert same(value, value) and not same([value], value) and not same(value, [value, value])
    assert same(2.0, 2) and not same(True, 1) and not same(1, True) and not same(0, False) and not same(None, 0)
    assert not same([True], [1]) and not same({"a": 1}, {"a": True}) and not same({"a": 1, "b": 2}, {"a": 1})
    assert not any(same(float("nan"), other) for other in (float("nan"), 0, None, [float("nan")]))


def test_the_file_is_read_late_and_once(task: Code, tmp_path: Path) -> None:
    Code(str(tmp_path / "not there"))
    task.draw(random.Random(0))
    Path(task.path).unlink()
    assert task.check(ADD, SUM) == RIGHT


def test_problems_lie_on_one_side_of_the_split(tmp_path: Path) -> None:
    lines = [ITEMS[1] | {"question": f"Echo {i}."} for i in range(200)]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = Code(str(tmp_path / "many.jsonl"))
    held, trained = distinct(task, "held_out", 8, 0), distinct(task, "train", 100, 0)
    assert not {p.key for p in held} & {p.key for p in trained}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "{FILE}:1 = '{': not JSON (Expecting property name"),
        ("[1]", "{FILE}:1 = [1]: not a JSON object. Correct the data file."),
        ('{"question": "\\ud800"}', "{FILE}:1 'question' = '\\ud800': half a character"),
        ({"question": " "}, "{FILE}:1: question = ' ': expected a text."),
        ({"tests": []}, "{FILE}:1: tests = []: expected a list of tests."),
        ({"answer": 1}, "{FILE}:1: answer = 1: no such field. Known: entry, question, solution, tests."),
        ({"solutoin": ""}, "{FILE}:1: solutoin = '': no such field. Did you mean 'solution'?"),
        ({"solution": 1}, "{FILE}:1: solution = 1: expected a text."),
        ({"entry": "a b"}, "{FILE}:1: entry = 'a b': expected the name of a function."),
        ({"entry": "import"}, "{FILE}:1: entry = 'import': expected the name of a function."),
        (
            {"entry": "f"},
            "{FILE}:1: tests[0] = {'stdin': 'one', 'stdout': 'one\\n'}: a test has the fields args and expected (with",
        ),
        (
            {"tests": [{"args": [], "expected": 1}]},
            "{FILE}:1: tests[0] = {'args': [], 'expected': 1}: a test has the fields stdin and stdout (without",
        ),
        ({"tests": [{"stdin": "", "stdout": 5}]}, "{FILE}:1: tests[0].stdout = 5: expected a text."),
        ({"entry": "f", "tests": [{"args": 5, "expected": 5}]}, "{FILE}:1: tests[0].args = 5: expected a list."),
        ('{"question": "?", "entry": "f", "tests": [{"args": [], "expected": NaN}]}', '{FILE}:1 = \'{"question"'),
        ("", "code.path = '{FILE}': the file has no problems. Correct the data file."),
        (
            json.dumps(ITEMS[1]) + "\n" + json.dumps(ITEMS[1]),
            "{FILE}:2: question = 'Echo.': the question occurs twice.",
        ),
    ],
)
def test_bad_data_name_file_line_and_field(line: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / ("x" * 99 + ".jsonl")  # a path is shown in full, however long
    path.write_text(line if isinstance(line, str) else json.dumps(ITEMS[1] | line))
    with pytest.raises(UserError) as caught:
        Code(str(path)).draw(random.Random(0))
    assert str(caught.value).startswith(message.replace("{FILE}", str(path)))
