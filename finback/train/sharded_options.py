"""Options of a sharded trainer: those knobs of a stage that concern computing and updating."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from finback.checkpoint.shares import Share
from finback.kernels.formats import round_mxfp4
from finback.model.config import ModelConfig
from finback.model.dsa_training import is_taught
from finback.model.fp4 import Qat, is_expert_stack, round_indexers, use_fp4
from finback.model.recompute import Policy, use_recompute
from finback.model.transformer import Transformer
from finback.parallel.shard import ShardedParameter, like, local
from finback.train.optim import MuonForm
from finback.train.precision import ExpertKernel, dtype_of, use_expert_kernel, use_fp8


@dataclass(frozen=True)
class ShardedOptions:
    """The knobs of Pretrain with the same names."""

    # optimizer of the hidden matrices; AdamW trains the rest
    optimizer: Literal["muon", "adamw"] = "muon"
    # Muon's orthogonalization
    muon_form: MuonForm = "jordan"
    # weight decay of hidden matrices
    weight_decay: float = 0.05
    compute: Literal["fp32", "bf16", "fp8"] = "fp32"
    # rounding of routed experts and of V4's indexers
    qat: Qat = "none"
    # decay of the moving average of the weights; 0: none
    ema_decay: float = 0.0
    recompute: Policy = "none"
    # auto is the loop: ranks have different experts and tokens, and nothing is timed
    expert_kernel: ExpertKernel = "auto"
    compile: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of activations between operators."""
        return dtype_of(self.compute)

    def put_on(self, model: Transformer) -> Transformer:
        """Applies the options to a model, in place: a blank one, or some pipeline stages, before its parameters are sharded.

        Indexers that are not trained are frozen, since no loss reaches them.
        """
        for name, parameter in model.named_parameters() if not is_taught(model) else ():
            if ".indexer." in name:
                parameter.requires_grad_(False)
        if self.compute == "fp8":
            use_fp8(model)
        elif self.expert_kernel == "grouped_mm":
            use_expert_kernel(model, self.expert_kernel)
        if self.qat != "none":
            use_fp4(model)
        use_recompute(model, self.recompute)
        if self.compile:
            from finback.train import compiling  # its imports take seconds

            compiling.compile_blocks(model)
        return model

    def whole(self, config: ModelConfig) -> Transformer:
        """A whole model without values, for an engine; the values that `read` returns are rounded already."""
        model = replace(self, qat="none").put_on(Transformer(config, self.dtype))
        return model if self.qat == "none" else round_indexers(model)

    def read(self, part: ShardedParameter) -> Tensor:
        """This rank's share of a parameter as passes compute with it."""
        if self.qat == "none" or not is_expert_stack(part.name, part.value.shape):
            return part.value
        return like(round_mxfp4(local(part.value.detach())), part.value)  # shares have whole rows

    def written(self, shares: Iterable[Share]) -> list[Share]:
        """This rank's shares for files, with the numbers that passes compute with."""
        if self.qat == "none":
            return list(shares)
        rounding = lambda s: is_expert_stack(s.name, s.shape)  # noqa: E731
        return [replace(s, local=round_mxfp4(s.local.detach())) if rounding(s) else s for s in shares]
