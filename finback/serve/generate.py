"""Generation from token ids for trainers: vLLM's POST /inference/v1/generate.

No text processing: no template, no generation_config.json, and no stop tokens but those in the request and, without
`ignore_eos`, the model's own. Log-probabilities are those of the sampling distribution, after temperature, top-k, top-p and
min-p (vLLM's processed_logprobs).
"""

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from finback.engine.request import Request as EngineRequest
from finback.engine.request import SamplingParams
from finback.runs import npy
from finback.serve.body import read
from finback.serve.metrics import usage
from finback.serve.middleware import salt
from finback.serve.prepare import SEEDS
from finback.serve.resumable import until_disconnect
from finback.serve.service import Service, service_of
from finback.serve.trainer_protocol import TokensRequest
from finback.serve.worker import ChoiceInput


class TokenGeneration:
    """The endpoint that answers token ids with token ids."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request; the engine drops it in the end, even after an error."""
        service, owner = service_of(scope), scope["state"]["owner"]
        service.refuse_if_all_busy()
        body = await read(Request(scope, receive), TokensRequest)
        service = await service.reach(body.model)
        with service.admission.admitted(owner, 1):
            await until_disconnect(receive, _respond(service, owner, body, send))


async def _respond(service: Service, owner: bytes, body: TokensRequest, send: Send) -> None:
    seed = secrets.randbelow(SEEDS) if body.sampling_params.seed is None else body.sampling_params.seed % SEEDS
    choice = ChoiceInput(body.token_ids, _sampling(service, body), seed, adapter=service.adapter)
    outputs = await service.worker.submit([choice], owner, salt(owner, body.cache_salt))
    (request,), finish = outputs.requests, None
    try:
        while finish is None:
            for _, delta in await outputs.next():
                service.metrics.observe(request, delta.new, delta.gap, delta.finish, service.options.name)
                finish = delta.finish
    finally:
        service.worker.cancel(outputs)
    # in a thread, since the expert ids of thousands of tokens take megabytes
    content = await asyncio.to_thread(_content, body, request, outputs.versions)
    await JSONResponse(content)({"type": "http"}, _no_body, send)


def _sampling(service: Service, body: TokensRequest) -> SamplingParams:
    p, room = body.sampling_params, service.engine.capacity - len(body.token_ids)
    narrows = p.top_k > 0 or p.top_p < 1 or p.min_p > 0
    return SamplingParams(
        p.temperature,
        max(1, room) if p.max_tokens is None else p.max_tokens,
        max(0, p.top_k),
        p.top_p,
        p.min_p,
        stop_token_ids=tuple(p.stop_token_ids or ()),
        ignore_eos=p.ignore_eos,
        return_sampling_mask=narrows and p.logprobs is not None,
    )


def _content(body: TokensRequest, request: EngineRequest, versions: Sequence[tuple[str, int]]) -> dict[str, Any]:
    made, asked = request.completion(), body.sampling_params
    stopped_by = made.tokens[-1] if made.finish_reason == "stop" else None
    choice: dict[str, Any] = {
        "index": 0,
        "token_ids": made.tokens,
        "finish_reason": made.finish_reason,
        "stop_reason": stopped_by if stopped_by in (asked.stop_token_ids or ()) else None,
        "logprobs": None,
        "routed_experts": None if made.routed_experts is None else npy.to_text(made.routed_experts),
        "sampling_mask": None if made.sampling_mask is None else [ids.tolist() for ids in made.sampling_mask],
        "weight_versions": _spans(versions, len(made.tokens)),
    }
    if asked.logprobs is not None:
        pairs = zip(made.tokens, made.logprobs, strict=True)
        own = [{"token_id": token, "logprob": logprob, "rank": None} for token, logprob in pairs]
        choice["logprobs"] = {"content": [each | {"top_logprobs": [each]} for each in own]}
    return {
        "request_id": body.request_id or f"generate-{secrets.token_hex(12)}",
        "model": body.model,
        "choices": [choice],
        "prompt_token_ids": body.token_ids if body.return_token_ids else None,
        "usage": usage([request]),
    }


def _spans(versions: Sequence[tuple[str, int]], count: int) -> list[dict[str, Any]]:
    """Which weights generated which of `count` tokens, without versions that generated none."""
    ends = [*(start for _, start in versions[1:]), count]
    spans = [(v, start, min(end, count)) for (v, start), end in zip(versions, ends, strict=True)]
    return [{"version": v, "start": start, "end": end} for v, start, end in spans if start < end]


def routes() -> list[Route]:
    """The route of token generation, for trainers."""
    return [Route("/inference/v1/generate", TokenGeneration(), methods=["POST"])]


async def _no_body() -> Any:
    raise AssertionError("a JSON response reads nothing")
