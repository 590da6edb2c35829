"""Chains of thought, calls and JSON answers on the wire."""

import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest

from finback.data.tokenizer import END_THINK, THINK
from finback.serve.http import digests
from tests.serving import CHAT, HELLO, KEY, OTHER, Scripted, events, served, small_tokenizer, streamed, summed, wait_for

pytestmark = pytest.mark.usefixtures("nothing_is_left")

CHAIN = "<think>4+5=9</think>It is 9."


def ask(client: httpx.Client, **request: Any) -> dict[str, Any]:
    response = client.post(CHAT, json=HELLO | request)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize(
    ("field", "names", "content"),
    [
        ("both", ("reasoning_content", "reasoning"), "It is 9."),
        ("deepseek", ("reasoning_content",), "It is 9."),
        ("openrouter", ("reasoning",), "It is 9."),
        ("inline", (), CHAIN),
        ("none", (), "It is 9."),
    ],
)
def test_the_chain_is_shown_as_configured(field: str, names: tuple[str, ...], content: str) -> None:
    with served(Scripted(CHAIN), reasoning=field) as client:
        message = ask(client, max_tokens=64)["choices"][0]["message"]
        assert message == {"role": "assistant", "content": content} | dict.fromkeys(names, "4+5=9")
        assert summed(streamed(client, **HELLO | {"max_tokens": 64})) == message | {"finish_reason": "stop"}


def test_tokens_of_the_chain_are_counted(client: httpx.Client, engine: Scripted) -> None:
    engine.script = CHAIN
    usage = ask(client, max_tokens=64)["usage"]
    chain = len(small_tokenizer().encode_marked("<think>4+5=9</think>"))
    assert usage["completion_tokens_details"]["reasoning_tokens"] == chain


@pytest.mark.parametrize(
    ("request_", "share"),
    [
        ({"reasoning_effort": "low"}, 8),
        ({"reasoning_effort": "medium"}, 16),
        ({"reasoning_effort": "high"}, 32),
        ({"reasoning_effort": "max"}, None),
        ({"reasoning_effort": "low", "thinking_budget": 3}, 3),
        ({"thinking": {"type": "enabled", "budget_tokens": 5}}, 5),
        ({}, None),
    ],
)
def test_effort_bounds_the_chain(
    client: httpx.Client, engine: Scripted, request_: dict[str, Any], share: int | None
) -> None:
    ask(client, max_tokens=64, ignore_eos=True, **request_)
    (request,) = engine.seen
    assert request.sampling.thinking_budget == share
    if share and request.thinking_tokens:
        assert request.thinking_tokens <= share + 1


@pytest.mark.parametrize(
    "request_",
    [
        {"thinking": {"type": "disabled"}},
        {"reasoning_effort": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"chat_template_kwargs": {"thinking": False}},
        {"thinking": {"type": "disabled"}, "reasoning_effort": "high"},
        {"thinking_budget": 0},
        {"thinking": {"type": "enabled", "budget_tokens": 0}},
    ],
)
def test_thinking_can_be_switched_off(client: httpx.Client, engine: Scripted, request_: dict[str, Any]) -> None:
    think = small_tokenizer().ids[THINK]
    close = small_tokenizer().ids[END_THINK]
    message = ask(client, logit_bias={str(think): 100, str(close): 99}, **request_)["choices"][0]["message"]
    assert "reasoning_content" not in message
    assert THINK not in message["content"] and END_THINK not in message["content"]
    assert (think, -math.inf) in engine.seen[0].sampling.logit_bias


def test_a_chain_can_be_closed_while_it_runs(engine: Scripted) -> None:
    slow = Scripted()
    slow.hold_at = 20
    with served(slow, keys=digests([KEY, OTHER])) as client:
        request = HELLO | {"stream": True, "max_tokens": 400, "ignore_eos": True, "thinking": {"type": "enabled"}}
        with client.stream("POST", CHAT, json=request) as response:
            lines = response.iter_lines()
            ident = events(iter([next(lines)]))[0]["id"]
            path = f"{CHAT}/{ident}/control"
            wait_for(lambda: slow.seen and slow.seen[0].thinking and slow.seen[0].tokens)
            other = client.post(path, json={"action": "answer_now"}, headers={"authorization": f"Bearer {OTHER}"})
            assert other.status_code == 404
            assert client.post(path, json={"action": "sing"}).status_code == 400
            assert slow.seen[0].thinking
            assert client.post(path, json={"action": "answer_now"}).json()["id"] == ident
            slow.hold_at = None
            wait_for(lambda: not slow.seen[0].thinking)
        wait_for(lambda: not slow.busy)
        assert client.post(path, json={"action": "answer_now"}).status_code == 404


