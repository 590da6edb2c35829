"""Options of a sharded trainer: those knobs of a stage that concern computing and updating."""

from dataclasses import dataclass
from typing import Literal

import torch

from finback.model.dsa_training import is_taught
from finback.model.recompute import Policy, use_recompute
from finback.model.transformer import Transformer
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
        use_recompute(model, self.recompute)
        if self.compile:
            from finback.train import compiling  # seconds of imports that only it needs

            compiling.compile_blocks(model)
        return model
