"""Which questions are drawn: none that exceed the window, and each of a file's once before any repeats."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finback.config import UserError
from finback.data import tokenizer
from finback.data.tokenizer import Tokenizer
from finback.data.turn import Message
from finback.engine.engine import Engine
from finback.engine.open import load
from finback.parallel.mesh import World
from finback.rollouts.drawing import QuestionOrder, Window
from finback.runs.files import read_lines
from finback.runs.folder import StageRun
from finback.stages.distill import Distill
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.exam_questions import ExamQuestions
from finback.stages.grpo import GRPO
from finback.stages.grpo_sampling import GroupSampler
from finback.stages.lessons import LessonReader
from finback.stages.prepare import TaskText
from finback.stages.reject import Reject
from finback.stages.sft import SFT
from finback.tasks import task as tasks
from finback.tasks.code import Code
from finback.tasks.math import Chains
from finback.tasks.questions import Questions
from finback.tasks.task import Mixture, Problem, Task, Verdict, is_held_out
from finback.train import loop
from tests.test_grpo import reinforcement
from tests.test_tuning import stage_folder, tune
from tests.toy import CONFIG, WORDS

LONG = "one and " * CONFIG.max_position_embeddings


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return tokenizer.train([WORDS], 320, tmp_path_factory.mktemp("words") / "tokenizer.json")


def questions(folder: Path, count: int = 20, longest: int = 0) -> Questions:
    """A file of short questions and `longest` that exceed any window, all in the training split."""
    path = folder / f"{count}-{longest}.jsonl"
    asked = (f"{LONG * (i < longest)}{i}?" for i in range(10 * count))
    chosen = [q for q in asked if not is_held_out(q)][:count]
    path.write_text("\n".join(json.dumps({"question": q, "answer": "1"}) for q in chosen))
    return Questions(str(path))


def order(task: Task, words: Tokenizer, seed: int = 0, said: list[str] | None = None) -> QuestionOrder:
    window = Window(words, CONFIG, max_tokens=12)
    return QuestionOrder(
        task, window, lambda *purpose: hash((seed, *map(len, map(str, purpose)), purpose[-1])), (said or []).append
    )


def drawn(of: QuestionOrder, count: int, seed: int = 0) -> list[Problem]:
    rng = random.Random(seed)
    return [of.draw(rng) for _ in range(count)]


def test_a_files_questions_come_in_epochs(words: Tokenizer, tmp_path: Path) -> None:
    task = questions(tmp_path)
    one = [p.question for p in drawn(order(task, words), 50)]
    assert len({*one[:20]}) == len({*one[20:40]}) == 20 and len({*one[40:]}) == 10
    assert one[:20] != one[20:40], "each epoch must have a different order"
    assert one == [p.question for p in drawn(order(task, words), 50, seed=9)], "only the run's seed counts"
    assert one != [p.question for p in drawn(order(task, words, seed=1), 50)]


def test_drawing_goes_on_where_it_stopped(words: Tokenizer, tmp_path: Path) -> None:
    task = Mixture((questions(tmp_path), Chains(2, 3)))
    whole, rng = order(task, words), random.Random(3)
    for _ in range(33):
        whole.draw(rng)
    again = order(task, words)
    again.load_state(json.loads(json.dumps(whole.state())))
    assert drawn(whole, 30) == drawn(again, 30)


def test_generated_questions_are_drawn_as_ever(words: Tokenizer) -> None:
    for task in (Chains(2, 3), Mixture((Chains(2, 3), Chains(4, 5)))):
        rng = random.Random(5)
        assert drawn(order(task, words), 40, seed=5) == [tasks.draw(task, "train", rng) for _ in range(40)]


def test_a_mixture_takes_its_files_questions_once(words: Tokenizer, tmp_path: Path) -> None:
    task = Mixture((questions(tmp_path), Chains(2, 3)), weights=(3.0, 1.0))
    found = drawn(order(task, words), 80)
    listed = [p.question for p in found if p.tags["part"] == 0]
    assert 40 < len(listed) < 79 and {*Counter(listed[:40]).values()} == {2}
    assert all(task.check(p, p.answer).correct and not is_held_out(p.key) for p in found)


def test_a_files_programs_come_in_epochs(words: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "code.jsonl"
    lines = [{"question": f"Echo {i}.", "tests": [{"stdin": "a", "stdout": "a"}]} for i in range(12)]
    path.write_text("\n".join(map(json.dumps, lines)))
    train = [p for p in Code(str(path)).all_problems if not is_held_out(p.key)]
    assert {p.key for p in drawn(order(Code(str(path)), words), len(train))} == {p.key for p in train}


def test_questions_that_are_too_long_are_left_out_before_the_first(words: Tokenizer, tmp_path: Path) -> None:
    said = [""]
    of = order(questions(tmp_path, 20, longest=5), words, said=said)
    assert of.too_long == 5 and len({p.question for p in drawn(of, 15)}) == 15
    assert said[1:] == ["5 questions left out: with max_tokens = 12 they exceed the window of 256 tokens"]
    with pytest.raises(
        UserError,
        match=r"^question = 'one and .*…': its \d+ tokens and max_tokens = 12 exceed the model's window of 256",
    ):
        order(questions(tmp_path, 5, longest=50), words)


class Sometimes(Chains):
    """Chains, some of which are too long."""

    def draw(self, rng: random.Random) -> Problem:
        problem = super().draw(rng)
        return problem if rng.random() < 0.7 else Problem(LONG + problem.question, problem.answer, problem.key)


def test_generated_questions_that_are_too_long_are_passed_over(words: Tokenizer) -> None:
    said = [""]
    of = order(Sometimes(2, 3), words, said=said)
    assert not any(p.question.startswith(LONG) for p in drawn(of, 60))
    assert of.too_long > 5 and of.state()["too_long"] == of.too_long and len(said) == 2


def loaded(folder: Path) -> tuple[Engine, Tokenizer]:
    model, words = load(folder)
    return Engine(model, words.stops), words


# ---- in the stages ------------------------------------------------------------------------------------------------------


def asked(folder: Path) -> list[str]:
    """The questions asked, in order: one for each group of answers."""
    lines = read_lines(folder / "samples.jsonl")
    return [line["question"] for line in lines[::4]]


def test_rl_asks_a_files_questions_in_epochs_and_resumes_in_them(tmp_path: Path) -> None:
    task = questions(tmp_path, 12, longest=2)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    whole = reinforcement(tmp_path / "a", task=task, steps=5, resample=1)
    results = loop.run(whole)
    every = asked(whole.run.folder)
    assert len(every) > 20 and {*Counter(every[:10]).values()} == {1} == {*Counter(every[10:20]).values()}
    assert results["too_long"] == 2
    begun = reinforcement(tmp_path / "b", task=task, steps=5, resample=1).loop()
    for _ in range(2):
        begun.advance()
    begun.checkpoint()
    begun.advance()  # lost
    again = reinforcement(tmp_path / "b", task=task, steps=5, resample=1)
    loop.run(again)
    assert asked(again.run.folder) == every


class Cities:
    """A user's task that draws its problems from a list."""

    name = "cities"
    all_problems = tuple(Problem(f"Where is city {i}?", str(i), f"where is city {i}?") for i in range(80))

    def draw(self, rng: random.Random) -> Problem:
        return rng.choice(self.all_problems)

    def check(self, problem: Problem, answer: str) -> Verdict:
        return Verdict(problem.answer == answer, True)


