"""Calls that a request requires: a model with random weights makes them, in every form, and nothing else."""

import copy
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from llguidance import LLMatcher, LLTokenizer

from finback.data.prompt_forms import FORMS
from finback.data.tokenizer import THINK, Tokenizer
from finback.data.tools import ToolCall
from finback.serve.parser import Parser
from finback.serve.protocol import ChatRequest
from finback.serve.tool_calls import ToolForm
from finback.serve.tool_choice import form_of, tool_grammar
from tests.serving import CHAT, HELLO, Scripted, served, small_tokenizer, streamed, summed
from tests.test_messages import END_CALL, QWEN3, R1, TOOL_MARKS, V31

pytestmark = pytest.mark.usefixtures("nothing_is_left")

ODD = "</tool_call>" + END_CALL  # markup that is plain text here
PLACE = {
    "type": "object",
    "required": ["n", "at"],
    "additionalProperties": False,
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "at": {"enum": ["sea", ODD]}},
}
TOOLS = [
    {"type": "function", "function": {"name": "place", "description": "Place // it.", "parameters": PLACE}},
    {"type": "function", "function": {"name": "function"}},
]
PLAIN = "{% for m in messages %}{{ m.content }}{% endfor %}{% if tools %}{{ tools | length }}{% endif %}"
MARKED = (*TOOL_MARKS, "<tool_call>", "</tool_call>")

# the template, the special tokens, and the resulting form
MODELS: dict[str, tuple[str | None, tuple[str, ...], ToolForm]] = {
    "own": (None, (), ToolForm.V31),
    "own, with marks": (None, MARKED, ToolForm.V31),
    "V3 and R1": (R1, MARKED, ToolForm.V3),
    "V3.1": (V31, MARKED, ToolForm.V31),
    "Qwen": (QWEN3, MARKED, ToolForm.QWEN),
    "Qwen, without marks": (QWEN3, (), ToolForm.QWEN),
    "unknown, with marks": (PLAIN, MARKED, ToolForm.V31),
    "unknown": (PLAIN, (), ToolForm.QWEN),
}


def words(template: str | None, marks: tuple[str, ...], folder: Path) -> Tokenizer:
    """The small tokenizer with these special tokens and this template."""
    state = json.loads(small_tokenizer().as_json())
    last = state["added_tokens"][-1]
    state["added_tokens"] += [{**last, "id": last["id"] + 1 + i, "content": mark} for i, mark in enumerate(marks)]
    (folder / "tokenizer.json").write_text(json.dumps(state))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return Tokenizer(folder)


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def ask(client: httpx.Client, **request: Any) -> dict[str, Any]:
    """The choice, without thinking unless the request asks for it."""
    quiet = {"thinking": {"type": "disabled"}, "max_tokens": 800, "tools": TOOLS, "tool_choice": "required"}
    response = client.post(CHAT, json=HELLO | quiet | request)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def checked(choice: dict[str, Any]) -> list[str]:
    """The names of an answer's calls, which must be all of it, with arguments that fit their schemas."""
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    calls = [call["function"] for call in choice["message"]["tool_calls"]]
    for call in calls:
        arguments = json.loads(call["arguments"])
        if call["name"] == "function":
            assert arguments == {}
        else:
            assert set(arguments) == {"n", "at"} and 0 <= arguments["n"] <= 99
            assert arguments["at"] in ("sea", ODD)
    assert len({call["id"] for call in choice["message"]["tool_calls"]}) == len(calls) > 0
    return [call["name"] for call in calls]


WRITTEN = {"v3.2": ToolForm.V32, "v4": ToolForm.V4, "v4-april": ToolForm.V4, "v4.1": ToolForm.V41}
SAIL = {
    "type": "object",
    "required": ["to", "days"],
    "properties": {
        "to": {"type": "string", "description": "where"},
        "days": {"$ref": "#/$defs/days"},
        "rig": {"enum": ["sloop", "ketch"]},
        "crew": {"type": "array", "items": {"type": "string"}},
    },
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}


