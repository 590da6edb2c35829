"""Which of a suite's questions occur in a prepared corpus: all planted ones are found, and no others."""

import json
from pathlib import Path

import pytest

from finback.config import UserError
from finback.data.sources import Files
from finback.parallel.mesh import World
from finback.runs.folder import StageRun
from finback.stages.prepare import Prepare
from finback.suites import catalogue
from finback.suites.contamination import check
from finback.suites.suite import Suite
from tests.toy import WORDS

ASKED = [
    "A farmer has 17 sheep and buys 5 more, then sells 3 of them on the market in town. How many are left?",
    "Three painters paint a long wooden fence together in exactly four hours of hard work. How long does one need?",
    "Mary reads twelve pages on each school day and thirty on each day of the weekend. How many in a week?",
    "A jar holds 40 sweets. Half are red, a quarter are green and all the others are of some other colour. Count them.",
    "12 + 30 - 5 = ?",
    "7 * 6 = ?",
]


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Suite:
    path = tmp_path_factory.mktemp("suite") / "asked.jsonl"
    path.write_text("\n".join(json.dumps({"question": q, "answer": "19"}) for q in ASKED))
    return catalogue.load(str(path), None, 0)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources: one with planted questions, whole and partial, and one without."""
    root = tmp_path_factory.mktemp("runs")
    planted = [
        "I heard this: " + ASKED[0] + " Nobody knew.",  # within a text
        "so three painters PAINT a long, wooden fence -- together in exactly four hours of hard work",  # other signs
        "on each day of the weekend",  # too short a part of the third question
        "Please add. 12 + 30 - 5 = ? and more",  # short, and not alone
    ]
    dialogue = {"messages": [{"role": "user", "content": ASKED[5]}, {"role": "assistant", "content": "42"}]}
    (root / "clean.txt").write_text(WORDS, encoding="utf-8")
    lines = [{"text": f"{text}\nnumber {i} {j}"} for i, text in enumerate(planted) for j in range(40)]
    lines += [dialogue | {"id": i} for i in range(3)]
    (root / "planted.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    text = (Files((str(root / "clean.txt"),), name="clean"), Files((str(root / "planted.jsonl"),), name="planted"))
    stage = Prepare(name="prepare", text=text, vocab_size=320)
    run = StageRun(root, "prepare", 0, World(), quiet=True)
    run.folder.mkdir()
    stage.run(run)
    return run.folder


def test_planted_questions_are_found_and_no_others(suite: Suite, prepared: Path) -> None:
    found = check(suite, prepared)
    assert (found.questions, found.overlapping, found.exact, found.without_ngram) == (6, 3, 1, 2)
    assert found.sources == {"clean": 0, "planted": 3} and found.share == 0.5
    assert found.examples == (ASKED[0], ASKED[1], ASKED[5]) and found.documents > 200
    assert json.loads(json.dumps(found.as_json()))["share"] == 0.5
    assert check(suite, prepared, sources=("clean",)).overlapping == 0


def test_shorter_runs_find_more_and_the_wording_of_a_suite_betrays_nothing(
    suite: Suite, prepared: Path, tmp_path: Path
) -> None:
    assert check(suite, prepared, ngram=5).overlapping == 4
    (tmp_path / "b.jsonl").write_text(
        "\n".join(json.dumps({"question": f"Add on each day of the weekend {i}.", "answer": "1"}) for i in (1, 2))
    )
    assert check(catalogue.load(str(tmp_path / "b.jsonl"), None, 0), prepared, ngram=5).overlapping == 0


def test_long_documents_lose_nothing_at_a_seam(suite: Suite, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = check(suite, prepared)
    monkeypatch.setattr("finback.suites.contamination.CHUNK", 200)
    monkeypatch.setattr("finback.suites.contamination.SEAM", 150)
    pieces = check(suite, prepared)
    assert (pieces.overlapping, pieces.documents) == (whole.overlapping, whole.documents)


def test_what_is_no_prepared_corpus(suite: Suite, prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not the folder of a finished prepare stage .*such as runs/tiny/prepare"):
        check(suite, tmp_path)
    with pytest.raises(UserError, match=r"not a prepared source\. Did you mean 'clean'"):
        check(suite, prepared, sources=("clea",))
    with pytest.raises(UserError, match="single words are in every text"):
        check(suite, prepared, ngram=1)
