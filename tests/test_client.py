"""The HTTP client: where a request goes, how long it may take, what counts as a reply, and what is retried."""

import email.utils
import logging
import subprocess
import sys
import threading
import time
from typing import Any

import pytest

from finback.client import DONE, Client, RateLimit, RequestFailed, Retries, check_url, parse_json, retry_after
from finback.config import UserError
from tests.comparing import Fake, Reply, faking
from tests.toy import ROOT

CHAT = "/chat/completions"
BODY = {"messages": [{"role": "user", "content": "0+1="}]}


def failure(fake: Fake, **knobs: Any) -> RequestFailed:
    with Client(fake.url, **knobs) as client, pytest.raises(RequestFailed) as error:
        list(client.stream(CHAT, BODY))
    return error.value


def test_a_request_goes_to_the_named_address_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with faking() as elsewhere, faking() as fake:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, elsewhere.url.removesuffix("/v1"))
        with Client(f"{fake.url}/?version=2", "secret") as client:
            events = list(client.stream(CHAT, BODY))
        assert events[-1] == DONE and fake.bodies[0]["path"] == "/v1/chat/completions?version=2"
        assert fake.headers[0]["Authorization"] == "Bearer secret"
        fake.behave = lambda n, body: Reply(status=307, headers={"Location": elsewhere.url}, stream=False)
        error = failure(fake, key="secret")
        assert error.final and str(error).startswith("HTTP 307")
        assert elsewhere.bodies == []


def test_the_key_stands_in_no_error_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with faking(lambda n, body: Reply(status=401, stream=False, raw=b"wrong key: top-secret")) as fake:
        assert str(failure(fake, key="top-secret")) == "HTTP 401 wrong key: [key]"
        assert str(failure(fake, key="geheim\u00fc")) == "the key has characters that a header cannot carry"
    with (
        faking(lambda n, body: Reply(raw=b"key top-secret", stream=False)) as fake,
        Client(fake.url, "top-secret") as client,
        pytest.raises(RequestFailed, match=r"not JSON: b'key \[key\]'"),
    ):
        client.reply(CHAT, BODY)
    assert "top-secret" not in caplog.text


def test_a_whole_request_has_a_deadline() -> None:
    """The server is never silent for long, but never finishes."""
    with faking() as fake:
        fake.drip = 0.05
        error = failure(fake, timeout=5.0, deadline=0.3)
        assert str(error) == "TimeoutError: no complete reply within 0.3 seconds" and not error.final
        with Client(fake.url, timeout=5.0) as client:
            assert b"".join(client.stream(CHAT, BODY))


def test_silence_and_nobody_there() -> None:
    with faking(lambda n, body: Reply(delay=60.0)) as fake:
        assert str(failure(fake, timeout=0.2)) == "TimeoutError: timed out"
    with Client("http://127.0.0.1:9/v1") as client, pytest.raises(RequestFailed, match=r"^ConnectionRefusedError"):
        client.reply("/models")
    with Client(f"http://{'é' * 70}/v1") as client, pytest.raises(RequestFailed, match=r"^InvalidURL"):
        client.reply("/models")


def test_a_reply_has_a_maximal_size() -> None:
    with faking(lambda n, body: Reply("x" * 10_000, stream=bool(n % 2))) as fake:
        for _ in range(2):
            assert str(failure(fake, max_bytes=1000)) == "a reply of more than 1,000 bytes"
        with Client(fake.url, max_bytes=1_000_000) as client:
            assert client.reply(CHAT, BODY)["choices"][0]["message"]["content"] == "x" * 10_000


def test_events_come_as_they_are_sent() -> None:
    rest = threading.Event()
    with faking(lambda n, body: Reply("123456789", rest=rest)) as fake, Client(fake.url) as client:
        events = client.stream(CHAT, BODY)
        next(events)
        rest.set()  # what had to wait for this would wait for a minute
        assert len(list(events)) > 2