@pytest.mark.parametrize("task", [Cities(), Mixture((Cities(), Chains(2, 3)))])
def test_any_list_of_an_exam_is_looked_for(task: Any, tmp_path: Path) -> None:
    run = StageRun(tmp_path, "zero", 0, World())
    held_out = [problem for problem in Cities.all_problems if is_held_out(problem.key)]
    asked = len(held_out) if isinstance(task, Cities) else 8
    run.stages = (Evaluate(name="after", start="zero", exams=(Exam("cities", task=task, problems=asked),)),)
    found = [p for p in held_out if ExamQuestions(run).find((Message("user", p.question),), is_made=True) == "cities"]
    assert len(held_out) > 4 and (found == held_out if isinstance(task, Cities) else found)


def test_questions_that_an_exam_asks_are_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    task = questions(tmp_path, 12)
    asked_too = [json.loads(line) for line in Path(task.source).read_text().splitlines()][:3]
    exam = tmp_path / "exam.jsonl"
    exam.write_text("\n".join(map(json.dumps, [*asked_too, {"question": "else", "answer": "1"}])))
    stage_folder(tmp_path, 1, "base")
    run = StageRun(tmp_path, "zero", 0, World())
    run.folder.mkdir()
    run.stages = (Evaluate(name="after", start="zero", exams=(Exam("file", suite=str(exam)),)),)
    # a mixture's generated problems are held out by their hash
    mixed = Mixture((task, Chains(2, 3)))
    sampler = GroupSampler(GRPO(name="zero", start="base", task=mixed), run, *loaded(tmp_path / "base"))
    assert sampler.order.contaminated == {"file": 3}
    drawn_ = [sampler.order.draw(random.Random(i)) for i in range(60)]
    found = {p.question for p in drawn_ if p.tags["part"] == 0}
    assert len(found) == 9 and found.isdisjoint(record["question"] for record in asked_too)
    assert "3 questions left out because exams ask them: file (3)" in capfd.readouterr().err
    exams = ExamQuestions(run)
    assert len(exams.without(task, tasks.distinct(task, "train", 12, 0))) == 9 and exams.left_out == {"file": 3}
    made = TaskText((task,), 40)
    kept = list(ExamQuestions(run).outside(made.tasks, made.generate(0)))
    assert 0 < len(kept) < 40 and found >= {document.messages[0].content for document in kept}
    reader = LessonReader(SFT(name="tuned", start="base", text=(made,)), run, Tokenizer(tmp_path / "base"))
    assert (
        reader.read()
        and reader.results["contaminated"]["tasks"]["file"]
        == 40 - reader.results["sources"]["tasks"]["documents"]["kept"]
    )
    exam.write_text(Path(task.source).read_text())
    run.stages = (Evaluate(name="after", start="zero", exams=(Exam("all", suite=str(exam)),)),)
    with pytest.raises(UserError, match=r"it has no training problems: exams ask all 12 \(all\)"):
        GroupSampler(GRPO(name="zero", start="base", task=task), run, *loaded(tmp_path / "base"))


