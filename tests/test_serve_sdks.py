"""The vendors' own client libraries, in Python and JavaScript, against a running server, each through a tool loop.

`make test-slow` installs them in a separate environment; FINBACK_CLIENTS names another one.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finback.serve.http import digests
from tests.serving import KEY, Scripted, served

CLIENTS = Path(os.environ.get("FINBACK_CLIENTS") or Path(sys.prefix) / "clients")
PYTHON, NODE = CLIENTS / "bin" / "python", CLIENTS / "js"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NODE.is_dir(), reason="no clients installed; `make test-slow` installs them"),
]

CALL = (
    "<think>4+5 is a sum</think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>add<｜tool▁sep｜>"
    '{"a": 4, "b": 5}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
WORDS, OBJECT = "<think>9</think>It is 9.", '{"sum": 9}'


class Turns(Scripted):
    """An engine that answers with one text after another."""

    def __init__(self, *turns: str) -> None:
        super().__init__(window=8192, tokens=65536)
        self.turns = turns

    def submit(self, prompt: Any, sampling: Any, seed: int, **more: Any) -> Any:
        self.script = self.turns[len(self.seen) % len(self.turns)]
        return super().submit(prompt, sampling, seed, **more)


def run(code: str, *turns: str, node: bool = False) -> tuple[Any, Turns]:
    """The last line that a program prints, as JSON, and the engine that it used."""
    engine = Turns(*turns)
    with served(engine, keys=digests([KEY])) as client:
        base = str(client.base_url).rstrip("/")
        flag = ["--input-type=module", "-e"] if node else ["-c"]
        command = ["node" if node else str(PYTHON), *flag, code, base]
        env = {
            "PATH": "/usr/bin:/bin",
            "BASE": base,
            "OPENAI_API_KEY": KEY,
            "ANTHROPIC_API_KEY": KEY,
            "HOME": "/nonexistent",
        }
        more = {"OPENAI_BASE_URL": f"{base}/v1", "ANTHROPIC_BASE_URL": base, "OPENAI_AGENTS_DISABLE_TRACING": "1"}
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=300, env=env | more, cwd=NODE if node else None
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1]), engine


ANTHROPIC = """
import json, anthropic
client = anthropic.Anthropic()
tools = [{"name": "add", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}]
messages = [{"role": "user", "content": "4+5?"}]
ask = {"model": "toy", "max_tokens": 900, "tools": tools}
with client.messages.stream(messages=messages, thinking={"type": "enabled", "budget_tokens": 300}, **ask) as stream:
    kinds = {event.type for event in stream}
    first = stream.get_final_message()
call = first.content[-1]
messages += [
    {"role": "assistant", "content": [block.model_dump() for block in first.content]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "9"}]},
]
last = client.messages.create(messages=messages, **ask)
count = client.messages.count_tokens(messages=messages, model="toy", tools=tools).input_tokens
names = [m.id for m in client.models.list()]
try:
    client.messages.create(model="none", max_tokens=9, messages=messages)
except anthropic.NotFoundError as error:
    refused = error.body["error"]["type"]
print(json.dumps([first.stop_reason, call.input, [b.type for b in last.content], last.content[-1].text,
    count == last.usage.input_tokens + last.usage.cache_read_input_tokens, names, refused, sorted(kinds)]))
"""


def test_anthropic() -> None:
    found, engine = run(ANTHROPIC, CALL, WORDS)
    assert found[:4] == ["tool_use", {"a": 4, "b": 5}, ["thinking", "text"], "It is 9."]
    assert found[4:7] == [True, ["toy"], "not_found_error"] and {"thinking", "input_json"} <= set(found[7])
    assert "4+5 is a sum" in engine.tokenizer.decode(engine.seen[1].prompt)  # the chain came back


OPENAI = """
import json, openai, pydantic
client = openai.OpenAI()
class Sum(pydantic.BaseModel):
    sum: int
tools = [{"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": False}]
with client.responses.stream(model="toy", input="4+5?", tools=tools) as stream:
    kinds = {event.type for event in stream}
    first = stream.get_final_response()
call = first.output[-1]
result = {"type": "function_call_output", "call_id": call.call_id, "output": "9"}
last = client.responses.create(model="toy", previous_response_id=first.id, input=[result], tools=tools)
parsed = client.responses.parse(model="toy", input="4+5?", text_format=Sum, tools=tools, store=False)
again = client.responses.retrieve(last.id)
items = [item.type for item in client.responses.input_items.list(last.id, order="asc")]
client.responses.delete(last.id)
try:
    client.responses.retrieve(last.id)
except openai.NotFoundError as error:
    refused = error.param
