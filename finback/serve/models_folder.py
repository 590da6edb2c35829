"""Models in a folder that are loaded when a request names them; the least recently used are unloaded if there are too many."""

import asyncio
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from finback.checkpoint.models import find_model
from finback.config import UserError
from finback.engine.engine import EngineConfig
from finback.engine.open import open_engine
from finback.serve.errors import ApiError, log
from finback.serve.options import ServeOptions

if TYPE_CHECKING:
    from finback.serve.service import Service


class ModelsFolder:
    """The models within `options.models_dir`; used on the event loop of `first`, the model that the server started with."""

    def __init__(self, options: ServeOptions, first: "Service", served: "type[Service]") -> None:
        assert options.models_dir is not None, "no folder"
        self.root, self.options, self.first, self.served = options.models_dir, options, first, served
        self._loaded: list[Service] = []
        self._lock = asyncio.Lock()  # one model is loaded at a time

    def paths(self) -> dict[str, Path]:
        """The models by name."""
        return _models_in(self.root)

    async def load(self, name: str) -> "Service | None":
        """The model of this name, loaded if necessary; None if there is none. ApiError 503 if it does not fit."""
        path = (await asyncio.to_thread(self.paths)).get(name)
        if path is None:
            return None
        async with self._lock:
            if found := next((each for each in self.first.all if name in each.names), None):
                return found
            await self._make_room(name, await asyncio.to_thread(_size, path, self.options.dtype))
            o = self.options
            config = EngineConfig(o.rows, o.tokens, o.chunk, o.reuse, o.speculate, draft=o.draft)
            reader = ThreadPoolExecutor(1)  # a separate thread, for the reason given in server.run
            try:
                loop = asyncio.get_running_loop()
                engine, tokenizer = await loop.run_in_executor(reader, open_engine, path, o.dtype, config)
            except UserError as error:
                raise ApiError(503, f"{name} cannot be read: {error.problem}", "model", "model_unreadable") from None
            finally:
                reader.shutdown(wait=False)
            own = dataclasses.replace(o, model=path, name=name, aliases=(), also=(), lora=())
            service = self.served(engine, tokenizer, own, first=self.first)
            service.worker.start()
            self._loaded.append(service)
            return service

    async def _make_room(self, name: str, needed: int) -> None:
        """Unloads idle models, least recently used first, until their number and the memory allow one more."""
        idle = sorted((s for s in self._loaded if not s.admission.requests), key=lambda s: s.used)
        while idle and (len(self._loaded) >= self.options.models_max or needed > psutil.virtual_memory().available):
            await self._unload(idle.pop(0))
        free = psutil.virtual_memory().available
        log.info("loading %s: about %.2f GB, %.2f GB are free", name, needed / 1e9, free / 1e9)
        if len(self._loaded) >= self.options.models_max:
            raise ApiError(503, f"{len(self._loaded)} models are busy, and no more can be loaded", "model", "busy")
        if needed > free:
            problem = f"{name} takes about {needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free"
            raise ApiError(503, problem, "model", "insufficient_memory", retry_after=30)

    async def _unload(self, service: "Service") -> None:
        log.info("unloading %s", service.options.name)
        self._loaded.remove(service)
        self.first.all.remove(service)
        await service.schemas.close()
        await asyncio.to_thread(service.worker.close)


def with_first(options: ServeOptions) -> ServeOptions:
    """The options with a model: the first of the folder if none is named. UserError if there is none."""
    if options.model is not None:
        return options
    if options.models_dir is None:
        remedy = "Name a run such as runs/tiny, or a folder of models with --models-dir."
        raise UserError("MODEL", "", "nothing to serve", remedy)
    for name, path in _models_in(options.models_dir).items():
        return dataclasses.replace(options, model=path, name=options.name or name)
    raise UserError("--models-dir", str(options.models_dir), "has no models", "Give a folder of run folders or models.")


def _models_in(folder: Path) -> dict[str, Path]:
    """The models in a folder by name. A request's name is looked up here, never turned into a path; symbolic links are not followed."""
    found, root = {}, folder.resolve()
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.resolve().is_relative_to(root):
            continue
        try:
            find_model(path)
        except UserError:  # not a model
            continue
        found[path.stem if path.suffix == ".gguf" else path.name] = path
    return found


def _size(path: Path, dtype: str) -> int:
    """Lower bound of a model's size in bytes, from its files; in fp32, files may be half as large as the model."""
    found = find_model(path)
    files = [found] if found.is_file() else [p for p in found.rglob("*") if p.suffix in (".safetensors", ".gguf")]
    return sum(p.stat().st_size for p in files) * (2 if dtype == "fp32" else 1)
