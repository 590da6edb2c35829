"""Chooses precision and expert kernel by timing them on this machine for this model; sets up FP8 training and bf16 weights."""

import re
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from finback.config import UserError
from finback.kernels import fp8_train, moe_gemm
from finback.kernels.fp8_products import Products
from finback.kernels.fp8_train import AFTER_ATTENTION, LINEAR, ROUTED, Numerics
from finback.kernels.probe import experts_seconds
from finback.model.fp4 import Qat
from finback.model.layers import GeGLU, Linear, SwiGLU
from finback.model.moe import MoE
from finback.model.replace import recast
from finback.model.transformer import Transformer
from finback.parallel.layout import Layout
from finback.train.optim import is_matrix

ExpertKernel = Literal["auto", "loop", "grouped_mm"]
# dtype of the weights that learn
Weights = Literal["fp32", "bf16"]
# knobs that bf16 weights do not support, and the values that they need
NO_MASTERS: dict[str, Any] = {"layout": None, "adapter": None, "qat": "none", "ema_decay": 0.0, "compile": False}
MARGIN = 1.15  # required speed-up, so that noise does not decide
COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of activations between operators."""
    return torch.float32 if precision == "fp32" else torch.bfloat16


def choose_expert_kernel(model: Transformer, tokens: int) -> Literal["loop", "grouped_mm"]:
    """The faster kernel for a model's routed experts on its device, for passes of `tokens` tokens.

    On a GPU both are timed, and grouped_mm must be clearly faster. On a CPU it is always the loop: grouped_mm does the same
    products in 0.8 to 1.1 of the time, which is noise, and a fixed choice keeps runs reproducible.
    """
    config, device = model.config, model.embed.device
    shape = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
    if device.type != "cuda" or not config.n_routed_experts or not moe_gemm.fits_grouped(*shape[1:], model.compute):
        return "loop"
    seconds = experts_seconds(tokens, config.num_experts_per_tok, shape, model.compute, device)
    return "grouped_mm" if seconds["loop"] > MARGIN * seconds["grouped_mm"] else "loop"


def use_expert_kernel(model: Transformer, kernel: ExpertKernel = "auto", tokens: int = 4096) -> str:
    """Sets the kernel of a model's routed experts, in place, and returns the one used.

    "auto" means `choose_expert_kernel`. The kernels round sums in different orders: to reproduce a run on a GPU, name one.
    """
    kernel = choose_expert_kernel(model, tokens) if kernel == "auto" else kernel
    if kernel == "grouped_mm":
        sizes = model.config.hidden_size, model.config.moe_intermediate_size
        if not moe_gemm.fits_grouped(*sizes, model.compute):
            raise UserError(
                "expert_kernel", kernel, f"experts of {sizes} are not aligned to its rows of 16 bytes", "Use loop."
            )
        for module in model.modules():
            if isinstance(module, MoE) and module.experts is moe_gemm.routed_experts:
                module.experts = moe_gemm.grouped_experts
    return kernel


def check_qat(stage: str, qat: Qat, layout: Layout | None) -> None:
    """Raises UserError if a layout would round weights before FP4 does."""
    if qat != "none" and layout is not None and layout.gather != "fp32":
        problem = f"rounds the weights themselves, and layout.gather rounds them to {layout.gather} before"
        raise UserError(f"{stage}.qat", qat, problem, 'Use gather="fp32".')


def check_weights(stage: Any) -> None:
    """Raises UserError for the first knob of a stage that needs fp32 weights if its own are bf16."""
    for name, usual in NO_MASTERS.items() if stage.weights == "bf16" else ():
        if getattr(stage, name, usual) != usual:
            raise stage.wrong(name, "needs weights in fp32", 'Leave it out, or use weights="fp32".')
    if stage.weights == "bf16" and stage.compute != "bf16":  # else passes would keep larger copies of the weights
        raise stage.wrong("weights", "saves memory only if passes compute in bf16", 'Use compute="bf16".')


@torch.no_grad()
def use_bf16_weights(model: Transformer) -> Transformer:
    """Rounds a model's hidden matrices to bf16, in place, to be trained without fp32 masters; updates round them stochastically.

    Embedding, head, routers, norms and vectors stay fp32, as in FP8 training. A pass sums the gradients of embedding and head
    over tokens and chunks of logits; in bf16 most of a frequent token's gradient would be lost.
    """
    with torch.device("meta"):  # some matrices are fp32 in every model
        bare = dict(Transformer(model.config, param_dtype=torch.bfloat16).named_parameters())
    for name, parameter in model.named_parameters():
        if is_matrix(name, parameter):
            parameter.data = parameter.data.to(bare[name].dtype)
    return model


def use_fp8(model: Transformer, products: Products | None = None) -> Transformer:
    """Makes a model's linear maps multiply in FP8, in place, as V3 trains (3.3.1, 3.3.3).

    These are the linear maps of attention, the feed-forwards and the experts, including those of the MTP module's block.
    Embedding, head, routers, norms, attention scores and the MTP projection are unchanged, and so are the parameters,
    indexers and compressors (V4's release has these two in BF16).
    The model's `compute` is the dtype between operators: bf16 as in the paper. `products` selects the FP8 implementation.
    """
    assert all(p.dtype == torch.float32 for p in model.parameters()), "FP8 training needs fp32 masters"
    if model.config.swiglu_alpha is not None:
        raise UserError("compute", "fp8", "experts with biases cannot be trained in FP8", "Use bf16.")
    apart = re.compile(r"\.(indexer|compressor)\.")
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            assert "experts" not in vars(module), "experts on several ranks do not train in FP8"
            numerics = replace(ROUTED, products=products, limit=model.config.swiglu_limit)
            module.experts = partial(fp8_train.routed_experts, numerics=numerics)
        elif isinstance(module, SwiGLU):
            recast(module, Fp8SwiGLU).numerics = replace(LINEAR, products=products, limit=module.limit)
        elif isinstance(module, GeGLU):
            for part in (module.gate_up, module.down):
                recast(part, Fp8Linear).numerics = replace(LINEAR, products=products)
        elif isinstance(module, Linear) and ".attention." in name and not apart.search(name):
            numerics = AFTER_ATTENTION if name.endswith(".out") else LINEAR
            recast(module, Fp8Linear).numerics = replace(numerics, products=products)
    return model


class Fp8Linear(Linear):
    """A linear map that multiplies in FP8."""

    numerics: Numerics

    def forward(self, x: Tensor) -> Tensor:
        if self.groups is None:
            y = fp8_train.linear(x, self.weight, self.numerics)
        else:  # each group has its own tiles along tokens and inputs
            each = zip(x.unbind(-2), self.weight.chunk(self.groups), strict=True)
            y = torch.cat([fp8_train.linear(part, weight, self.numerics) for part, weight in each], dim=-1)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Fp8SwiGLU(SwiGLU):
    """A feed-forward that multiplies in FP8, as one fused operator."""

    numerics: Numerics

    def forward(self, x: Tensor) -> Tensor:
        return fp8_train.swiglu(x, self.gate_up.weight, self.down.weight, self.numerics)
