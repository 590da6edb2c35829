"""Requests that fit the server's OpenAI document, or almost fit it, get an answer that the document allows."""

import copy
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS

from finback.serve import openapi
from finback.serve.http import digests
from tests.serving import KEY, Scripted, served, wait_for

DOCUMENT = schemathesis.openapi.from_dict(openapi.document())
OPERATIONS = [
    (operation.path, operation.method.upper())
    for result in DOCUMENT.get_all_operations()
    for operation in [result.ok()]
]
CHECKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
)
# requests that violate the document must be refused
NEGATIVE = (*CHECKED, "negative_data_rejection")


@pytest.fixture(scope="module", params=[128])
def client(request: pytest.FixtureRequest) -> Iterator[httpx.Client]:
    """A server; the parameter is the length of its model's window."""
    engine = Scripted(rows=32, window=request.param)
    with served(engine, keys=digests([KEY]), queue=200) as client:
        yield client
        wait_for(lambda: not engine.busy)
        assert engine.leaked == 0
        counted = client.get("/metrics").text
        assert 'status="5' not in counted and 'status="200"' in counted
        assert client.get("/ready").status_code == 200


def fuzz(client: httpx.Client, path: str, method: str, mode: GenerationMode, cases: int) -> None:
    """Sends this many cases for one operation."""
    operation: Any = DOCUMENT[path][method]
    names = NEGATIVE if mode is GenerationMode.NEGATIVE else CHECKED

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        response = case.call(base_url=str(client.base_url), headers={"authorization": f"Bearer {KEY}"}, timeout=120)
        is_too_large = response.status_code == 413  # also a refusal, which the refusal check does not know
        case.validate_response(response, checks=CHECKS.get_by_names(CHECKED if is_too_large else names))

    send()


def modes(path: str, method: str) -> list[GenerationMode]:
    """The modes that apply: a GET without parameters cannot be invalid."""
    is_plain = method == "GET" and "{" not in path
    return [GenerationMode.POSITIVE] if is_plain else [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]


CASES = [(path, method, mode) for path, method in OPERATIONS for mode in modes(path, method)]


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_a_few_requests_of_every_kind(client: httpx.Client, path: str, method: str, mode: GenerationMode) -> None:
    fuzz(client, path, method, mode, 5)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method", "mode"), [c for c in CASES if c[1] == "POST"])
def test_a_hundred_requests_of_every_kind(client: httpx.Client, path: str, method: str, mode: GenerationMode) -> None:
    # drawing a case costs a hundred times as much as its answer, and the case names a model that does not exist
    fuzz(client, path, method, mode, 100)


