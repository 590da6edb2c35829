"""Servers with the wire formats of vLLM 0.32 and SGLang 0.5.23 on finback's own engine; tests can inject faults."""

import base64
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice, pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch

from finback.checkpoint import models
from finback.data.tokenizer import THINK, Tokenizer
from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import Completion, SamplingParams
from finback.engine.sampler import top_logprobs

Reply = dict[str, Any]


class FakeEngineServer:
    """Implements the routes of vLLM and SGLang that a trainer uses. `fault` sees each path and body before the answer.

    A fault returns None, a status, "drop" to close the connection, or "break off" to end a stream after one event.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.kind, self.tokenizer, self.stops = kind, Tokenizer(folder), ()
        self.engine = self._engine(folder)
        self.version = "default"
        self.fault: Callable[[str, Reply], int | str | None] = lambda path, body: None
        # changes the reply to a prompt before it is sent
        self.change: Callable[[Reply], None] = lambda reply: None
        # whether to answer as if no schema or grammar were requested
        self.unheld = False
        self.paused = False
        # the memory tags that are released
        self.released: set[str] = set()
        self.seen: list[tuple[str, Reply]] = []
        self.answered = 0
        self._lock = threading.Lock()

    def reply(self, path: str, body: Reply) -> Reply | None:
        """The reply of a route; None if the route does not exist."""
        route = {
            "/health": lambda body: {},
            "/v1/models": self._models,
            "/tokenize": self._tokenize,
            **(self._vllm if self.kind == "vllm" else self._sglang),
        }.get(path)
        return None if route is None else route(body)

    @property
    def _vllm(self) -> dict[str, Callable[[Reply], Reply]]:
        return {
            "/inference/v1/generate": self._generate,
            "/v1/completions": self._complete,
            "/pause": self._pause,
            "/collective_rpc": self._rpc,
            "/update_weight_version": self._name,
            "/reset_prefix_cache": lambda body: {"success": not self.paused},
            "/resume": self._resume,
            "/weight_info": lambda body: {"weight_version": self.version},
            "/sleep": lambda body: self._release(["weights", "kv_cache"]),
            "/wake_up?tags=weights": lambda body: self._take_back(["weights"]),
            "/wake_up?tags=kv_cache": lambda body: self._take_back(["kv_cache"]),
        }

    @property
    def _sglang(self) -> dict[str, Callable[[Reply], Reply]]:
        return {
            "/generate": self._sglang_generate,
            "/update_weights_from_disk": self._update,
            "/release_memory_occupation": lambda body: self._release(body["tags"]),
            "/resume_memory_occupation": lambda body: self._take_back(body["tags"]),
        }

    # ---- both ------------------------------------------------------------------------------------------------------

    def _models(self, body: Reply) -> Reply:
        card = {"id": "toy", "object": "model", "owned_by": self.kind, "max_model_len": 256}
        return {"object": "list", "data": [card]}

    def _tokenize(self, body: Reply) -> Reply:
        ids = self.tokenizer.encode(body["prompt"])
        return {"count": len(ids), "max_model_len": 256, "tokens": ids, "token_strs": None}

    def _made(self, ids: list[int], sampling: SamplingParams, seed: int) -> Completion:
        with self._lock:
            assert not self.released, "the engine is asleep"
            self.answered += 1
            return self.engine.generate([ids], sampling, [seed])[0]

    def _load(self, path: str) -> None:
        with self._lock:
            assert "weights" not in self.released, "the memory for weights is released"
            self.engine = self._engine(Path(path))

    def _engine(self, folder: Path) -> Engine:
        return Engine(models.load(folder), (), EngineConfig(return_routed_experts=True), self.tokenizer)

    def _release(self, tags: list[str]) -> Reply:
        self.released |= set(tags)
        return {}

    def _take_back(self, tags: list[str]) -> Reply:
        self.released -= set(tags)
        return {}

    def _more(self, given: Reply) -> dict[str, Any]:
        """Sampling parameters that trainers do not send."""
        names = "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty"
        bias = tuple((int(token), float(value)) for token, value in (given.get("logit_bias") or {}).items())
        held = given.get("structured_outputs", {})
        schema, grammar = held.get("json", given.get("json_schema")), held.get("grammar", given.get("ebnf"))
        found = {name: given[name] for name in names if name in given} | {"logit_bias": bias}
        if self.unheld or (schema, grammar) == (None, None):
            return found
        # the constraint begins with the first token
        mark = ((self.tokenizer.ids[THINK], float("-inf")),) if THINK in self.tokenizer.ids else ()
        return found | {"schema": schema, "grammar": grammar, "logit_bias": (*bias, *mark)}

    # ---- vLLM ------------------------------------------------------------------------------------------------------

    def _vllm_params(self, given: Reply) -> tuple[SamplingParams, int]:
        narrows = bool(given.get("top_k")) or given.get("top_p", 1.0) < 1
        assert given["ignore_eos"] is True and given["logprobs"] >= 1, given
        sampling = SamplingParams(
            *(given["temperature"], given["max_tokens"], given["top_k"], given["top_p"]),
            stop_token_ids=tuple(given.get("stop_token_ids", ())),
            **self._more(given),
            return_sampling_mask=narrows,
        )
        return sampling, given["seed"]

    def _generate(self, body: Reply) -> Reply:
        made = self._made(body["token_ids"], *self._vllm_params(body["sampling_params"]))
        own = [{"token_id": t, "logprob": p, "rank": 1} for t, p in zip(made.tokens, made.logprobs, strict=True)]
        written = io.BytesIO()
        assert made.routed_experts is not None
        np.save(written, made.routed_experts)
        choice = {
            "index": 0,
            "logprobs": {"content": [{**each, "top_logprobs": [each]} for each in own]},
            "finish_reason": made.finish_reason,
            "stop_reason": None,
            "token_ids": made.tokens,
            "routed_experts": base64.b64encode(written.getvalue()).decode(),
            "sampling_mask": None if made.sampling_mask is None else [ids.tolist() for ids in made.sampling_mask],
            "weight_versions": [{"version": self.version, "start": 0, "end": len(made.tokens)}],
        }
        return {"request_id": "generate-tokens-1", "choices": [choice], "usage": {}, "prompt_token_ids": None}

    @torch.no_grad()
    def _scored(self, ids: list[int], k: int) -> list[list[tuple[int, float]]]:
        """For each token but the first: itself and the k likeliest."""
        model = self.engine.model
        logits = model.logits(model(torch.tensor([ids]))[0, :-1])
        return top_logprobs(logits, ids[1:], [k] * (len(ids) - 1))

    def _complete(self, body: Reply) -> Reply:
        if "prompt_logprobs" in body:
            assert body["max_tokens"] == 1
            lines = self._scored(body["prompt"], body["prompt_logprobs"])
            said = [{str(t): {"logprob": p, "rank": 1, "decoded_token": "?"} for t, p in line} for line in lines]
            return {"id": "cmpl-1", "choices": [{"index": 0, "text": "?", "prompt_logprobs": [None, *said]}]}
        assert body["return_token_ids"] is True
        made = self._made(body["prompt"], *self._vllm_params(body))
        logprobs = {"token_logprobs": made.logprobs, "tokens": ["?"] * len(made.tokens), "top_logprobs": None}
        choice = {"index": 0, "text": "?", "logprobs": logprobs, "finish_reason": made.finish_reason}
        return {"id": "cmpl-1", "choices": [choice | {"token_ids": made.tokens, "prompt_token_ids": body["prompt"]}]}

    def _pause(self, body: Reply) -> Reply:
        self.paused = True
        return {"status": "paused"}

    def _resume(self, body: Reply) -> Reply:
        self.paused = False
        return {"status": "resumed"}

    def _rpc(self, body: Reply) -> Reply:
        assert self.paused and body["method"] == "reload_weights"
        self._load(body["kwargs"]["weights_path"])
        return {"results": [None]}

    def _name(self, body: Reply) -> Reply:
        self.version = body["new_version"]
        return {"success": True, "new_version": self.version}

    # ---- SGLang ----------------------------------------------------------------------------------------------------

    def _sglang_generate(self, body: Reply) -> Reply:
        if body.get("top_logprobs_num") and body["logprob_start_len"] == 0:
            lines = self._scored(body["input_ids"], body["top_logprobs_num"])
            tops = [[[p, t, None] for t, p in line[1:]] or None for line in lines]
            return {"text": "?", "output_ids": [1], "meta_info": {"id": "1", "input_top_logprobs": [None, *tops]}}
        assert body["return_logprob"] is True and body["logprob_start_len"] == -1
        given = body["sampling_params"]
        assert given["ignore_eos"] is False or given.get("stop_token_ids", []) == []
        sampling = SamplingParams(
            *(given["temperature"], given["max_new_tokens"], max(0, given["top_k"]), given["top_p"]),
            stop_token_ids=tuple(given.get("stop_token_ids", ())),
            **self._more(given),
        )
        made = self._made(body["input_ids"], sampling, given["sampling_seed"])
        assert made.routed_experts is not None
        routes = base64.b64encode(made.routed_experts.astype(np.int32).tobytes()).decode()
        meta = {
            "id": "1",
            "finish_reason": {"type": made.finish_reason},
            "weight_version": self.version,
            "output_token_logprobs": [[p, t, None] for t, p in zip(made.tokens, made.logprobs, strict=True)],
            "routed_experts": routes if body["return_routed_experts"] else None,
        }
        return {"text": "?", "output_ids": made.tokens, "meta_info": meta}

    def _update(self, body: Reply) -> Reply:
        assert body["flush_cache"] is True
        self._load(body["model_path"])
        self.version = body["weight_version"]
        return {"success": True, "message": "Succeeded to update model weights.", "num_paused_requests": 0}


def _handler(server: FakeEngineServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.respond({})

        def do_POST(self) -> None:
            self.respond(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}"))

        def respond(self, body: Reply) -> None:
            path = urlsplit(self.path).path
            server.seen.append((path, body))
            fault = server.fault(path, body)
            if fault == "drop":
                self.close_connection = True
                return
            full = self.path if path == "/wake_up" else path
            found = {"error": "a fault"} if isinstance(fault, int) else server.reply(full, body)
            if found is not None and "generate" in path + "completions" and not fault:
                server.change(found)
            if found is not None and body.get("stream") and not isinstance(fault, int):
                self.stream(found, 1 if fault == "break off" else None)
                return
            raw = json.dumps(found or {"detail": "Not Found"}).encode()
            self.send_response(fault if isinstance(fault, int) else 200 if found is not None else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(raw)))
            if fault == 503:
                self.send_header("Retry-After", "0.01")
            self.end_headers()
            self.wfile.write(raw)

        def stream(self, found: Reply, events: int | None) -> None:
            """Streams a reply as events of one token each; SGLang's events repeat the earlier tokens."""
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for event in islice(streamed(found), events):
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
            self.wfile.write(b"data: [DONE]\n\n")
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


