"""The server on the network: half-open connections, odd requests, Unix sockets, https, other origins, metrics."""

import contextlib
import json
import logging
import shutil
import socket
import ssl
import stat
import subprocess
import time
from pathlib import Path

import httpx
import pytest

from finback.config import UserError
from finback.serve import http
from finback.serve.options import ServeOptions
from tests.serving import CHAT, HELLO, Scripted, served, small_tokenizer, streamed, wait_for


def address(client: httpx.Client) -> tuple[str, int]:
    return client.base_url.host, client.base_url.port or 80


def raw(client: httpx.Client, sent: bytes) -> bytes:
    """The reply to these bytes."""
    with socket.create_connection(address(client), timeout=10) as connection:
        connection.sendall(sent)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


def test_a_thousand_half_sent_heads_are_shrugged_off(capfd: pytest.CaptureFixture[str]) -> None:
    with served(Scripted("9"), head_timeout=4.0, body_timeout=4.0) as client:
        held = [socket.create_connection(address(client)) for _ in range(1000)]
        for i, connection in enumerate(held):
            # nothing, half a head, and half a body
            body = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{"
            connection.sendall((b"", b"GET /health HTTP/1.1\r\nhost: loc", body)[i % 3] or b"G")
        assert client.get("/health").status_code == 200
        assert client.post(CHAT, json=HELLO).status_code == 200
        for connection in held:  # the server closes all of them
            connection.settimeout(30)
            with contextlib.suppress(ConnectionResetError):
                assert connection.recv(4096) in (b"",)
            connection.close()
        assert client.get("/health").status_code == 200
    assert len("".join(capfd.readouterr())) < 200_000


def test_a_connection_too_many_is_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "most_connections", lambda: 3)
    with served(Scripted("9"), head_timeout=60.0) as client:
        held = [socket.create_connection(address(client), timeout=10) for _ in range(3)]
        one_more = socket.create_connection(address(client), timeout=10)
        with one_more, contextlib.suppress(ConnectionResetError):
            assert one_more.recv(1) == b""
        for connection in held:
            connection.close()

        def answers() -> bool:
            with contextlib.suppress(httpx.TransportError):
                return client.get("/health").status_code == 200
            return False

        wait_for(answers)


@pytest.mark.slow
def test_a_slow_request_is_no_broken_one() -> None:
    """A head has one timeout as a whole, a body one between pieces; an answer has none."""
    with served(Scripted("a b c d e f g h", pace=0.3), head_timeout=2.0, body_timeout=2.0) as client:
        assert streamed(client, **HELLO)[-1] == "[DONE]"

        def slowly() -> object:
            body = json.dumps(HELLO | {"max_tokens": 1}).encode()
            for i in range(0, len(body), 3):
                time.sleep(0.1)
                yield body[i : i + 3]

        assert client.post(CHAT, content=slowly()).status_code == 200  # type: ignore[arg-type]


def test_odd_requests_are_understood_or_refused_by_name(tmp_path: Path) -> None:
    with served(Scripted("9"), origins=("https://chat.example",)) as client:
        for path in (f"{CHAT}/", "/chat/completions/", "/v1/models/", "/health/"):
            response = client.post(path, json=HELLO) if "chat" in path else client.get(path)
            assert response.status_code == 200, path
        refused = client.post(CHAT, content=b"\x1f\x8b", headers={"content-encoding": "gzip"})
        assert refused.status_code == 415 and "compressed" in refused.json()["error"]["message"]
        assert client.post(CHAT, json=HELLO, headers={"content-encoding": "identity"}).status_code == 200
        head = b"GET http://%b/v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
        assert b" 200 " in raw(client, head % b"localhost:8000")
        assert b" 403 " in raw(client, head % b"evil.example")
        # what OpenAI's client requests in a browser
        names = "authorization,content-type,x-stainless-os,x-stainless-retry-count"
        asked = {"origin": "https://chat.example", "access-control-request-method": "POST"}
        preflight = client.options(CHAT, headers=asked | {"access-control-request-headers": names})
        assert preflight.status_code == 204 and preflight.headers["access-control-allow-headers"] == names
        assert "retry-after" in preflight.headers["access-control-expose-headers"]
        odd = client.options(CHAT, headers=asked | {"access-control-request-headers": "a: b"})
        assert odd.headers["access-control-allow-headers"] == "authorization, content-type, x-api-key"
    for port in (70_000, -1):
        with pytest.raises(UserError, match="port"):
            ServeOptions(model=tmp_path, port=port)


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]"),
        ({"tool_choice": {"type": "function"}, "tools": []}, "tool_choice.function"),
        ({"stop": ["a", 1]}, "stop[1]"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
    ],
)
def test_a_refusal_names_a_field_that_exists(client: httpx.Client, request_: dict[str, object], param: str) -> None:
    error = client.post(CHAT, json=HELLO | request_).json()["error"]
    assert error["param"] == param and error["message"].startswith(param)
    assert "image_url" not in str(request_) or "'image_url'" in error["message"]


