"""Published question sets: read in their hub format; gold answers pass and near misses fail."""

import base64
import hashlib
import importlib.util
import json
import pickle
import sys
import time
import types
import zlib
from pathlib import Path
from typing import Any

import pytest

from finback.config import UserError
from finback.suites import catalogue, choice, livecodebench, mathematics, packaged
from finback.suites.suite import Suite
from finback.tasks.answers import boxed
from finback.tasks.choice import Choice
from finback.tasks.letters import named
from finback.tasks.task import Task, Verdict, is_held_out
from tests.copies import COPIES, GOOD, lay

RIGHT, WRONG, NONE = Verdict(True, True), Verdict(False, True), Verdict(False, False)
NUMBERS, LETTERS = ("gsm8k", "math500", "aime24", "aime25"), ("gpqa", "mmlu", "mmlu-pro", "ceval")


def gold(suite: Suite, number: int) -> str:
    """A correct answer to a question in the requested form."""
    problem = suite.problems[number]
    if suite.name in NUMBERS:
        return f"So it is \\boxed{{{problem.answer}}}."
    if suite.name in LETTERS:
        return f"I think.\n**Answer: {problem.answer}**"
    return GOOD[str(problem.tags.get("task_id", problem.tags.get("date")))]


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Disables the network and the user's cache."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return tmp_path


def options(name: str) -> str:
    return "?subset=computer_network" if name == "ceval" else ""


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_the_hub_and_its_file_are_the_same_suite(name: str, local: Path) -> None:
    copy = lay(local, name)
    suite = catalogue.load(f"{name}@{copy}{options(name)}", None, 0)
    same = catalogue.load(f"{name}@{copy / COPIES[name][2]}{options(name)}", None, 1)
    assert suite.problems == same.problems and suite.source.digest == same.source.digest
    assert suite.name == name and len(suite.problems) == len(COPIES[name][3]) and isinstance(suite.task, Task)
    assert suite.source.licence and suite.extraction and suite.metric and suite.system == ""
    for number, problem in enumerate(suite.problems):
        assert suite.task.check(problem, gold(suite, number)) == RIGHT
        for text in ("", " ", "I do not know.", "\\boxed{}", gold(suite, number).replace(problem.answer, "Z")):
            if text != gold(suite, number):
                assert not suite.task.check(problem, text).correct, text


