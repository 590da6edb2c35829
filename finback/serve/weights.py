"""Weight updates of a running server: SGLang's POST /update_weights_from_disk, if the server was started with it allowed."""

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
    """Loads other weights next to the current ones, then switches to them; on failure nothing changes.

    Running requests continue with them. The prompt cache is cleared.
    """
    service = service_of(request.scope)
    allowed = service.options.allow_weight_updates
    if allowed is None:
        raise ApiError(403, "weight updates are off; start the server with --allow-weight-updates FOLDER")
    body = await read(request, UpdateWeightsRequest)
    service = service.named(body.model)
    path = Path(body.model_path).resolve()
    if not path.is_relative_to(allowed.resolve()):
        raise bad(f"not inside {allowed}, the folder of --allow-weight-updates", "model_path")
    if isinstance(service.engine, UpstreamEngine):
        raise ApiError(403, "external engines keep their weights")
    if isinstance(service.engine.model, MultiLoraTransformer):
        raise bad("adapters depend on the served weights; serve without --adapter", "model")
    version = body.weight_version or path.name
    async with service.updating:
        model = await _read(path, service)
        await service.worker.use(model, version)
    return JSONResponse({"success": True, "message": "The weights are in use.", "weight_version": version})


async def _read(path: Path, service: Service) -> Transformer:
    # a thread that ends; for the reason see server.run
    with ThreadPoolExecutor(1) as reader:
        try:
            model = await asyncio.wrap_future(reader.submit(load_for_inference, path, _dtype(service)))
        except (UserError, OSError) as error:
            raise bad(f"the weights cannot be read: {error}", "model_path") from None
    engine = service.engine
    assert isinstance(engine, Engine), "checked before"
    served = engine.model
    if model.config != served.config or model.compute != served.compute:
        raise bad("its shape or precision differs from the served model", "model_path")
    return model


def _dtype(service: Service) -> InferenceDtype:
    """The dtype of the served model: "auto" might choose another for files of another size."""
    asked = service.options.dtype
    if asked != "auto":
        return asked
    engine = service.engine
    return "bf16" if isinstance(engine, Engine) and engine.model.compute == torch.bfloat16 else "fp32"


def routes() -> list[Route]:
    """The route by which a trainer replaces weights."""
    return [Route("/update_weights_from_disk", update_weights, methods=["POST"])]