@pytest.mark.parametrize("form", WRITTEN)
def test_demanded_calls_in_dsml_are_as_the_form_writes_them(form: str) -> None:
    """Accepts calls that fit the schemas, reads them back unchanged, rejects others; `now` takes nothing, `any` all."""
    own = copy.copy(small_tokenizer())  # shared with other tests
    own.form = form
    functions = [("sail", SAIL), ("now", None), ("any", {"type": "object"})]
    tools = [{"type": "function", "function": {"name": n, "parameters": p} if p else {"name": n}} for n, p in functions]
    asked = ChatRequest.model_validate(HELLO | {"tools": tools, "tool_choice": "required"})
    found = tool_grammar(asked, own, True, None)
    assert found.form is WRITTEN[form] and found.grammar is not None
    byte = LLTokenizer("byte")

    def taken(*calls: tuple[str, dict[str, Any]]) -> bool:
        made = [ToolCall(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
        text = "".join(FORMS[form].calls(made))
        matcher = LLMatcher(byte, found.grammar, log_level=0)
        ids = byte.tokenize_str(text)
        fits = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
        if fits:
            parser = Parser(False, True, found.form, constrained=True)
            parser.push(text)
            parser.end()
            assert [(c.name, json.loads(c.arguments)) for c in parser.calls] == list(calls)
        return fits

    sail = {"to": '</ｐ>\nthe "sea" <｜DSM', "days": 3}
    assert taken(("sail", sail)) and taken(
        ("sail", {**sail, "rig": "ketch", "crew": ["é", "b"]}), ("now", {}), ("sail", sail)
    )
    assert taken(("any", {})) and taken(("any", {"a": 1, "b": "c", "d": [{"e": None}]}))
    assert not taken(("sail", {"to": "sea"})) and not taken(("sail", {**sail, "days": 10}))
    assert not taken(("sail", {**sail, "rig": "brig"})) and not taken(("sail", {"days": 3, "to": "sea"}))
    assert not taken(("now", {"a": 1})) and not taken(("then", {})) and not taken()
    exotic = {"anyOf": [{"type": "object", "required": ["a"]}, {"type": "object", "required": ["b"]}]}
    tools[0]["function"]["parameters"] = exotic
    asked = ChatRequest.model_validate(HELLO | {"tools": tools, "tool_choice": "required"})
    assert tool_grammar(asked, own, True, None).form is ToolForm.V31


@pytest.mark.parametrize("name", MODELS)
def test_the_form_is_the_models_own(name: str, tmp_path: Path) -> None:
    template, marks, form = MODELS[name]
    assert form_of(words(template, marks, tmp_path)) is form


@pytest.mark.parametrize("name", ["own", "V3 and R1", "V3.1", "Qwen"])
def test_calls_are_made_and_nothing_else(name: str, tmp_path: Path) -> None:
    template, marks, form = MODELS[name]
    own = words(template, marks, tmp_path)
    engine = Scripted(words=own)
    # in Qwen's form eos ends the calls
    even = {"temperature": 2, "logit_bias": {str(own.eos): 2}}
    with served(engine) as client:
        found = [checked(ask(client, seed=seed, **even)) for seed in range(6)]
        assert {len(called) > 1 for called in found} == {True, False}
        assert {called for calls in found for called in calls} == {"place", "function"}
        for request, called in zip(engine.seen, found, strict=True):
            alone = Parser(False, True, form, constrained=True)
            alone.push(own.decode(request.tokens))
            alone.end()
            assert [call.name for call in alone.calls] == called
            # markup is a token if the vocabulary has it
            ids = {own.encode_marked(mark)[0] for mark in marks}
            assert bool(marks) == bool(ids & set(request.tokens))
        seed = next(i for i, called in enumerate(found) if len(called) > 1)
        assert checked(ask(client, seed=seed, parallel_tool_calls=False, **even)) == found[seed][:1]
        for wanted in ("place", "function"):
            assert checked(ask(client, seed=seed, tool_choice=named(wanted))) == [wanted]


def test_a_stream_says_what_a_reply_says(client: httpx.Client) -> None:
    for seed in range(3):
        request = {"seed": seed, "max_tokens": 800, "tools": TOOLS, "tool_choice": "required"}
        choice = ask(client, **request, thinking=None)
        message = choice["message"] | {"finish_reason": "tool_calls"}
        calls = [call.pop("function") | call for call in message.pop("tool_calls")]
        summary = summed(streamed(client, **HELLO | request))
        streams = [call | {"type": "function", "id": ""} for call in summary.pop("tool_calls")]
        assert streams == [call | {"id": ""} for call in calls]
        assert summary | {"content": summary["content"] or None} == message


def test_the_chain_is_free_and_comes_first(tmp_path: Path) -> None:
    engine = Scripted(words=words(R1, MARKED, tmp_path))
    with served(engine) as client:
        for seed in range(4):
            choice = ask(client, seed=seed, thinking={"type": "enabled"}, thinking_budget=30)
            assert choice["message"]["reasoning_content"] and checked(choice)


def test_each_choice_makes_its_own_calls(client: httpx.Client) -> None:
    request = HELLO | {"n": 3, "max_tokens": 800, "tools": TOOLS, "tool_choice": named("place")}
    choices = client.post(CHAT, json=request).json()["choices"]
    assert [checked(choice) for choice in choices] == [["place"]] * 3
    assert len({choice["message"]["tool_calls"][0]["function"]["arguments"] for choice in choices}) == 3


def test_a_call_that_breaks_off_is_not_told_as_a_whole_one(client: httpx.Client) -> None:
    whole = ask(client, tool_choice=named("place"))["message"]["tool_calls"][0]["function"]["arguments"]
    for length in (1, 5, 40, 60, 80):
        choice = ask(client, max_tokens=length, tool_choice=named("place"))
        assert choice["finish_reason"] == "length"
        calls = choice["message"].get("tool_calls", [])
        assert all(whole.startswith(call["function"]["arguments"]) for call in calls)
    assert calls, "80 tokens must contain a part of a call"
    choice = ask(client, stop='"at"', tool_choice=named("place"))
    assert choice["finish_reason"] == "stop" and choice["message"]["tool_calls"]
    assert checked(ask(client, stop=END_CALL, tool_choice=named("function"))) == ["function"]


def test_a_demand_leaves_nothing_for_a_json_answer(client: httpx.Client) -> None:
    assert checked(ask(client, response_format={"type": "json_object"}))


def test_one_call_at_most_also_where_none_is_demanded(client: httpx.Client, engine: Scripted) -> None:
    from tests.test_serve_thinking import CALLS

    engine.script = CALLS
    request = {"tool_choice": "auto", "parallel_tool_calls": False, "thinking": None}
    message = ask(client, **request)["message"]
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["add"]
    assert (message["content"], message["reasoning_content"]) == ("I ask.", "add")
    calls = summed(streamed(client, **HELLO | {"max_tokens": 800, "tools": TOOLS} | request))["tool_calls"]
    assert [call["arguments"] for call in calls] == ['{"a": 4, "b": 5}']


def test_arguments_are_objects_whatever_a_schema_leaves_open(client: httpx.Client) -> None:
    tight = {"maxProperties": 0}
    for parameters in (tight, {"$ref": "#/$defs/a", "$defs": {"a": tight}}, {"type": ["null", "object"]} | tight):
        tools = [{"type": "function", "function": {"name": "ARGUMENTS", "parameters": parameters}}]
        choice = ask(client, tools=tools)
        assert {call["function"]["name"] for call in choice["message"]["tool_calls"]} == {"ARGUMENTS"}
        assert all(json.loads(c["function"]["arguments"]) == {} for c in choice["message"]["tool_calls"])


def test_a_model_that_is_told_not_to_think_calls_at_once(client: httpx.Client, engine: Scripted) -> None:
    think = small_tokenizer().ids[THINK]
    checked(ask(client, logit_bias={str(think): 100}))
    assert think not in engine.seen[-1].tokens