def test_hub_sets_are_asked_for_by_name_split_and_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(name: str, subset: str | None, **given: str | None) -> list[dict[str, Any]]:
        asked[name] = (subset, given["split"], given["revision"], given["data_files"])
        return wanted

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    monkeypatch.setattr("finback.suites.code.packaged", lambda: ("", ""))
    for name, (_, _, _, records) in COPIES.items():
        wanted = records
        suite = catalogue.load(f"{name}{options(name)}", None, 0)
        assert suite.source.name.startswith("hub:") and len(suite.problems) == len(records)
    assert asked["openai/gsm8k"] == ("main", "test", "cc7b047b6e5bb11b4f1af84efc572db110a51b3c", None)
    assert asked["Idavidrein/gpqa"][:2] == ("gpqa_diamond", "train")
    assert asked["json"][3] == f"hf://datasets/{livecodebench.ORIGIN.repo}@{livecodebench.ORIGIN.revision}/test6.jsonl"
    pinned = [given[2] for name, given in asked.items() if name not in ("json", "ceval/ceval-exam")]
    assert len(asked) == len(COPIES) and all(len(str(revision)) == 40 for revision in pinned)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("gsm8", "no such suite. Did you mean 'gsm8k'"),
        ("nothing like it", "Known: .*gsm8k.*; or the path of a file"),
        ("gym:chain_sun", "no such data set. Did you mean 'chain_sum'"),
        ("gym:composite", "is a mixture"),
        ("gym:chain_sum?level=heard", "no such level. Did you mean 'hard'"),
        ("gym:chain_sum?max_term=3", "no such option. Did you mean 'max_terms'"),
        ("gym:chain_sum?max_terms=x", "expected int"),
        ("gym:acre?level=hard", "has no levels"),
        ("gsm8k?split=train", "has no option 'split'"),
        ("gsm8k?x", "not a list of options"),
        ("needle@a.jsonl", "made from a seed"),
        ("needle?length=3", "Did you mean 'lengths'"),
        ("needle?lengths=ten", "not whole numbers from 50"),
        ("language:xx", "no such suite"),
        ("ceval", "52 subjects"),
        ("chains?terms=3", "no such option. Did you mean"),
        ("chains?min_terms=9", "not in 2..max_terms"),
        ("gsm8k@nowhere.jsonl", "no such file"),
        ("livecodebench?since=August", "since = 'August': not a date"),
        ("safety?judge=http://127.0.0.1:1/v1", "a judge needs an address and a model"),
        ("mine.jsonl", "no such file"),
    ],
)
def test_what_cannot_be_found_is_named(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        catalogue.load(spec, 2, 0)
    with pytest.raises(UserError, match="problems = 0: not above 0"):
        catalogue.load("gsm8k", 0, 0)


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("gsm8k", {"question": "a"}, r":2 = 'answer': the record has no such field. Known: question"),
        ("gsm8k", {"question": ["a"], "answer": "1"}, r":2 question = \['a'\]: expected text"),
        ("mmlu", {"question": "a", "choices": "b", "answer": 0}, r":2 choices = 'b': expected a list of texts"),
        ("mmlu", {"question": "a", "choices": ["b", "c"], "answer": "x"}, r":2 answer = 'x': neither a letter"),
        ("mmlu", {"question": "a", "choices": ["b", "c"], "answer": 2}, r":2 = 2: there are 2 choices"),
        ("mmlu", {"question": "a", "choices": ["b"], "answer": 0}, r":2 = \['b'\]: not 2 to 10 choices"),
        ("humaneval", {"task_id": "x", "prompt": "p"}, r":2 = 'canonical_solution': the record has no such"),
        ("mbpp", {"prompt": "p", "code": "def f(", "test_list": ["assert f()"]}, r":2 code = 'def f\(': not Py"),
        ("mbpp", {"prompt": "p", "code": "def f(): 1", "test_list": ["assert g()"]}, r":2 test_list = .*calls no"),
        ("livecodebench", {"question_content": "a", "contest_date": "soon"}, r":2 contest_date = 'soon': not a date"),
    ],
)
def test_a_bad_record_is_named_by_file_line_and_field(
    name: str, record: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, (COPIES[name][3][0], record))))
    with pytest.raises(UserError, match=rf"bad\.jsonl{message}"):
        catalogue.load(f"{name}@{path}", None, 0)


def test_a_test_case_that_is_a_pickled_call_is_refused(tmp_path: Path) -> None:
    class Call:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "made",))

    record = dict(COPIES["livecodebench"][3][0])
    for raw in (pickle.dumps(Call()), b"not a pickle", b""):
        record["private_test_cases"] = base64.b64encode(zlib.compress(raw)).decode()
        (tmp_path / "bad.jsonl").write_text(json.dumps(record))
        with pytest.raises(UserError, match=r"bad\.jsonl:1 private_test_cases = .*not base64 of a compressed"):
            catalogue.load(f"livecodebench@{tmp_path / 'bad.jsonl'}", None, 0)
    assert not (tmp_path / "made").exists()


def test_a_window_of_contests(tmp_path: Path) -> None:
    at = lay(tmp_path, "livecodebench") / "test6.jsonl"
    suite = catalogue.load(f"livecodebench@{at}?since=2024-08-11&until=2025-01-11", None, 0)
    assert [p.tags["date"] for p in suite.problems] == ["2025-01-11"]
    with pytest.raises(UserError, match="no problem in this period"):
        catalogue.load(f"livecodebench@{at}?since=2025-02-01", None, 0)


