"""reasoning-gym tasks: gold answers pass, answers are never executed, junk earns nothing, some sets are refused."""

import os
import random
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import pytest

import finback
from finback.config import UserError
from finback.tasks.expression import evaluate
from finback.tasks.gym import REFUSED, SUPPORTED, Gym
from finback.tasks.task import Problem, Verdict, distinct, is_held_out

factory = pytest.importorskip("reasoning_gym.factory")

SLOW = ("futoshiki", "puzzle24", "sudoku", "zebra_puzzles")
RIGHT, WRONG, JUNK = Verdict(True, True), Verdict(False, True), Verdict(False, False)
HOSTILE = {
    "import": "__import__('os').system('touch F')",
    "call": "open('F', 'w')",
    "tower": "9**9**9**9**9",
    "parentheses": "(" * 10_000,
    "few parentheses": "(" * 120 + "1" + ")" * 120,
    "minus signs": "-" * 150 + "1",
    "exponent": "1e999999999",
    "digits": "9" * 10**6,
    "commas": "[" + "1," * 10**6 + "]",
    "spaces": " " * 10**6,
    "nul": "1\0",
    "surrogate": "\ud8001",
    "arabic digits": "\u0661\u0662",
    "superscript": "1\u00b2",
    "nan": "nan",
    "infinity": "-inf",
    "zero": "1/0",
    "names": "a is a " * 10_000,
    "nothing": "",
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[Problem]]:
    """A few problems of every supported data set."""
    return {name: draws(name, seed=5, n=2 if name in SLOW else 20) for name in SUPPORTED}


def draws(dataset: str, seed: int, n: int, **settings: int) -> list[Problem]:
    task, rng = Gym(dataset, dict(settings)), random.Random(seed)
    return [task.draw(rng) for _ in range(n)]


def check(dataset: str, gold: str, answer: str) -> Verdict:
    return Gym(dataset).check(Problem(question="?", answer=gold, key="?"), answer)


def test_every_data_set_is_either_supported_or_refused() -> None:
    assert not SUPPORTED.keys() & REFUSED.keys()
    assert SUPPORTED.keys() | REFUSED.keys() == factory.DATASETS.keys()