print(json.dumps([call.arguments, last.output_text, again.output_text, parsed.output_parsed.sum, items, refused, sorted(kinds)]))
"""


def test_openai_responses() -> None:
    found, _ = run(OPENAI, CALL, WORDS, OBJECT)
    assert found[:4] == ['{"a": 4, "b": 5}', "It is 9.", "It is 9.", 9]
    assert found[4] == ["message", "reasoning", "function_call", "function_call_output"] and found[5] == "id"
    assert "response.reasoning_summary_text.delta" in found[6] and "response.completed" in found[6]


AGENTS = """
import asyncio, json, openai, pydantic
from agents import Agent, OpenAIChatCompletionsModel, OpenAIResponsesModel, Runner, function_tool
class Sum(pydantic.BaseModel):
    sum: int
added = []
@function_tool
def add(a: int, b: int) -> int:
    added.append((a, b))
    return a + b
async def main():
    found = []
    for kind in (OpenAIResponsesModel, OpenAIChatCompletionsModel):
        model = kind(model="toy", openai_client=openai.AsyncOpenAI())
        agent = Agent(name="a", instructions="Add.", tools=[add], output_type=Sum, model=model)
        found.append((await Runner.run(agent, "4+5?")).final_output.sum)
        stream = Runner.run_streamed(agent, "4+5?")
        async for event in stream.stream_events():
            pass
        found.append(stream.final_output.sum)
    print(json.dumps([found, added]))
asyncio.run(main())
"""


def test_openai_agents() -> None:
    found, _ = run(AGENTS, CALL, OBJECT)
    assert found == [[9] * 4, [[4, 5]] * 4]


PYDANTIC_AI = """
import json, pydantic
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
class Sum(pydantic.BaseModel):
    sum: int
found, added = [], []
for model in (OpenAIResponsesModel("toy"), OpenAIChatModel("toy"), AnthropicModel("toy")):
    form = str if isinstance(model, AnthropicModel) else NativeOutput(Sum)
    agent = Agent(model, output_type=form)
    @agent.tool_plain
    def add(a: int, b: int) -> int:
        added.append((a, b))
        return a + b
    output = agent.run_sync("4+5?").output
    found.append(json.loads(output)["sum"] if isinstance(output, str) else output.sum)
print(json.dumps([found, added]))
"""


def test_pydantic_ai() -> None:
    found, _ = run(PYDANTIC_AI, CALL, OBJECT)
    assert found == [[9] * 3, [[4, 5]] * 3]


AI_SDK = """
import { generateText, streamText, stepCountIs, tool, Output } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { createAnthropic } from "@ai-sdk/anthropic";
import { z } from "zod";
const openai = createOpenAI({ baseURL: process.env.BASE + "/v1" });
const anthropic = createAnthropic({ baseURL: process.env.BASE + "/v1" });
const added = [], found = [], thoughts = [];
const add = tool({ description: "Add.", inputSchema: z.object({ a: z.number(), b: z.number() }),
  execute: async ({ a, b }) => { added.push([a, b]); return a + b; } });
