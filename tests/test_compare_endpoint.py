"""Endpoints that stream, stall, lie and refuse: no answer is lost or miscounted, and failed requests are retried."""

import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from finback.client import Retries
from finback.comparison.compare import compare
from finback.comparison.contestant import Answer, Failure, Price
from finback.comparison.endpoint import HOPELESS, Endpoint
from finback.comparison.protocol import EvalRequest, SamplingProtocol, eval_requests
from finback.config import UserError
from tests.comparing import Behaviour, Fake, Reply, faking, right, sums

RULES = SamplingProtocol(samples=1, max_tokens=64)
FAST: dict[str, Any] = {"retries": Retries(3, backoff=0.01), "timeout": 60.0}


def some(n: int = 4, **more: Any) -> list[EvalRequest]:
    return eval_requests([sums(n, **more)], RULES, {})


def ask(
    fake: Fake, wanted: list[EvalRequest] | None = None, rules: SamplingProtocol = RULES, **knobs: Any
) -> list[Answer | Failure]:
    endpoint = Endpoint(fake.url, "m", **FAST | knobs)
    return list(endpoint.answers(wanted or some(), rules))


def once(fault: Reply) -> Behaviour:
    """Fails the first request for each question, then answers correctly."""
    seen: Counter[str] = Counter()

    def behave(n: int, body: dict[str, Any]) -> Reply:
        question = body["messages"][-1]["content"]
        seen[question] += 1
        return fault if seen[question] == 1 else Reply(right(body))

    return behave


