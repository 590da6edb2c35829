"""One engine of a fleet, as it runs on a Ray worker: finback's own, beside no trainer. Ray is not needed to import it."""

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

# tensors as numpy holds them, those of bf16 as int16
Packed = dict[str, np.ndarray]


class FleetEngine:
    """Made on the worker; its methods may be called by several threads."""

    def __init__(
        self, config: ModelConfig, compute: torch.dtype, dtype: torch.dtype, engine: EngineConfig, threads: int
    ) -> None:
        """compute: of activations. dtype: of the matrices. threads: of the CPU, one less than it has cores at most."""
        torch.set_num_threads(threads)
        self.model, self.engine = (config, compute, dtype), engine
        # none before the first weights, and while it sleeps
        self.live: LiveEngine | None = None

    def software(self) -> dict[str, str]:
        """Versions that have to be the trainer's."""
        return provenance.software()

    def pid(self) -> int:
        """Of its process."""
        return os.getpid()

    def load(self, weights: Packed, version: int, drop: bool) -> None:
        """Go on with other weights; answers under way with them too, or anew (drop)."""
        if self.live is None:
            model, _ = whole_copy(*self.model, World())
            # what ends an answer comes with each request
            self.live = LiveEngine(Engine(model, (), self.engine))
        self.live.take(lambda model: unpack(model, weights), version, drop)

    def sleep(self) -> None:
        """Let go of weights and cache until other weights come."""
        if self.live is not None:
            self.live.close()
            self.live = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def answers(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int], patience: float
    ) -> Iterator[tuple[int, Completion] | None]:
        """Each answer with its place, as it is done; None as a sign of life after `patience` seconds without one."""
        if self.live is None or self.live.version < 0:  # another rank asks one that has just been started
            raise RequestFailed("has no weights yet")
        yield from self.live.answers(prompts, sampling, seeds, patience)


def pack(model: Transformer, dtype: torch.dtype) -> Packed:
    """A model's weights for `unpack`, without the MTP modules: matrices in dtype, the rest as it is."""
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
    """Write weights of `pack` into a model."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        value: Tensor = torch.from_numpy(weights[name].copy())  # what Ray shares is not to be written
        tensor.copy_(value.view(torch.bfloat16) if value.dtype == torch.int16 else value)
