"""The server refuses invalid requests immediately, with OpenAI's error shape and the right status."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from finback.serve.schema_ends import can_end
from tests.serving import CHAT, HELLO, Scripted, served, wait_for


@pytest.fixture(scope="module")
def client(engine: Scripted) -> Iterator[httpx.Client]:
    with served(engine, aliases=("alias/of-toy",)) as client:
        yield client


def nested(depth: int, inner: Any = 1) -> Any:
    for _ in range(depth):
        inner = {"a": inner}
    return inner


def form(schema: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f"} | function}


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def call(schema: dict[str, Any]) -> dict[str, Any]:
    """A request that requires calls, with a second tool that has this schema."""
    return {"tools": [tool(), tool(name="g", parameters=schema)], "tool_choice": "required"}


MESSAGE = {"role": "user", "content": "x"}

WRONG: dict[str, tuple[dict[str, Any], str | None]] = {
    "no messages": ({"messages": []}, "messages"),
    "messages are no list": ({"messages": "Hello"}, "messages"),
    "a message is no object": ({"messages": ["Hello"]}, "messages[0]"),
    "no role": ({"messages": [{"content": "x"}]}, "messages[0].role"),
    "an unknown role": ({"messages": [{"role": "god", "content": "x"}]}, "messages[0].role"),
    "no content": ({"messages": [{"role": "user"}]}, "messages[0]"),
    "an image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0]"),
    "a list too long": ({"messages": [MESSAGE] * 4097}, "messages"),
    "a text for a number": ({"temperature": "1"}, "temperature"),
    "a truth value for a number": ({"max_tokens": True}, "max_tokens"),
    "a number for a truth value": ({"stream": 1}, "stream"),
    "temperature above 2": ({"temperature": 2.01}, "temperature"),
    "temperature below 0": ({"temperature": -0.01}, "temperature"),
    "top_p 0": ({"top_p": 0}, "top_p"),
    "top_p above 1": ({"top_p": 1.01}, "top_p"),
    "top_k below -1": ({"top_k": -2}, "top_k"),
    "min_p above 1": ({"min_p": 1.5}, "min_p"),
    "frequency_penalty 3": ({"frequency_penalty": 3}, "frequency_penalty"),
    "presence_penalty -3": ({"presence_penalty": -3}, "presence_penalty"),
    "repetition_penalty 0": ({"repetition_penalty": 0}, "repetition_penalty"),
    "max_tokens -2": ({"max_tokens": -2}, "max_tokens"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens"),
    "max_tokens 10^30": ({"max_tokens": 10**30}, "max_tokens"),
    "max_tokens beyond the window": ({"max_tokens": 4000}, "max_tokens"),
    "n 0": ({"n": 0}, "n"),
    "n 9": ({"n": 9}, "n"),
    "n 10^9": ({"n": 10**9}, "n"),
    "seed is a fraction": ({"seed": 1.5}, "seed"),
    "top_logprobs 21": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "top_logprobs without logprobs": ({"top_logprobs": 1}, "top_logprobs"),
    "an empty stop": ({"stop": ""}, "stop"),
    "an empty stop in a list": ({"stop": ["a", ""]}, "stop"),
    "17 stops": ({"stop": ["a"] * 17}, "stop"),
    "10,000 stops": ({"stop": [str(i) for i in range(10_000)]}, "stop"),
    "a stop of 257": ({"stop": "a" * 257}, "stop"),
    "a bias of 101": ({"logit_bias": {"1": 101}}, "logit_bias"),
    "a bias for a word": ({"logit_bias": {"the": 1}}, "logit_bias"),
    "a bias for no token": ({"logit_bias": {"100000": 1}}, "logit_bias"),
    "an unknown effort": ({"reasoning_effort": "heroic"}, "reasoning_effort"),
    "thinking is a word": ({"thinking": "enabled"}, "thinking"),
    "a negative budget": ({"thinking_budget": -1}, "thinking_budget"),
    "an unknown tool_choice": ({"tools": [tool()], "tool_choice": "any"}, "tool_choice"),
    "a call of nothing": ({"tools": [tool()], "tool_choice": {"type": "function"}}, "tool_choice"),
    "a call of another kind": ({"tools": [tool()], "tool_choice": named("f") | {"type": "custom"}}, "tool_choice"),
    "a call of no function": ({"tools": [tool()], "tool_choice": named("g")}, "tool_choice.function.name"),
    "a call without tools": ({"tool_choice": "required"}, "tool_choice"),
    "a named call without tools": ({"tools": [], "tool_choice": named("f")}, "tool_choice"),
    "a number for parallel_tool_calls": ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    "arguments that are no object": (call({"type": "string"}), "tools[1].function.parameters"),
    "arguments of no type": (call({"type": {}}), "tools[1].function.parameters"),
    "arguments that are none": (call({"properties": {"a": {"type": "whale"}}}), "tools[1].function.parameters"),
    "arguments that refer to nothing": (call({"$ref": "#/$defs/none"}), "tools[1].function.parameters"),
    "arguments too deep": (call(nested(33, {})), "tools[1].function.parameters"),
    "arguments too long": (call({"description": "x" * 65_536}), "tools[1].function.parameters"),
    "129 tools": ({"tools": [tool()] * 129}, "tools"),
    "a tool with a bad name": ({"tools": [tool(name="a b")]}, "tools[0].function.name"),
    "tools and a pattern": ({"tools": [tool()], "guided_regex": "a"}, "guided_regex"),
    "two grammars": ({"guided_choice": ["a"], "structured_outputs": {"regex": "a"}}, "guided_choice"),
    "a grammar that is none": ({"grammar": "root ::= ("}, "grammar"),
    "a template": ({"chat_template": "{{ 1 }}"}, "chat_template"),
    "a template among the switches": ({"chat_template_kwargs": {"chat_template": ""}}, "chat_template_kwargs.chat"),
    "a schema that is only itself": (form({"$ref": "#"}), "response_format"),
    "a schema that goes in circles": (
        form({"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "$defs": {"a": {"$ref": "#/$defs/a"}}}),
        "response_format",
    ),
    "an unknown format": ({"response_format": {"type": "xml"}}, "response_format"),
    "a format without its schema": ({"response_format": {"type": "json_schema"}}, "response_format"),
    "a schema that is none": (form({"type": "whale"}), "response_format"),
    "a schema that contradicts itself": (form({"type": "object", "properties": 7}), "response_format"),
    "a schema that refers to nothing": (form({"$ref": "#/$defs/none"}), "response_format"),
    "a schema that is a list": (form([]), "response_format"),
    "a schema too deep": (form(nested(33)), "response_format"),
    "a schema too long": (form({"description": "x" * 65_536}), "response_format"),
    "a long prompt": ({"messages": [{"role": "user", "content": "word " * 2000}]}, "messages"),
    "a prompt of 10^6": ({"messages": [{"role": "user", "content": "a" * 10**6}]}, "messages"),
    "a prompt of 10^6 signs": ({"messages": [{"role": "user", "content": "(" * 10**6}]}, "messages"),
    "NUL": ({"messages": [{"role": "user", "content": "a\0b"}]}, None),
    "NUL in a name": ({"a\0b": 1}, None),
    "a lone surrogate": ({"messages": [{"role": "user", "content": "a\ud800b"}]}, None),
    "a lone surrogate in a stop": ({"stop": "\udfff"}, None),
    "nesting of 201": ({"a": nested(200)}, None),
    "nesting of 100,000": ({"a": "DEEP"}, None),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused(client: httpx.Client, name: str) -> None:
    request, param = WRONG[name]
    body = json.dumps(HELLO | request).replace('"DEEP"', "[" * 100_000 + "]" * 100_000)
    for path in (CHAT, "/chat/completions"):
        response = client.post(path, content=body)
        assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param or "") and len(error["message"]) < 1000
    assert response.headers["x-should-retry"] == "false"


ITSELF = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"stop": ["a"] * 17}, "at most 16 items"),
        ({"guided_regex": "("}, "unclosed group"),
        (form(ITSELF), "no answer could end"),
        (form({"type": "array", "prefixItems": [ITSELF], "minItems": 1}), "no answer could end"),
        (
            form({"$defs": {"a": {"anyOf": [{"$ref": "#"}, ITSELF]}}, "allOf": [{"$ref": "#/$defs/a"}]}),
            "no answer could end",
        ),
        (call({"type": "object", "properties": {"a": ITSELF}, "required": ["a"]}), "no answer could end"),
    ],
)
def test_a_refusal_says_what_is_wrong(client: httpx.Client, request_: dict[str, Any], words: str) -> None:
    response = client.post(CHAT, json=HELLO | request_)
    assert response.status_code == 400 and words in response.json()["error"]["message"], response.text


@pytest.mark.parametrize(
    ("schema", "ends"),
    [
        (
            {"type": "object", "properties": {"a": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}}, "required": ["a"]},
            True,
        ),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}}, True),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, True),  # a number fits
        ({"type": "array", "items": {"$ref": "#"}}, True),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"type": "null"}}, "$ref": "#/$defs/a"}, True),
        ({"$defs": {"a": ITSELF | {"properties": {"a": {"$ref": "#/$defs/a"}}}}, "$ref": "#/$defs/a"}, False),
        ({"$ref": "#/$defs/none"}, True),  # another check reports it
    ],
)
def test_schemas_that_can_end(schema: dict[str, Any], ends: bool) -> None:
    assert can_end(schema) is ends


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"seed": Infinity}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b"\xef\xbb\xbf{}",
        b'{"temperature": 1e999}',
        b"{'a': 1}",
    ],
)
def test_a_body_that_is_no_json_object_is_refused(client: httpx.Client, body: bytes) -> None:
    response = client.post(CHAT, content=body)
    assert response.status_code == 400 and response.json()["error"]["message"]


def test_a_schema_that_takes_hours_stops_nobody(client: httpx.Client) -> None:
    every = [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnopqrstuvwxyz0123456789"]
    for schema in ({"allOf": every}, {"$defs": {"a": {"allOf": every}}, "$ref": "#/$defs/a"}):
        response = client.post(CHAT, json=HELLO | form(schema))
        assert response.status_code == 400 and "too complex" in response.json()["error"]["message"]
        assert response.elapsed.total_seconds() < 5
    hard = {"type": "object", "properties": {"a": {"allOf": every}}}
    response = client.post(CHAT, json=HELLO | call(hard))
    assert response.status_code == 400 and response.json()["error"]["param"].startswith("tools")
    assert client.post(CHAT, json=HELLO | call({}) | {"tool_choice": "auto"}).status_code == 200
    assert client.post(CHAT, json=HELLO | form({"type": "object"})).status_code == 200
    assert client.post(CHAT, json=HELLO).status_code == 200


def test_limits_hold_at_the_limit_and_beyond(client: httpx.Client) -> None:
    fine = (
        {"n": 8},
        {"temperature": 2},
        {"stop": ["x" * 256] * 16},
        {"logprobs": True, "top_logprobs": 20},
        {"tools": []},
        {"tools": [tool(name="a" * 64)], "tool_choice": "none"},
        {"top_k": -1},
        {"max_tokens": -1, "stop": ["a", "e", "o", " ", "\n"]},
        {"seed": 10**40},
        {"logit_bias": {"1": 100, "2": -100}},
        {"a": nested(199)},
        {"user": None, "stop": None, "tools": None},
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
                MESSAGE,
            ]
        },
    )
    for request in fine:
        response = client.post(CHAT, json=HELLO | {"max_tokens": 2} | request)
        assert response.status_code == 200, (request, response.text)


def test_a_prompt_beyond_the_window_names_the_window(client: httpx.Client) -> None:
    for path, request in (
        (CHAT, {"messages": [{"role": "user", "content": "1 " * 1200}]}),
        ("/v1/completions", {"prompt": "1 " * 1200}),
        ("/v1/completions", {"prompt": [5] * 2100}),
        ("/v1/completions", {"prompt": [5] * 2000, "max_tokens": 49}),
    ):
        error = client.post(path, json=request).json()["error"]
        assert "maximum context length is 2048" in error["message"] and error["code"] == "context_length_exceeded"


def test_the_frameworks_own_refusals_have_the_same_shape(client: httpx.Client) -> None:
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", CHAT, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/v1/models/", 405),
        ("GET", "/v1/models/other", 404),
        ("POST", f"{CHAT}/x/control", 400),
        ("GET", "/v1", 404),
        ("OPTIONS", CHAT, 405),
    ):
        response = client.request(method, path)
        assert response.status_code == status, (method, path, response.text)
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert client.post(f"{CHAT}/x/control", json={"action": "answer_now"}).status_code == 404
    assert "POST" in client.get(CHAT).headers["allow"]


def test_models_have_names(client: httpx.Client) -> None:
    for prefix in ("/v1", "", "/beta"):
        assert [m["id"] for m in client.get(f"{prefix}/models").json()["data"]] == ["toy", "alias/of-toy"]
        assert client.get(f"{prefix}/models/alias/of-toy").json()["max_model_len"] == 2048
        for name in ("toy", "alias/of-toy", None):
            assert client.post(f"{prefix}/chat/completions", json=HELLO | {"model": name}).status_code == 200
            assert client.post(f"{prefix}/completions", json={"prompt": "a", "max_tokens": 1, "model": name}).is_success
    for name in ("gpt-4", "", "toy "):
        response = client.post(CHAT, json=HELLO | {"model": name})
        assert response.status_code == 404 and response.json()["error"]["param"] == "model"
        assert response.headers["x-should-retry"] == "false"


def test_a_body_that_is_too_large_is_refused(client: httpx.Client) -> None:
    limit = 4 << 20
    for size, status in ((limit, 400), (limit + 1, 413)):
        assert client.post(CHAT, content=b" " * size).status_code == status

    def pieces(size: int) -> Iterator[bytes]:  # without a content-length
        for start in range(0, size, 1 << 18):
            yield b" " * min(1 << 18, size - start)

    assert client.post(CHAT, content=pieces(limit)).status_code == 400
    response = client.post(CHAT, content=pieces(limit + (1 << 18)))
    assert response.status_code == 413 and response.json()["error"]["code"] == "request_too_large"


def raw(client: httpx.Client, sent: bytes) -> tuple[int, dict[str, Any]]:
    """The reply to bytes that no client library would send."""
    address = (client.base_url.host, client.base_url.port or 80)
    with socket.create_connection(address, timeout=10) as connection:
        connection.sendall(sent)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def test_what_is_not_http_is_refused_in_the_same_shape(client: httpx.Client) -> None:
    close = b"connection: close\r\n"
    for sent, status in (
        (b"nonsense\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + close + b"a: " + b"x" * 20_000 + b"\r\n\r\n", 431),
        (b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n" + close + b"content-length: 99999999999\r\n\r\n", 413),
        (b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -1\r\n\r\n", 400),
        (b"GET /v1/models/%ff%00 HTTP/1.1\r\nhost: localhost\r\n" + close + b"\r\n", 404),
    ):
        got, body = raw(client, sent)
        assert got == status and body["error"]["message"], (sent[:60], got)


def test_nothing_of_it_reached_the_model(client: httpx.Client, engine: Scripted) -> None:
    assert client.post(CHAT, json=HELLO | {"temperature": -1}).status_code == 400
    wait_for(lambda: not engine.busy)
    assert engine.leaked == 0
    counted = client.get("/metrics").text
    assert 'status="400"' in counted and 'status="500"' not in counted
