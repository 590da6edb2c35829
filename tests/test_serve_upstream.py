"""finback's API in front of other engines gives the same answers as with the built-in engine."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from finback.checkpoint import models
from finback.config import UserError
from finback.engine.engine import EngineConfig
from finback.engine.open import open_engine, stops_of
from finback.model.transformer import Transformer
from finback.serve.options import ServeOptions
from finback.serve.programs import opened
from finback.serve.replicas import BLOCK, KINDS, MORE, ReplicaRouter, VllmReplica
from finback.serve.upstream import UpstreamConfig, UpstreamEngine
from tests.engine_servers import engine_server
from tests.serving import CHAT, served
from tests.test_tuning import stage_folder
from tests.toy import CONFIG

ASKED: list[dict[str, Any]] = [
    {"max_tokens": 12},
    {"max_tokens": 12, "logprobs": True, "top_logprobs": 0, "temperature": 0.7, "top_p": 0.9},
    {"max_tokens": 20, "stop": ["e"]},
    {"max_tokens": 12, "n": 2, "presence_penalty": 0.5, "logit_bias": {"40": 5}},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    stage_folder(root, 1, "base")
    return root / "base"


def body(more: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hello"}], "seed": 3, **more}


def said(reply: httpx.Response) -> Any:
    """A reply without ids, times and other values that change."""
    found = reply.json()
    assert reply.status_code == 200, found
    usage = {name: found["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return [{**choice, "logprobs": None} for choice in found["choices"]], usage


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_api_says_the_same(kind: str, folder: Path) -> None:
    """With two replicas, whole and streamed; an answer continues after its chain was closed early."""
    engine, tokenizer = open_engine(folder, "fp32", EngineConfig(8, 4096))
    with served(engine) as client:
        expected = [said(client.post(CHAT, json=body(more))) for more in ASKED]
    with engine_server(folder, kind) as (one, first), engine_server(folder, kind) as (two, second):
        replicas = [KINDS[kind](url, "toy") for url in (one, two)]
        upstream = UpstreamEngine(replicas, tokenizer, stops_of(tokenizer), 256, UpstreamConfig(8))
        with served(upstream) as client:
            assert [said(client.post(CHAT, json=body(more))) for more in ASKED] == expected
            with client.stream("POST", CHAT, json=body(ASKED[0]) | {"stream": True}) as stream:
                events = [json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {")]
            deltas = [choice["delta"] for event in events for choice in event["choices"]]
            text = "".join(delta.get("content") or delta.get("reasoning_content") or "" for delta in deltas)
            assert text and text == expected[0][0][0]["message"]["content"]
            budget = {"max_tokens": 16, "chat_template_kwargs": {"thinking": True}, "thinking_budget": 3}
            closed = client.post(CHAT, json=body(budget))
            assert closed.status_code == 200, closed.json()
            second.fault = lambda path, asked: "drop" if "generate" in path else None
            assert [said(client.post(CHAT, json=body(more))) for more in ASKED] == expected, "the other takes over"
            greedy, broken = body({"max_tokens": 12, "temperature": 0}), iter(["break off"])
            second.fault = first.fault
            whole = said(client.post(CHAT, json=greedy))
            first.fault = second.fault = lambda path, asked: next(broken, None) if "generate" in path else None
            assert said(client.post(CHAT, json=greedy)) == whole, "the other replica must continue the answer"
            assert next(broken, None) is None
        assert first.answered and second.answered
        for replica in replicas:
            replica.client.close()


CHOICE = {"type": "json_schema", "json_schema": {"name": "c", "schema": {"enum": ["whale", "song", 42]}}}
ARGUMENTS = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "sing", "parameters": ARGUMENTS}}
PLAIN: dict[str, Any] = {"chat_template_kwargs": {"thinking": False}, "max_tokens": 60}
HELD: list[dict[str, Any]] = [
    PLAIN | {"response_format": CHOICE},
    PLAIN | {"structured_outputs": {"regex": "(la|lu){2,4}"}},
    PLAIN | {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
]


@pytest.fixture(scope="module")
def wide(folder: Path) -> Path:
    """A folder whose window has room for tools."""
    made = folder.parent / "wide"
    shutil.copytree(folder, made)
    config = replace(CONFIG, initializer_range=0.15, max_position_embeddings=1024)
    models.save(made, Transformer(config).initialise(1))
    return made


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_answers_are_held_to_schemas_grammars_and_calls(kind: str, wide: Path) -> None:
    """As with the built-in engine, also after a chain of thought; an answer that violates them is an error."""
    engine, tokenizer = open_engine(wide, "fp32", EngineConfig(8, 4096))
    with served(engine) as client:
        expected = [message(client.post(CHAT, json=body(more))) for more in HELD]
    assert json.loads(expected[0]["content"]) in ("whale", "song", 42)
    with engine_server(wide, kind) as (url, server):
        replica = KINDS[kind](url, "toy")
        with served(UpstreamEngine([replica], tokenizer, stops_of(tokenizer), 1024, UpstreamConfig(8))) as client:
            assert [message(client.post(CHAT, json=body(more))) for more in HELD] == expected
            budget = {"max_tokens": 60, "chat_template_kwargs": {"thinking": True}, "thinking_budget": 3}
            thought = message(client.post(CHAT, json=body(budget | {"response_format": CHOICE})))
            assert thought["reasoning_content"] and json.loads(thought["content"]) in ("whale", "song", 42)
            unasked = message(client.post(CHAT, json=body({"max_tokens": 60, "response_format": CHOICE})))
            assert json.loads(unasked["content"]) in ("whale", "song", 42), "a chain must not begin"
            server.unheld = True
            for more in HELD:
                refused = client.post(CHAT, json=body(more))
                assert refused.status_code == 500 and "violates the schema" in refused.text, refused.json()
            server.fault = lambda path, asked: 400 if "generate" in path else None
            refused = client.post(CHAT, json=body({}))
            assert refused.status_code == 500 and "engine behind this server fails: HTTP 400" in refused.text
        replica.client.close()


def message(reply: httpx.Response) -> dict[str, Any]:
    """An answer's message, without the ids of its calls."""
    assert reply.status_code == 200, reply.json()
    found: dict[str, Any] = reply.json()["choices"][0]["message"]
    return found | {"tool_calls": [call["function"] for call in found.get("tool_calls") or ()]}