@pytest.mark.parametrize("dataset", SUPPORTED)
def test_gold_answers_are_right_without_a_foreign_scorer(
    dataset: str, drawn: dict[str, list[Problem]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> float:
        raise AssertionError("a reasoning-gym scorer was called")

    monkeypatch.setattr(factory.DATASETS[dataset][0], "score_answer", refuse)
    for problem in drawn[dataset]:
        assert Gym(dataset).check(problem, problem.answer) == RIGHT
        assert Gym(dataset).check(problem, f"\n {problem.answer} \n") == RIGHT
        assert problem.key.split() == f"{dataset}: {problem.question}".split()
        assert problem.tags == {"source": dataset}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_answers_are_wrong_at_once_and_do_nothing(
    attack: str, drawn: dict[str, list[Problem]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for dataset, problems in drawn.items():
        start = time.process_time()
        verdict = Gym(dataset).check(problems[0], HOSTILE[attack])
        assert not verdict.correct and time.process_time() - start < 20, dataset
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dataset", SUPPORTED)
def test_junk_is_never_right(dataset: str, drawn: dict[str, list[Problem]]) -> None:
    task, problems = Gym(dataset), drawn[dataset]
    for problem in problems:
        gold = problem.answer
        junk = [f"The answer is {gold}", f"{gold} or 7", f"{gold} {gold}", f"({gold}", "zzz", " \n", "[]", "{}"]
        junk += [problem.question, "True or False", "0 1 2 3 4 5 6 7 8 9", "yes no on off undetermined"]
        assert not any(task.check(problem, text).correct for text in junk)
        read = SUPPORTED[dataset]
        for other in problems:
            if dataset not in ("countdown", "puzzle24"):
                assert task.check(problem, other.answer).correct == (read(gold) == read(other.answer))


@pytest.mark.parametrize("dataset", ["chain_sum", "spell_backward", "knights_knaves", "gsm_symbolic", "acre"])
def test_sides_never_share_a_problem(dataset: str) -> None:
    train, held_out = (distinct(Gym(dataset), "train", 80, seed=0), distinct(Gym(dataset), "held_out", 20, seed=0))
    assert not {p.key for p in train} & {p.key for p in held_out}
    assert not {p.question for p in train} & {p.question for p in held_out}
    assert all(is_held_out(p.key) for p in held_out) and not any(is_held_out(p.key) for p in train)


def test_neighbouring_seeds_share_almost_nothing() -> None:
    # reasoning-gym's item i of seed s is item 0 of seed s + i, so these two would share 999 of 1,000 problems.
    one, two = draws("chain_sum", 1, 1000), draws("chain_sum", 2, 1000)
    assert len({p.key for p in one} & {p.key for p in two}) < 100


def test_templates_and_their_contents_are_independent() -> None:
    # reasoning-gym's item 0 of gsm_symbolic draws template and first name from one random number: here always Mia.
    questions = [p.question for p in draws("gsm_symbolic", 0, 3000) if "budgeted for" in p.question]
    assert len({question.split("'")[0] for question in questions}) > 3


def test_same_seed_same_problems(drawn: dict[str, list[Problem]]) -> None:
    for dataset in SUPPORTED:
        n = 1 if dataset in SLOW else 5
        assert draws(dataset, 5, n) == drawn[dataset][:n], dataset
    task = Gym("countdown", {"min_numbers": 2, "max_numbers": 2, "min_target": 2})
    state = random.Random(9).getstate()
    rngs = [random.Random(1), random.Random(2)]
    rngs[0].setstate(state), rngs[1].setstate(state)
    first = task.draw(rngs[0])
    task.draw(random.Random(77))
    assert task.draw(rngs[1]) == first


DRAW = f"""
import random
from finback.tasks.gym import SUPPORTED, Gym
for name in sorted(SUPPORTED.keys() - {SLOW}):
    rng = random.Random(5)
    print(name, [Gym(name).draw(rng) for _ in range(20)])
"""


@pytest.mark.slow
def test_same_problems_in_another_process() -> None:
    """Some generators iterate over sets, whose order differs between processes; these must be refused."""
    root = str(Path(finback.__path__[0]).parent)
    outputs = []
    for hash_seed in "12":
        env = os.environ | {"PYTHONPATH": root, "PYTHONHASHSEED": hash_seed}
        outputs.append(subprocess.run([sys.executable, "-c", DRAW], env=env, capture_output=True, check=True))
    one, two = (output.stdout.splitlines() for output in outputs)
    assert len(one) == len(SUPPORTED) - len(SLOW)
    assert [line.split()[0] for line, other in zip(one, two, strict=True) if line != other] == []


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("(7 - 3) * 25 + 2", RIGHT),
        ("2+25*(7-3)", RIGHT),
        ("-(3 - 7) * 25 + 2", RIGHT),
        ("25 * (7 - 3) - -2", RIGHT),
        ("(7 - 3) / (1 / 25) + 2", WRONG),  # 102, but 1 is not available
        ("7 * 25 - 3 * 2", WRONG),  # 169
        ("(7 - 3) * 25 + 2 + 2 - 2", WRONG),  # uses 2 three times
        ("100 + 2", WRONG),
        ("102", WRONG),
        ("25 * 2 * 2 + 2", WRONG),  # 102 without 3 and 7
        ("(7 - 3) * 25 + 3", WRONG),
        ("(7 - 3) * 25 + 2 = 102", JUNK),
        ("(7 - 3) * 25 + 2.0", JUNK),
        ("(7 - 3) ** 25 + 2", JUNK),
        ("(7 - 3) * 25 // 2", JUNK),
        ("(7 - 3) * 25 + 0x2", JUNK),
        ("(7 - 3)(25) + 2", JUNK),
        ("(7 - 3) * 25 + +2", JUNK),
        ("(7 - 3) * 25 + 2 / (7 - 7)", JUNK),
        ("(7 - 3) * 25 + 02", JUNK),
        ("(7 - 3) * 25 + two", JUNK),
        ("7 - 3, 25, 2", JUNK),
        ("", JUNK),
    ],
)
def test_countdown_by_hand(answer: str, verdict: Verdict) -> None:
    assert check("countdown", gold="25*(7 - 3) + 2", answer=answer) == verdict


def test_expressions_are_exact() -> None:
    assert evaluate("8 / (3 - 8 / 3)") == (24, (3, 3, 8, 8))  # 23.99… in floating point
    assert evaluate(" 1/3 ") == (Fraction(1, 3), (1, 3))
    assert evaluate("-5") == (-5, (5,))
    assert evaluate("9" * 10) and not evaluate("9" * 11)
    assert evaluate("+".join("1" * 100)) and not evaluate("+".join("1" * 101))


@pytest.mark.parametrize(
    ("dataset", "gold", "answer", "verdict"),
    [
        ("chain_sum", "1204", "+01,204.0", RIGHT),
        ("chain_sum", "1204", "12,04", JUNK),
        ("chain_sum", "1204", "1204.000000000000000000000001", WRONG),
        ("chain_sum", "-4", "\u22124", JUNK),  # a typographic minus is not interpreted
        ("basic_arithmetic", "3", "6/2", JUNK),  # copied from the question
        ("decimal_chain_sum", "2.10", "2.1", RIGHT),
        ("coin_flip", "0.3125", "10/32", RIGHT),
        ("coin_flip", "0.3125", "0.3125", RIGHT),
        ("coin_flip", "0.3125", "5/0", JUNK),
        ("fraction_simplification", "$\\frac{2}{3}$", "2/3", RIGHT),
        ("fraction_simplification", "$\\frac{2}{3}$", "\\dfrac{2}{3}", RIGHT),
        ("fraction_simplification", "2/3", "4/6", WRONG),
        ("prime_factorization", "2 × 2 × 3", "3*2 x 2", RIGHT),
        ("prime_factorization", "2 × 2 × 3", "2 × 6", WRONG),
        ("number_sorting", "['-1.0', '2.5']", "[-1, 2.50]", RIGHT),
        ("number_sorting", "['-1.0', '2.5']", "['2.5', '-1.0']", WRONG),
        ("number_sorting", "['-1.0', '2.5']", "-1, 2.5", JUNK),
        ("rotate_matrix", "1 2\n3 4", "1  2 \r\n\n3 4\n", RIGHT),
        ("rotate_matrix", "1 2\n3 4", "1 2 3 4", WRONG),
        ("course_schedule", "True", " true", RIGHT),
        ("needle_haystack", "Kerr", "\u212aerr", WRONG),  # a Kelvin sign
        ("spiral_matrix", "1 2 3", "1 2 3 4", WRONG),
        ("string_manipulation", "abc", "ABC", WRONG),
        ("word_sorting", "Zoo, apple", "Zoo,apple", RIGHT),
        ("word_sorting", "Zoo, apple", "zoo, apple", WRONG),
        ("knights_knaves", "Ann is a hero, and Bob is an egoist.", "Bob is a egoist and Ann is a hero", RIGHT),
        ("knights_knaves", "Ann is a hero, and Bob is an egoist.", "Ann is a hero.", WRONG),
        (
            "knights_knaves",
            "Ann is a hero, and Bob is an egoist.",
            "Ann is a hero, Bob is a hero, Bob is an egoist",
            JUNK,
        ),
        ("knights_knaves", "Ann is a hero.", "Ann is not a hero, Ann is a hero", JUNK),
    ],
)
def test_forms_by_hand(dataset: str, gold: str, answer: str, verdict: Verdict) -> None:
    assert check(dataset, gold, answer) == verdict


def test_unsound_problems_are_not_asked() -> None:
    """Without a check, each of these generators gives wrong or ambiguous answers to some problems."""
    for problem in draws("basic_arithmetic", 0, 50, allow_parentheses=False):
        expression = problem.question.removeprefix("Calculate ").removesuffix(".")
        assert evaluate(expression)[0] == int(problem.answer)  # type: ignore[index]
    assert all("bottom to the top" not in p.question for p in draws("color_cube_rotation", 0, 50))
    assert not {p.answer for p in draws("family_relationships", 0, 200)} & {"niece", "nephew"}
    for problem in draws("coin_flip", 0, 50, min_trials=15):
        assert 2**15 % Fraction(problem.answer).denominator == 0


def test_worked_solutions_are_kept() -> None:
    problem = draws("gsm_symbolic", 0, 1)[0]
    assert problem.solution and "####" not in problem.solution


@pytest.mark.parametrize("dataset", REFUSED)
def test_what_cannot_be_judged_is_refused(dataset: str) -> None:
    with pytest.raises(UserError, match=f"gym.dataset = '{dataset}': this data set .*Choose one"):
        Gym(dataset)


@pytest.mark.parametrize(
    ("dataset", "settings", "message"),
    [
        ("chain_sun", {}, r"gym\.dataset = 'chain_sun': no such data set. Did you mean 'chain_sum'"),
        ("chain_sum", {"max_term": 3}, r"gym\.settings\.max_term = 3: .*Did you mean 'max_terms'"),
        ("chain_sum", {"seed": 3}, r"gym\.settings\.seed = 3: .*Known: "),
        ("chain_sum", {"max_terms": "3"}, r"gym\.settings\.max_terms = '3': expected int, got str"),
        ("chain_sum", {"max_terms": 1}, r"max_terms must be >= min_terms"),
        ("basic_arithmetic", {"operators": ("+", "^")}, r"unsupported operator: \^"),
        ("basic_arithmetic", {"operators": "+"}, r"gym\.settings\.operators = '\+': expected tuple"),
        ("basic_arithmetic", {"operators": ["+"]}, r"gym\.settings = "),
        ("countdown", {"operators": ()}, r"must specify at least one operator"),
    ],
)
def test_wrong_settings_are_refused(dataset: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Gym(dataset, settings)  # type: ignore[arg-type]


def test_settings_are_used() -> None:
    task = Gym("basic_arithmetic", {"operators": ("+",), "min_terms": 2, "max_terms": 2, "max_digits": 1}, "sums")
    problem = task.draw(random.Random(0))
    assert not set("*/") & set(problem.question) and problem.question.count("+") <= 1
    assert task.name == "sums" and Gym("chain_sum").name == "gym-chain_sum"
    with pytest.raises(UserError, match="no valid problem"):
        Gym("calendar_arithmetic", {"tasks": ("weekday_of_date_from_first_date",)}).draw(random.Random(0))
