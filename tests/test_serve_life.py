"""Disconnects, failures, stalls and draining: what the server does when something ends early."""

import json
import random
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from finback.checkpoint import models
from finback.config import UserError
from finback.engine.engine import EngineConfig
from finback.engine.open import open_engine
from finback.engine.request import Request
from finback.serve.models_folder import with_first
from finback.serve.options import ServeOptions
from tests.serving import (
    CHAT,
    HELLO,
    Scripted,
    events,
    served,
    small_model,
    small_tokenizer,
    streamed,
    summed,
    wait_for,
)

LONG = HELLO | {"max_tokens": 800, "ignore_eos": True}


def http(request: dict[str, Any], path: str = CHAT) -> bytes:
    """A request as bytes."""
    body = json.dumps(request).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def connect(client: httpx.Client) -> socket.socket:
    return socket.create_connection((client.base_url.host, client.base_url.port or 80), timeout=30)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot(stream: bool) -> None:
    engine = Scripted()
    engine.hold_at = 20  # it would never end
    with served(engine) as client:
        connection = connect(client)
        connection.sendall(http(LONG | {"stream": stream, "n": 2}))
        wait_for(lambda: engine.running == 2 and all(s.tokens for s in engine.seen))
        connection.close()
        wait_for(lambda: not engine.busy)
        assert engine.leaked == 0 and {s.finish_reason for s in engine.seen} == {"cancelled"}
        wait_for(lambda: "finback_cancelled_total 2" in client.get("/metrics").text)
        assert client.app.state.service.active == {}  # type: ignore[attr-defined]
        if not stream:
            assert 'status="499"' in client.get("/metrics").text


def test_a_client_that_leaves_in_its_own_request_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    with served(Scripted()) as client:
        with connect(client) as connection:
            connection.sendall(http(HELLO)[:-5])
        wait_for(lambda: 'status="499"' in client.get("/metrics").text)
        assert 'status="500"' not in client.get("/metrics").text
    assert not [r for r in caplog.records if r.levelname == "ERROR"]


def cut(client: httpx.Client, rounds: int) -> None:
    """Requests whose clients disconnect at a random byte, while sending or receiving."""
    choose = random.Random(0)
    for _ in range(rounds):
        request = HELLO | {
            "stream": choose.random() < 0.7,
            "n": choose.choice((1, 1, 3)),
            "max_tokens": 40,
            "seed": choose.randrange(99),
            "messages": [{"role": "user", "content": "Sing " * choose.choice((1, 50))}],
        }
        path = choose.choice((CHAT, CHAT, "/v1/messages", "/v1/responses"))
        if path != CHAT:
            request |= {"model": "toy", "max_output_tokens": 40, "input": request["messages"]}
        sent = http(request, path)
        with connect(client) as connection:
            if choose.random() < 0.2:
                connection.sendall(sent[: choose.randrange(len(sent))])
                continue
            connection.sendall(sent)
            left = choose.choice((0, 0, 1, 400, 2000))
            while left > 0 and (got := connection.recv(left)):
                left -= len(got)