def test_prompts_go_where_they_were_read() -> None:
    """Two prompts with a common prefix go to one replica unless it is busier; a failed one is avoided for a while."""
    one, two = (VllmReplica(f"http://127.0.0.1:{port}", "m") for port in (1, 2))
    router = ReplicaRouter([one, two])
    long = list(range(3 * BLOCK))
    assert router.take(long, b"") is one and router.take([7] * BLOCK, b"") is two
    assert router.take([*long, 1, 2], b"") is one
    assert router.take(long, b"another key") is two, "another key's cache is not shared"
    for _ in range(MORE + 1):
        router.take(long, b"")
    assert one.active > two.active and router.take(long, b"") is two
    for replica in (one, two):
        replica.client.close()


def test_what_is_not_there_is_said(folder: Path) -> None:
    options = {"model": folder, "engine": "vllm"}
    with (
        pytest.raises(UserError, match=r"--upstream = .*no vllm answers"),
        opened(ServeOptions(**options, upstream=("http://127.0.0.1:9",))),
    ):
        pass
    with pytest.raises(UserError, match="--engine-python = '': vllm runs in its own environment"):
        ServeOptions(**options)
    with pytest.raises(UserError, match="--upstream"):
        ServeOptions(model=folder, upstream=("http://127.0.0.1:9",))
    with engine_server(folder) as (url, server):
        with opened(ServeOptions(**options, upstream=(url,))) as (engine, _):
            assert engine.capacity == 256
        server.tokenizer = type("Other", (), {"encode": lambda self, text: [1]})()  # type: ignore[assignment]
        with (
            pytest.raises(UserError, match="does not have the tokenizer"),
            opened(ServeOptions(**options, upstream=(url,))),
        ):
            pass
