"""V4's prompts and calls on the wire: the chain of a turn with calls returns in the next request, in each protocol."""

import copy
import json
from typing import Any

import httpx
import pytest

from finback.data.tokenizer import ASSISTANT, END_THINK, EOS, THINK, USER, Tokenizer
from tests.serving import CHAT, Scripted, served, small_tokenizer

pytestmark = pytest.mark.usefixtures("nothing_is_left")

CALL = (
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="add">\n<｜DSML｜parameter name="a" string="false">4</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
SAID = f"r{END_THINK}t{CALL}"
KEPT = f"q{ASSISTANT}{THINK}{SAID}{EOS}{USER}<tool_result>9</tool_result>{ASSISTANT}{THINK}"
PARAMETERS = {"type": "object", "properties": {"a": {"type": "integer"}}}
USER_SAYS = {"role": "user", "content": "q"}


def words(form: str) -> Tokenizer:
    found = copy.copy(small_tokenizer())  # shared with other tests
    found.form = form
    return found


def chat(client: httpx.Client) -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": PARAMETERS}}]
    asked: dict[str, Any] = {"messages": [USER_SAYS], "tools": tools, "reasoning_effort": "low", "max_tokens": 400}
    message = client.post(CHAT, json=asked).json()["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("r", "t")
    assert message["tool_calls"][0]["function"] == {"name": "add", "arguments": '{"a": 4}'}
    result = {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "9"}
    client.post(CHAT, json=asked | {"messages": [USER_SAYS, message, result]}).raise_for_status()


def messages(client: httpx.Client) -> None:
    tools = [{"name": "add", "input_schema": PARAMETERS}]
    asked: dict[str, Any] = {"model": "toy", "messages": [USER_SAYS], "tools": tools, "max_tokens": 400}
    asked["output_config"] = {"effort": "low"}
    content = client.post("/v1/messages", json=asked).json()["content"]
    assert [block["type"] for block in content] == ["thinking", "text", "tool_use"] and content[2]["input"] == {"a": 4}
    result = {"type": "tool_result", "tool_use_id": content[2]["id"], "content": "9"}
    turns = [USER_SAYS, {"role": "assistant", "content": content}, {"role": "user", "content": [result]}]
    client.post("/v1/messages", json=asked | {"messages": turns}).raise_for_status()


def responses(client: httpx.Client) -> None:
    tools = [{"type": "function", "name": "add", "parameters": PARAMETERS}]
    asked: dict[str, Any] = {
        "input": [USER_SAYS],
        "tools": tools,
        "reasoning": {"effort": "low"},
        "max_output_tokens": 400,
    }
    output = client.post("/v1/responses", json=asked).json()["output"]
    assert [item["type"] for item in output] == ["reasoning", "message", "function_call"]
    result = {"type": "function_call_output", "call_id": output[2]["call_id"], "output": "9"}
    client.post("/v1/responses", json=asked | {"input": [USER_SAYS, *output, result]}).raise_for_status()


SLOW = pytest.mark.slow


@pytest.mark.parametrize("protocol", [chat, *(pytest.param(form, marks=SLOW) for form in (messages, responses))])
def test_the_chain_behind_a_call_comes_back(protocol: Any) -> None:
    engine = Scripted(SAID, words=words("v4"))
    with served(engine) as client:
        protocol(client)
    first, last = (words("v4").decode(engine.seen[i].prompt, skip_special=False) for i in (0, -1))
    assert last.endswith(f"{USER}{KEPT}") and first.endswith(f"{USER}q{ASSISTANT}{THINK}")
    # the prompt states the effort, except low, which has no text and no budget either
    assert "Reasoning Effort" not in first and engine.seen[0].sampling.thinking_budget is None


def test_efforts_developers_and_formats_are_told() -> None:
    """A developer's instructions become the system's; V3.2 accepts a final developer message, without effort text."""
    schema = {"type": "json_schema", "json_schema": {"schema": PARAMETERS}}
    with served(engine := Scripted(f"r{END_THINK}{{}}", words=words("v4"))) as client:
        said = [{"role": "developer", "content": "D"}, USER_SAYS]
        asked: dict[str, Any] = {"messages": said, "response_format": schema, "max_tokens": 8}
        client.post(CHAT, json=asked | {"reasoning_effort": "max"}).raise_for_status()
        client.post(CHAT, json=asked | {"thinking": {"type": "disabled"}}).raise_for_status()
    told, off = (words("v4").decode(r.prompt, skip_special=False) for r in engine.seen)
    assert "Reasoning Effort: Beyond maximum" in told and "D\n\n## Response Format:" in told
    assert told.endswith(f"\n{json.dumps(PARAMETERS)}{USER}q{ASSISTANT}{THINK}")
    assert "Reasoning" not in off and off.endswith(f"{USER}q{ASSISTANT}{END_THINK}")
    with served(engine := Scripted("x", words=words("v3.2"))) as client:
        asked = {"messages": [USER_SAYS, {"role": "developer", "content": "D"}], "max_tokens": 80}
        client.post(CHAT, json=asked | {"reasoning_effort": "low"}).raise_for_status()
    (seen,) = engine.seen
    assert (
        words("v3.2")
        .decode(seen.prompt, skip_special=False)
        .endswith(f"{USER}\n\n# The user's message is: D{ASSISTANT}{THINK}")
    )
    assert seen.sampling.thinking_budget == 10