SAID = [
    {"role": "system", "content": "Sing."},
    {"role": "user", "content": [{"type": "text", "text": "1+1=?"}]},
    {"role": "assistant", "content": "2", "reasoning_content": "one more"},
    {"role": "user", "content": "And 2+2?"},
]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
FUNCTION = {"name": "add", "description": "Add.", "parameters": SCHEMA}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
BASE: dict[str, Any] = {"model": "toy", "seed": 1, "stream": False, "temperature": 0.5, "top_p": 0.9}
# valid requests by path; fuzzing applies one or more changes to one of them
ANSWERED: dict[str, list[dict[str, Any]]] = {
    "/v1/messages": [
        BASE | {"max_tokens": 8, "system": "Sing.", "messages": SAID[3:], "stop_sequences": ["x"], "top_k": 3},
        BASE
        | {
            "max_tokens": 8,
            "system": [{"type": "text", "text": "Sing.", "cache_control": {"type": "ephemeral"}}],
            "tools": [{"name": "add", "description": "Add.", "input_schema": SCHEMA}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
            "thinking": {"type": "enabled", "budget_tokens": 4},
            "messages": [
                {"role": "user", "content": "1+1=?"},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "one more", "signature": "s"},
                        {"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}},
                    ],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "2"}]},
            ],
        },
        BASE
        | {
            "max_tokens": 40,
            "stream": True,
            "messages": SAID[3:],
            "metadata": {"user_id": "u"},
            "output_config": {"effort": "low", "format": {"type": "json_schema", "schema": SCHEMA}},
        },
    ],
    "/v1/responses": [
        BASE | {"max_output_tokens": 8, "input": "1+1=?", "instructions": "Sing.", "metadata": {"a": "b"}},
        BASE
        | {
            "max_output_tokens": 8,
            "store": False,
            "tools": [{"type": "function", **FUNCTION, "strict": False}],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "reasoning": {"effort": "low", "summary": "auto"},
            "include": ["reasoning.encrypted_content"],
            "input": [
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "1+1=?"}]},
                {"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "one more"}]},
                {"type": "function_call", "call_id": "c1", "name": "add", "arguments": '{"a": 1}'},
                {"type": "function_call_output", "call_id": "c1", "output": "2"},
            ],
        },
        BASE
        | {
            "max_output_tokens": 40,
            "stream": True,
            "input": SAID[3:],
            "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA, "strict": True}},
        },
    ],
    "/v1/chat/completions": [
        BASE | {"max_tokens": 8, "messages": SAID, "stop": ["x"], "n": 2, "logprobs": True, "top_logprobs": 2},
        BASE
        | {
            "max_tokens": 8,
            "messages": [SAID[3], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "c1"}],
            "tools": [{"type": "function", "function": FUNCTION}],
            "tool_choice": "auto",
            "stream": True,
            "stream_options": {"include_usage": True},
        },
        BASE | {"max_tokens": 40, "messages": SAID[3:], "response_format": {"type": "json_object", "schema": SCHEMA}},
    ],
}
for tool in ANSWERED["/v1/chat/completions"][1]["messages"][2:]:
    tool["content"] = "2"
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    3.5,
    1e308,
    "",
    "x",
    "é\u0000\ud83d\ude00",
    [],
    [None],
    {},
    {"type": "x"},
    "1" * 5000,
    2**63,
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [(value, key) for key in keys] + [place for key in keys for place in places(value[key])]


def changed(request: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A request with one to three of its parts removed, replaced, doubled, wrapped or swapped."""
    found: dict[str, Any] = copy.deepcopy(request)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        inside, key = rng.choice(places(found))
        other, its = rng.choice(places(found))
        match rng.randrange(6):
            case 0:
                del inside[key]
            case 1:
                inside[key] = copy.deepcopy(rng.choice(ODD))
            case 2:
                inside[key] = [inside[key]] * rng.choice((1, 2, 40))
            case 3:
                inside[key] = copy.deepcopy(other[its])
            case 4:
                inside[key] = {"type": "text", "text": inside[key]}
            case _ if isinstance(inside, dict):
                inside[rng.choice(("extra", "name", "type", "content", "id"))] = copy.deepcopy(rng.choice(ODD))
        if not found:
            break
    return found


@pytest.mark.parametrize("client", [1024], indirect=True)
@pytest.mark.parametrize("cases", [12, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("path", ANSWERED)
def test_changed_requests_are_answered_or_refused(client: httpx.Client, path: str, cases: int) -> None:
    rng, codes = random.Random(7), Counter[int]()
    sent = [*ANSWERED[path], *(changed(rng.choice(ANSWERED[path]), rng) for _ in range(cases))]
    for request in sent:
        reply = client.post(path, content=json.dumps(request), headers={"content-type": "application/json"})
        codes[reply.status_code] += 1
        assert reply.status_code in (200, 400, 404, 413), (request, reply.text)
        if reply.status_code == 200 and reply.headers["content-type"].startswith("text/event-stream"):
            assert not re.search(r'"(api_error|server_error|internal_error)"', reply.text), (request, reply.text)
        elif reply.status_code != 200:
            error = reply.json()["error"]
            assert error["message"] and error["type"], (request, reply.text)
    assert codes[200] > len(sent) // 5 and codes[400] > len(sent) // 5, codes  # both outcomes are well represented
