"""Secure by default: keys, hosts, origins, limits per key, and the content of logs."""

import hashlib
import logging
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import Route

from finback.config import UserError
from finback.serve import body, http, server
from finback.serve.errors import ApiError
from finback.serve.http import digests, secured
from finback.serve.middleware import OPEN, Quota, owner_of, salt
from finback.serve.options import ListenOptions, ServeOptions
from finback.serve.server import build
from tests.serving import CHAT, HELLO, KEY, OTHER, Scripted, served, small_tokenizer, wait_for


def test_every_route_but_health_needs_a_key() -> None:
    engine = Scripted()
    with served(engine, keys=digests([KEY])) as client:
        del client.headers["authorization"]
        routes = build(engine, small_tokenizer(), ServeOptions(model=Path("toy"), page=False)).routes
        assert len(routes) > 15 and all(isinstance(route, Route) for route in routes)
        for route in routes:
            assert isinstance(route, Route)
            path = route.path.replace("{id}", "x").replace("{name:path}", "toy")
            for method in sorted(route.methods or {"GET", "POST"}):
                status = client.request(method, path).status_code
                assert status == (200 if route.path in OPEN else 401), (method, path)
        for path in ("/", "/nothing", "/health/", "//health", "/health/../metrics", "/HEALTH", "/docs"):
            assert client.get(path).status_code == 401, path
        refused = client.post(CHAT, json=HELLO)
        assert refused.json()["error"]["type"] == "authentication_error"
        assert refused.headers["www-authenticate"] == "Bearer" and refused.headers["x-should-retry"] == "false"
        assert not engine.seen


@pytest.mark.parametrize(
    ("header", "value", "status"),
    [
        ("authorization", f"Bearer {KEY}", 200),
        ("authorization", f"bearer  {OTHER} ", 200),
        ("x-api-key", KEY, 200),
        ("authorization", KEY, 401),
        ("authorization", f"Basic {KEY}", 401),
        ("authorization", "Bearer ", 401),
        ("authorization", f"Bearer {KEY}x", 401),
        ("authorization", f"Bearer {KEY[:-1]}", 401),
        ("x-api-key", "", 401),
        ("x-api-key", "schlüssel-mit-umlaut", 401),
        ("authorization", f"Bearer {hashlib.sha256(KEY.encode()).hexdigest()}", 401),
    ],
)
def test_only_the_key_opens(header: str, value: str, status: int) -> None:
    keys = digests([KEY, OTHER])
    owner = owner_of([(header.encode(), value.encode())], keys)
    assert (owner is not None) == (status == 200)
    assert owner is None or owner in keys


