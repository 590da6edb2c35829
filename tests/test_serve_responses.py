"""OpenAI's Responses on the wire: items, events, the store, tools, schemas; without a client library."""

import json
from typing import Any

import httpx
import pytest

from finback.serve.errors import ApiError
from finback.serve.http import digests
from finback.serve.responses_store import ResponseStore
from tests.serving import KEY, OTHER, Scripted, served, small_tokenizer
from tests.test_serve_thinking import CALLS

pytestmark = pytest.mark.usefixtures("nothing_is_left")

PATH = "/v1/responses"
ASK: dict[str, Any] = {"model": "toy", "max_output_tokens": 600, "seed": 1, "input": "Hello"}
TOOLS = [
    {"type": "function", "name": "add", "description": None, "parameters": {"type": "object"}, "strict": False},
    {"type": "function", "name": "sing"},
]
# what Codex and others send in addition, unasked
UNASKED = {
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "x",
    "client_metadata": {"a": 1},
    "reasoning": {"summary": "auto"},
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "metadata": None,
}


def ask(client: httpx.Client, **request: Any) -> dict[str, Any]:
    response = client.post(PATH, json=ASK | request)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(client: httpx.Client, **request: Any) -> list[dict[str, Any]]:
    """The events of a stream, each under its own name, numbered from 0."""
    response = client.post(PATH, json=ASK | request | {"stream": True})
    assert response.status_code == 200, response.text
    found = []
    for frame in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}" and found[-1]["sequence_number"] == len(found) - 1
    return found


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The response as a client assembles it, with a check of the order of events and of the final response."""
    assert [e["type"] for e in events[:2]] == ["response.created", "response.in_progress"]
    assert all(events[0]["response"][n] is not None for n in ("id", "model", "created_at", "tools"))
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"
    response, items = events[-1]["response"], []
    assert response["id"] == events[0]["response"]["id"] and events[-1]["type"] == f"response.{response['status']}"
    texts: dict[str, str] = {}
    for event in events[2:-1]:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            items.append(event["item"])
            assert event["output_index"] == len(items) - 1 and event["item"]["status"] == "in_progress"
            texts = {}
            continue
        assert event["output_index"] == len(items) - 1
        if kind == "output_item.done":
            assert event["item"]["id"] == items[-1]["id"]
            items[-1] = event["item"]
            continue
        assert event["item_id"] == items[-1]["id"]
        name = kind.rpartition(".")[0]
        if kind.endswith(".delta"):
            texts[name] = texts.get(name, "") + event["delta"]
        elif kind.endswith(".done") and "part" not in event:
            field = next(n for n in ("text", "arguments", "input") if n in event)
            assert event[field] == texts.get(name, "")
    assert items == response["output"]
    return response


def both(client: httpx.Client, **request: Any) -> dict[str, Any]:
    """The response, which must be the same whole and streamed."""
    whole, streams = ask(client, **request), put_together(streamed(client, **request))
    for response in (whole, streams):
        usage = response.pop("usage")
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        for name in ("created_at", "completed_at"):
            response.pop(name)
        assert response.pop("id").startswith("resp_")
        for item in response["output"]:
            assert item.pop("id").startswith({"reasoning": "rs_", "message": "msg_"}.get(item["type"], ("fc_", "ctc_")))
            assert item.pop("call_id", "call_").startswith("call_")
    assert whole == streams
    return whole


def test_reasoning_text_and_calls_are_items(client: httpx.Client, engine: Scripted) -> None:
    engine.script = CALLS
    response = both(client, tools=TOOLS, instructions="Sing.", **UNASKED)
    reasoning, message, *calls = response["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "add"}]
    assert reasoning["summary"] == [{"type": "summary_text", "text": "add"}] and reasoning["encrypted_content"] is None
    assert message["content"] == [{"type": "output_text", "text": "I ask.", "annotations": [], "logprobs": []}]
    assert [(c["name"], c["arguments"], c["status"]) for c in calls] == [
        ("add", '{"a": 4, "b": 5}', "completed"),
        ("sing", '{"song": "鲸"}', "completed"),
    ]
    assert response["status"] == "completed" and response["tools"][1] == {"type": "function", "name": "sing"}
    # the next turn, with everything sent again
    first = ask(client, tools=TOOLS)
    outputs = [{"type": "function_call_output", "call_id": c["call_id"], "output": "9"} for c in first["output"][2:]]
    engine.script = "It is 9."
    again = [{"role": "user", "content": [{"type": "input_text", "text": "4+5?"}]}, *first["output"], *outputs]
    reply = ask(client, input=again, tools=TOOLS, store=False)
    assert reply["output"][0]["content"][0]["text"] == "It is 9."
    prompt = small_tokenizer().decode(engine.seen[-1].prompt)
    assert (
        prompt.index("<think>add</think>I ask.") < prompt.index("<｜tool▁output▁begin｜>9")
        and prompt.count("4+5?") == 1
    )
    # the same by reference, to the response and to its items
    seen = engine.seen[-1].prompt
    before = ask(client, input=[again[0], *first["output"]], tools=TOOLS, store=True)
    assert client.get(f"{PATH}/{before['id']}").json() == before
    referred = [
        again[0],
        *({"type": "item_reference", "id": i["id"]} for i in first["output"][:2]),
        *first["output"][2:],
    ]
    ask(client, input=[*referred, *outputs], tools=TOOLS)
    assert engine.seen[-1].prompt == seen
    engine.script = CALLS
    called = ask(client, input="4+5?", tools=TOOLS)
    outputs = [o | {"call_id": c["call_id"]} for o, c in zip(outputs, called["output"][2:], strict=True)]
    engine.script = "It is 9."
    last = ask(client, previous_response_id=called["id"], input=outputs, tools=TOOLS)
    assert engine.seen[-1].prompt == seen and last["previous_response_id"] == called["id"]
    listed = client.get(f"{PATH}/{last['id']}/input_items", params={"order": "asc"}).json()
    assert [i["type"] for i in listed["data"]] == [
        *("message", "reasoning", "message", "function_call", "function_call"),
        *("function_call_output",) * 2,
    ]
    assert client.delete(f"{PATH}/{last['id']}").json()["deleted"] is True
    assert client.get(f"{PATH}/{last['id']}").status_code == 404


def test_tools_and_a_schema_go_together(client: httpx.Client, engine: Scripted) -> None:
    closed = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
    closed["additionalProperties"] = False
    form = {"format": {"type": "json_schema", "name": "u", "schema": closed, "strict": True}}
    tools = [{"type": "function", "name": "now", "parameters": closed, "strict": True}]
    kinds = set()
    for seed in range(4):
        request = {
            "seed": seed,
            "tools": tools,
            "text": form,
            "reasoning": {"effort": "none"},
            "max_output_tokens": 400,
        }
        for item in both(client, **request)["output"]:
            kinds.add(item["type"])
            said = item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"]
            assert json.loads(said)["unit"] in ("C", "F")
    assert kinds == {"function_call", "message"}  # a model with random weights does both


def test_an_answer_that_breaks_off_is_incomplete(client: httpx.Client, engine: Scripted) -> None:
    engine.script = "one two three four five six"
    response = both(client, max_output_tokens=9)
    assert response["status"] == "incomplete" and response["incomplete_details"] == {"reason": "max_output_tokens"}
    engine.script = ""
    assert both(client)["output"][0]["content"][0]["text"] == ""
    ask(client, max_output_tokens=64_000)  # clamped to what fits


def test_tools_of_other_kinds(client: httpx.Client, engine: Scripted) -> None:
    space = {"type": "namespace", "name": "sea", "tools": [{"type": "function", "name": "add"}]}
    plain = {"type": "custom", "name": "sing", "format": {"type": "text"}}
    engine.script = CALLS.replace("add<", "sea__add<").replace('"song"', '"input"')
    first, second = both(client, tools=[space, plain, {"type": "web_search"}])["output"][2:]
    assert (first["namespace"], first["name"]) == ("sea", "add")
    assert (second["type"], second["name"], second["input"]) == ("custom_tool_call", "sing", "鲸")
    response = client.post(PATH, json=ASK | {"tools": [*TOOLS, {"type": "web_search"}]})
    assert "web_search" in response.headers["finback-note"]
    choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "sing"}]}
    ask(client, tools=TOOLS, tool_choice=choice)
    assert "add" not in small_tokenizer().decode(engine.seen[-1].prompt)


@pytest.mark.parametrize(
    ("request_", "status", "param"),
    [
        ({"input": None}, 400, "input"),
        ({"input": []}, 400, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            400,
            "input[0].content[0]",
        ),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]}, 400, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "rs_1"}]}, 404, "input[0].id"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, 400, "input[0]"),
        ({"previous_response_id": "resp_1"}, 404, "previous_response_id"),
        ({"model": "gpt-4"}, 404, "model"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type"),
        ({"tool_choice": {"type": "function", "name": "f"}}, 400, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, 400, "tool_choice.type"),
        ({"background": True}, 400, "background"),
        ({"prompt": {"id": "x"}}, 400, "prompt"),
        ({"conversation": "x"}, 400, "conversation"),
        ({"input": "1 " * 3000}, 400, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, 400, "text.format"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"$ref": "#"}}}},
            400,
            "text.format.schema",
        ),
    ],
)
def test_refusals_name_the_field_as_it_was_sent(
    client: httpx.Client, request_: dict[str, Any], status: int, param: str
) -> None:
    response = client.post(PATH, json=ASK | request_)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert error["param"].startswith(param) and error["type"] == "invalid_request_error"
    place: Any = ASK | request_
    for part in error["param"].replace("[", ".").replace("]", "").split("."):
        place = place[int(part)] if isinstance(place, list) else place.get(part, {})  # it exists, or is what is missing


def test_counting_and_what_is_not_to_be_had(client: httpx.Client, engine: Scripted) -> None:
    engine.script = "9"
    request = ASK | {"tools": TOOLS, "instructions": "Sing."}
    counted = client.post(f"{PATH}/input_tokens", json=request).json()
    assert not engine.seen
    response = client.post(PATH, json=request).json()
    assert counted == {"object": "response.input_tokens", "input_tokens": response["usage"]["input_tokens"]}
    assert client.post(f"{PATH}/{response['id']}/cancel").status_code == 400
    assert client.get(f"{PATH}/{response['id']}", params={"stream": "true"}).status_code == 400
    kept = ask(client, store=False)
    assert kept["store"] is False and client.get(f"{PATH}/{kept['id']}").status_code == 404


def test_a_failure_ends_a_stream_as_failed_and_keys_are_kept_apart() -> None:
    engine = Scripted("9", pace=0.01)
    with served(engine, keys=digests([KEY, OTHER])) as client:
        ident = ask(client)["id"]
        headers = {"authorization": f"Bearer {OTHER}"}
        assert client.get(f"{PATH}/{ident}", headers=headers).status_code == 404
        assert client.post(PATH, json=ASK | {"previous_response_id": ident}, headers=headers).status_code == 404
        engine.failing = RuntimeError("out of order")
        last = streamed(client)[-1]
        assert last["type"] == "response.failed" and last["response"]["error"]["code"] == "server_error"


def test_the_store_is_bounded_and_forgets() -> None:
    def response(number: int) -> dict[str, Any]:
        return {"id": f"resp_{number}", "output": [{"id": f"msg_{number}", "text": "x" * 100}]}

    store = ResponseStore(count=3)
    for number in range(5):
        store.put(b"me", response(number), [])
    assert [store.get(b"me", f"resp_{n}", "id").response["id"] for n in (2, 3, 4)] == ["resp_2", "resp_3", "resp_4"]
    assert store.item(b"me", "msg_4", "input")["id"] == "msg_4"
    for gone in (lambda: store.get(b"me", "resp_1", "id"), lambda: store.item(b"me", "msg_1", "input")):
        with pytest.raises(ApiError):
            gone()
    small = ResponseStore(size=400)
    for number in range(5):
        small.put(b"me", response(number), [])
    with pytest.raises(ApiError):
        small.get(b"me", "resp_1", "id")
    brief = ResponseStore(seconds=0.0)
    brief.put(b"me", response(0), [])
    with pytest.raises(ApiError):
        brief.get(b"me", "resp_0", "id")