FAULTS = {
    "overload": Reply(status=429, headers={"Retry-After": "0"}, stream=False),
    "unavailable": Reply(status=503, stream=False),
    "error": Reply(status=500, stream=False, raw=b"Traceback"),
    "gateway": Reply(status=502, stream=False, raw=b"<html>"),
    "silence": Reply("1", delay=60.0),
    "cut before the end": Reply("100", finish=None, done=False),
    "cut in an event": Reply("100", cut=-70, done=False),
    "cut headers": Reply("100", cut=0),
    "no JSON": Reply(raw=b"data: {nonsense\n\ndata: [DONE]\n\n"),
    "half a JSON": Reply("1", stream=False, cut=-9),
    "not even an object": Reply(raw=b"[1, 2]", stream=False),
    "no choices": Reply(raw=b'{"id": "x"}', stream=False),
    "HTML behind 200": Reply(raw=b"<html>busy</html>", stream=False),
    "deep JSON": Reply(raw=b"[" * 100_000, stream=False),
    "error in the stream": Reply("100", error="overloaded"),
    "error beside a choice": Reply(
        raw=b'{"error": {"code": 502}, "choices": [{"message": {"content": "100"}, "finish_reason": "stop"}]}',
        stream=False,
    ),
    "broken off": Reply("100", finish="insufficient_system_resource"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_that_pass(name: str) -> None:
    with faking(once(FAULTS[name])) as fake:
        found = ask(fake, timeout=2.0 if name == "silence" else 60.0)
        answers = {a.question: a for a in found if isinstance(a, Answer)}
        assert {q: a.text for q, a in answers.items()} == {f"sums:{i}": str(i + 1) for i in range(4)}
        assert all(a.tries == 2 and a.whole and (a.prompt_tokens, a.tokens) == (7, 5) for a in answers.values())
        assert len(fake.bodies) == 8


@pytest.mark.parametrize("name", [n for n in FAULTS if n not in ("overload", "unavailable", "silence")])
def test_faults_that_stay_are_failures(name: str) -> None:
    with faking(
        lambda n, body: FAULTS[name] if body["messages"][-1]["content"] == "0+1=" else Reply(right(body))
    ) as fake:
        found = ask(fake)
        assert [type(f) for f in found].count(Failure) == 1 and len(found) == 4
        (failure,) = (f for f in found if isinstance(f, Failure))
        assert failure.ask.place == 0 and failure.problem
        assert fake.asked.count("0+1=") == 3 and len(fake.bodies) == 6


@pytest.mark.parametrize("status", [400, 401, 404, 422, 302])
def test_what_no_repetition_mends_is_tried_once(status: int) -> None:
    with faking(lambda n, body: Reply(status=status, stream=False, raw=b'{"error": "no"}')) as fake:
        found = ask(fake)
        assert all(isinstance(f, Failure) and f"HTTP {status}" in f.problem for f in found)
        assert len(fake.bodies) == 4


def test_a_hopeless_endpoint_is_left_alone() -> None:
    with faking(lambda n, body: Reply(status=401, stream=False)) as fake:
        found = ask(fake, some(100), concurrency=2)
        assert len(found) == 100 and all(isinstance(f, Failure) for f in found)
        assert {f.ask.place for f in found if isinstance(f, Failure)} == set(range(100))
        assert HOPELESS <= len(fake.bodies) <= HOPELESS + 1
        told = [f.problem for f in found if isinstance(f, Failure) and f.problem.startswith("not sent")]
        assert len(told) == 100 - len(fake.bodies) and all("HTTP 401" in problem for problem in told)


def test_servers_of_one_model_share_the_questions() -> None:
    """A thread that finds a server unreachable asks it nothing more, and the others answer every question."""
    both = threading.Barrier(2)

    def behave(n: int, body: dict[str, Any]) -> Reply:
        if not n:
            both.wait(60)
        return Reply(right(body))

    with faking(behave) as one, faking(behave) as two:
        endpoint = Endpoint(f"{one.url},http://127.0.0.1:9/v1,{two.url}", "m", concurrency=1, **FAST)
        found = list(endpoint.answers(some(30), RULES))
        assert len(found) == 30 and all(isinstance(each, Answer) for each in found)
        assert len(one.asked) + len(two.asked) == 30, "each question is asked once"
        assert sum(each.tries for each in found if isinstance(each, Answer)) <= 31
    with pytest.raises(UserError, match="--endpoint = 'nowhere': not the url of a server"):
        Endpoint.parse("http://127.0.0.1:9/v1,nowhere#m")


def test_nobody_there() -> None:
    endpoint = Endpoint("http://127.0.0.1:9/v1", "m", retries=Retries(2, backoff=0.001))
    found = list(endpoint.answers(some(20), RULES))
    assert len(found) == 20 and all(isinstance(f, Failure) and "Refused" in f.problem for f in found)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("reply", "thinking", "text"),
    [
        ({"reasoning": {"reasoning_content": "so"}}, "so", "3"),
        ({"reasoning": {"reasoning": "so"}}, "so", "3"),
        ({"reasoning": {"reasoning": "so", "reasoning_content": "so"}}, "so", "3"),
        ({"content": "<think>so</think>\n\n3"}, "so", "3"),
        ({"content": "so</think>3"}, "so", "3"),  # the prompt had opened the chain
        ({"content": "  3\n"}, "", "3"),
        ({"usage": False, "done": False}, "", "3"),
        ({"finish": None}, "", "3"),  # [DONE] also ends a stream
        ({"finish": "eos"}, "", "3"),
    ],
)
def test_forms_of_replies(reply: dict[str, Any], thinking: str, text: str, stream: bool) -> None:
    with faking(lambda n, body: Reply(**{"content": "3", "stream": stream} | reply)) as fake:
        (answer,) = ask(fake, some(1))
        assert isinstance(answer, Answer)
        assert (answer.thinking, answer.text, answer.whole) == (thinking, text, True)
        assert answer.tokens == (5 if reply.get("usage", True) else None)
        named_last = stream and not reply.get("finish", "stop")  # only the chunk with the finish reason names the model
        assert answer.model == ("" if named_last else "m-2")


@pytest.mark.parametrize(
    ("reply", "finish"),
    [
        (Reply(None, finish="length", reasoning={"reasoning": "on and on"}), "length"),
        (Reply("<think>on and on", finish="length"), "length"),
        (Reply(None, finish="length"), "length"),  # null content is an empty answer
        (Reply("", finish="content_filter"), "content_filter"),
    ],
)
def test_answers_without_an_end_are_answers(reply: Reply, finish: str) -> None:
    with faking(lambda n, body: reply) as fake:
        (answer,) = ask(fake, some(1))
        assert isinstance(answer, Answer) and not answer.whole
        assert (answer.text, answer.finish) == ("", finish)


def test_a_storm_of_429() -> None:
    """The server accepts one request in 50 ms and refuses the rest, without a Retry-After."""
    last = [0.0]

    def behave(n: int, body: dict[str, Any]) -> Reply:
        if time.monotonic() - last[0] < 0.05:
            return Reply(status=429, stream=False)
        last[0] = time.monotonic()
        return Reply(right(body))

    with faking(behave) as fake:
        found = ask(fake, some(6), concurrency=6)
        assert sorted(a.text for a in found if isinstance(a, Answer)) == sorted(str(i + 1) for i in range(6))


def test_retry_after_holds_for_all() -> None:
    def behave(n: int, body: dict[str, Any]) -> Reply:
        if n == 0:
            return Reply(status=429, headers={"Retry-After": "1"}, stream=False)
        return Reply(right(body), delay=float(n == 1))

    with faking(behave) as fake:
        assert len(ask(fake, some(6), concurrency=2)) == 6
        since = [at - fake.times[0] for at in fake.times]
        # the second request was already in flight, and takes as long; all others wait, whichever thread sends them
        assert len(since) == 7 and sum(at < 0.95 for at in since) <= 2 and since[-1] < 20


def test_concurrency_and_rate() -> None:
    three = threading.Barrier(3)

    def together(n: int, body: dict[str, Any]) -> Reply:
        three.wait(60)
        return Reply(right(body), delay=0.05)

    with faking(together) as fake:
        ask(fake, some(9), concurrency=3)
        assert fake.most_at_once == 3
    with faking() as fake:
        began = time.monotonic()
        ask(fake, some(5), concurrency=5, rate=1200)
        assert all(at - began >= 0.05 * n for n, at in enumerate(sorted(fake.times)))  # no request before its turn


def test_what_is_sent() -> None:
    with faking() as fake:
        ask(fake, some(1, stop=("\n\n",), prompt="{question}", system="Be brief."), key="top-secret")
        body = fake.bodies[0]
        assert body["path"] == "/v1/chat/completions" and fake.headers[0]["Authorization"] == "Bearer top-secret"
        assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "0+1="}]
        assert (body["temperature"], body["top_p"], body["max_tokens"], body["stop"]) == (0.6, 0.95, 64, ["\n\n"])
        assert 0 <= body["seed"] < 2**31 and "thinking" not in body and body["stream_options"]
        extra = {"max_tokens": None, "max_completion_tokens": 9, "temperature": None}
        ask(fake, some(1), SamplingProtocol(samples=1, think=False), extra=extra)
        body = fake.bodies[1]
        assert "max_tokens" not in body and "temperature" not in body and body["max_completion_tokens"] == 9
        assert body["thinking"] == {"type": "disabled"} and body["chat_template_kwargs"]["enable_thinking"] is False


