"""One finback engine of a fleet, as it runs on a Ray worker without a trainer. Importing it does not need Ray."""

import os
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from finback.client import RequestFailed
from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import Completion, SamplingParams
from finback.model.config import ModelConfig
from finback.model.layers import RMSNorm
from finback.model.moe import Router
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.parallel.served_weights import whole_copy
from finback.rollouts.live_engine import LiveEngine
from finback.runs import provenance

# tensors as numpy arrays; bf16 as int16
Packed = dict[str, np.ndarray]


class FleetEngine:
    """Created on the worker; its methods may be called from several threads."""

    def __init__(
        self, config: ModelConfig, compute: torch.dtype, dtype: torch.dtype, engine: EngineConfig, threads: int
    ) -> None:
        """compute: dtype of activations. dtype: of the matrices. threads: CPU threads, at most one fewer than cores."""
        torch.set_num_threads(threads)
        self.model, self.engine = (config, compute, dtype), engine
        # None before the first weights, and while asleep
        self.live: LiveEngine | None = None

    def software(self) -> dict[str, str]:
        """Versions that must equal the trainer's."""
        return provenance.software()

    def pid(self) -> int:
        """pid of its process."""
        return os.getpid()

    def load(self, weights: Packed, version: int, drop: bool) -> None:
        """Switches to other weights; answers in progress continue with them, or restart (drop)."""
        if self.live is None:
            model, _ = whole_copy(*self.model, World())
            # each request carries its own end-of-sequence tokens
            self.live = LiveEngine(Engine(model, (), self.engine))
        self.live.take(lambda model: unpack(model, weights), version, drop)

    def sleep(self) -> None:
        """Releases weights and cache until new weights arrive."""
        if self.live is not None:
            self.live.close()
            self.live = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def answers(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int], patience: float
    ) -> Iterator[tuple[int, Completion] | None]:
        """Yields (place, answer) as each is done; None, as a sign of life, after `patience` seconds without an answer."""
        if self.live is None or self.live.version < 0:  # another rank asked an engine that has just been started
            raise RequestFailed("has no weights yet")
        yield from self.live.answers(prompts, sampling, seeds, patience)


def pack(model: Transformer, dtype: torch.dtype) -> Packed:
    """A model's weights for `unpack`, without MTP modules: matrices in dtype, the rest unchanged."""
    kept = {id(p) for m in model.modules() if isinstance(m, RMSNorm | Router) for p in m.parameters(recurse=False)}
    found: Packed = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name.startswith("mtp."):
            continue
        exact = id(tensor) in kept or not isinstance(tensor, torch.nn.Parameter)
        value = tensor.detach().to("cpu", tensor.dtype if exact else dtype).contiguous()
        found[name] = (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
    return found


@torch.no_grad()
def unpack(model: Transformer, weights: Packed) -> None:
    """Writes weights of `pack` into a model."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        value: Tensor = torch.from_numpy(weights[name].copy())  # Ray's shared memory is read-only
        tensor.copy_(value.view(torch.bfloat16) if value.dtype == torch.int16 else value)