def test_a_unix_socket_is_its_users_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for _ in range(2):  # a leftover socket is replaced
        with served(Scripted("9"), uds=path) as client:
            assert client.post(CHAT, json=HELLO).status_code == 200
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="--uds"):
        http.listen_at(tmp_path / "file")


def test_https_by_files(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("nothing here can create certificates")
    key, chain = tmp_path / "key.pem", tmp_path / "cert.pem"
    make = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost -keyout {key} -out {chain}"
    subprocess.run(make.split(), check=True, capture_output=True)
    with served(Scripted("9"), ssl_certfile=chain, ssl_keyfile=key) as client:
        assert client.base_url.scheme == "https" and client.post(CHAT, json=HELLO).status_code == 200
        with pytest.raises(ssl.SSLError), socket.create_connection(address(client), timeout=10) as plain:
            ssl.create_default_context().wrap_socket(plain, server_hostname="localhost")
    with pytest.raises(UserError, match="ssl-certfile"):
        ServeOptions(model=tmp_path, ssl_keyfile=key)
    locked = tmp_path / "locked.pem"
    lock = f"openssl ec -in {key} -aes256 -passout pass:secret -out {locked}"
    subprocess.run(lock.split(), check=True, capture_output=True)
    assert http.secured(ServeOptions(model=tmp_path, ssl_certfile=chain, ssl_keyfile=key)).ssl_certfile == chain
    for bad in ((key, key), (tmp_path / "none.pem", None), (chain, locked), (chain, None)):
        with pytest.raises(UserError, match=r"ssl-certfile.* cannot be used"):
            http.secured(ServeOptions(model=tmp_path, ssl_certfile=bad[0], ssl_keyfile=bad[1]))


def test_metrics_have_vllms_names_too() -> None:
    with served(Scripted("4+5=9 is what"), name='a "b"') as client:
        usage = client.post(CHAT, json=HELLO | {"max_tokens": 99}).json()["usage"]
        lines = client.get("/metrics").text.splitlines()
    values = {name: float(value) for line in lines if line[0] != "#" for name, _, value in [line.rpartition(" ")]}
    label = 'model_name="a \\"b\\""'
    assert values[f"vllm:generation_tokens_total{{{label}}}"] == usage["completion_tokens"]
    assert values[f"vllm:prompt_tokens_total{{{label}}}"] == usage["prompt_tokens"]
    assert values[f'vllm:request_success_total{{finished_reason="stop",{label}}}'] == 1
    assert values[f"vllm:e2e_request_latency_seconds_count{{{label}}}"] == 1
    assert values[f'vllm:time_to_first_token_seconds_bucket{{le="+Inf",{label}}}'] == 1
    assert values[f"vllm:num_requests_running{{{label}}}"] == 0


def test_a_queue_without_an_end() -> None:
    engine = Scripted(pace=0.01, rows=1)
    with served(engine, queue=None, choices=8) as client:
        held = [client.stream("POST", CHAT, json=HELLO | {"max_tokens": 200, "stream": True}) for _ in range(6)]
        assert [each.__enter__().status_code for each in held] == [200] * 6
        for each in held:
            each.__exit__(None, None, None)
        wait_for(lambda: not engine.busy)


def test_tokens_in_the_words_of_others(client: httpx.Client) -> None:
    words, text = small_tokenizer(), "The whale sang. 4+5=9"
    ids = words.encode(text)
    found = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert found["tokens"] == [words.bos, *ids] and found["count"] == len(ids) + 1 and found["max_model_len"] == 2048
    assert "".join(found["token_strs"][1:]) == text
    assert client.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"] == ids
    assert client.post("/tokenize", json={"content": text}).json() == {"tokens": ids}
    pieces = client.post("/tokenize", json={"content": "4+5", "with_pieces": True}).json()["tokens"]
    assert "".join(p["piece"] for p in pieces) == "4+5"
    assert client.post("/detokenize", json={"tokens": ids}).json() == {"prompt": text, "content": text}
    chat = client.post("/tokenize", json={"messages": HELLO["messages"]}).json()
    assert chat["count"] == client.post(CHAT, json=HELLO).json()["usage"]["prompt_tokens"]
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "content": "b"}),
        ("/detokenize", {"tokens": [10**6]}),
    ):
        assert client.post(path, json=body).status_code == 400


def test_an_error_in_a_loop_does_not_fill_the_log() -> None:
    def record(at: float, failed: bool) -> logging.LogRecord:
        found = logging.LogRecord(
            "asyncio", logging.ERROR, "", 0, "x", (), (OSError, OSError(), None) if failed else None
        )
        found.created = at
        return found

    seldom = http.Seldom()
    assert [seldom.filter(record(at / 10, True)) for at in range(21)].count(True) == 3
    assert seldom.filter(record(2.05, False))