CALLS = (
    "<think>add</think>I ask.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>"
    '{"a": 4, "b": 5}<｜tool▁call▁end｜><｜tool▁call▁begin｜>sing<｜tool▁sep｜>{"song": "鲸"}<｜tool▁call▁end｜>'
    "<｜tool▁calls▁end｜>"
)
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "sing", "description": "Sing."}},
]


def test_calls_are_told_apart_and_streamed(client: httpx.Client, engine: Scripted) -> None:
    engine.script = CALLS
    choice = ask(client, tools=TOOLS, max_tokens=600)["choices"][0]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls"
    assert (message["content"], message["reasoning_content"]) == ("I ask.", "add")
    called = [c["function"] for c in message["tool_calls"]]
    assert called == [{"name": "add", "arguments": '{"a": 4, "b": 5}'}, {"name": "sing", "arguments": '{"song": "鲸"}'}]
    assert len({c["id"] for c in message["tool_calls"]}) == 2
    chunks = streamed(client, **HELLO | {"tools": TOOLS, "max_tokens": 600})
    summary = summed(chunks)
    assert summary["finish_reason"] == "tool_calls" and summary["content"] == "I ask."
    assert [{"name": c["name"], "arguments": c["arguments"]} for c in summary["tool_calls"]] == called
    calls = [c for k in chunks[:-1] for c in k["choices"][0]["delta"].get("tool_calls", [])]
    assert [c["index"] for c in calls if "id" in c] == [0, 1]  # id and name once each
    assert len(calls) > 4 and all(set(c["function"]) == {"arguments"} for c in calls if "id" not in c)
    results = [
        {"role": "user", "content": "?"},
        {"role": "assistant", **{k: v for k, v in message.items() if k != "role"}},
        *({"role": "tool", "tool_call_id": c["id"], "content": "9"} for c in message["tool_calls"]),
    ]
    engine.script = "It is 9."
    assert ask(client, messages=results, tools=TOOLS)["choices"][0]["finish_reason"] in ("stop", "length")
    prompt = small_tokenizer().decode(engine.seen[-1].prompt)
    assert "<think>add</think>" in prompt  # a model that has called gets its chain back


def test_without_tools_marks_are_text(client: httpx.Client, engine: Scripted) -> None:
    engine.script = CALLS
    for request in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        message = ask(client, max_tokens=600, **request)["choices"][0]["message"]
        assert "tool_calls" not in message and "sing" in message["content"]


@pytest.mark.parametrize("effort", [None, "none", "max"])
def test_an_answer_follows_its_schema(client: httpx.Client, effort: str | None) -> None:
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": ["yes", "no"]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    formats = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
    more = {"reasoning_effort": effort, "thinking_budget": 10} if effort else {}
    choice = ask(client, response_format=formats, max_tokens=400, temperature=0.2, **more)["choices"][0]
    if choice["finish_reason"] == "stop":
        assert json.loads(choice["message"]["content"])["answer"] in ("yes", "no")
    else:  # endless white space is also allowed
        assert choice["message"]["content"].split()[:1] in (["{"], [])
    text = ask(client, response_format={"type": "json_object"}, max_tokens=9)["choices"][0]["message"]["content"]
    assert text.lstrip().startswith("{") or not text.strip()


def test_a_hidden_chain_is_kept_alive_too() -> None:
    slow = Scripted("<think>4+5=9 4+5=9</think>9", pace=0.05)
    with served(slow, keep_alive=0.02, reasoning="none") as client:
        assert ": keep-alive" in streamed(client, **HELLO | {"max_tokens": 64})


def test_stop_looks_at_the_answer_and_not_at_the_chain(client: httpx.Client, engine: Scripted) -> None:
    engine.script = "<think>one two\n three</think>\n\none two three"
    for stop, content in (("two", "one "), ("\n", "one two three"), (["three", "chain"], "one two ")):
        choice = ask(client, stop=stop, max_tokens=90)["choices"][0]
        assert (choice["message"]["reasoning_content"], choice["message"]["content"]) == ("one two\n three", content)
        assert choice["finish_reason"] == "stop"
        assert summed(streamed(client, **HELLO | {"stop": stop, "max_tokens": 90}))["content"] == content


