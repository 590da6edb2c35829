"""Tasks: gold answers are correct, junk is not, and no problem is on both sides of the split."""

import dataclasses
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest

import finback
from finback.config import UserError
from finback.data.clean import CleaningRules, DocumentFilter, check
from finback.parallel.mesh import World
from finback.runs.folder import StageRun
from finback.runs.recipe import load
from finback.stages.prepare import _interleave
from finback.tasks.math import Chains, integer
from finback.tasks.task import Problem, Split, Verdict, distinct, draw, is_held_out

RIGHT, WRONG, JUNK = Verdict(True, True), Verdict(False, True), Verdict(False, False)
FIVE = Problem(question="3+2=?", answer="5", key="?")
TINY_RECIPE = Path(finback.__path__[0]).parent / "recipes" / "tiny.py"


def terms_of(question: str) -> tuple[int, ...]:
    """The signed terms of "3+1-3+6=?", in ascending order, parsed without finback."""
    assert re.fullmatch(r"\d+([+-]\d+)+=\?", question), question
    return tuple(sorted(int(term) for term in re.findall(r"[+-]?\d+", question)))


def drawn(task: Chains, n: int, seed: int = 1) -> list[Problem]:
    rng = random.Random(seed)
    return [task.draw(rng) for _ in range(n)]


@pytest.mark.parametrize(
    "task", [Chains(), Chains(2, 2), Chains(7, 8), Chains(2, 3, largest=1), Chains(2, 4, largest=999)]
)
def test_gold_answers_and_worked_steps_are_right(task: Chains) -> None:
    for problem in drawn(task, 1000):
        terms = terms_of(problem.question)
        assert sum(terms) == int(problem.answer) and len(terms) == problem.tags["terms"]
        assert task.min_terms <= len(terms) <= task.max_terms and all(1 <= abs(t) <= task.largest for t in terms)
        assert task.check(problem, problem.answer) == task.check(problem, f" {problem.answer}\n") == RIGHT
        assert task.check(problem, str(int(problem.answer) + 1)) == WRONG
        total = int(re.match(r"\d+", problem.question)[0])  # type: ignore[index]
        steps = [re.fullmatch(r"(-?\d+)([+-])(\d+)=(-?\d+)", line) for line in problem.solution.split("\n")]
        assert len(steps) == len(terms) - 1
        for step in steps:
            assert step is not None, problem.solution
            left, sign, right, result = step.groups()
            assert int(left) == total and int(result) == (total + int(right) if sign == "+" else total - int(right))
            total = int(result)
        assert total == int(problem.answer)


