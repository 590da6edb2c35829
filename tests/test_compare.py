"""The comparison report: scores worked by hand, flags, refused rankings, and a cache that survives kill -9."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from finback import cli
from finback.comparison import picture, table
from finback.comparison.compare import compare, protocol
from finback.comparison.contestant import Answer, AnswerStore, Failure, Price, distinct, parse_answer, prices
from finback.comparison.options import CompareOptions, spread
from finback.comparison.protocol import EvalRequest, SamplingProtocol, eval_requests
from finback.config import UserError
from finback.suites.catalogue import load as load_suite
from finback.suites.suite import Suite
from tests.comparing import Reply, faking, right, sums
from tests.serving import wait_for
from tests.toy import ROOT, environment

Says = Callable[[EvalRequest], str | Answer | Failure]


@dataclasses.dataclass
class Actor:
    """A contestant whose answers a test scripts."""

    name: str
    says: Says
    price: Price = dataclasses.field(default_factory=Price)
    asked: list[EvalRequest] = dataclasses.field(default_factory=list)

    @property
    def identity(self) -> dict[str, Any]:
        return {"actor": self.name}

    def answers(self, wanted: Sequence[EvalRequest], rules: SamplingProtocol) -> Iterator[Answer | Failure]:
        for ask in wanted:
            self.asked.append(ask)
            said = self.says(ask)
            if isinstance(said, str):
                said = parse_answer(
                    ask, said, finish="stop", prompt_tokens=10, tokens=len(said), seconds=0.5, busy=0.25
                )
            yield said


def gold(ask: EvalRequest) -> str:
    return ask.suite.problems[ask.place].answer


def choices(n: int = 40, name: str = "choices") -> Suite:
    """Questions with four possible answers, each equally often right."""
    suite = sums(n, name, chance=0.25)
    problems = tuple(dataclasses.replace(p, answer=str(i % 4 + 1)) for i, p in enumerate(suite.problems))
    return dataclasses.replace(suite, problems=problems)


def scores_of(says: Says, suite: Suite, out: Path, samples: int = 1, **more: Any) -> dict[str, Any]:
    report = compare([Actor("a", says, **more)], [suite], SamplingProtocol(samples=samples), out)
    return dict(report["scores"][0])


def test_scores_by_hand(tmp_path: Path) -> None:
    """Two questions, four samples each. The first: 1, 1, 7, 8. The second: 2 cut off, 3, 3, nothing."""
    said = {(0, 0): "<think>so</think>1", (0, 1): "1", (0, 2): "7", (0, 3): "8", (1, 1): "3", (1, 2): "3", (1, 3): ""}

    def says(ask: EvalRequest) -> str | Answer:
        if (ask.place, ask.sample) == (1, 0):
            return parse_answer(ask, "2", finish="length", prompt_tokens=10, tokens=100, seconds=1.5, busy=2.25)
        return said[ask.place, ask.sample]

    s = scores_of(says, sums(2), tmp_path, 4, price=Price(per_hour=3600.0))
    assert (s["n"], s["answers"], s["failed"]) == (2, 8, 0)
    assert s["accuracy"] == 0.25  # (2/4 + 0/4) / 2: a cut answer is wrong, whatever its text
    assert s["majority"] == 0.5  # the majority is right on the first question only
    assert s["pass_at"] == {1: 0.25, 2: pytest.approx((1 - 1 / 6) / 2), 4: 0.5}
    assert (s["cut"], s["unparseable"], s["empty"]) == (1 / 8, 2 / 8, 1 / 8)
    assert s["dollars"] == pytest.approx(7 * 0.25 + 2.25) and s["dollars_per_answer"] == pytest.approx(0.5)
    assert s["dollars_per_solved"] == pytest.approx(2.0)
    assert s["tokens"] == pytest.approx((18 + 1 + 1 + 1 + 100 + 1 + 1 + 0) / 8) and s["prompt_tokens"] == 10
    assert s["seconds"] == pytest.approx((7 * 0.5 + 1.5) / 8)


def test_a_sum_with_an_unknown_part_is_unknown(tmp_path: Path) -> None:
    def says(ask: EvalRequest) -> Answer:
        tokens = None if ask.place == 1 else 5
        return parse_answer(ask, gold(ask), finish="stop", prompt_tokens=10, tokens=tokens, seconds=1.0)

    s = scores_of(says, sums(3), tmp_path, price=Price(None, 1.0, 1.0))
    assert (s["dollars"], s["dollars_per_answer"], s["dollars_per_solved"], s["tokens"]) == (None, None, None, 5)


@pytest.mark.parametrize(
    ("says", "accuracy", "flags"),
    [
        (lambda ask: "", 0, ["all answers empty", "not above chance (25%)"]),
        (lambda ask: "3", 0.25, ["always says '3'", "not above chance (25%)"]),
        (lambda ask: f"<think>{ask.place}</think> 3", 0.25, ["always says '3'", "not above chance (25%)"]),
        (lambda ask: str(ask.place * 7 % 4 + 1), 0.5, []),
        (gold, 1, []),
        (
            lambda ask: "I cannot help with that. " * 20,
            0,
            [f"always says {('I cannot help with that. ' * 2)[:30]!r}", "not above chance (25%)"],
        ),
        (lambda ask: f"{ask.place} it is, I think. " * 40, 0, ["not above chance (25%)"]),
    ],
)
def test_who_says_nothing_or_always_the_same_is_flagged(
    says: Says, accuracy: float, flags: list[str], tmp_path: Path
) -> None:
    s = scores_of(says, choices(), tmp_path)
    assert (s["accuracy"], s["flags"]) == (accuracy, flags)


def test_always_the_same_is_flagged_though_it_is_right(tmp_path: Path) -> None:
    suite = choices()
    suite = dataclasses.replace(suite, problems=tuple(dataclasses.replace(p, answer="3") for p in suite.problems))
    s = scores_of(lambda ask: "3", suite, tmp_path)
    said = "always says '3', as do 100% of the gold answers: the suite cannot tell models apart"
    assert (s["accuracy"], s["flags"]) == (1, [said])


def test_always_the_same_letter_is_flagged_however_it_is_said(tmp_path: Path) -> None:
    """Compares and votes by the letter in a long reply; all correct answers are A, so the score is 100 %."""
    records = [{"question": f"Which is {i}?", "choices": [str(i), "none"], "answer": "A"} for i in range(20)]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, records)))
    suite = load_suite(f"{tmp_path}/quiz.jsonl?shuffle=false", None, 0)
    forms = ("A", "Answer: A", "\\boxed{A}", "(a)")

    def says(ask: EvalRequest) -> str:
        return (
            f"Of {ask.place} and the others I think {'long ' * 60}.\nAnswer: A" if ask.sample else forms[ask.place % 4]
        )

    s = scores_of(says, suite, tmp_path / "out", 2)
    assert (s["accuracy"], s["majority"], s["flags"][0][:35]) == (1, 1, "always says 'A', as do 100% of the ")
    shuffled = scores_of(says, load_suite(f"{tmp_path}/quiz.jsonl", None, 0), tmp_path / "out", 2)
    assert 0.2 < shuffled["accuracy"] < 0.8
    assert shuffled["flags"] == ["always says 'A'", "not above chance (50%)"]


def test_a_failure_is_no_mistake(tmp_path: Path) -> None:
    def says(ask: EvalRequest) -> str | Failure:
        return Failure(ask, "HTTP 500") if ask.place % 2 else gold(ask)

    actors = [Actor("fails", says), Actor("knows half", lambda ask: "0" if ask.place % 2 else gold(ask))]
    report = compare(actors, [sums(20)], SamplingProtocol(samples=1), tmp_path)
    fails, half = report["scores"]
    assert (fails["accuracy"], fails["n"], fails["failed"]) == (1.0, 10, 10) and half["accuracy"] == 0.5
    (pair,) = report["pairs"]  # they agree on the questions that both have answered
    assert (pair["n"], pair["difference"], pair["better"]) == (10, 0, None)
    assert len(report["failures"]) == 10
    text = table.render(report)
    assert "fails: 10 x HTTP 500" in text and "10 answers failed" in text
    lost = scores_of(lambda ask: Failure(ask, "HTTP 500"), sums(3), tmp_path / "lost")
    assert (lost["accuracy"], lost["interval"], lost["dollars"], lost["n"]) == (None, None, None, 0)


def test_no_ranking_where_the_questions_do_not_tell(tmp_path: Path) -> None:
    def knows(n: int) -> Says:
        return lambda ask: gold(ask) if ask.place < n else "0"

    actors = [Actor("A", knows(30)), Actor("B", knows(28)), Actor("C", knows(5))]
    report = compare(actors, [sums(40)], SamplingProtocol(samples=1), tmp_path)
    better = {(p["one"], p["other"]): p["better"] for p in report["pairs"]}
    assert better == {("A", "B"): None, ("A", "C"): "A", ("B", "C"): "B"}
    text = table.render(report)
    assert "A against B: cannot be distinguished; +5.0 points" in text and "A against C: A is better; +62.5" in text
    for pair in report["pairs"]:
        low, high = pair["interval"]
        assert low <= pair["difference"] <= high and pair["p_holm"] >= pair["p"]
        assert (low <= 0 <= high) == (pair["better"] is None)


@pytest.mark.parametrize(("without", "spoken"), [(4, True), (5, False)])
def test_no_verdict_where_answers_lack_the_form(without: int, spoken: bool, tmp_path: Path) -> None:
    """If more than a tenth of 40 answers lack the requested form, a difference may be due to the form."""

    def says(ask: EvalRequest) -> str:
        return gold(ask) if ask.place < 5 else "I wonder" if ask.place < 5 + without else "0"

    actors = [Actor("right", gold), Actor("loose", says)]
    report = compare(actors, [sums(40)], SamplingProtocol(samples=1), tmp_path)
    (pair,) = report["pairs"]
    assert pair["better"] == ("right" if spoken else None)
    assert pair["no_answer"] == ({} if spoken else {"loose": 5 / 40})
    text = table.render(report)
    assert ("right is better" in text) == spoken and "no answer of the requested form" in text
    assert ("no verdict, because 12% of the answers of loose lack the requested form; +87.5 points" in text) != spoken
    (pair,) = compare(actors, [sums(40)], SamplingProtocol(samples=1), tmp_path, 0.5)["pairs"]
    assert pair["better"] == "right"


def test_language(tmp_path: Path) -> None:
    russian = "<think>Прибавим один к числу и прочтём сумму</think>"
    english = "<think>We add one to the number and read it</think>"
    said = [russian, english, russian, ""]  # without a chain the answer's language counts, and a number has no words
    s = scores_of(lambda ask: said[ask.place] + gold(ask), sums(4, language="ru"), tmp_path)
    assert s["language"] == pytest.approx(2 / 3)
    assert "67% of words in the expected language" in table.render(
        compare([Actor("a", gold)], [sums(4, language="ru")], SamplingProtocol(samples=1), tmp_path)
    )
    assert scores_of(gold, sums(4), tmp_path / "none")["language"] is None


def test_prices() -> None:
    one = parse_answer(
        eval_requests([sums(1)], SamplingProtocol(), {})[0],
        "x",
        finish="stop",
        prompt_tokens=1000,
        tokens=2000,
        seconds=1,
        busy=9,
    )
    assert Price(None, 0.5, 2.0).of(one) == pytest.approx(0.0045)
    assert Price().of(one) is None and Price(per_hour=0.4).of(one) == pytest.approx(0.001)
    assert Price(None, 0.5, 2.0).of(dataclasses.replace(one, tokens=None)) is None  # an unknown cost is not zero
    assert prices(["b=3", "1"], "--price-in", ["a", "b"]) == {"a": 1, "b": 3}
    for bad in ("c=1", "a=", "a=-1", "nan", "a=b=1"):
        with pytest.raises(UserError, match="--price-in"):
            prices([bad], "--price-in", ["a", "b"])
    assert distinct(["m", "m", "n"]) == ["m", "m (2)", "n"]
    assert table.money(None) == "NOT PROVIDED" and table.money(0.00123) == "$0.0012" and table.money(3.456) == "$3.46"


def test_bits_per_byte_are_measured_and_kept(tmp_path: Path) -> None:
    texts = sums(3, "text", metric="bits per byte")
    measured = []

    def compress(suites: Sequence[Suite]) -> list[float]:
        measured.extend(suites)
        return [1.25 for _ in suites]

    local, far = Actor("local", gold), Actor("far", gold)
    local.compress = compress  # type: ignore[attr-defined]
    for _ in range(2):
        report = compare([local, far], [sums(3), texts], SamplingProtocol(samples=1), tmp_path)
        assert [c["bits_per_byte"] for c in report["compression"]] == [1.25, None]
        assert {s["suite"] for s in report["scores"]} == {"sums"} and len(measured) == 1
    assert "local | 1.2500 " in table.render(report) and "far   | –" in table.render(report)
    assert compare([far], [texts], SamplingProtocol(samples=1), tmp_path)["scores"] == []


# what is kept


def test_a_key_changes_with_all_that_matters() -> None:
    base = (sums(3), SamplingProtocol(), {"sha256": "a"})
    plain = eval_requests([base[0]], *base[1:])
    assert len({a.key for a in plain}) == len(plain) == 12
    assert [a.key for a in eval_requests([sums(3)], *base[1:])] == [a.key for a in plain]
    changed = [
        (dataclasses.replace(base[0], prompt="{question}!"), *base[1:]),
        (dataclasses.replace(base[0], system="Be brief."), *base[1:]),
        (dataclasses.replace(base[0], stop=("x",)), *base[1:]),
        (dataclasses.replace(base[0], source=dataclasses.replace(base[0].source, digest="1" * 64)), *base[1:]),
        *(
            (base[0], dataclasses.replace(base[1], **more), base[2])
            for more in ({"temperature": 0.7}, {"top_p": 0.9}, {"max_tokens": 9}, {"seed": 1}, {"think": True})
        ),
        (*base[:2], {"sha256": "b"}),
    ]
    others = [{a.key for a in eval_requests([suite], *rest)} for suite, *rest in changed]
    assert all(not keys & {a.key for a in plain} for keys in others)
    assert len(set().union(*others)) == sum(map(len, others))
    # larger numbers of samples or questions only add requests
    assert {a.key for a in plain} < {a.key for a in eval_requests([sums(3)], SamplingProtocol(samples=8), base[2])}


def test_the_same_seed_for_all_contestants() -> None:
    one, other = (eval_requests([sums(3)], SamplingProtocol(), {"who": who}) for who in "ab")
    assert [a.seed for a in one] == [a.seed for a in other] and len({a.seed for a in one}) == 12
    assert not {a.key for a in one} & {a.key for a in other}


def test_answers_are_kept_and_only_missing_ones_asked(tmp_path: Path) -> None:
    first = Actor("a", gold)
    compare([first], [sums(3)], SamplingProtocol(samples=2), tmp_path)
    again = Actor("a", gold)
    report = compare([again], [sums(3), sums(2, "more")], SamplingProtocol(samples=3), tmp_path)
    asked = [(a.suite.name, a.place, a.sample) for a in again.asked]
    assert asked == [("sums", i, 2) for i in range(3)] + [("more", i, s) for i in range(2) for s in range(3)]
    assert [s["answers"] for s in report["scores"]] == [9, 6]


def test_verdicts_are_made_anew(tmp_path: Path) -> None:
    suite = sums(3)
    assert scores_of(gold, suite, tmp_path)["accuracy"] == 1
    stricter = dataclasses.replace(suite, problems=tuple(dataclasses.replace(p, answer="x") for p in suite.problems))
    assert scores_of(lambda ask: pytest.fail("asked again"), stricter, tmp_path)["accuracy"] == 0


def test_a_damaged_file_loses_its_damaged_lines_alone(tmp_path: Path) -> None:
    wanted = eval_requests([sums(4)], SamplingProtocol(samples=1), {})
    store = AnswerStore(tmp_path, "a/b", {})
    list(store.save(Actor("a", gold).answers(wanted, SamplingProtocol())))
    lines = store.path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4 and store.path.parent == tmp_path
    store.path.write_bytes(lines[0] + b'{"key": 1}\n[]\n' + lines[1] + b"\xff\xfe nonsense\n" + lines[2][:30])
    back = AnswerStore(tmp_path, "a/b", {})
    assert set(back.answers) == {a.key for a in wanted[:2]}
    list(back.save(Actor("a", gold).answers(wanted[2:], SamplingProtocol())))
    assert AnswerStore(tmp_path, "a/b", {}).answers == store.answers
    assert set(AnswerStore(tmp_path, "a/b", {"other": 1}).answers) == set()


def test_ctrl_c_keeps_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(ask: EvalRequest) -> str:
        if ask.place == 2:
            raise KeyboardInterrupt
        return gold(ask)

    with pytest.raises(KeyboardInterrupt):
        scores_of(says, sums(5), tmp_path)
    assert "2 of 5 answers of a are stored" in capsys.readouterr().err
    again = Actor("a", gold)
    compare([again], [sums(5)], SamplingProtocol(samples=1), tmp_path)
    assert [a.place for a in again.asked] == [2, 3, 4]


DRIVER = """
import sys
from pathlib import Path
from finback.comparison.compare import compare
from finback.comparison.endpoint import Endpoint
from finback.comparison.protocol import SamplingProtocol
from tests.comparing import sums
report = compare([Endpoint(sys.argv[1], "m", concurrency=3)], [sums(24)], SamplingProtocol(samples=1), Path(sys.argv[2]))
print(report["scores"][0]["n"], report["scores"][0]["accuracy"])
"""


def test_kill_minus_9_and_start_again(tmp_path: Path) -> None:
    running: list[subprocess.Popen[bytes]] = []

    def behave(n: int, body: dict[str, Any]) -> Reply:
        if n == 13:  # others are answered meanwhile
            wait_for(lambda: any(file.stat().st_size for file in (tmp_path / "answers").glob("*.jsonl")))
            os.kill(running[0].pid, signal.SIGKILL)
        return Reply(right(body), delay=0.02)

    with faking(behave) as fake:
        drive = [sys.executable, "-c", DRIVER, fake.url, str(tmp_path)]
        running.append(subprocess.Popen(drive, env=environment(), cwd=ROOT, stderr=subprocess.DEVNULL))
        assert running[0].wait(120) == -signal.SIGKILL
        (file,) = (tmp_path / "answers").glob("*.jsonl")
        kept = {json.loads(line)["question"] for line in file.read_bytes().splitlines()}
        assert 1 <= len(kept) <= 23
        with file.open("ab") as handle:
            handle.write(b'{"key": "abc", "sui')  # the kill may come in the middle of a line
        before = len(fake.bodies)
        done = subprocess.run(drive, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert done.stdout.split() == ["24", "1.0"], done.stderr
        missing = {f"{i}+1=" for i in range(24)} - {f"{q.partition(':')[2]}+1=" for q in kept}
        assert set(fake.asked[before:]) == missing  # requests in flight at the kill may arrive late, and twice
        assert f"{len(kept)} stored earlier" in done.stderr and "price NOT PROVIDED" in done.stderr


# the command


def test_words_behind_tasks() -> None:
    assert spread(["A", "B", "--tasks", "x", "y", "--seed", "3"]) == [
        "A",
        "B",
        "--tasks",
        "x",
        "--tasks",
        "y",
        "--seed",
        "3",
    ]
    assert spread(["A", "--harness", "lm-eval", "x", "y"]) == [
        "A",
        "--harness",
        "lm-eval",
        "--tasks",
        "x",
        "--tasks",
        "y",
    ]
    assert spread(["--think", "A", "--tasks", "x", "--json"]) == ["--think", "A", "--tasks", "x", "--json"]


@pytest.fixture
def catalogue(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None, int]]:
    """Replaces the loading of suites by name; returns the log of what was loaded."""
    loaded = []

    def load(spec: str, problems: int | None, seed: int) -> Suite:
        loaded.append((spec, problems, seed))
        return sums(problems or 30, spec)

    @dataclasses.dataclass
    class Row:
        model: str = "DeepSeek-R1"
        benchmark: str = "Sums"
        score: float = 97.3
        conditions: str = "zero-shot"
        source: str = "2501.12948 table 4"
        suite: str = "sums"

    printed = (Row(), Row(benchmark="MMLU", score=90.8, suite="mmlu"))

    def rows(suite: str = "") -> tuple[Row, ...]:
        return tuple(row for row in printed if suite in ("", row.suite))

    def check(suite: Suite, data: Path) -> Any:
        found = {"suite": suite.name, "data": str(data), "overlapping": 2, "questions": 9, "ngram": 13, "exact": 1}
        return types.SimpleNamespace(as_json=lambda: {**found, "without_ngram": 3})

    monkeypatch.setattr("finback.suites.catalogue.load", load)
    monkeypatch.setattr("finback.suites.published.rows", rows)
    monkeypatch.setattr("finback.suites.contamination.check", check)
    return loaded


def invoke(*words: object) -> Any:
    result = CliRunner().invoke(cli.app, ["compare", *map(str, words)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command(catalogue: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_KEY", "top-secret")
    with faking(lambda n, body: Reply(right(body) if body["model"] == "good" else "1")) as fake:
        words = [
            "--endpoint",
            f"{fake.url}#good",
            "--endpoint",
            f"{fake.url}#bad",
            "--tasks",
            "sums",
            "more",
            "--problems",
            9,
            "--samples",
            2,
            "--price-in",
            1,
            "--price-out",
            "good=2",
            "--price-out",
            "bad=0.2",
            "--out",
            tmp_path,
            "--seed",
            3,
            "--key-env",
            "good=THE_KEY",
            "--published",
            "--contamination",
            "runs/x/prepare",
        ]
        result = invoke(*words)
        assert result.exit_code == 0 and catalogue == [("sums", 9, 3), ("more", 9, 3)]
        asked, keys = len(fake.bodies), {h.get("Authorization") for h in fake.headers}
        assert asked == 2 * 2 * 9 * 2 and keys == {"Bearer top-secret", None}
        again = json.loads(invoke(*words, "--json").stdout)
        assert len(fake.bodies) == asked
    report = json.loads((tmp_path / "compare.json").read_text())
    assert report == again
    assert [(s["contestant"], s["suite"], s["accuracy"]) for s in report["scores"]] == [
        ("good", "sums", 1),
        ("good", "more", 1),
        ("bad", "sums", 1 / 9),
        ("bad", "more", 1 / 9),
    ]
    assert {p["better"] for p in report["pairs"]} == {"good"}
    good = report["scores"][0]
    assert good["dollars_per_answer"] == pytest.approx((7 + 10) / 1e6)
    text = (tmp_path / "compare.md").read_text()
    assert "good is better" in text and "always says '1'" in text and "97.3" in text and "MMLU" not in text
    assert "sums in runs/x/prepare: 2 of 9 questions share 13 consecutive words" in text
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
    everything = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()) + result.output.encode()
    assert b"top-secret" not in everything


def test_failures_end_with_code_1(catalogue: list[Any], tmp_path: Path) -> None:
    with faking(lambda n, body: Reply(status=400, stream=False)) as fake:
        result = invoke(
            "--endpoint", f"{fake.url}#m", "--tasks", "sums", "--problems", 3, "--samples", 1, "--out", tmp_path
        )
    assert result.exit_code == 1 and "3 answers failed" in result.stdout
    assert "to retry them" in result.output


def test_published_alone_needs_no_model(catalogue: list[Any], tmp_path: Path) -> None:
    result = invoke("--published", "--out", tmp_path / "new")
    assert result.exit_code == 0 and "MMLU" in result.stdout and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--tasks"),
        (["--tasks", "sums"], "no model named"),
        (["--endpoint", "http://a/v1", "--tasks", "sums"], "names no model"),
        (["--endpoint", "http://a/v1#m", "--tasks", "sums", "sums"], "named twice: sums"),
        (["--endpoint", "http://a/v1#m", "--tasks", "sums", "--temperature", 0, "--samples", 4], "greedy"),
        (["--endpoint", "http://a/v1#m", "--tasks", "sums", "--problems", 0], "--problems"),
        (["--endpoint", "http://a/v1#m", "--tasks", "sums", "--extra", "[1]"], "--extra"),
        (["--endpoint", "http://a/v1#m", "--tasks", "sums", "--key-env", "NOT_SET_AT_ALL"], "NOT_SET_AT_ALL"),
        (["--endpoint", "http://a/v1#m", "--tasks", "sums", "--price-in", "n=1"], "no such endpoint"),
        (["--endpoint", "http://a/v1#m", "--tasks", "sums", "--top-p", 0], "top_p"),
        (["--endpoint", "http://a/v1#m", "--tasks", "sums", "--rate", "nan"], "--rate"),
        (["--endpoint", "http://a/v1#m", "--tasks", "sums", "--max-no-answer", 10], "Write a share"),
        (["--endpoint", "http://a/v1#m", "--tasks", "sums", "--harness", "other"], "lm-eval"),
        (["no/such/model", "--tasks", "sums"], "no/such/model"),
    ],
)
def test_bad_options(words: list[object], said: str, catalogue: list[Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        invoke(*words, "--out", tmp_path)


def test_samples_by_default() -> None:
    def samples(**given: Any) -> int:
        return protocol(CompareOptions(published=True, **given)).samples

    assert samples() == 4 and samples(temperature=0.0) == 1 and samples(samples=16) == 16


def test_a_table_is_markdown() -> None:
    made = table.markdown([["x|y", "1"], ["", "22"]], ("a", "b"))
    assert made == "| a    | b  |\n| ---- | -- |\n| x\\|y | 1  |\n|      | 22 |"


def test_a_picture_of_anything(tmp_path: Path) -> None:
    """Draws reports with no price, cost or answer, and with one suite or many; warnings are errors here."""
    actors = [
        Actor("cheap", gold, Price(per_hour=0.01)),
        Actor("dear", gold, Price(per_hour=100.0)),
        Actor("free", lambda ask: "1", Price(per_hour=0.0)),
        Actor("secret", lambda ask: "2"),
        Actor("gone", lambda ask: Failure(ask, "HTTP 500")),
    ]
    suites = [choices(8, f"suite {i}") for i in range(2)]
    report = compare(actors, suites, SamplingProtocol(samples=1), tmp_path)
    picture.draw(report, tmp_path / "many.png")
    picture.draw(report | {"suites": report["suites"][:1]}, tmp_path / "one.png")
    assert (tmp_path / "many.png").stat().st_size > (tmp_path / "one.png").stat().st_size > 5000
    assert math.isfinite(report["scores"][0]["dollars_per_answer"])