def test_a_chain_that_is_begun_or_whose_opening_is_missing(client: httpx.Client, engine: Scripted) -> None:
    engine.script = "4+5=9</think>It is 9."
    user = {"role": "user", "content": "4+5?"}
    for begun in ("<think>\n", "<think>", " \n<think>"):
        messages = [user, {"role": "assistant", "content": begun, "prefix": True}]
        message = ask(client, messages=messages, max_tokens=90)["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("4+5=9", "It is 9.")
        assert small_tokenizer().decode(engine.seen[-1].prompt).endswith(THINK)
    engine.script = " So it is 9."
    messages = [user, {"role": "assistant", "content": "<think>\n4+5=9\n</think>\nI see:", "prefix": True}]
    assert ask(client, messages=messages, max_tokens=90)["choices"][0]["message"]["content"] == " So it is 9."
    assert small_tokenizer().decode(engine.seen[-1].prompt).endswith("<think>4+5=9</think>I see:")
    for parser, said in (("deepseek_r1", ("4+5=9", "It is 9.")), ("none", (None, "4+5=9</think>It is 9."))):
        with served(Scripted("4+5=9</think>It is 9."), reasoning_parser=parser) as other:
            message = ask(other, max_tokens=90)["choices"][0]["message"]
            assert (message.get("reasoning_content"), message["content"]) == said


def test_a_model_without_a_mark_answers_without_a_chain(tmp_path: Path) -> None:
    from tests.test_serve_tool_choice import PLAIN, words

    plain = words(PLAIN, (), tmp_path)
    plain.ids.pop(THINK), plain.ids.pop(END_THINK)
    with served(Scripted(words=plain)) as client:
        reply = client.post(CHAT, json=HELLO | {"thinking": {"type": "enabled"}})
        assert reply.status_code == 200 and "no token" in reply.json()["notes"][0] and reply.headers["finback-note"]
        assert client.get("/v1/models/toy").json()["thinking"] is False
        assert "notes" not in client.post(CHAT, json=HELLO).json()


CLOSED = {
    "type": "object",
    "properties": {"a": {"type": "string", "format": "cuid2", "maxLength": 3}},
    "required": ["a"],
}


@pytest.mark.parametrize(
    "request_",
    [
        {"response_format": {"type": "json_object", "schema": CLOSED | {"additionalProperties": False}}},
        {"response_format": {"type": "json_schema", "schema": CLOSED | {"additionalProperties": False}}},
        {"guided_json": json.dumps(CLOSED | {"additionalProperties": False})},
        {"structured_outputs": {"json": CLOSED | {"additionalProperties": False}}},
        {"json_schema": CLOSED | {"additionalProperties": False, "not": {"required": ["b"]}}},
        {"guided_choice": ['{"a":"x"}']},
        {"guided_regex": r'\{"a":"[a-z]/"\}'},
        {"structured_outputs": {"grammar": 'start: "{" "\\"a\\":" "\\"b\\"" "}"'}},
        {"grammar": 'root ::= "{" "\\"a\\":\\"" [a-z] "\\"}"'},
    ],
)
def test_an_answer_is_bound_in_anybodys_words(client: httpx.Client, request_: dict[str, Any]) -> None:
    for seed in range(2):
        choice = ask(client, seed=seed, max_tokens=90, thinking={"type": "disabled"}, **request_)["choices"][0]
        assert choice["finish_reason"] == "stop" and set(json.loads(choice["message"]["content"])) == {"a"}
        assert "\n" not in choice["message"]["content"]


def test_a_grammar_that_leads_nowhere_is_an_error_and_no_stop(client: httpx.Client, engine: Scripted) -> None:
    """`a` is possible at first, but then no token can follow."""
    dead = {"type": "object", "properties": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}}, "required": ["a"]}
    schema = dead | {"additionalProperties": False, "$defs": {"b": {"anyOf": [{"$ref": "#/$defs/b"}]}}}
    response = client.post(
        CHAT, json=HELLO | {"guided_json": schema, "max_tokens": 30, "thinking": {"type": "disabled"}}
    )
    assert response.status_code == 400 and response.json()["error"]["param"] == "guided_json"
    strict = {"name": "a", "strict": True, "schema": CLOSED | {"not": {}}}
    refused = client.post(CHAT, json=HELLO | {"response_format": {"type": "json_schema", "json_schema": strict}})
    assert refused.status_code == 400 and "#/not" in refused.json()["error"]["message"]
