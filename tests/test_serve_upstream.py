"""finback's front over engines elsewhere: what its API says is what it says over the built-in engine."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from finback.config import UserError
from finback.engine.engine import EngineConfig
from finback.engine.open import open_engine, stops_of
from finback.serve.options import ServeOptions
from finback.serve.programs import opened
from finback.serve.replicas import BLOCK, KINDS, MORE, ReplicaRouter, VllmReplica
from finback.serve.upstream import UpstreamConfig, UpstreamEngine
from tests.engine_servers import engine_server
from tests.serving import CHAT, served
from tests.test_tuning import stage_folder

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
    """What a reply says, without what is of its time."""
    found = reply.json()
    assert reply.status_code == 200, found
    usage = {name: found["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return [{**choice, "logprobs": None} for choice in found["choices"]], usage


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_the_api_says_the_same(kind: str, folder: Path) -> None:
    """Over two replicas, whole and streamed; a chain that is closed early goes on behind its end."""
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
            refused = client.post(CHAT, json=body({"response_format": {"type": "json_object"}}))
            assert refused.status_code == 400 and "engines elsewhere" in refused.text
            second.fault = lambda path, asked: "drop" if "generate" in path else None
            assert [said(client.post(CHAT, json=body(more))) for more in ASKED] == expected, "the other one goes on"
        assert first.answered and second.answered
        for replica in replicas:
            replica.client.close()


def test_prompts_go_where_they_were_read() -> None:
    """Two prompts begin alike and go to one replica, unless it has much more to do; one that fails is left alone for a while."""
    one, two = (VllmReplica(f"http://127.0.0.1:{port}", "m") for port in (1, 2))
    router = ReplicaRouter([one, two])
    long = list(range(3 * BLOCK))
    assert router.take(long, b"") is one and router.take([7] * BLOCK, b"") is two
    assert router.take([*long, 1, 2], b"") is one
    assert router.take(long, b"another key") is two, "what another key has cached is not shared"
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
    with pytest.raises(UserError, match="--engine-python = '': vllm lives in an environment of its own"):
        ServeOptions(**options)
    with pytest.raises(UserError, match="--upstream"):
        ServeOptions(model=folder, upstream=("http://127.0.0.1:9",))
    with engine_server(folder) as (url, server):
        with opened(ServeOptions(**options, upstream=(url,))) as (engine, _):
            assert engine.capacity == 256
        server.tokenizer = type("Other", (), {"encode": lambda self, text: [1]})()  # type: ignore[assignment]
        with pytest.raises(UserError, match="another tokenizer"), opened(ServeOptions(**options, upstream=(url,))):
            pass