def test_a_digest_is_that_of_the_questions_asked(tmp_path: Path) -> None:
    at = lay(tmp_path, "gsm8k") / "main" / "test.jsonl"
    whole = catalogue.load(f"gsm8k@{at}", None, 0)
    rows = [
        ["Ann has 3 bags of 1,000 nails. How many nails?", "3,000"],
        ["Ben owes 5 dollars and pays 7. What is left?", "-2"],
    ]
    by_hand = hashlib.sha256("".join(json.dumps(row) + "\n" for row in rows).encode()).hexdigest()
    assert whole.source.digest == by_hand
    drawn = [catalogue.load(f"gsm8k@{at}", 1, seed) for seed in range(8)]
    assert {len(s.problems) for s in drawn} == {1} and len({s.source.digest for s in drawn}) == 2
    at.write_text(at.read_text().replace("nails?", "nails"))
    assert catalogue.load(f"gsm8k@{at}", None, 0).source.digest != whole.source.digest


def test_gold_answers_that_fail_their_own_check_are_counted_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"question": f"{i} + 1?", "answer": str(i + 1)}) for i in range(30)]
    bad = json.dumps({"question": "Which?", "answer": "nothing follows the mark ####"})
    path.write_text("\n".join([*lines, bad]))
    suite = catalogue.load(str(path), None, 0)
    assert len(suite.problems) == 30 and suite.notes["left out"].startswith("1,")
    path.write_text("\n".join([*lines, bad, bad.replace("Which", "What")]))
    with pytest.raises(UserError, match="suite a = '': 2 of 32 gold answers fail their own check"):
        catalogue.load(str(path), None, 0)


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    files = {
        "sums": ({"question": "1+1?", "answer": "2"}, "\\boxed{2}", "\\boxed{3}"),
        "quiz": ({"question": "Big?", "choices": ["ant", "whale"], "answer": "whale"}, "Answer: B", "Answer: A"),
        "code": ({"question": "Say 5.", "tests": [{"stdin": "", "stdout": "5"}]}, "print(5)", "print(6)"),
    }
    for name, (record, right, wrong) in files.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record))
        suite = catalogue.load(str(tmp_path / f"{name}.jsonl"), None, 0)
        assert suite.name == name and suite.source.licence == "unknown"
        assert suite.task.check(suite.problems[0], right).correct
        assert not suite.task.check(suite.problems[0], wrong).correct
    (tmp_path / "sums.jsonl").write_text(json.dumps({"frage": "1+1?", "antwort": "2"}))
    suite = catalogue.load(f"{tmp_path}/sums.jsonl?question=frage&answer=antwort", None, 0)
    assert suite.problems[0].question == "1+1?"


@pytest.mark.parametrize(
    ("record", "usual", "known"),
    [
        ({"question": "1+1?", "answer": "2"}, "boxed", ["boxed", "plain"]),
        (
            {"question": "1+1?", "choices": ["1", "2"], "answer": "B"},
            'line of the form "Answer: X"',
            ["boxed", "plain"],
        ),
        (
            {"question": "1+1?", "tests": [{"stdin": "", "stdout": "2"}]},
            "whole program in one ```python block",
            ["plain"],
        ),
    ],
)
def test_questions_of_ones_own_are_asked_for_a_form(
    record: dict[str, Any], usual: str, known: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record))

    def put(query: str) -> str:
        suite = catalogue.load(f"{path}{query}", None, 0)
        return suite.ask(suite.problems[0])[0]["content"]

    assert usual in put("") and put("").startswith(("1+1?", "Answer"))
    assert put("?prompt=plain") == "1+1?" + ("\nA. 2\nB. 1" if "choices" in record else "")
    for prompt in ("boxed", "box"):
        if prompt in known:
            assert "step by step" in put(f"?prompt={prompt}") and "\\boxed{}" in put(f"?prompt={prompt}")
            continue
        with pytest.raises(UserError, match=f"has no prompt '{prompt}'.*Use .*prompt=plain"):
            put(f"?prompt={prompt}")


def test_the_quickstarts_sums_are_held_out() -> None:
    suite = catalogue.load("chains", 20, 1)
    assert suite.name == "chains-5-7" and len(suite.problems) == 20
    assert all(is_held_out(problem.key) for problem in suite.problems)
    assert suite.ask(suite.problems[0])[0]["content"] == suite.problems[0].question
    assert suite.task.check(suite.problems[0], suite.problems[0].answer).correct
    assert catalogue.load("chains?min_terms=8&max_terms=8", 3, 1).name == "chains-8"


