"""Streams that survive a lost connection: nothing is lost or repeated, and nothing is kept for ever."""

import json
import threading
from typing import Any

import httpx
import pytest

from finback.serve.http import digests
from tests.serving import CHAT, HELLO, KEY, OTHER, Scripted, events, served, streamed, summed, wait_for

TEXT = " ".join(map(str, range(40)))
HELD = 50  # tokens, of more than a hundred that TEXT has
ASK = HELLO | {"max_tokens": 400, "stream": True, "stream_options": {"include_usage": True, "resumable": True}}


def numbered(lines: Any, most: int = 10**9) -> list[tuple[int, Any]]:
    """Events with their numbers, up to `most` of them; then it disconnects."""
    found: list[tuple[int, Any]] = []
    at = 0
    for line in lines:
        if line.startswith("id: "):
            at = int(line[4:])
        elif line.startswith("data: "):
            found.append((at, line[6:] if line == "data: [DONE]" else json.loads(line[6:])))
            if len(found) == most:
                break
    return found


def begun(client: httpx.Client, most: int, **request: Any) -> list[tuple[int, Any]]:
    """The first events of a request, whose connection is then lost before its answer has ended."""
    service = client.app.state.service  # type: ignore[attr-defined]
    engine, held = service.engine, service.engine.hold_at
    engine.hold_at = HELD if held is None else held
    with client.stream("POST", CHAT, json=ASK | request) as response:
        assert response.status_code == 200, response.read()
        found = numbered(response.iter_lines(), most)
    stream = service.streams[found[0][1]["id"]]
    wait_for(lambda: not stream._readers)
    engine.hold_at = held
    return found


def read_on(client: httpx.Client, ident: str, after: int, **headers: str) -> list[tuple[int, Any]]:
    query = {} if headers else {"params": {"after": after}}
    with client.stream("GET", f"{CHAT}/{ident}/stream", headers=headers, **query) as response:  # type: ignore[arg-type]
        assert response.status_code == 200, response.read()
        return numbered(response.iter_lines())


@pytest.mark.parametrize("by_header", [False, True])
def test_a_lost_connection_loses_nothing(by_header: bool) -> None:
    engine = Scripted(f"<think>so</think>{TEXT}")
    with served(engine) as client:
        first = begun(client, 20)
        at, ident = first[-1][0], first[-1][1]["id"]
        rest = read_on(client, ident, at, **({"last-event-id": str(at)} if by_header else {}))
        assert [n for n, _ in first + rest] == list(range(1, len(first + rest) + 1))
        message = summed([chunk for _, chunk in first + rest])
        assert message["content"] == TEXT and message["reasoning_content"] == "so"
        assert message["finish_reason"] == "stop" and rest[-1][1] == "[DONE]" and rest[-2][1]["usage"]
        wait_for(lambda: not client.app.state.service.streams)  # type: ignore[attr-defined]
        assert len(engine.seen) == 1
    assert engine.leaked == 0


def test_others_streams_are_what_they_were() -> None:
    with served(Scripted(TEXT)) as client:
        with client.stream("POST", CHAT, json=HELLO | {"stream": True, "max_tokens": 400}) as response:
            lines = [line for line in response.iter_lines() if line]
        assert all(line.startswith("data: ") for line in lines)
        ident = json.loads(lines[0][6:])["id"]
        plain = streamed(client, **HELLO | {"max_tokens": 400})
        assert summed(plain) == summed([json.loads(line[6:]) for line in lines[:-1]])
        assert client.get(f"{CHAT}/{ident}/stream").status_code == 404


def test_two_read_the_same() -> None:
    with served(Scripted(TEXT)) as client:
        ident = begun(client, 1)[0][1]["id"]
        found: list[Any] = []
        readers = [threading.Thread(target=lambda: found.append(read_on(client, ident, 0))) for _ in range(2)]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        assert found[0] == found[1] and summed([c for _, c in found[0]])["content"] == TEXT


def test_nobody_comes_back_and_nothing_is_left() -> None:
    engine = Scripted(TEXT)
    engine.hold_at = HELD
    with served(engine, resume_timeout=0.1) as client:
        ident = begun(client, 5)[0][1]["id"]
        service = client.app.state.service  # type: ignore[attr-defined]
        wait_for(lambda: not service.streams and not engine.busy)
        assert engine.seen[0].finish_reason == "cancelled" and engine.leaked == 0 and service.admission.choices == 0
        assert client.get(f"{CHAT}/{ident}/stream").status_code == 404


def test_what_has_ended_meanwhile_is_read_once() -> None:
    engine = Scripted(TEXT)
    with served(engine) as client:
        first = begun(client, 1)
        service = client.app.state.service  # type: ignore[attr-defined]
        wait_for(lambda: not engine.busy and not service.active)
        rest = read_on(client, first[0][1]["id"], first[0][0])
        assert summed([c for _, c in first + rest])["content"] == TEXT
        wait_for(lambda: not service.streams)


