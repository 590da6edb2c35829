"""How a sharded model computes and is updated: what of a stage's knobs its trainer is told."""

from dataclasses import dataclass
from typing import Literal

import torch

from finback.model.dsa_training import is_taught
from finback.model.recompute import Policy, use_recompute
from finback.model.transformer import Transformer
from finback.train.precision import ExpertKernel, dtype_of, use_expert_kernel, use_fp8


@dataclass(frozen=True)
class ShardedOptions:
    """The knobs of Pretrain that have these names."""

    # for hidden matrices; the rest is AdamW's
    optimizer: Literal["muon", "adamw"] = "muon"
    # of hidden matrices
    weight_decay: float = 0.05
    compute: Literal["fp32", "bf16", "fp8"] = "fp32"
    # of a running average of the weights; 0: none
    ema_decay: float = 0.0
    recompute: Policy = "none"
    # auto is the loop: each rank has experts and tokens of its own, and nothing is timed
    expert_kernel: ExpertKernel = "auto"
    compile: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of what goes from one operator to the next."""
        return dtype_of(self.compute)

    def put_on(self, model: Transformer) -> Transformer:
        """Have a model compute so, in place: a blank one, or some stages of it, before its parameters are shared.

        Indexers that are not taught stay as they are: no loss reaches them.
        """
        for name, parameter in model.named_parameters() if not is_taught(model) else ():
            if ".indexer." in name:
                parameter.requires_grad_(False)
        if self.compute == "fp8":
            use_fp8(model)
        elif self.expert_kernel == "grouped_mm":
            use_expert_kernel(model, self.expert_kernel)
        use_recompute(model, self.recompute)
        if self.compile:
            from finback.train import compiling  # seconds of imports that only it needs

            compiling.compile_blocks(model)
        return model