@pytest.mark.parametrize("rounds", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_random_cuts_leave_nothing_behind(rounds: int) -> None:
    engine = Scripted()
    with served(engine) as client:
        workers = [threading.Thread(target=cut, args=(client, rounds // 4)) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        service = client.app.state.service  # type: ignore[attr-defined]
        wait_for(lambda: not engine.busy and service.admission.requests == 0)
        assert (
            engine.leaked == 0 and service.admission.choices == 0 and service.active == {} and not service.worker.active
        )
        assert summed(streamed(client, **HELLO))["content"]
        assert 'status="500"' not in client.get("/metrics").text


@pytest.mark.slow
def test_two_hundred_streams_at_once() -> None:
    engine = Scripted(rows=32, tokens=65536)
    found: list[int] = []
    with served(engine, queue=200) as client:

        def one(seed: int) -> None:
            with httpx.Client(base_url=client.base_url, timeout=300, trust_env=False) as own:
                chunks = streamed(own, **HELLO | {"seed": seed, "max_tokens": 32})
                assert chunks[-1] == "[DONE]" and summed(chunks)["finish_reason"]
                found.append(seed)

        threads = [threading.Thread(target=one, args=(i,)) for i in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == list(range(200))
        assert engine.leaked == 0
        asked = sorted(engine.seen, key=lambda s: s.submitted)
        assert [s.started for s in asked] == sorted(s.started for s in asked)  # first come, first served
        waits = [s.first - s.submitted for s in asked]
        assert waits[0] <= 2 * sum(waits) / len(waits)


def test_a_step_that_fails_ends_its_requests_and_not_the_server() -> None:
    engine = Scripted()
    engine.hold_at = 20
    with served(engine) as client:
        with client.stream("POST", CHAT, json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            engine.failing = RuntimeError("out of order")
            *_, last = events(lines)
        assert last["error"]["code"] == "engine_failed" and "choices" not in last
        refused = client.get("/ready")
        assert refused.status_code == 503 and "RuntimeError" in refused.json()["error"]["message"]
        failed = client.post(CHAT, json=HELLO)
        assert failed.status_code == 503 and int(failed.headers["retry-after"]) > 0
        assert client.get("/health").status_code == 200
        engine.failing = engine.hold_at = None
        assert client.post(CHAT, json=HELLO).status_code == 200
        assert client.get("/ready").status_code == 200
        assert engine.leaked == 0 and "finback_failed_steps_total 2" in client.get("/metrics").text


def test_an_engine_that_cannot_recover_is_left_alone() -> None:
    class Broken(Scripted):
        def cancel(self, sequence: Any) -> None:
            raise RuntimeError("no")

    engine = Broken()
    with served(engine) as client:
        engine.failing = RuntimeError("out of order")
        assert client.post(CHAT, json=HELLO).status_code == 503
        engine.failing = None
        assert client.post(CHAT, json=HELLO).status_code == 503
        assert "stopped" in client.get("/ready").json()["error"]["message"]


def test_a_server_whose_engine_stands_still_is_not_ready() -> None:
    go_on = threading.Event()

    class Stalled(Scripted):
        def step(self) -> list[Request]:
            if self.busy:
                go_on.wait()
            return super().step()

    with served(Stalled("a b c"), stalled=0.2) as client:
        assert client.get("/ready").json() == {"status": "ready"}
        thread = threading.Thread(target=lambda: client.post(CHAT, json=HELLO))
        thread.start()
        wait_for(lambda: client.get("/ready").status_code == 503)
        assert client.get("/health").status_code == 200
        go_on.set()
        thread.join()
        assert client.get("/ready").status_code == 200


def test_a_draining_server_ends_what_runs_and_takes_nothing_new() -> None:
    engine = Scripted()
    engine.hold_at = 20
    with served(engine, drain=0.6) as client:
        service = client.app.state.service  # type: ignore[attr-defined]
        with client.stream("POST", CHAT, json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            service.drain()
            assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
            refused = client.post(CHAT, json=HELLO)
            assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
            *_, last = events(lines)
        assert last["error"]["code"] == "shutting_down"
        wait_for(lambda: not engine.busy)
        assert engine.leaked == 0


def test_metrics_are_prometheus_text() -> None:
    engine = Scripted("4+5=9 is what the whale said")
    with served(engine) as client:
        usage = client.post(CHAT, json=HELLO | {"max_tokens": 99, "n": 2}).json()["usage"]
        client.get("/nothing")
        response = client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        values: dict[str, float] = {}
        kinds: dict[str, str] = {}
        for line in response.text.splitlines():
            if line.startswith("# TYPE"):
                _, _, name, kind = line.split()
                kinds[name] = kind
            elif not line.startswith("#"):
                name, value = line.rsplit(" ", 1)
                values[name] = float(value)
    assert values['finback_requests_total{route="/v1/chat/completions",status="200"}'] == 1
    assert values['finback_requests_total{route="other",status="404"}'] == 1
    assert values["finback_prompt_tokens_total"] == usage["prompt_tokens"]
    made = values["finback_generated_tokens_total"]
    assert made == usage["completion_tokens"]
    assert values["finback_time_to_first_token_seconds_count"] == 2
    assert values["finback_inter_token_seconds_count"] == made - 2
    buckets = [v for n, v in values.items() if n.startswith("finback_inter_token_seconds_bucket")]
    assert buckets == sorted(buckets) and buckets[-1] == made - 2
    assert values["finback_pages"] == engine.pages.count and values["finback_pages_used"] == 0
    assert values["finback_running"] == values["finback_queued"] == 0 and values["finback_ready"] == 1
    assert {n: k for n, k in kinds.items() if k == "gauge"}.keys() >= {"finback_queued", "finback_running"}


def test_a_folder_can_be_served(tmp_path: Path) -> None:
    models.save(tmp_path, small_model(256))
    small_tokenizer().save(tmp_path)
    engine, tokenizer = open_engine(tmp_path, config=EngineConfig(4, None, 64, reuse=True, speculate=True))
    assert engine.pages.count * engine.pages.size >= 1024 and tokenizer.vocab_size == small_tokenizer().vocab_size
    with served(engine) as client:
        assert client.get("/v1/models/toy").json()["max_model_len"] == 256
        assert client.post(CHAT, json=HELLO).status_code == 200


def test_models_of_a_folder_are_read_when_asked_for_and_leave_by_least_use(tmp_path: Path) -> None:
    root, elsewhere = tmp_path / "models", tmp_path / "elsewhere"
    for folder in (root / "a", root / "b", root / ".hidden", elsewhere):
        folder.mkdir(parents=True)
        models.save(folder, small_model(256))
        small_tokenizer().save(folder)
    (root / "link").symlink_to(elsewhere)
    (root / "notes").mkdir()
    alone = with_first(ServeOptions(models_dir=root))
    assert (alone.model, alone.name) == (root / "a", "a") and with_first(alone) is alone
    for options in (ServeOptions(), ServeOptions(models_dir=root / "notes")):
        with pytest.raises(UserError, match="models-dir"):
            with_first(options)
    with served(Scripted("9"), models_dir=root, models_max=1, rows=2, tokens=512) as client:

        def states() -> dict[str, str]:
            return {m["id"]: m["status"]["value"] for m in client.get("/v1/models").json()["data"]}

        assert states() == {"toy": "loaded", "a": "unloaded", "b": "unloaded"}
        for name in ("a", "a", "b"):
            reply = client.post(CHAT, json=HELLO | {"model": name})
            assert reply.status_code == 200 and reply.json()["model"] == name
        assert states() == {"toy": "loaded", "a": "unloaded", "b": "loaded"}
        for name in ("link", ".hidden", "notes", "../elsewhere", "/etc", "a/../b"):
            assert client.post(CHAT, json=HELLO | {"model": name}).status_code == 404, name
        assert client.post(CHAT, json=HELLO).json()["model"] == "toy"
        # a busy one does not leave
        service = next(s for s in client.app.state.service.all if s.options.name == "b")  # type: ignore[attr-defined]
        service.admission.requests += 1
        refused = client.post(CHAT, json=HELLO | {"model": "a"})
        assert refused.status_code == 503 and int(refused.headers["retry-after"]) > 0
        service.admission.requests -= 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("finback.serve.models_folder._size", lambda path, dtype: 10**15)
            refused = client.post(CHAT, json=HELLO | {"model": "a"})
            assert refused.status_code == 503 and "GB of memory" in refused.json()["error"]["message"]
