"""Training on this machine's cores: memory from what autograd stores, time from calibration.

Both follow finback's trainer (stages/pretrain.py) with the whole model on every rank: fp32 masters, all gradients in one
buffer, Muon or AdamW for matrices, AdamW for the rest, one thread per rank, rows divided among ranks, and
the C++ kernels between products; without a compiler SwiGLU and attention store a little more.
tests/test_plan_here.py checks the formulas against the trainer.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from finback.kernels.attention import LONGEST, stores_scores
from finback.kernels.moe_gemm import BLOCK_MULTIPLE
from finback.model.config import CSA, HCA, ModelConfig
from finback.model.count import parameters, token_flops
from finback.model.recompute import Policy
from finback.planner.workload import Optimizer
from finback.train.loss import CHUNK
from finback.train.optim import MUON_FORMS, MuonForm
from finback.train.precision import dtype_of

# bytes of one compiled product, measured: torch 2.13 on an EPYC, 0.7 to 1.0 MB
COMPILED = 0.75e6
# number of products that oneDNN caches
MOST_COMPILED = 1024


@dataclass(frozen=True)
class Shape:
    """A training step on one rank."""

    model: ModelConfig
    # rows on this rank
    rows: int
    length: int
    compute: str = "fp32"
    ranks: int = 1
    recompute: Policy = "none"
    optimizer: Optimizer = "muon"
    muon_form: MuonForm = "jordan"
    # dtype of hidden matrices
    weights: str = "fp32"

    @property
    def newton_schulz_steps(self) -> int:
        """Newton-Schulz steps of Muon's orthogonalization."""
        return len(MUON_FORMS[self.muon_form].steps)

    @property
    def tokens(self) -> int:
        """Tokens in this rank's rows."""
        return self.rows * self.length

    @property
    def width(self) -> int:
        """Bytes per activation value."""
        return 4 if self.compute == "fp32" else 2


def attention_matrices(c: ModelConfig, layer: int = 0) -> list[tuple[int, int]]:
    """(rows, columns) of the matrices of one layer's attention."""
    d, heads = c.hidden_size, c.num_attention_heads
    if c.attention == "compressed":
        return _compressed_matrices(c, layer)
    if c.attention == "gqa":
        return [(heads * c.head_dim, d), (2 * c.num_key_value_heads * c.head_dim, d), (d, heads * c.head_dim)]
    query = [] if c.q_lora_rank is None else [(c.q_lora_rank, d)]
    return [
        *query,
        (heads * c.qk_head_dim, c.q_lora_rank or d),
        (c.kv_lora_rank + c.qk_rope_head_dim, d),
        (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank),
        (d, heads * c.v_head_dim),
    ]


