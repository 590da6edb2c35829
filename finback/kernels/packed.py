"""Linear maps for a model that only answers, in the layouts that torch's CPU kernels read fastest.

bf16 goes through oneDNN's blocked layout, so that a product with few rows runs at the speed of memory; int8 keeps one
scale per output (weights only, rounded to nearest), which halves what a single token has to read once more.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["bf16", "int8"]
FEW = 32  # rows up to which torch's int8 product is faster than dequantizing the weight for a bf16 one


class PackedLinear(nn.Module):
    """y = W x (+ b) for weights (out, in) stacked over one another; for inference alone, bf16 in and out.

    The stack lets products of the same input run as one.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], form: Form) -> None:
        super().__init__()
        self.form, self.outputs = form, [w.size(0) for w in weights]
        weight = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()
        given = [b for b in biases if b is not None]
        assert len(given) in (0, len(weights)), "all of a stack have a bias, or none has"
        self.bias = torch.cat(given).detach().to(torch.bfloat16) if given else None
        if form == "int8":
            fp32 = weight.float()
            scale = fp32.abs().amax(dim=1).clamp(min=1e-12) / 127
            self.weight = (fp32 / scale[:, None]).round().to(torch.int8)
            self.scale = scale.to(torch.bfloat16)
        else:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(torch.bfloat16).contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) in bf16 -> (..., sum of outputs)."""
        if self.form == "bf16":
            packed: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
            return packed
        rows = x.reshape(-1, x.size(-1))
        # torch's kernel reads past the end of sizes that do not fill its vectors
        if rows.size(0) <= FEW and rows.size(1) % 32 == 0 and self.weight.size(0) % 32 == 0:
            y = torch._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)).mul_(self.scale)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in), for int8 only: oneDNN's layout cannot be read back."""
        assert self.form == "int8", "a weight in oneDNN's layout cannot be read back"
        return self.weight.to(dtype) * self.scale.to(dtype)[:, None]


def available(form: Form) -> bool:
    """Whether this build of torch has the kernels for it on a CPU."""
    if form == "bf16":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return hasattr(torch, "_weight_int8pack_mm")
