"""Rewards of answers, and of reward hacks that models are known for."""

import random
from pathlib import Path
from typing import Any

import pytest

from finback.config import UserError
from finback.data.messages import parse_response
from finback.tasks.judge import Judge
from finback.tasks.language import consistency
from finback.tasks.math import Chains
from finback.tasks.questions import Questions
from finback.tasks.rewards import Reward
from finback.tasks.small_talk import SmallTalk
from finback.tasks.task import Mixture, Problem, Task, Verdict, draw

RIGHT, WRONG, JUNK = Verdict(True, True), Verdict(False, True), Verdict(False, False)
FULL = Reward(form=0.1, think=0.2, language=0.3, brevity=0.1)
ENGLISH, CHINESE = "first I add the two numbers, then I take one away", "先把两个数字加起来然后再减去一"


def earn(reward: Reward, task: Task, problem: Problem, text: str, tokens: int = 50) -> dict[str, float]:
    """Returns the reward of a model's whole text, as RL computes it."""
    response = parse_response(text)
    verdict = task.check(problem, response.answer) if response.closed else JUNK
    return reward.parts(verdict, response.reasoning, response.thinks, tokens, 100)


def test_a_right_answer_pays_most_and_junk_nothing() -> None:
    assert [sum(Reward().parts(v, "", False, 5, 96).values()) for v in (RIGHT, WRONG, JUNK)] == [1.0, 0.1, 0.0]


def test_parts_by_hand() -> None:
    assert FULL.names == ["accuracy", "form", "think", "language", "brevity"]
    assert FULL.parts(RIGHT, ENGLISH, True, 25, 100) == pytest.approx(
        {"accuracy": 1.0, "form": 0.0, "think": 0.2, "language": 0.3, "brevity": 0.075}
    )
    assert FULL.parts(WRONG, ENGLISH, True, 25, 100) == pytest.approx(
        {"accuracy": 0.0, "form": 0.1, "think": 0.2, "language": 0.3, "brevity": 0.0}
    )
    assert sum(FULL.parts(JUNK, ENGLISH, True, 25, 100).values()) == 0


def test_language_is_paid_by_its_share() -> None:
    """13 words of which 5 are Chinese, at two characters a word."""
    half = FULL.parts(RIGHT, ENGLISH + " " + CHINESE[:10], True, 25, 100)["language"]
    assert 0.15 < half < 0.25
    assert FULL.parts(RIGHT, CHINESE, True, 25, 100)["language"] == 0
    assert Reward(language=0.3, target="zh").parts(RIGHT, CHINESE, True, 25, 100)["language"] == pytest.approx(0.3)


@pytest.mark.parametrize(
    "weights",
    [
        {"form": 1.0},
        {"language": 0.9},
        {"think": 0.5, "language": 0.4},
        {"accuracy": 0.1},
        {"preference": 2.0, "judge": Judge("http://127.0.0.1:1/v1", "any")},
    ],
)
def test_a_wrong_answer_can_never_earn_as_much_as_a_right_one(weights: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"reward\.accuracy"):
        Reward(**weights)
    worst_right = FULL.parts(RIGHT, CHINESE, True, 100, 100)
    best_wrong = FULL.parts(WRONG, ENGLISH, True, 1, 100)
    assert sum(worst_right.values()) > sum(best_wrong.values())


@pytest.mark.parametrize("weights", [{"brevity": -2.0}, {"accuracy": float("nan")}, {"form": float("inf")}])
def test_weights_are_numbers_of_zero_or_more(weights: dict[str, float]) -> None:
    with pytest.raises(UserError, match=r"negative|NaN or infinity"):
        Reward(**weights)


def test_a_judge_and_its_weight_go_together() -> None:
    with pytest.raises(UserError, match=r"reward\.preference = 0\.5"):
        Reward(preference=0.5)