CHOICES = ["ant", "bee", "cat", "dog"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("Answer: B", "B"),
        ("... so.\n\n**Answer: B**\n", "B"),
        ("答案：B", "B"),
        ("The final answer is: (B)", "B"),
        ("\\boxed{B}", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("Answer: bee", "B"),
        ("Answer: B. bee", "B"),
        ("I first thought\nAnswer: B\nand still\nAnswer: B", "B"),
        ("Answer: `B`", "B"),
        ("Answer: B. cat", None),
        ("Answer: A\nAnswer: B", None),
        ("\\boxed{A} \\boxed{B}", None),
        ("Answer: E", None),
        ("Answer: A or B", None),
        ("A or B", None),
        ("Answer: B\nAnswer: who knows", None),
        ("", None),
        ("AB", None),
        ("Answer:", None),
        ("Answer: not B", None),
        ("The ant is B, the bee C", None),
        ("Ｂ", "B"),
        ("Answer: \u0412", None),
        ("The answer is B.", "B"),
        ("So the correct answer is (b)\nsince bees hum", "B"),
        ("The answer is not B", None),
        ("The answer is A\nbut wait\nAnswer: B", "B"),
        ("The answer is A.\nThe answer is B.", None),
        ("B" * 200_000, None),
        ("Answer: " * 9999, None),
        ("Answer: A, B, C, D", None),
        ("\\boxed{B" * 5000, None),
    ],
)
def test_the_letter_of_an_answer(answer: str, letter: str | None) -> None:
    assert named(answer, CHOICES) == letter
    assert named(answer, []) is None


def test_boxes_are_found_in_one_pass() -> None:
    assert boxed("\\boxed{1} {\\boxed{\\frac{1}{2}}} \\boxed{\\boxed{3}} \\fbox {4} } \\boxed{5") == [
        "1",
        "\\frac{1}{2}",
        "3",
        "4",
    ]
    assert boxed("\\boxed{" + "x" * 1999 + "}") and not boxed("\\boxed{" + "x" * 2000 + "}")
    start = time.process_time()
    assert boxed("\\boxed{B" * 12_000) == boxed("\\boxed{" + "{" * 90_000 + "}" * 5000) == []
    assert time.process_time() - start < 20


