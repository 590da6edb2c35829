"""Other weights for a server that runs: SGLang's POST /update_weights_from_disk, where the server was started for it."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from finback.checkpoint.inference import InferenceDtype, load_for_inference
from finback.config import UserError
from finback.engine.engine import Engine
from finback.model.multi_lora import MultiLoraTransformer
from finback.model.transformer import Transformer
from finback.serve.body import read
from finback.serve.errors import ApiError, bad
from finback.serve.service import Service, service_of
from finback.serve.trainer_protocol import UpdateWeightsRequest
from finback.serve.upstream import UpstreamEngine


async def update_weights(request: Request) -> Response:
    """Read other weights beside those that answer, then go on with them; on failure nothing has changed.

    Requests under way go on with them too. What is cached of prompts is forgotten.
    """
    service = service_of(request.scope)
    allowed = service.options.allow_weight_updates
    if allowed is None:
        raise ApiError(403, "weights stay as they are; start the server with --allow-weight-updates FOLDER")
    body = await read(request, UpdateWeightsRequest)
    service = service.named(body.model)
    path = Path(body.model_path).resolve()
    if not path.is_relative_to(allowed.resolve()):
        raise bad(f"not within {allowed}, which --allow-weight-updates names", "model_path")
    if isinstance(service.engine, UpstreamEngine):
        raise ApiError(403, "the engines elsewhere keep their weights")
    if isinstance(service.engine.model, MultiLoraTransformer):
        raise bad("adapters lie on the weights that are served; serve them without --adapter", "model")
    version = body.weight_version or path.name
    async with service.updating:
        model = await _read(path, service)
        await service.worker.use(model, version)
    return JSONResponse({"success": True, "message": "The weights are in use.", "weight_version": version})


async def _read(path: Path, service: Service) -> Transformer:
    # a thread that ends: see server.run
    with ThreadPoolExecutor(1) as reader:
        try:
            model = await asyncio.wrap_future(reader.submit(load_for_inference, path, _dtype(service)))
        except (UserError, OSError) as error:
            raise bad(f"the weights cannot be read: {error}", "model_path") from None
    engine = service.engine
    assert isinstance(engine, Engine), "looked at before"
    served = engine.model
    if model.config != served.config or model.compute != served.compute:
        raise bad("a model of another shape or precision than the one that is served", "model_path")
    return model


def _dtype(service: Service) -> InferenceDtype:
    """That of the model which is served: "auto" might mean another one for files of another size."""
    asked = service.options.dtype
    if asked != "auto":
        return asked
    engine = service.engine
    return "bf16" if isinstance(engine, Engine) and engine.model.compute == torch.bfloat16 else "fp32"


def routes() -> list[Route]:
    return [Route("/update_weights_from_disk", update_weights, methods=["POST"])]
