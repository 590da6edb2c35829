"""The running average of a model's weights (V3 3.2.3): steadier than the weights themselves, ready before the decay."""

import copy

import torch
from torch import Tensor

from finback.model.transformer import Transformer


class EMA:
    """w̄ <- decay · w̄ + (1 - decay) · w for every parameter, in fp32 on the CPU."""

    def __init__(self, model: Transformer, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p.detach().float().cpu().clone() for n, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: Transformer) -> None:
        """Take the model's weights into the average."""
        now = [p.detach().float().cpu() for p in model.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), now, 1 - self.decay)

    def model(self, model: Transformer) -> Transformer:
        """A copy of `model` with the averaged weights; buffers, the routers' biases among them, are its own."""
        averaged = copy.deepcopy(model)
        with torch.no_grad():
            for name, p in averaged.named_parameters():
                p.copy_(self.weights[name])
        return averaged

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps."""
        return {f"average.{name}": t for name, t in self.weights.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take the average back from a checkpoint."""
        for name, t in self.weights.items():
            t.copy_(tensors[f"average.{name}"])