def _compressed_matrices(c: ModelConfig, layer: int) -> list[tuple[int, int]]:
    """The matrices of V4's attention and of its two mixtures of streams."""
    d, q, heads, kind = c.hidden_size, c.q_lora_rank or 0, c.num_attention_heads * c.head_dim, c.layer_type(layer)
    found = [(q, d), (heads, q), (c.head_dim, d), (c.o_groups * c.o_lora_rank, heads // c.o_groups)]
    found += [(d, c.o_groups * c.o_lora_rank)] + 2 * [(c.hc_mult * (2 + c.hc_mult), c.hc_mult * d)]
    if kind == HCA:
        found += 2 * [(c.head_dim, d)]
    if kind == CSA:
        found += 2 * [(2 * c.head_dim, d)] + 2 * [(2 * c.index_head_dim, d)]
        found += [(c.index_n_heads * c.index_head_dim, q), (c.index_n_heads, d)]
    return found


def matrices(c: ModelConfig) -> list[tuple[int, int, int]]:
    """(count, rows, columns) of every parameter that Muon updates, with expert stacks as single matrices."""
    d, found = c.hidden_size, []
    for layer in range(c.num_hidden_layers + c.num_nextn_predict_layers):
        found += [(1, a, b) for a, b in attention_matrices(c, layer)]
        widths = [(1, c.intermediate_size)]
        if c.is_moe(layer):
            widths = [(c.n_routed_experts, c.moe_intermediate_size)]
            widths += [(1, c.n_shared_experts * c.moe_intermediate_size)] if c.n_shared_experts else []
        for number, width in widths:
            found += [(number, 2 * width, d), (number, d, width)]
        if layer >= c.num_hidden_layers:
            found += [(2, d, d)] if c.hc_mult else [(1, d, 2 * d)]
    return found


def muon_parameters(c: ModelConfig) -> int:
    """Parameters that Muon updates; AdamW updates the rest."""
    return sum(number * a * b for number, a, b in matrices(c))


def saved_bytes(shape: Shape) -> float:
    """Bytes that autograd stores between forward and backward, besides parameters."""
    c, n, a = shape.model, shape.tokens, shape.width
    total = sum(_layer_bytes(shape, moe) for moe in _layers(c))
    depths = c.num_nextn_predict_layers
    total += (1 + depths) * (n * (2 * a * c.hidden_size + 4) + 4 * c.vocab_size * c.hidden_size)  # norm, loss
    total += depths * n * (4 * a * c.hidden_size + 8)  # MTP's two norms and its concatenated input
    if shape.compute != shape.weights:  # weights are cast, and the cast is stored unless its product is recomputed
        cast = {
            "none": muon_parameters(c),
            "attention": muon_parameters(c)
            - sum(a * b for layer in range(len(_layers(c))) for a, b in attention_matrices(c, layer)),
            "block": depths * 2 * c.hidden_size**2,
        }
        total += 2 * cast[shape.recompute]
    return total


def _layers(c: ModelConfig) -> list[bool]:
    """For each layer, MTP's included, whether it is a mixture of experts."""
    return [c.is_moe(layer) for layer in range(c.num_hidden_layers + c.num_nextn_predict_layers)]


def _layer_bytes(shape: Shape, moe: bool) -> float:
    """Bytes stored for one block."""
    c, a = shape.model, shape.width
    d, heads = c.hidden_size, c.num_attention_heads
    if shape.recompute == "block":
        return shape.tokens * a * d
    if shape.recompute == "attention":  # the norm's input and output, from which attention is recomputed
        saved = a * 2 * d + 4
    elif c.attention == "mla":
        query = 2 * (c.q_lora_rank or 0)
        latent = 2 * c.kv_lora_rank + c.qk_rope_head_dim
        saved = a * (2 * d + query + latent + heads * 2 * (c.qk_head_dim + c.v_head_dim)) + 4 * 4
        saved += heads * shape.length * a if shape.length <= LONGEST else 0
    elif c.attention == "compressed":  # plus the window's scores and the streams that each part writes
        seen = shape.length + c.sliding_window if c.sliding_window else shape.length
        saved = a * (2 * d + 3 * c.num_attention_heads * c.head_dim + 8 * c.head_dim + 6 * c.hc_mult * d)
        saved += 3 * 4 * heads * min(seen, shape.length)
    else:
        both = heads + c.num_key_value_heads
        saved = a * 2 * (d + c.head_dim * both) + 4 * 2
        if stores_scores(dtype_of(shape.compute), shape.length, heads != c.num_key_value_heads):
            saved += a * heads * shape.length
        else:  # torch's kernel also stores its output, by head, and the normalizers
            saved += a * c.head_dim * heads + 4 * heads
        if c.qk_norm:
            saved += (a * c.head_dim + 4) * both
    saved += 2 * a * d
    if not moe:
        return shape.tokens * (saved + 3 * a * c.intermediate_size)
    k = c.num_experts_per_tok
    saved += a * (3 * c.n_shared_experts * c.moe_intermediate_size + k * 2 * (d + c.moe_intermediate_size))
    saved += 4 * 2 * c.n_routed_experts + 16 * k
    if shape.compute == "fp32":
        return shape.tokens * saved
    # the router reads an fp32 copy, shared experts read the norm's output; plus padding rows of the experts' blocks
    saved += 4 * d - (0 if c.n_shared_experts else a * d)
    filled = c.n_routed_experts * BLOCK_MULTIPLE / 2
    return shape.tokens * saved + filled * a * 2 * (d + c.moe_intermediate_size)


@dataclass(frozen=True)
class RankMemory:
    """Peak bytes of one rank's process."""

    # Python, torch and their libraries, as measured by calibration
    process: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    # temporary memory: the larger of the backward pass's and Muon's
    working: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return sum(getattr(self, field.name) for field in dataclasses.fields(self))


def memory(shape: Shape, process: float) -> RankMemory:
    """Peak memory of one rank of a Pretrain stage."""
    c = shape.model
    p = parameters(c)
    muon = muon_parameters(c) if shape.optimizer == "muon" else 0
    # directions, updates, and one group in progress; blocks freed by the backward pass are too small for these
    at_update = 4 * 2 * muon + 3 * max(_groups(c).values(), default=0) if muon else 0
    whole = dataclasses.replace(shape, recompute="none")
    # stored while a layer is recomputed
    again = max(_layer_bytes(whole, moe) - _layer_bytes(shape, moe) for moe in _layers(c))
    working = max(_backward_bytes(c) + again, at_update) + _compiled_bytes(shape)
    weights = 4.0 * p - (2.0 * muon_parameters(c) if shape.weights == "bf16" else 0.0)
    return RankMemory(process, weights, 4.0 * p, 4.0 * muon + 8.0 * (p - muon), saved_bytes(shape), working)


def _compiled_bytes(shape: Shape) -> float:
    """Memory of bf16 products that oneDNN has compiled: six for each size of an expert's block of rows.

    Before routers are balanced an expert may get every token, so every possible size occurs.
    """
    if shape.compute == "fp32" or not any(_layers(shape.model)):
        return 0.0
    return COMPILED * min(6 * math.ceil(shape.tokens / BLOCK_MULTIPLE), MOST_COMPILED)


def _backward_bytes(c: ModelConfig) -> float:
    """Temporary memory of a backward pass: gradients of embedding, head and one layer's experts, and logits."""
    stacks = max((4 * n * a * b for n, a, b in matrices(c)), default=0)
    return 2 * 4 * c.vocab_size * c.hidden_size + 2 * stacks + 4 * CHUNK * c.vocab_size


def _groups(c: ModelConfig) -> dict[tuple[int, int], int]:
    """Bytes of all matrices of each shape: Newton-Schulz processes them as one batch."""
    groups: Counter[tuple[int, int]] = Counter()
    for number, a, b in matrices(c):
        groups[a, b] += 4 * number * a * b
    return groups


def newton_schulz_flops(c: ModelConfig, ranks: int, steps: int = len(MUON_FORMS["jordan"].steps)) -> float:
    """FLOPs of one rank's share of Muon's orthogonalization."""
    total = 0.0
    for (a, b), size in _groups(c).items():
        short, long_ = min(a, b), max(a, b)
        mine = math.ceil(size / (4 * a * b) / ranks)
        total += mine * steps * (4 * short * short * long_ + 2 * short**3)
    return total


def passes(shape: Shape) -> dict[str, float]:
    """The amounts of work in a forward and backward pass; calibration finds the seconds per unit."""
    c, layers = shape.model, _layers(shape.model)
    # causal attention over short rows computes the full square
    context = shape.length if shape.length <= LONGEST else shape.length / 2
    terms = token_flops(c, context, mtp=True)
    # cost in forward passes of the products of attention, feed-forward and both ends
    attention, feed_forward = 3 + (shape.recompute != "none"), 3 + (shape.recompute == "block")
    linear = attention * terms.attention_linear + 3 * (terms.head + terms.join)
    linear += feed_forward * (terms.dense + terms.experts + terms.shared + terms.router)
    chunks = (1 + c.num_nextn_predict_layers) * (math.ceil(shape.tokens / CHUNK) + 2)
    return {
        "products": shape.tokens * linear,
        "experts": feed_forward * shape.tokens * terms.experts,  # their extra cost compared with other products
        "attention": attention * shape.tokens * terms.attention_scores,
        "head": chunks * c.vocab_size * c.hidden_size,  # its gradient is accumulated chunk by chunk
        "saved": saved_bytes(dataclasses.replace(shape, recompute="none")),
        "blocks": sum(layers) * min(c.n_routed_experts, shape.tokens * c.num_experts_per_tok),
        "parameters": parameters(c),  # zeroing and accumulating gradients, casting masters to bf16
        "layers": len(layers),
    }


def update(shape: Shape) -> dict[str, float]:
    """The amounts of work in a parameter update."""
    c = shape.model
    if shape.optimizer == "adamw":
        return {"parameters": parameters(c)}
    return {
        "newton_schulz": newton_schulz_flops(c, shape.ranks, shape.newton_schulz_steps),
        "muon": muon_parameters(c),
        "parameters": parameters(c),
        "groups": len(_groups(c)) * shape.newton_schulz_steps,
    }


def exchanged_bytes(shape: Shape) -> float:
    """Bytes that ranks all-reduce in a step: gradients and Muon's updates."""
    muon = muon_parameters(shape.model) if shape.optimizer == "muon" else 0
    return 4.0 * (parameters(shape.model) + muon) if shape.ranks > 1 else 0.0


def seconds(shape: Shape, measured: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Seconds of a step by part; `measured` has the calibrated seconds per unit, by part and dtype."""
    exchange, found = measured["exchange"], {}
    for part, work in (("passes", passes(shape)), ("update", update(shape))):
        costs = measured[f"{part}_{shape.compute}"]
        found[part] = sum(costs.get(name, 0.0) * value for name, value in work.items())
    return found | {
        "exchange": exchange["fixed"] + exchange["byte"] * exchanged_bytes(shape) if shape.ranks > 1 else 0.0
    }