def test_every_length_and_sign_is_drawn() -> None:
    problems = drawn(Chains(), 1000)
    assert {p.tags["terms"] for p in problems} == {4, 5, 6}
    assert {t for p in problems for t in terms_of(p.question)} == {*range(-9, 0), *range(1, 10)}
    assert Chains().name == "chains-4-6" and Chains(7, 7).name == "chains-7"


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("5", RIGHT),
        (" 5 ", RIGHT),
        ("+5", RIGHT),
        ("-5", WRONG),
        ("6", WRONG),
        ("55", WRONG),
        ("", JUNK),
        (" \n", JUNK),
        ("5.0", JUNK),
        ("5.", JUNK),
        ("3+2", JUNK),
        ("=5", JUNK),
        ("5 5", JUNK),
        ("4 or 5", JUNK),
        ("The answer is 5", JUNK),
        ("5</think>5", JUNK),
        ("0x5", JUNK),
        ("5e0", JUNK),
        ("0_5", JUNK),
        ("--5", JUNK),
        ("+-5", JUNK),
        ("- 5", JUNK),
        ("\u22125", JUNK),  # a typographic minus
        ("\u0665", JUNK),  # an Arabic 5
        ("\uff15", JUNK),  # a wide 5
        ("\u2075", JUNK),  # a superscript 5
        ("\u2164", JUNK),  # a Roman 5
        ("5\0", JUNK),
        ("5\ud800", JUNK),
        ("5\u200b", JUNK),  # a zero-width space
        ("nan", JUNK),
        ("inf", JUNK),
        ("True", JUNK),
        ("None", JUNK),
        ("__import__('os')", JUNK),
        ("__import__('os').system('touch forged') or 5", JUNK),
        ("9**9**9**9", JUNK),
        ("(" * 10_000, JUNK),
        ("9" * 18, WRONG),
        ("9" * 19, JUNK),
        ("0" * 10**6 + "5", JUNK),
        ("9" * 10**6, JUNK),
        (" " * 10**6 + "6", WRONG),
        ("-" * 10**6, JUNK),
    ],
    ids=lambda value: repr(value)[:30] if isinstance(value, str) else "",
)
def test_answers_by_hand(answer: str, verdict: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    start = time.process_time()
    assert Chains().check(FIVE, answer) == verdict
    assert time.process_time() - start < 20 and not list(tmp_path.iterdir())


def test_a_right_guess_must_be_the_number_itself() -> None:
    for problem in drawn(Chains(), 100):
        texts = [problem.question, problem.solution, f"{problem.answer}!", f"{problem.answer} {problem.answer}"]
        texts += [problem.question.replace("=?", f"={problem.answer}"), ",".join(map(str, range(-50, 50)))]
        assert all(Chains().check(problem, text) == JUNK for text in texts)


def test_integers_are_read_and_never_worked_out() -> None:
    assert [integer(text) for text in ("12", "-3", "+0", " 7\t", "007")] == [12, -3, 0, 7, 7]
    assert all(integer(text) is None for text in ("1+1", "1,000", "1.0", "", "١٢", "one", "1 2", "9" * 4301))


def test_the_canonical_form_ignores_order_and_nothing_else() -> None:
    by_key: dict[str, set[tuple[int, ...]]] = {}
    by_terms: dict[tuple[int, ...], set[str]] = {}
    questions = set()
    for problem in drawn(Chains(2, 3, largest=4), 5000):
        terms = terms_of(problem.question)
        by_key.setdefault(problem.key, set()).add(terms)
        by_terms.setdefault(terms, set()).add(problem.key)
        questions.add(problem.question)
    assert all(len(found) == 1 for found in (*by_key.values(), *by_terms.values()))
    assert len(questions) > 1.5 * len(by_key)  # so some problems were drawn in several orders


def test_sides_never_share_a_problem() -> None:
    sizes: dict[Split, int] = {"train": 20_000, "held_out": 2_000}
    sides = {}
    for split, n in sizes.items():
        rng = random.Random(3)
        sides[split] = {terms_of(draw(Chains(2, 6), split, rng).question) for _ in range(n)}
    assert not sides["train"] & sides["held_out"]
    share = sum(is_held_out(p.key) for p in drawn(Chains(), 20_000)) / 20_000
    assert 0.08 < share < 0.12


def test_distinct_problems_are_distinct_and_on_their_side() -> None:
    for split, held in (("train", False), ("held_out", True)):
        problems = distinct(Chains(), split, 600, seed=4)  # type: ignore[arg-type]
        assert len({p.key for p in problems}) == len({terms_of(p.question) for p in problems}) == 600
        assert all(is_held_out(p.key) == held for p in problems)


def test_same_seed_same_problems() -> None:
    assert distinct(Chains(), "held_out", 50, seed=4) == distinct(Chains(), "held_out", 50, seed=4)
    assert distinct(Chains(), "held_out", 50, seed=4) == distinct(Chains(), "held_out", 80, seed=4)[:50]
    assert distinct(Chains(), "held_out", 50, seed=4) != distinct(Chains(), "held_out", 50, seed=5)
    assert drawn(Chains(), 50) == drawn(Chains(), 50) != drawn(Chains(), 50, seed=2)
    one, two = (random.Random(9) for _ in range(2))
    for _ in range(50):
        assert draw(Chains(), "train", one) == draw(Chains(), "train", two)
    # Published scores are comparable only while these stay the same.
    assert [p.question for p in distinct(Chains(), "held_out", 2, seed=0)] == ["4-9+3-5-3-2=?", "9+2+1-2+4+2=?"]


def test_a_task_with_too_few_problems_says_so() -> None:
    few = Chains(2, 2, largest=2)
    keys = {p.key for p in drawn(few, 1000)}
    n = sum(not is_held_out(key) for key in keys)
    assert 0 < n < 10 and len(distinct(few, "train", n, seed=0)) == n
    message = f"problems = 10: task 'chains-2' has only about {n} distinct train problems. Ask for fewer or widen"
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        distinct(few, "train", 10, seed=0)


@dataclasses.dataclass(frozen=True)
class Same:
    """A task with a single problem."""

    problem: Problem
    name: str = "same"

    def draw(self, rng: random.Random) -> Problem:
        return self.problem

    def check(self, problem: Problem, answer: str) -> Verdict:
        return JUNK


def test_a_task_with_nothing_on_one_side_says_so() -> None:
    key = next(str(i) for i in range(1000) if is_held_out(str(i)))
    held, trained = Same(Problem("?", "5", key)), Same(FIVE)
    assert not is_held_out(FIVE.key)
    for task, split in ((held, "train"), (trained, "held_out")):
        text = f"task = 'same': no {split} problem in 100,000 draws. Widen the task's ranges."
        with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
            draw(task, split, random.Random(0))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_terms": 1}, "chains.min_terms = 1: not in 2..max_terms (6). Correct the range."),
        ({"min_terms": 7}, "chains.min_terms = 7: not in 2..max_terms (6). Correct the range."),
        ({"largest": 0}, "chains.largest = 0: terms run from 1 to largest. Set it to at least 1."),
        ({"max_terms": "6"}, "chains.max_terms = '6': expected int, got str. Correct the value in the recipe."),
        ({"min_terms": 4.0}, "chains.min_terms = 4.0: expected int, got float. Correct the value in the recipe."),
    ],
)
def test_impossible_tasks_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        Chains(**fields)


