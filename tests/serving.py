"""What the tests of the server share: a small model whose answers a test scripts, and a server around it."""

import dataclasses
import functools
import json
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from finback.data import tokenizer as tokenizers
from finback.data.tokenizer import ASSISTANT, USER, Tokenizer
from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import Request, SamplingParams
from finback.model.transformer import Transformer
from finback.serve import http
from finback.serve.options import ServeOptions
from finback.serve.server import Server, build
from tests.toy import CONFIG

KEY, OTHER = "key-of-the-tests-0001", "key-of-somebody-else-2"
CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hello"}], "seed": 1, "max_tokens": 8}


@functools.cache
def small_tokenizer() -> Tokenizer:
    """A small tokenizer with all of DeepSeek's special tokens."""
    with tempfile.TemporaryDirectory() as folder:
        return tokenizers.train(["The whale sang. 4+5=9"] * 20, 300, Path(folder) / "tokenizer.json")


@functools.cache
def small_model(window: int) -> Transformer:
    """A small model with random weights."""
    config = dataclasses.replace(CONFIG, max_position_embeddings=window, initializer_range=0.15)
    return Transformer(config).initialise(0).eval()


class Scripted(Engine):
    """An engine whose requests answer with `script`, if set, and whose steps take `pace` seconds or raise `failing`.

    A chain that is closed early is followed by `after`, or else by the model's own tokens, possibly few. While a
    request has `hold_at` tokens or more, nothing is generated; it can be cancelled.
    """

    def __init__(
        self,
        script: str | None = None,
        pace: float = 0.0,
        rows: int = 8,
        tokens: int = 16384,
        window: int = 2048,
        words: Tokenizer | None = None,
        after: str = "",
    ) -> None:
        words = words or small_tokenizer()
        stops = (*words.stops, words.ids[USER], words.ids[ASSISTANT])
        super().__init__(small_model(window), stops, EngineConfig(rows, tokens, 64, reuse=True, speculate=True), words)
        self.script, self.pace, self.after = script, pace, after
        self.failing: Exception | None = None
        self.hold_at: int | None = None
        self.seen: list[Request] = []

    def submit(self, prompt: Sequence[int], sampling: SamplingParams, seed: int, **more: Any) -> Request:
        """Submits the request with the script ahead of the model's own tokens."""
        found = super().submit(list(prompt), sampling, seed, **more)
        self.seen.append(found)
        if self.script is not None:
            words = small_tokenizer()
            found.forced.extend([*words.encode_marked(self.script), words.eos])
        return found

    def close_thinking(self, request: Request) -> None:
        """Closes the chain and drops the rest of the script."""
        if self.script is not None:
            request.forced.clear()
        super().close_thinking(request)
        request.forced.extend(small_tokenizer().encode_marked(self.after))

    def step(self) -> list[Request]:
        """Steps after a pause of `pace` seconds, or raises `failing`."""
        if self.busy:
            time.sleep(self.pace)
            if self.failing is not None:
                raise self.failing
        if self.is_held:
            time.sleep(0.001)
            return []
        return super().step()

    @property
    def is_held(self) -> bool:
        """Whether a request that has not ended has as many tokens as `hold_at` allows."""
        at = self.hold_at
        return at is not None and any(len(r.tokens) >= at for r in self.seen if r.finish_reason is None)

    @property
    def leaked(self) -> int:
        """The pages in use, which must be 0 when the engine is idle."""
        return self.pages.count - self.pages.free


@contextmanager
def served(engine: Engine, adapters: Mapping[str, Tokenizer] | None = None, **options: Any) -> Iterator[httpx.Client]:
    """A server on a real socket, and a client for it; `adapters` are those that the engine has."""
    made = ServeOptions(**{"model": Path("toy"), "page": False, "port": 0} | options)
    app = build(engine, engine.tokenizer or small_tokenizer(), made, adapters=adapters)
    listener = http.listen_as(made) if made.uds else http.listen("127.0.0.1", 0)
    runner = Server(app)
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    base = "http://localhost" if made.uds else http.url(listener, made)
    transport = httpx.HTTPTransport(uds=str(made.uds) if made.uds else None, verify=False)
    headers = {"authorization": f"Bearer {KEY}"} if options.get("keys") else {}
    try:
        wait_for(lambda: runner.started)
        with httpx.Client(base_url=base, headers=headers, timeout=60, trust_env=False, transport=transport) as client:
            client.app = app  # type: ignore[attr-defined]
            yield client
    finally:
        runner.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive(), "the server does not stop"


def wait_for(condition: Any, seconds: float = 20) -> float:
    """Waits until a condition holds; returns the seconds that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, "the condition does not hold in time"
        time.sleep(0.005)
    return time.monotonic() - began


def events(lines: Iterator[str]) -> list[Any]:
    """The chunks of a stream; comments are unchanged, and "[DONE]" is the last."""
    found: list[Any] = []
    for line in lines:
        if line.startswith(":"):
            found.append(line)
        elif line:
            assert line.startswith("data: "), line
            content = line.removeprefix("data: ")
            found.append(content if content == "[DONE]" else json.loads(content))
    return found


def streamed(client: httpx.Client, path: str = CHAT, **request: Any) -> list[Any]:
    """All chunks of a streaming request."""
    with client.stream("POST", path, json=request | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response.iter_lines())


def summed(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """The message assembled from a stream's deltas, with its finish_reason."""
    message: dict[str, Any] = {"finish_reason": None}
    calls: dict[int, dict[str, str]] = {}
    for chunk in chunks:
        for choice in chunk["choices"] if isinstance(chunk, dict) else ():
            if choice["index"] != index:
                continue
            message["finish_reason"] = choice["finish_reason"] or message["finish_reason"]
            for name, value in choice["delta"].items():
                if name != "tool_calls":
                    message[name] = message.get(name, "") + value
                    continue
                for call in value:
                    known = calls.setdefault(call["index"], {"id": call.get("id", ""), "name": "", "arguments": ""})
                    known["name"] += call["function"].get("name", "")
                    known["arguments"] += call["function"].get("arguments", "")
    return message | ({"tool_calls": [calls[i] for i in sorted(calls)]} if calls else {})