def test_on_policy_distillation_asks_a_files_questions_in_epochs(tmp_path: Path) -> None:
    task = questions(tmp_path, 8, longest=1)
    knobs: dict[str, Any] = {
        "teacher": "other",
        "task": task,
        "traces": (),
        "steps": 3,
        "prompts_per_step": 7,
        "max_tokens": 4,
    }
    t = tune(tmp_path, Distill, **knobs)
    begun = t.loop()
    begun.advance()
    assert t.batches.state() == {"drawn": [7], "too_long": 1}
    begun.checkpoint()
    again = tune(tmp_path, Distill, **knobs)
    assert loop.run(again)["too_long"] == 1 and again.batches.state() == {"drawn": [21], "too_long": 1}


def test_evaluation_and_rejection_sampling_leave_out_what_is_too_long(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stage_folder(tmp_path, 1, "base")
    path = tmp_path / "exam.jsonl"
    lines = [{"question": f"{LONG * (i < 2)}{i}?", "answer": "1"} for i in range(8)]
    path.write_text("\n".join(map(json.dumps, lines)))
    exam = Exam("file", suite=str(path), max_tokens=4)
    run = StageRun(tmp_path, "after", 0, World())
    run.folder.mkdir()
    (result,) = Evaluate(name="after", start="base", exams=(exam,)).run(run)["evaluations"]
    assert (result["n"], result["too_long"]) == (6, 2) and "file: 2 questions left out" in capfd.readouterr().err
    task = questions(tmp_path, 10, longest=3)
    stage = Reject(name="kept", start="base", task=task, prompts=10, num_generations=2, max_tokens=4)
    run = StageRun(tmp_path, "kept", 0, World())
    run.folder.mkdir()
    with pytest.raises(UserError, match="none of 14 answers can be kept"):
        stage.run(run)
    assert "3 questions left out" in capfd.readouterr().err