def test_gpqa_hides_where_the_right_answer_was(tmp_path: Path) -> None:
    rows = [
        json.dumps({**COPIES["gpqa"][3][0], "Question": f"Which of these is a noble gas, {i}?"}) for i in range(200)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    suite = catalogue.load(f"gpqa@{tmp_path / 'a.jsonl'}", None, 0)
    counts = [sum(p.answer == letter for p in suite.problems) for letter in "ABCD"]
    assert min(counts) >= 30 and suite.chance == 0.25
    assert all(f"{p.answer}. Neon" in p.question for p in suite.problems)


def quiz(path: Path, n: int = 80) -> Path:
    """n questions, all with the right choice first."""
    records = [
        {"question": f"Which is {i}?", "choices": [str(i), f"{i + 1}", f"{i + 2}", "7 x"], "answer": "A"}
        for i in range(10, n + 10)
    ]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


def test_choices_of_ones_own_are_shuffled_as_in_training(tmp_path: Path) -> None:
    path = quiz(tmp_path / "quiz.jsonl")
    suite, task = catalogue.load(str(path), None, 0), Choice(str(path), instruction="")
    assert [(p.question, p.answer) for p in suite.problems] == [(p.question, p.answer) for p, _ in task.problems()]
    counts = [sum(p.answer == letter for p in suite.problems) for letter in "ABCD"]
    assert min(counts) >= 10 and all(suite.task.check(p, p.answer) == RIGHT for p in suite.problems)
    as_given = catalogue.load(f"{path}?shuffle=false", None, 0)
    assert {p.answer for p in as_given.problems} == {"A"} and as_given.source.digest != suite.source.digest
    with pytest.raises(UserError, match="neither true nor false"):
        catalogue.load(f"{path}?shuffle=maybe", None, 0)


def test_choices_of_published_sets_are_shuffled_where_that_is_asked(tmp_path: Path) -> None:
    path = quiz(tmp_path / "quiz.jsonl")
    assert {p.answer for p in catalogue.load(f"mmlu@{path}", None, 0).problems} == {"A"}
    shuffled = catalogue.load(f"mmlu@{path}?shuffle=true", None, 0)
    assert {p.answer for p in shuffled.problems} == set("ABCD")
    assert all(f"{p.answer}. {p.question.split()[2][:-1]}" in p.question.splitlines() for p in shuffled.problems)


@pytest.mark.parametrize(
    ("records", "left", "note"),
    [
        ([("1+1?", "2"), ("1 + 2?", "3"), ("1+1?", "3")], 1, "1 left out, first '1+1?' with '2' and '3'"),
        ([("1+1?", "2"), ("1 + 2?", "3"), ("1+1?", "2.0"), ("1+1? ", "#### 2")], 2, ""),
        ([("Who?", "Ann"), ("who?", "Bob"), ("What?", "x^2"), ("What?", "x+1")], 0, "2 left out"),
    ],
)
def test_questions_with_two_gold_answers_are_left_out(
    records: list[tuple[str, str]], left: int, note: str, tmp_path: Path
) -> None:
    lines = [json.dumps({"question": q, "answer": a}) for q, a in records]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    if not left:
        with pytest.raises(UserError, match="every question has several gold answers"):
            catalogue.load(str(tmp_path / "a.jsonl"), None, 0)
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, json.dumps({"question": "2+2?", "answer": "4"})]))
    suite = catalogue.load(str(tmp_path / "a.jsonl"), None, 0)
    assert len(suite.problems) == left + 1
    assert suite.notes.get("questions with different gold answers", "").startswith(note) and bool(suite.notes) == bool(
        note
    )


def test_choices_with_two_gold_answers_are_left_out(tmp_path: Path) -> None:
    choices = [(["x", "y"], "A"), (["y", "x"], "B"), (["x", "z"], "A"), (["z", "x"], "A"), (["x", "w"], "B")]
    records = [{"question": "Which?", "choices": shown, "answer": gold} for shown, gold in choices]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, records)))
    for query in ("", "?shuffle=false"):
        suite = catalogue.load(f"{tmp_path}/a.jsonl{query}", None, 0)
        assert len(suite.problems) == 2 and suite.notes["questions with different gold answers"].startswith(
            "1 left out"
        )


def test_chance_is_that_of_the_choices_shown(tmp_path: Path) -> None:
    suite = catalogue.load(f"mmlu-pro@{lay(tmp_path, 'mmlu-pro') / 'test.jsonl'}", None, 0)
    assert suite.chance == pytest.approx((1 / 10 + 1 / 3) / 2)


def test_every_name_is_checked_at_once() -> None:
    names = catalogue.names()
    assert len(set(names)) == len(names) and {*mathematics.SETS, *choice.SETS, *packaged.SETS} <= set(names)
    for name in names:
        catalogue.check(name)


@pytest.mark.parametrize("name", packaged.SETS)
def test_the_items_of_the_package_evals(name: str) -> None:
    if importlib.util.find_spec("evals") is None:
        pytest.skip("pip install --no-deps evals")
    suite = catalogue.load(name, None, 0)
    again = catalogue.load(name, 10, 3)
    assert len(suite.problems) == SIZES[name] and all(p in suite.problems for p in again.problems)
    for problem in again.problems:
        wrong = "7" if name == "evals-aime" else "B" if problem.answer == "A" else "A"
        put = "\\boxed{{{}}}" if name == "evals-aime" else "Well.\nAnswer: {}"
        assert suite.task.check(problem, put.format(problem.answer)) == RIGHT
        assert suite.task.check(problem, put.format(wrong)) == WRONG
        assert suite.task.check(problem, "") == NONE


SIZES = {"evals-mmlu": 991, "evals-logiqa": 677, "evals-quartz": 3828, "evals-born-first": 112, "evals-aime": 15}