def test_the_quickstart_never_trains_on_a_problem_that_it_is_examined_on() -> None:
    """Compares the numbers in all draws of `finback run recipes/tiny.py`, with the same generators and seeds."""
    prepare, base, before, zero, after = load(TINY_RECIPE).stages
    run = StageRun(Path("unused"), "any", 0, World())
    asked: dict[tuple[int, ...], str] = {}
    for exam in (*before.exams, *after.exams):  # type: ignore[attr-defined]
        problems = distinct(exam.task, "held_out", exam.problems, run.seed("exam", exam.task.name))
        assert len({terms_of(p.question) for p in problems}) == exam.problems
        asked |= {terms_of(p.question): p.question for p in problems}
    assert len(asked) >= 600

    seen = []
    for made in prepare.tasks:  # type: ignore[attr-defined]
        documents = dataclasses.replace(made, documents=6_000).generate(run.seed("tasks", made.name))
        seen += [m.content for document in documents for m in document.messages if m.role == "user"]
    rng = random.Random(run.seed("interleave"))
    for source in prepare.text:  # type: ignore[attr-defined]
        checked = (check(document, CleaningRules()) for document in source.documents())
        dialogues = [kept.document for _, kept in DocumentFilter(source.name).sift(checked)]
        mixed = [_interleave(d, prepare.tasks[0], prepare.interleave, rng) for d in dialogues]  # type: ignore[attr-defined]
        new = [m.content for a, b in zip(dialogues, mixed, strict=True) if a != b for m in b.messages]
        sums = [text for text in new if re.fullmatch(r"[0-9+-]+=\?", text)]
        assert len(sums) > 0.4 * prepare.interleave * len(dialogues)  # type: ignore[attr-defined]
        seen += sums
    for step in range(1, zero.steps + 1):  # type: ignore[attr-defined]
        rng = random.Random(run.seed("questions", step))
        seen += [draw(zero.task, "train", rng).question for _ in range(zero.prompts_per_step)]  # type: ignore[attr-defined]
    probe = base.probe  # type: ignore[attr-defined]
    seen += [p.question for p in distinct(probe.task, "train", probe.problems, run.seed("probe"))]

    assert len(seen) > 6_000 * len(prepare.tasks)  # type: ignore[attr-defined]
    for question in seen:
        terms = terms_of(question)
        assert terms not in asked, f"{question} is {asked[terms]} in another order"
        assert not is_held_out("chains:" + " ".join(f"{term:+d}" for term in terms)), question


def test_task_text_shows_its_work_as_often_as_asked() -> None:
    made = load(TINY_RECIPE).stages[0].tasks[0]  # type: ignore[attr-defined]
    documents = list(dataclasses.replace(made, documents=5000).generate(seed=1))
    assert abs(sum(bool(d.messages[-1].reasoning) for d in documents) / 5000 - made.think) < 0.03
    assert abs(sum(len(d.messages) > 2 for d in documents) / 5000 - made.follow_up) < 0.03
    assert not any(m.reasoning for d in documents for m in d.messages[:-1]), "prompts must not contain earlier chains"
    for question, answer in (d.messages[i : i + 2] for d in documents for i in range(0, len(d.messages), 2)):
        assert question.role == "user" and answer.role == "assistant"
        assert int(answer.content) == sum(terms_of(question.content))
        assert not answer.reasoning or answer.reasoning.endswith(f"={answer.content}")
    assert documents == list(dataclasses.replace(made, documents=5000).generate(seed=1))
    text = "chains.think = 1.5: a share is between 0 and 1. Correct it."
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        dataclasses.replace(made, think=1.5)
