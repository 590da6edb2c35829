"""Exponential moving average of a model's weights (V3 3.2.3): smoother than the weights, and usable before the decay."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

CPU = torch.device("cpu")


class EMA:
    """w̄ <- decay · w̄ + (1 - decay) · w for tensors by name, in fp32 on `device`."""

    def __init__(self, named: Sequence[tuple[str, Tensor]], decay: float, device: torch.device = CPU) -> None:
        self.decay, self.tensors = decay, [t.detach() for _, t in named]
        self.names = [name for name, _ in named]
        self.averages = [t.to(device, torch.float32, copy=True) for t in self.tensors]

    @torch.no_grad()
    def update(self) -> None:
        """Updates the average from the current tensors."""
        now = [t.to(average.device, torch.float32) for t, average in zip(self.tensors, self.averages, strict=True)]
        torch._foreach_lerp_(self.averages, now, 1 - self.decay)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Swaps the tensors with their average, in place and bit-exact, for as long as the context lasts."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for tensor, average in zip(self.tensors, self.averages, strict=True):
            assert tensor.dtype == torch.float32, "swapping must not round"
            before = tensor.clone()
            tensor.copy_(average)
            average.copy_(before)

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint."""
        return {f"average.{name}": t for name, t in zip(self.names, self.averages, strict=True)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores the average from a checkpoint."""
        for name, t in self.state().items():
            t.copy_(tensors[name])