def test_the_key_is_never_shown() -> None:
    endpoint = Endpoint("http://127.0.0.1:1/v1", "m", key="top-secret")
    assert "top-secret" not in repr(endpoint) and "top-secret" not in str(endpoint.identity)
    with faking(lambda n, body: Reply(status=401, stream=False, raw=b"wrong key: top-secret")) as fake:
        (failure,) = ask(fake, some(1), key="top-secret")
        assert isinstance(failure, Failure) and failure.problem == "HTTP 401 wrong key: [key]"


def test_what_failed_is_asked_again_and_nothing_else(tmp_path: Path) -> None:
    down = True

    def behave(n: int, body: dict[str, Any]) -> Reply:
        return Reply(status=500, stream=False) if down and right(body) in ("3", "4") else Reply(right(body))

    with faking(behave) as fake:
        endpoint = Endpoint(fake.url, "m", price=Price(None, 1.0, 2.0), **FAST)
        report = compare([endpoint], [sums(6)], RULES, tmp_path)
        (score,) = report["scores"]
        assert (score["n"], score["failed"], score["accuracy"]) == (4, 2, 1.0)  # not 4 of 6
        assert {f["question"] for f in report["failures"]} == {"sums:2", "sums:3"}
        assert "2 answers failed" in score["flags"][0]
        down, before = False, len(fake.bodies)
        report = compare([endpoint], [sums(6)], RULES, tmp_path)
        assert (report["scores"][0]["n"], report["failures"]) == (6, [])
        assert sorted(fake.asked[before:]) == ["2+1=", "3+1="]
        assert report["scores"][0]["dollars_per_answer"] == pytest.approx((7 * 1 + 5 * 2) / 1e6)


def test_bad_addresses() -> None:
    for text in ("http://a/v1", "http://a/v1#"):
        with pytest.raises(UserError, match="names no model"):
            Endpoint.parse(text)
    for url in ("a/v1", "ftp://a/v1", "http://a:b/v1", "http://"):
        with pytest.raises(UserError, match="not the url of a server"):
            Endpoint.parse(f"{url}#m")
    assert Endpoint.parse("https://a/v1#org/m:free").model == "org/m:free"
