"""Whether bf16 pays on this machine, for this model: decided by timing real steps; and which products may be in FP8."""

import math
import time
from dataclasses import replace

import torch
from torch import nn

from finback.kernels.fp8_products import Products
from finback.kernels.fp8_train import AFTER_ATTENTION, LINEAR, ROUTED
from finback.model.config import ModelConfig
from finback.model.gqa import GQA
from finback.model.layers import Linear, SwiGLU
from finback.model.mla import MLA
from finback.model.moe import MoE
from finback.model.transformer import Block, Transformer
from finback.train.step import backward

COMPUTE = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rates(config: ModelConfig, rows: int, length: int, device: torch.device) -> dict[str, float]:
    """Tokens per second of forward and backward passes of `rows` rows, per dtype; the fastest of six turns each."""
    width = length + 1 + config.num_nextn_predict_layers
    tokens = torch.randint(config.vocab_size, (rows, width), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(device)
    contestants = {name: Transformer(config, dtype).initialise(0).to(device).train() for name, dtype in COMPUTE.items()}
    best = dict.fromkeys(COMPUTE, math.inf)
    for _ in range(6):  # in turns, so that another program's burst hits both
        for name, model in contestants.items():
            begin = time.perf_counter()
            losses = backward(model, tokens, mtp_weight=0.3, balance_alpha=1e-4)
            losses.main.item()  # a GPU has only been told what to do until something of it is read
            best[name] = min(best[name], time.perf_counter() - begin)
    return {name: rows * length / seconds for name, seconds in best.items()}


def use_fp8(model: Transformer, products: Products | None = None) -> Transformer:
    """Have a model's linear maps multiply in FP8 from now on, in place, as V3 trains (3.3.1, 3.3.3).

    These are the linear maps of attention, the feed-forwards and the experts, those of the MTP module's block included.
    Embedding, head, routers, norms, attention itself and the MTP projection stay as they are, as do the parameters.
    The model's own `compute` is the dtype between operators: bf16 as in the paper. `products` is for comparing forms.
    """
    assert all(p.dtype == torch.float32 for p in model.parameters()), "FP8 training needs fp32 masters"
    for module in model.modules():
        if isinstance(module, Block):
            _use_fp8(module, products)
    return model


def _use_fp8(block: Block, products: Products | None) -> None:
    attention = block.attention
    assert isinstance(attention, MLA | GQA), "an attention that FP8 does not know"
    for name, module in attention.named_children():
        if isinstance(module, Linear):
            numerics = AFTER_ATTENTION if name == "out" else LINEAR
            module.numerics = replace(numerics, products=products)
    feed_forward: nn.Module = block.feed_forward
    if isinstance(feed_forward, MoE):
        feed_forward.numerics = replace(ROUTED, products=products)
        feed_forward = getattr(feed_forward, "shared", feed_forward)
    if isinstance(feed_forward, SwiGLU):
        feed_forward.numerics = replace(LINEAR, products=products)