@pytest.mark.parametrize(
    ("sent", "events"),
    [
        (b"data: 1\n\ndata:2\n\n", [b"1", b"2"]),
        (b": alive\r\n\r\nevent: x\r\ndata: 1\r\ndata: 2\r\n\r\n", [b"1\n2"]),
        ("data: \u2028\u0085\n\ndata: half".encode(), ["\u2028\u0085".encode(), b"half"]),  # not line ends
        (b"", []),
    ],
)
def test_server_sent_events(sent: bytes, events: list[bytes]) -> None:
    with faking(lambda n, body: Reply(raw=sent)) as fake, Client(fake.url) as client:
        assert list(client.stream(CHAT, BODY)) == events


def test_retry_after_in_each_form(monkeypatch: pytest.MonkeyPatch) -> None:
    assert retry_after("7") == 7 and retry_after("0.5") == 0.5 and retry_after("9" * 400) == 1e6
    monkeypatch.setattr(time, "time", lambda: 1e9)
    assert retry_after(email.utils.formatdate(1e9 + 30, usegmt=True)) == 30
    assert retry_after("Wed, 21 Oct 1998 07:28:00 GMT") == 0
    assert [retry_after(text) for text in ("soon", "-3", "inf", "nan", "1e3", None)] == [None] * 6


def test_retries_count_faults_and_overload_apart() -> None:
    failures = [RequestFailed("busy", busy=True)] * 3 + [RequestFailed("broken")]

    def request() -> str:
        if failures:
            raise failures.pop()
        return "reply"

    limit = RateLimit(threading.Event())
    assert Retries(tries=2, busy_tries=4, backoff=1e-4).send(request, limit) == ("reply", 5)
    for failure, tries in ((RequestFailed("a", busy=True), 4), (RequestFailed("a"), 2), (RequestFailed("a", True), 1)):
        failures[:] = [failure] * 9
        with pytest.raises(RequestFailed):
            Retries(tries=2, busy_tries=4, backoff=1e-4).send(request, limit)
        assert len(failures) == 9 - tries
    limit.stop.set()
    with pytest.raises(RequestFailed, match="was stopped"):
        Retries().send(request, limit)


def test_a_stop_ends_every_wait() -> None:
    stop = threading.Event()
    limit = RateLimit(stop, rate=1)  # one request a minute
    assert limit.wait()
    threading.Timer(0.05, stop.set).start()
    began = time.monotonic()
    assert not limit.wait() and time.monotonic() - began < 60


@pytest.mark.parametrize("url", ["", "127.0.0.1:8000", "ftp://a/v1", "http://", "http://a:b/v1", "http://a/v1?x=1"])
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(UserError, match=r"judge\.url = .* not the url of a server\. Write for example http://b"):
        check_url(url, "judge.url", "http://b")


def test_json_or_nothing() -> None:
    assert parse_json(b'{"a": 1}') == {"a": 1}
    for raw in (b"<html>", b"[" * 100_000, b"\xff"):
        with pytest.raises(RequestFailed, match="not JSON: "):
            parse_json(raw)


def test_a_command_does_not_wait_for_httpx() -> None:
    code = "import sys, finback.cli, finback.comparison.endpoint, finback.tasks.judge; print('httpx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, cwd=ROOT)
    assert done.stdout == b"False\n"


@pytest.mark.parametrize("key", ["SECRET\n", " SECRET\r\n"])
def test_a_keys_line_break_is_not_part_of_it(key: str) -> None:
    with Client("http://127.0.0.1:9/v1", key) as client, pytest.raises(RequestFailed) as failed:
        client.reply("/x")
    assert "SECRET" not in str(failed.value) and "refused" in str(failed.value)


@pytest.mark.parametrize("key", ["SEC\nRET", "schlüssel"])
def test_a_key_that_no_header_can_carry_is_not_shown(key: str) -> None:
    with Client("http://127.0.0.1:9/v1", key) as client, pytest.raises(RequestFailed, match="cannot carry") as failed:
        client.reply("/x")
    assert failed.value.final and key not in str(failed.value)


def test_a_host_that_is_no_name_is_named() -> None:
    with Client("http://a..b/v1") as client, pytest.raises(RequestFailed, match=r"InvalidURL: 'a\.\.b'") as failed:
        client.reply("/x")
    assert failed.value.final
