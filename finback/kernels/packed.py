"""Linear maps for inference, in the layouts that torch's CPU kernels read fastest.

bf16 uses oneDNN's blocked layout, with which a product of few rows is limited by memory bandwidth. int8 quantizes the
weights with one scale per output, which halves the bytes that a token reads.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Form = Literal["bf16", "int8"]
FEW = 32  # up to this many rows, torch's int8 product is faster than a bf16 product with the dequantized weight


class PackedLinear(nn.Module):
    """y = W x (+ b) for weights (out, in) stacked along `out`; for inference only, bf16 in and out.

    Stacking turns several products of one input into one.
    """

    def __init__(self, weights: Sequence[Tensor], biases: Sequence[Tensor | None], form: Form) -> None:
        super().__init__()
        self.form, self.outputs = form, [w.size(0) for w in weights]
        weight = torch.cat([w.detach() for w in weights]) if len(weights) > 1 else weights[0].detach()
        given = [b for b in biases if b is not None]
        assert len(given) in (0, len(weights)), "either all maps of a stack have a bias or none has"
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
        # torch's kernel reads out of bounds if a size is not a multiple of its vector length
        if rows.size(0) <= FEW and rows.size(1) % 32 == 0 and self.weight.size(0) % 32 == 0:
            y = torch._weight_int8pack_mm(rows.contiguous(), self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)).mul_(self.scale)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (out, in); int8 only, since oneDNN's layout cannot be read back."""
        assert self.form == "int8", "a weight in oneDNN's layout cannot be read back"
        return self.weight.to(dtype) * self.scale.to(dtype)[:, None]


def available(form: Form) -> bool:
    """Whether this build of torch has CPU kernels for the form."""
    if form == "bf16":
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return hasattr(torch, "_weight_int8pack_mm")