def test_keys_come_from_a_file_and_are_not_kept(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# for the tests\n\n{KEY}\n  {OTHER}  \n")
    found = digests([], file)
    stored = [f"sha256:{hashlib.sha256(key.encode()).hexdigest()}" for key in (KEY, OTHER)]
    assert found == digests([KEY, OTHER]) == digests(stored) and all(len(d) == 32 for d in found)
    assert KEY not in repr(ListenOptions(keys=found, api_key=KEY))
    with pytest.raises(UserError, match="too short") as caught:
        digests(["secret"])
    assert "secret" not in str(caught.value).replace("import secrets; print(secrets", "")
    with pytest.raises(UserError, match="cannot be read"):
        digests([], tmp_path / "none")


def test_an_open_door_to_the_network_is_refused(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.168.1.5", "::", "example.org"):
        with pytest.raises(UserError, match="no API key"):
            secured(ListenOptions(host=host))
        assert secured(ListenOptions(host=host, api_key=KEY)).keys == digests([KEY])
        secured(ListenOptions(host=host, insecure=True))
    for host in ("127.0.0.1", "localhost", "::1"):
        secured(ListenOptions(host=host))
    with pytest.raises(UserError, match="no API key"):  # before it reads a model or opens a port
        server.run(ServeOptions(model=tmp_path / "none", host="0.0.0.0"))


def test_a_port_that_is_taken_is_a_users_error(tmp_path: Path) -> None:
    listener = http.listen("127.0.0.1", 0)
    with pytest.raises(UserError, match="host:port"):
        server.run(ServeOptions(model=tmp_path / "none", port=listener.getsockname()[1]))
    listener.close()


@pytest.mark.parametrize(
    ("options", "host", "status"),
    [
        ({}, "localhost", 200),
        ({}, "LOCALHOST:8000", 200),
        ({}, "127.0.0.1:1", 200),
        ({}, "[::1]:8000", 200),
        ({}, "evil.example", 403),
        ({}, "localhost.evil.example", 403),
        ({}, "192.168.0.7", 403),
        ({}, "", 403),
        ({}, "localhost@evil.example", 403),
        ({}, "[", 403),
        ({"hosts": ("ai.example",)}, "ai.example:443", 200),
        ({"hosts": ("*",)}, "anything.example", 200),
        ({"host": "0.0.0.0"}, "192.168.0.7:8000", 200),
        ({"host": "0.0.0.0"}, "evil.example", 403),
        ({"host": "box.lan"}, "box.lan", 200),
    ],
)
def test_the_host_must_be_the_servers(options: dict[str, Any], host: str, status: int) -> None:
    with served(Scripted(), **options) as client:
        response = client.get("/health", headers={"host": host})
        assert response.status_code == status
        assert status == 200 or response.json()["error"]["code"] == "host_not_allowed"


def test_other_sites_may_not_ask() -> None:
    with served(Scripted(), origins=("https://chat.example",)) as client:
        own = f"http://{client.base_url.host}:{client.base_url.port}"
        for origin, status in (
            (own, 200),
            ("https://chat.example", 200),
            ("https://evil.example", 403),
            ("null", 403),
            ("", 403),
            ("http://127.0.0.1", 403),
            ("file://", 403),
            ("https://chat.example.evil.example", 403),
        ):
            response = client.post(CHAT, json=HELLO | {"max_tokens": 1}, headers={"origin": origin})
            assert response.status_code == status, origin
            allowed = response.headers.get("access-control-allow-origin")
            assert allowed == (origin if origin == "https://chat.example" else None)
        asked = {"origin": "https://chat.example", "access-control-request-method": "POST"}
        preflight = client.options(CHAT, headers=asked)
        assert preflight.status_code == 204 and "authorization" in preflight.headers["access-control-allow-headers"]
        assert client.options(CHAT, headers=asked | {"origin": "https://evil.example"}).status_code == 403
    with served(Scripted(), keys=digests([KEY])) as client:
        assert "access-control-allow-origin" not in client.get("/health").headers
        del client.headers["authorization"]
        asked = {"origin": str(client.base_url).rstrip("/"), "access-control-request-method": "POST"}
        assert client.options(CHAT, headers=asked).status_code == 401


def test_one_key_may_ask_so_often_and_no_more() -> None:
    quota = Quota(rate=2, concurrent=0)
    for _ in range(2):
        with quota.use(b"a"):
            pass
    with pytest.raises(ApiError) as caught, quota.use(b"a"):
        pass
    assert caught.value.status == 429 and 25 <= caught.value.retry_after <= 31
    with quota.use(b"b"):
        pass
    quota = Quota(rate=0, concurrent=1)
    with quota.use(b"a"):
        with pytest.raises(ApiError), quota.use(b"a"):
            pass
        with quota.use(b"b"):
            pass
    with quota.use(b"a"):
        pass


def test_too_much_is_refused_at_once_and_with_a_time_to_return() -> None:
    engine = Scripted(rows=1)
    engine.hold_at = 20  # a reply that waited for the engine would never come
    keys = {name: {"authorization": f"Bearer {name}"} for name in (KEY, OTHER)}
    long = HELLO | {"max_tokens": 300, "ignore_eos": True, "stream": True}
    with served(engine, keys=digests([KEY, OTHER]), queue=2, concurrent=2) as client:
        streams = [client.stream("POST", CHAT, json=long, headers=keys[k]) for k in (KEY, KEY, OTHER)]
        try:
            for i, stream in enumerate(streams):
                assert stream.__enter__().status_code == 200, i
            # three choices are all that one row and a queue of two can hold
            for key, status in ((OTHER, 503), (KEY, 503)):
                response = client.post(CHAT, json=HELLO, headers=keys[key])
                assert response.status_code == status and int(response.headers["retry-after"]) > 0
            streams.pop().__exit__(None, None, None)
            wait_for(lambda: client.app.state.service.admission.choices == 2)  # type: ignore[attr-defined]
            response = client.post(CHAT, json=HELLO, headers=keys[KEY])
            assert response.status_code == 429 and response.json()["error"]["code"] == "concurrency_limit_exceeded"
            assert int(response.headers["retry-after"]) > 0 and "x-should-retry" not in response.headers
            assert client.post(CHAT, json=HELLO | {"n": 2}, headers=keys[OTHER]).status_code == 503
            assert client.post(CHAT, json=HELLO | {"n": 4}, headers=keys[OTHER]).status_code == 400
            assert "finback_queued 1" in client.get("/metrics", headers=keys[KEY]).text
        finally:
            for stream in streams:
                stream.__exit__(None, None, None)
        wait_for(lambda: not engine.busy)
        assert engine.leaked == 0


def test_logs_hold_no_words_of_anybody(caplog: pytest.LogCaptureFixture) -> None:
    secret, said = "rosebud", "4+5=9"
    engine = Scripted(f"It said {said}")
    request = HELLO | {"messages": [{"role": "user", "content": secret}], "max_tokens": 30, "user": secret}
    with caplog.at_level(logging.DEBUG), served(engine, keys=digests([KEY])) as client:
        assert said in client.post(CHAT, json=request).text
        client.post(CHAT, json=request | {"temperature": secret})
        client.get(f"/v1/models/{secret}?q={secret}")
        engine.failing = RuntimeError(f"cannot do {secret}")
        assert client.post(CHAT, json=request).status_code == 503
    ours = [r.getMessage() for r in caplog.records if not r.name.startswith(("httpx", "httpcore", "asyncio"))]
    lines = [line for line in ours if line.startswith("req-")]
    assert any(f"POST {CHAT} 200 in=" in line for line in lines) and any(" 400 " in line for line in lines)
    assert not [line for line in ours if secret in line or said in line or KEY in line]


def test_the_salt_is_the_keys_and_the_users() -> None:
    one, two = digests([KEY, OTHER])
    salts = [salt(b"", None), salt(one, None), salt(two, None), salt(one, "a"), salt(one, "b")]
    assert salts[0] == b"" and len(set(salts)) == 5 and all(len(s) <= 64 for s in salts)


def test_a_long_request_does_not_hold_up_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is parsed in a separate thread."""
    parse, begun, go_on = body._validated, threading.Event(), threading.Event()

    def slowly(raw: bytes, form: Any) -> Any:
        begun.set()
        go_on.wait()
        return parse(raw, form)

    monkeypatch.setattr(body, "_validated", slowly)
    with served(Scripted()) as client:
        big = {"messages": [{"role": "user", "content": "x"}], "pad": ["y" * 10] * 10_000}
        thread = threading.Thread(target=lambda: client.post(CHAT, json=big))
        thread.start()
        assert begun.wait(60) and client.get("/health").status_code == 200
        go_on.set()
        thread.join()
