"""The openai package against a real server, used as its users use it."""

import json
from collections.abc import Iterator

import openai
import pytest

from finback.serve.http import digests
from tests.serving import KEY, Scripted, served
from tests.test_serve_thinking import CALLS, TOOLS


@pytest.fixture(scope="module")
def client(engine: Scripted) -> Iterator[openai.OpenAI]:
    with (
        served(engine, keys=digests([KEY])) as raw,
        openai.OpenAI(
            base_url=f"{raw.base_url}v1" if str(raw.base_url).endswith("/") else f"{raw.base_url}/v1", api_key=KEY
        ) as client,
    ):
        yield client


HELLO = [{"role": "user", "content": "Hello"}]


def test_chat(client: openai.OpenAI, engine: Scripted) -> None:
    engine.script = "<think>4+5=9</think>It is 9."
    reply = client.chat.completions.create(
        model="toy", messages=HELLO, max_tokens=64, logprobs=True, top_logprobs=2, extra_body={"top_k": 5}
    )
    (choice,) = reply.choices
    assert choice.message.content == "It is 9." and choice.finish_reason == "stop"
    assert choice.message.reasoning_content == "4+5=9"
    assert reply.usage.completion_tokens_details.reasoning_tokens > 0 and reply.timings["predicted_n"] > 0
    assert len(choice.logprobs.content[0].top_logprobs) == 2


def test_stream(client: openai.OpenAI, engine: Scripted) -> None:
    engine.script = "<think>4+5=9</think>It is 9."
    stream = client.chat.completions.create(
        model="toy", messages=HELLO, max_tokens=64, stream=True, stream_options={"include_usage": True}
    )
    chain, text, usage = "", "", None
    for chunk in stream:
        for choice in chunk.choices:
            chain += getattr(choice.delta, "reasoning_content", None) or ""
            text += choice.delta.content or ""
        usage = chunk.usage or usage
    assert (chain, text) == ("4+5=9", "It is 9.") and usage.total_tokens > 0
    with client.chat.completions.stream(model="toy", messages=HELLO, max_tokens=64, logprobs=True) as events:
        assert events.get_final_completion().choices[0].message.content == "It is 9."


def test_tools(client: openai.OpenAI, engine: Scripted) -> None:
    engine.script = CALLS
    with client.chat.completions.stream(model="toy", messages=HELLO, max_tokens=600, tools=TOOLS) as events:
        choice = events.get_final_completion().choices[0]
    assert choice.finish_reason == "tool_calls"
    assert [c.function.name for c in choice.message.tool_calls] == ["add", "sing"]
    assert choice.message.tool_calls[0].function.arguments == '{"a": 4, "b": 5}'
    again = [*HELLO, choice.message.model_dump(exclude_none=True)]
    again += [{"role": "tool", "tool_call_id": c.id, "content": "9"} for c in choice.message.tool_calls]
    engine.script = "It is 9."
    reply = client.chat.completions.create(model="toy", messages=again, max_tokens=64, tools=TOOLS)
    assert reply.choices[0].message.content == "It is 9."


def test_calls_that_must_be_made(client: openai.OpenAI, engine: Scripted) -> None:
    engine.script = None
    schema = {
        "type": "object",
        "properties": {"unit": {"enum": ["C", "F"]}},
        "required": ["unit"],
        "additionalProperties": False,
    }
    tools = [*TOOLS, {"type": "function", "function": {"name": "now", "parameters": schema, "strict": True}}]
    request = {
        "model": "toy",
        "messages": HELLO,
        "max_tokens": 400,
        "seed": 1,
        "tools": tools,
        "tool_choice": {"type": "function", "function": {"name": "now"}},
        "extra_body": {"thinking_budget": 9},
    }
    choice = client.chat.completions.create(**request).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and call.function.name == "now"
    assert json.loads(call.function.arguments)["unit"] in ("C", "F")
    with client.chat.completions.stream(**request) as events:
        kinds = {event.type for event in events}
        same = events.get_final_completion().choices[0]
    assert "tool_calls.function.arguments.delta" in kinds and same.finish_reason == "tool_calls"
    assert same.message.tool_calls[0].function.arguments == call.function.arguments
    assert same.message.tool_calls[0].function.parsed_arguments == json.loads(call.function.arguments)
    tools[:2] = []
    choice = client.chat.completions.create(**request | {"tool_choice": "required"}).choices[0]
    assert {call.function.name for call in choice.message.tool_calls} == {"now"}
    with pytest.raises(openai.BadRequestError) as bad:
        wrong = {"type": "function", "function": {"name": "later"}}
        client.chat.completions.create(**request | {"tool_choice": wrong})
    assert bad.value.param == "tool_choice.function.name"


def test_json_schema(client: openai.OpenAI, engine: Scripted) -> None:
    engine.script = None
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["n"]}
    reply = client.chat.completions.create(
        model="toy",
        messages=HELLO,
        max_tokens=40,
        seed=1,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )
    assert reply.choices[0].message.content.lstrip()[:1] in ("{", "")


def test_completions(client: openai.OpenAI, engine: Scripted) -> None:
    engine.script = None
    reply = client.completions.create(model="toy", prompt="The whale", max_tokens=4, logprobs=2, echo=True, seed=1)
    choice = reply.choices[0]
    assert choice.text.startswith("The whale") and choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs) == len(choice.logprobs.text_offset)
    text = "".join(
        c.choices[0].text
        for c in client.completions.create(model="toy", prompt="The whale", max_tokens=4, seed=1, stream=True)
    )
    assert "The whale" + text == choice.text


def test_errors_are_raised_as_what_they_are(client: openai.OpenAI, engine: Scripted) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="toy", messages=[])
    assert bad.value.param == "messages" and bad.value.code == "invalid_value"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    engine.failing, engine.pace = RuntimeError("out of order"), 0.05
    with pytest.raises(openai.APIError) as failed:
        list(client.chat.completions.create(model="toy", messages=HELLO, max_tokens=64, stream=True))
    assert failed.value.code == "engine_failed"
    engine.failing, engine.pace = None, 0.0


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["toy"] and client.models.retrieve("toy").id == "toy"