def streamed(found: Reply) -> Iterator[Reply]:
    """The events of a complete reply."""
    if "choices" in found:
        (choice,) = found["choices"]
        content, count = choice["logprobs"]["content"], len(choice["token_ids"])
        for i, token in enumerate(choice["token_ids"]):
            finish = choice["finish_reason"] if i == count - 1 else None
            yield {
                "choices": [
                    {"index": 0, "token_ids": [token], "logprobs": {"content": [content[i]]}, "finish_reason": finish}
                ]
            }
        return
    meta = found["meta_info"]
    drawn = meta["output_token_logprobs"]
    for i in range(1, len(drawn) + 1):
        finish = meta["finish_reason"] if i == len(drawn) else None
        yield {"meta_info": {**meta, "output_token_logprobs": drawn[:i], "finish_reason": finish}}


def main(arguments: list[str]) -> None:
    """Replaces the Python of an engine's environment: takes `-m MODULE`, and the model and address as flags."""
    flags = dict(pairwise(arguments))
    kind = "vllm" if flags["-m"].startswith("vllm") else "sglang"
    assert flags["--dtype"] == "float32" and "--enable-return-routed-experts" in arguments
    server = FakeEngineServer(Path(flags["--model" if kind == "vllm" else "--model-path"]), kind)
    ThreadingHTTPServer((flags["--host"], int(flags["--port"])), _handler(server)).serve_forever()


@contextmanager
def engine_server(folder: Path, kind: str = "vllm") -> Iterator[tuple[str, FakeEngineServer]]:
    """Yields the address of a server for the model in a folder, and the server."""
    server = FakeEngineServer(folder, kind)
    http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}", server
    finally:
        http.shutdown()
        http.server_close()
        time.sleep(0)


if __name__ == "__main__":
    main(sys.argv[1:])