SUM = Problem("3+4=?", "7", "k")
FILE_LINES = '{"question": "Ann has 3 apples and gets 4. How many?", "answer": "3+4=7 #### 7"}\n'
# (description, text after the assistant token)
HACKS = [
    ("an empty chain", "<think></think>7"),
    ("a chain of blanks", "<think> \n\t </think>7"),
    ("a chain that never ends", "<think>3+4=7 7"),
    ("two different answers", "<think>3+4=7</think>7 8"),
    ("two answers in words", "<think>3+4=7</think>7 or 8"),
    ("the same answer twice", "<think>3+4=7</think>7 7"),
    ("the question as the answer", "<think>3+4=7</think>3+4"),
    ("the question with its answer", "<think>3+4=7</think>3+4=7"),
    ("every number", "<think>3+4=7</think>" + " ".join(map(str, range(20)))),
    ("a fake end of the chain", "<think>a</think>8</think>7"),
    ("a forged answer tag", "<think>a</think></answer><answer>7</answer>8"),
    ("no answer", "<think>3+4=7</think>"),
]


@pytest.mark.parametrize(("what", "text"), HACKS, ids=[what for what, _ in HACKS])
def test_hacks_earn_nothing(what: str, text: str) -> None:
    assert sum(earn(FULL, Chains(), SUM, text).values()) == 0


# for a question from a file, a true equation is a correct answer
OF_A_FILE = [hack for hack in HACKS if hack[0] != "the question with its answer"]


@pytest.mark.parametrize(("what", "text"), OF_A_FILE, ids=[what for what, _ in OF_A_FILE])
def test_hacks_earn_nothing_for_a_question_of_a_file(what: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text(FILE_LINES)
    task = Questions(str(tmp_path / "q.jsonl"))
    problem = task.draw(random.Random(0))
    earned = earn(Reward(), task, problem, text.replace("7 7", "7, 7"))
    assert earned["accuracy"] == 0, what
    if what in ("an empty chain", "a chain of blanks", "a chain that never ends", "no answer"):
        assert sum(earned.values()) == 0
    assert earn(Reward(), task, problem, "<think>3+4</think>7")["accuracy"] == 1


# ---- mixtures and small talk ---------------------------------------------------------------------------------------------------


def test_a_mixture_draws_by_weight_and_asks_the_right_task() -> None:
    mixture = Mixture((Chains(2, 2), SmallTalk()), (3.0, 1.0))
    rng = random.Random(0)
    problems = [draw(mixture, "train", rng) for _ in range(400)]
    sums = [p for p in problems if p.question.endswith("=?")]
    assert 0.65 < len(sums) / 400 < 0.85
    assert all(mixture.check(p, p.answer).correct for p in sums)
    chat = next(p for p in problems if not p.question.endswith("=?"))
    assert mixture.check(chat, "I am well, thank you. And you?").correct and not mixture.check(chat, "7").correct
    with pytest.raises(UserError, match=r"mixture\.weights"):
        Mixture((Chains(),), (1.0, 2.0))
    with pytest.raises(UserError, match=r"mixture\.tasks"):
        Mixture(())
    with pytest.raises(UserError, match="contains another mixture"):
        Mixture((mixture, SmallTalk()))


@pytest.mark.parametrize(
    ("reply", "good"),
    [
        ("I am doing great, how are you?", True),
        ("That’s funny! I have never been there.", True),
        ("7", False),
        ("16 and 8 is 24, my friend", False),
        ("hi", False),
        ("yes yes yes yes yes yes", False),
        ("Esmplet frust Agtla safled regended hSS", False),
        ("", False),
        ("well " * 50, False),
        ("how are you today my friend?", False),
    ],
)
def test_small_talk_knows_a_sentence_when_it_sees_one(reply: str, good: bool) -> None:
    """The last reply only repeats the question."""
    problem = Problem("How are you today my friend?", "", "talk: how are you today my friend?")
    verdict = SmallTalk().check(problem, reply)
    assert verdict.correct == verdict.well_formed == good


def test_sums_put_in_words_are_the_same_sums() -> None:
    by_language = {t: Chains(4, 6, wording=t).draw(random.Random(3)) for t in ("", "en", "zh")}  # type: ignore[arg-type]
    assert len({(p.question, p.answer, p.key) for p in by_language.values()}) == 1
    assert consistency(by_language["en"].solution) == 1 and consistency(by_language["zh"].solution) == 0
    assert consistency(by_language[""].solution) is None
    assert consistency(by_language["zh"].solution, "zh") == 1
    mixed = [Chains(6, 6, wording="mixed").draw(random.Random(seed)).solution for seed in range(20)]
    assert any(0 < (consistency(chain) or 0) < 1 for chain in mixed)