def test_no_more_is_kept_than_allowed() -> None:
    with served(Scripted(TEXT), resume_bytes=5000) as client:
        ident = begun(client, 1)[0][1]["id"]
        service = client.app.state.service  # type: ignore[attr-defined]
        wait_for(lambda: service.streams[ident].is_finished)
        stream = service.streams[ident]
        assert stream.first > 10 and stream.size <= 5000
        lost = client.get(f"{CHAT}/{ident}/stream?after=1")
        assert lost.status_code == 404 and lost.json()["error"]["param"] == "after"
        assert read_on(client, ident, stream.last - 1)[-1][1] == "[DONE]"


def test_stop_ends_it_for_everybody_at_once() -> None:
    engine = Scripted(TEXT)
    engine.hold_at = HELD
    with served(engine) as client:
        ident = begun(client, 3)[0][1]["id"]
        assert client.post(f"{CHAT}/{ident}/control", json={"action": "stop"}).status_code == 200
        wait_for(lambda: not engine.busy)
        last = read_on(client, ident, 0)[-1][1]
        assert last["error"]["code"] == "stopped" and engine.seen[0].finish_reason == "cancelled"


def test_only_its_owner_reads_on() -> None:
    with served(Scripted(TEXT), keys=digests([KEY, OTHER])) as client:
        ident = begun(client, 2)[0][1]["id"]
        other = {"authorization": f"Bearer {OTHER}"}
        for action in (
            lambda: client.get(f"{CHAT}/{ident}/stream", headers=other),
            lambda: client.post(f"{CHAT}/{ident}/control", headers=other, json={"action": "stop"}),
        ):
            assert action().status_code == 404
        for wrong in ("x", "-1", "1e3", "²", "9" * 20):
            assert client.get(f"{CHAT}/{ident}/stream", params={"after": wrong}).status_code == 400, wrong
        assert client.get(f"{CHAT}/{ident}/stream", params={"after": 10**6}).status_code == 404
        assert summed([c for _, c in read_on(client, ident, 0)])["content"] == TEXT


def test_what_is_refused_is_refused_as_ever() -> None:
    engine = Scripted(TEXT, rows=1)
    engine.hold_at = HELD
    with served(engine, queue=0) as client:
        assert client.post(CHAT, json=ASK | {"top_p": 5}).status_code == 400
        assert client.post(CHAT, json=ASK | {"max_tokens": 10**6}).json()["error"]["code"] == "context_length_exceeded"
        ident = begun(client, 2)[0][1]["id"]  # it still has the only slot, though its client has left
        assert client.post(CHAT, json=ASK).status_code == 503
        client.post(f"{CHAT}/{ident}/control", json={"action": "stop"})
        service = client.app.state.service  # type: ignore[attr-defined]
        wait_for(lambda: service.admission.choices == 0)
        assert begun(client, 1)


def test_the_place_in_the_queue_is_told() -> None:
    engine = Scripted(TEXT, rows=1)
    engine.hold_at = HELD
    with served(engine) as client:
        idents = [begun(client, 1)[0][1]["id"] for _ in range(4)]
        with client.stream("GET", f"{CHAT}/{idents[3]}/stream?after=1") as response:
            lines = response.iter_lines()
            assert next(line for line in lines if line.startswith(": queue")) == ": queue 3"
            client.post(f"{CHAT}/{idents[1]}/control", json={"action": "stop"})
            assert next(line for line in lines if line.startswith(": queue")) == ": queue 2"
            for ident in (idents[0], idents[2]):
                client.post(f"{CHAT}/{ident}/control", json={"action": "stop"})
            engine.hold_at = None
            assert summed(events(x for x in lines if x.startswith("data")))["content"] == TEXT


class Clairvoyant(Scripted):
    """An engine whose MTP module always guesses the script's next token."""

    def step(self) -> Any:
        """Steps with the right drafts."""
        for request in self.seen:
            if request.draft >= 0 and request.forced:
                request.draft = request.forced[0]
        return super().step()


def test_tokens_that_mtp_drafted_are_marked() -> None:
    engine = Clairvoyant(TEXT)
    engine.speculation.choose = lambda rows: "draft"  # type: ignore[union-attr, method-assign]
    with served(engine) as client:
        asked = HELLO | {"max_tokens": 200, "logprobs": True}
        whole = client.post(CHAT, json=asked).json()
        chunks = streamed(client, **asked)
        pieces = [c["choices"][0]["logprobs"] for c in chunks if isinstance(c, dict) and c["choices"]]
        for parts in ([whole["choices"][0]["logprobs"]], pieces):
            entries = [entry for part in parts if part for entry in part["content"] or []]
            marked = [i for i, entry in enumerate(entries) if entry.get("drafted")]
            assert len(entries) == whole["timings"]["predicted_n"]
            assert len(marked) == whole["timings"]["draft_n_accepted"] > 10
            assert 0 not in marked and {e.get("drafted") for e in entries} == {True, None}
        assert marked == engine.seen[1].accepted_at
