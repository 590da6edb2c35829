"""Anthropic's Messages on the wire: blocks, thinking, tools, events, counting; without a client library."""

import json
from typing import Any

import httpx
import pytest

from finback.serve.anthropic_form import MessagesRequest, translated
from finback.serve.anthropic_reply import InputGate
from finback.serve.http import digests
from tests.serving import KEY, Scripted, served, small_tokenizer
from tests.test_serve_thinking import CALLS

pytestmark = pytest.mark.usefixtures("nothing_is_left")

PATH = "/v1/messages"
ASK: dict[str, Any] = {"model": "toy", "max_tokens": 600, "seed": 1, "messages": [{"role": "user", "content": "Hello"}]}
TOOLS = [
    {"name": "add", "description": "Add.", "input_schema": {"type": "object", "$schema": "draft/2020-12"}},
    {"name": "sing", "input_schema": {"type": "object"}, "cache_control": {"type": "ephemeral"}},
]
USE = {"type": "tool_use", "id": "x", "name": "add", "input": None}
# what Claude Code sends in addition, unasked
UNASKED = {
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "output_config": {"effort": "high"},
    "thinking": {"type": "adaptive"},
    "metadata": {"user_id": '{"device": 1}'},
    "max_tokens": 64_000,
}


def ask(client: httpx.Client, **request: Any) -> dict[str, Any]:
    response = client.post(PATH, params={"beta": "true"}, json=ASK | request)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(client: httpx.Client, **request: Any) -> list[dict[str, Any]]:
    """The events of a stream, each under its own name."""
    response = client.post(PATH, json=ASK | request | {"stream": True})
    found = []
    for frame in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def put_together(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message as a client assembles it, with a check of the order of events."""
    assert events[0]["type"] == "message_start" and events[-1]["type"] == "message_stop"
    message, is_open = events[0]["message"], False
    assert message["content"] == [] and message["usage"]["output_tokens"] == 0
    inputs: dict[int, str] = {}
    for event in events[1:-1]:
        match event["type"]:
            case "content_block_start":
                assert event["index"] == len(message["content"]) and not is_open
                message["content"].append(event["content_block"])
                is_open = True
            case "content_block_delta":
                assert is_open and event["index"] == len(message["content"]) - 1
                for name, value in event["delta"].items():
                    if name == "partial_json":
                        inputs[event["index"]] = inputs.get(event["index"], "") + value
                    elif name != "type":
                        message["content"][-1][name] += value
            case "content_block_stop":
                assert is_open
                is_open = False
            case "message_delta":
                message |= event["delta"]
                message["usage"] |= event["usage"]
    assert not is_open
    for index, text in inputs.items():
        message["content"][index]["input"] = json.loads(text)
    return message


def both(client: httpx.Client, **request: Any) -> dict[str, Any]:
    """The message, which must be the same whole and streamed."""
    whole, streams = ask(client, **request), put_together(streamed(client, **request))
    for message in (whole, streams):
        usage, ident = message.pop("usage"), message.pop("id")
        assert ident.startswith("msg_")
        total = usage["input_tokens"] + usage["cache_read_input_tokens"] + usage["cache_creation_input_tokens"]
        assert total > 0 and usage["output_tokens"] > 0
        for block in message["content"]:
            assert block.pop("id", "call_").startswith("call_")
    assert whole == streams
    return whole


def test_thinking_text_and_calls_are_blocks(client: httpx.Client, engine: Scripted) -> None:
    engine.script = CALLS
    message = both(client, tools=TOOLS, system=[{"type": "text", "text": "x-anthropic-billing-header: 1"}], **UNASKED)
    thinking, text, *calls = message["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "add") and thinking["signature"]
    assert text == {"type": "text", "text": "I ask."}
    assert [(c["type"], c["name"], c["input"]) for c in calls] == [
        ("tool_use", "add", {"a": 4, "b": 5}),
        ("tool_use", "sing", {"song": "鲸"}),
    ]
    assert message["stop_reason"] == "tool_use" and message["stop_sequence"] is None
    assert engine.seen[0].sampling.max_tokens == 2048 - len(engine.seen[0].prompt)  # clamped, not refused
    assert "billing" not in small_tokenizer().decode(engine.seen[0].prompt)
    # the next turn: results, then the user's text, then a system message in between
    called = ask(client, tools=TOOLS)["content"]
    results = [{"type": "tool_result", "tool_use_id": c["id"], "content": "9"} for c in called[2:]]
    again = [
        *ASK["messages"],
        {"role": "assistant", "content": called},
        {"role": "user", "content": [{"type": "text", "text": "So?"}, *results]},
        {"role": "system", "content": "Be brief."},
    ]
    engine.script = "It is 9."
    assert ask(client, messages=again, tools=TOOLS)["content"] == [{"type": "text", "text": "It is 9."}]
    prompt = small_tokenizer().decode(engine.seen[-1].prompt)
    assert prompt.index("<｜tool▁output▁begin｜>9") < prompt.index("So?") and "Be brief." in prompt
    again[2]["content"] = results
    ask(client, messages=again, tools=TOOLS)
    assert "<think>add</think>" in small_tokenizer().decode(engine.seen[-1].prompt)


def test_an_answer_ends_for_a_reason(client: httpx.Client, engine: Scripted) -> None:
    engine.script = "<think>one two</think>\n\none two three"
    message = both(client, stop_sequences=["two"])  # the chain contains it too
    assert message["content"][1] == {"type": "text", "text": "one "}
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", "two")
    assert both(client, max_tokens=9)["stop_reason"] == "max_tokens"
    engine.script = ""
    assert both(client)["content"] == [{"type": "text", "text": ""}]
    engine.script = " nine"
    begun = [*ASK["messages"], {"role": "assistant", "content": "It is"}]
    assert both(client, messages=begun)["stop_reason"] == "end_turn"
    assert small_tokenizer().decode(engine.seen[-1].prompt).endswith("It is")


def test_thinking_is_switched_and_calls_are_demanded(client: httpx.Client, engine: Scripted) -> None:
    both(client, thinking={"type": "enabled", "budget_tokens": 5}, max_tokens=40)
    assert engine.seen[0].sampling.thinking_budget == 5 and engine.seen[0].thinking_tokens
    assert both(client, thinking={"type": "disabled"}, max_tokens=20)["content"][0]["type"] == "text"
    choice = {"type": "tool", "name": "now", "disable_parallel_tool_use": True}
    closed = {"type": "object", "properties": {"unit": {"enum": ["C", "F"]}}, "required": ["unit"]}
    tools = [*TOOLS, {"name": "now", "input_schema": closed | {"additionalProperties": False}}]
    message = both(client, tools=tools, tool_choice=choice, thinking={"type": "disabled"}, max_tokens=400)
    (call,) = message["content"]
    assert call["name"] == "now" and call["input"]["unit"] in ("C", "F") and message["stop_reason"] == "tool_use"
    schema = {"format": {"type": "json_schema", "schema": closed | {"additionalProperties": False}}}
    text = both(client, output_config=schema, thinking={"type": "disabled"}, max_tokens=400)["content"][0]["text"]
    assert json.loads(text)["unit"] in ("C", "F")


def test_tokens_are_counted_without_an_answer(client: httpx.Client, engine: Scripted) -> None:
    engine.script = "9"
    request = ASK | {"tools": TOOLS, "system": "Sing."}
    counted = client.post(f"{PATH}/count_tokens", json=request).json()
    assert not engine.seen
    usage = client.post(PATH, json=request).json()["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}


@pytest.mark.parametrize(
    ("request_", "status", "kind", "words"),
    [
        ({"model": "gpt-4"}, 404, "not_found_error", "no model"),
        ({"messages": []}, 400, "invalid_request_error", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, 400, "", "'image'"),
        ({"messages": [{"role": "user", "content": "1 " * 3000}]}, 400, "", "prompt is too long: "),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]}, 400, "", "[0]"),
        ({"max_tokens": 0}, 400, "", "max_tokens"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, 400, "", "web_search_20250305"),
        ({"tool_choice": {"type": "tool"}}, 400, "", "tool_choice"),
        ({"stop_sequences": [""]}, 400, "", "stop_sequences"),
        ({"mcp_servers": [{}]}, 400, "", "mcp_servers"),
        ({"messages": [{"role": "assistant", "content": [USE] * 129}, *ASK["messages"]]}, 400, "", "messages[0]"),
    ],
)
def test_refusals_have_anthropics_shape(
    client: httpx.Client, request_: dict[str, Any], status: int, kind: str, words: str
) -> None:
    response = client.post(PATH, json=ASK | request_)
    assert response.status_code == status, response.text
    error = response.json()
    assert set(error) == {"type", "error"} and error["type"] == "error"
    assert error["error"]["type"] == (kind or "invalid_request_error") and words in error["error"]["message"]
    assert response.headers["request-id"].startswith("req-") and response.headers["x-should-retry"] == "false"


def test_failures_come_in_anthropics_shape_too() -> None:
    engine = Scripted(pace=0.01)
    with served(engine, keys=digests([KEY])) as client:
        refused = client.post(PATH, json=ASK, headers={"authorization": "", "x-api-key": "wrong"})
        assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
        accepted = client.post(PATH, json=ASK | {"max_tokens": 2}, headers={"authorization": "", "x-api-key": KEY})
        assert accepted.status_code == 200
        assert client.get(PATH).json()["error"]["type"] == "invalid_request_error"
        engine.failing = RuntimeError("out of order")
        last = streamed(client)[-1]
        assert last["type"] == "error" and last["error"]["type"] == "overloaded_error"


def test_hosted_tools_are_left_out_with_a_note(client: httpx.Client, engine: Scripted) -> None:
    engine.script = "9"
    tools = [*TOOLS, {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}]
    response = client.post(PATH, json=ASK | {"tools": tools})
    assert response.status_code == 200 and "web_search" in response.headers["finback-note"]


def test_models_are_listed_for_both_worlds(client: httpx.Client) -> None:
    listed = client.get("/v1/models", params={"limit": 1000}).json()
    assert listed["has_more"] is False and listed["first_id"] == "toy" and listed["last_id"] == "toy-chat"
    assert {m["type"] for m in listed["data"]} == {"model"} == {m["object"] for m in listed["data"]}
    assert listed["data"][0]["created_at"].endswith("Z") and listed["data"][0]["thinking"] is True


def test_any_cut_lets_the_same_json_through() -> None:
    for text, sent in (
        ('{"a": [1, {"b": "x\\n"}], "c": nul', '{"a": [1, {"b": "x\\n"}], "c": nul'),
        ('{"a": -1.5e3}', '{"a": -1.5e3}'),
        ("a < b", "{}"),
        ("", "{}"),
        ("[1]", "{}"),
    ):
        for size in (1, 2, 100):
            gate = InputGate()
            pieces = [gate.push(text[i : i + size]) for i in range(0, len(text), size)]
            assert "".join(pieces) + gate.end() == sent


def test_turns_without_words_say_nothing() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": []}, {"role": "user", "content": "b"}]
    found = translated(MessagesRequest(model="toy", max_tokens=1, messages=turns))
    assert [m.content for m in found.messages] == ["a", "b"] and found.places == ["messages[0]", "messages[2]"]