for (const model of [openai("toy"), openai.chat("toy"), anthropic("toy")]) {
  const request = { model, tools: { add }, prompt: "4+5?", stopWhen: stepCountIs(4) };
  const whole = await generateText(request);
  const stream = streamText(request);
  let text = "";
  for await (const part of stream.textStream) text += part;
  found.push(whole.text, text);
  thoughts.push(whole.steps[0].reasoningText ?? null, (await stream.steps)[0].reasoningText ?? null);
}
console.log(JSON.stringify([found, added, thoughts]));
"""
AI_OBJECT = """
import { generateText, stepCountIs, tool, Output } from "ai";
import { createOpenAI } from "@ai-sdk/openai";
import { z } from "zod";
const openai = createOpenAI({ baseURL: process.env.BASE + "/v1" });
const add = tool({ description: "Add.", inputSchema: z.object({ a: z.number(), b: z.number() }), execute: async ({ a, b }) => a + b });
const found = [];
for (const model of [openai("toy"), openai.chat("toy")]) {
  const output = Output.object({ schema: z.object({ sum: z.number().int() }) });
  const result = await generateText({ model, tools: { add }, output, prompt: "4+5?", stopWhen: stepCountIs(4) });
  found.push(result.output.sum);
}
console.log(JSON.stringify(found));
"""
JAVASCRIPT = """
import OpenAI from "openai";
import Anthropic from "@anthropic-ai/sdk";
const openai = new OpenAI({ baseURL: process.env.BASE + "/v1" }), anthropic = new Anthropic({ baseURL: process.env.BASE });
const stream = openai.responses.stream({ model: "toy", input: "4+5?" });
for await (const event of stream) {}
const response = await stream.finalResponse();
const message = await anthropic.messages.stream({ model: "toy", max_tokens: 900, messages: [{ role: "user", content: "4+5?" }] }).finalMessage();
const chat = openai.chat.completions.stream({ model: "toy", messages: [{ role: "user", content: "4+5?" }] });
console.log(JSON.stringify([response.output_text, message.content.at(-1).text, await chat.finalContent()]));
"""


def test_ai_sdk() -> None:
    found, engine = run(AI_SDK, CALL, WORDS, node=True)
    assert found[0] == ["It is 9."] * 6 and found[1] == [[4, 5]] * 6
    assert found[2] == [*["4+5 is a sum"] * 2, None, None, *["4+5 is a sum"] * 2]  # its chat client shows no chains
    prompts = [engine.tokenizer.decode(request.prompt) for request in engine.seen[1::2]]
    assert ["4+5 is a sum" in prompt for prompt in prompts] == [True, True, False, False, True, True]


def test_ai_sdk_with_tools_and_a_schema() -> None:
    assert run(AI_OBJECT, CALL, OBJECT, node=True)[0] == [9, 9]


def test_openai_and_anthropic_in_javascript() -> None:
    assert run(JAVASCRIPT, WORDS, node=True)[0] == ["It is 9."] * 3


TWO = (("4", "5"), ("1", "2"))
THOUGHT = "<think>two sums</think>\n\n"


def each(form: str, between: str = "") -> str:
    """Both calls in a form, where A and B stand for the numbers and I for the index."""
    return between.join(form.replace("A", a).replace("B", b).replace("I", str(i)) for i, (a, b) in enumerate(TWO))


LISTED = each('{"name": "add", "parameters": {"a": A, "b": B}}', ", ")
KIMI = each('<|tool_call_begin|>functions.add:I<|tool_call_argument_begin|>{"a": A, "b": B}<|tool_call_end|>')
D = "｜DSML｜"
PARAMETERS = "".join(f'<{D}parameter name="{n}" string="false">{n.upper()}</{D}parameter>\n' for n in "ab")
INVOKED = each(f'<{D}invoke name="add">\n{PARAMETERS}</{D}invoke>\n')
SPOKEN = each(
    "<|start|>assistant<|channel|>commentary to=functions.add <|constrain|>json<|message|>" + '{"a": A, "b": B}<|call|>'
)
CALLS = {
    "Qwen3-Coder": THOUGHT
    + each(
        "<tool_call>\n<function=add>\n<parameter=a>\nA\n</parameter>\n<parameter=b>\nB\n</parameter>\n</function>\n</tool_call>\n"
    ),
    "Kimi K2": f"{THOUGHT}<|tool_calls_section_begin|>{KIMI}<|tool_calls_section_end|>",
    "Kimi K2, singular": f"{THOUGHT}<|tool_call_section_begin|>{KIMI}<|tool_call_section_end|>",
    "GLM-4.5": THOUGHT
    + each(
        "<tool_call>add\n<arg_key>a</arg_key>\n<arg_value>A</arg_value>\n<arg_key>b</arg_key>\n<arg_value>B</arg_value>\n</tool_call>\n"
    ),
    "gpt-oss": f"<|channel|>analysis<|message|>two sums<|end|>{SPOKEN}",
    "Llama 3.1": THOUGHT + LISTED.replace("}, {", "}; {"),
    "Llama 3.1, listed": f"{THOUGHT}[{LISTED}]",
    "Hermes": THOUGHT + each('<tool_call>\n{"name": "add", "arguments": {"a": A, "b": B}}\n</tool_call>\n'),
    "DeepSeek V3.2": f"{THOUGHT}<{D}function_calls>\n{INVOKED}</{D}function_calls>",
}
LOOP = """
import json, openai
client = openai.OpenAI()
number = {"type": "integer"}
schema = {"type": "object", "properties": {"a": number, "b": number}, "required": ["a", "b"]}
ask = {"model": "toy", "max_tokens": 900, "tools": [{"type": "function", "function": {"name": "add", "parameters": schema}}]}
found = []
for _ in range(COUNT):
    messages, calls, chain, text = [{"role": "user", "content": "4+5? 1+2?"}], {}, "", ""
    for chunk in client.chat.completions.create(messages=messages, stream=True, **ask):
        for choice in chunk.choices:
            chain += getattr(choice.delta, "reasoning_content", None) or ""
            text += choice.delta.content or ""
            finish = choice.finish_reason
            for part in choice.delta.tool_calls or ():
                if part.id:
                    calls[part.index] = part
                else:
                    calls[part.index].function.arguments += part.function.arguments
    messages.append({"role": "assistant", "content": text, "tool_calls": [call.model_dump() for call in calls.values()]})
    sums = []
    for call in calls.values():
        sums.append(sum(json.loads(call.function.arguments).values()))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": str(sums[-1])})
    last = client.chat.completions.create(messages=messages, **ask).choices[0]
    found.append([chain, text, finish, sums, last.message.content])
print(json.dumps(found))
"""


def test_every_form_of_calls_through_a_tool_loop() -> None:
    turns = [turn for said in CALLS.values() for turn in (said, WORDS)]
    found, engine = run(LOOP.replace("COUNT", str(len(CALLS))), *turns)
    wanted = ["two sums", "", "tool_calls", [9, 3], "It is 9."]
    assert dict(zip(CALLS, found, strict=True)) == dict.fromkeys(CALLS, wanted)
    assert len(engine.seen) == len(turns)
