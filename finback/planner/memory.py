"""Memory of each rank in training, and what is left for the cache in serving. No torch here.

Bytes per parameter (V3 3.3.3): compute weights 2 (one bf16 copy, or two FP8 ones: Hopper reads a matrix and its transpose
apart), gradients 4, master weights 4, AdamW moments 2 + 2 (Muon: momentum 2). In fp32 the weights are their own
masters and moments are fp32. Activations per token follow from what each policy keeps of a layer:

  none       all that a backward pass reads
  selective  V3's: norms, MLA's up-projections and SwiGLU are done again; FP8 keeps what feeds a product in one byte
             with a scale per 128, attention's output in E5M6
  full       the input of each layer; the layer is done again
"""

from dataclasses import dataclass

from finback.model.config import ModelConfig
from finback.model.count import cache_bytes
from finback.parallel.pipeline_tables import in_flight
from finback.planner.hardware import Fact
from finback.planner.layout import Layout, Optimizer, Precision, Recompute, part_parameters, parts

SCALE = 4 / 128  # an fp32 scale for each 128 numbers in FP8


@dataclass(frozen=True)
class Memory:
    """Bytes on one pipeline rank at its worst moment."""

    weights: float
    gradients: float
    optimizer: float
    activations: float  # of all micro-batches in flight
    working: float  # scores, one layer done again, layers gathered by FSDP
    reserve: float
    in_flight: float  # micro-batches, in stages of mean size

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working + self.reserve


def parameter_bytes(precision: Precision, optimizer: Optimizer) -> tuple[float, float, float]:
    """Bytes per parameter of weights, gradients and optimizer, master weights among the last."""
    moments = 2 if optimizer == "adamw" else 1
    return (4, 4, 4 * moments) if precision == "fp32" else (2, 4, 4 + 2 * moments)


def attention_activation(c: ModelConfig, precision: Precision, recompute: Recompute) -> float:
    """Bytes per token that one layer's attention and its norm keep."""
    a, kept = _widths(precision)
    heads, keep_all = c.num_attention_heads, recompute == "none"
    value = c.v_head_dim if c.attention == "mla" else c.head_dim
    output = heads * value * (1.5 if precision == "fp8" else a) + 4 * heads  # and softmax's normaliser
    total = a * c.hidden_size + output + (kept * c.hidden_size if keep_all else 0)
    if c.attention == "gqa":
        return total + a * c.head_dim * (heads + 2 * c.num_key_value_heads)
    latents = (c.q_lora_rank or 0) + c.kv_lora_rank
    total += a * (latents + c.qk_rope_head_dim)
    if keep_all:
        total += kept * latents + a * heads * (2 * c.qk_head_dim + value)
    elif c.q_lora_rank is None:
        total += a * heads * c.qk_head_dim
    return total


def feed_forward_activation(
    c: ModelConfig, moe: bool, precision: Precision, recompute: Recompute, imbalance: float
) -> float:
    """Bytes per token that a layer's dense or MoE feed-forward and its norm keep; routed experts with the fullest rank's surplus."""
    a, kept = _widths(precision)
    keep_all = recompute == "none"
    total = a * c.hidden_size + (kept * c.hidden_size if keep_all else 0)
    hidden = 3 if keep_all else 2  # gate and up, and their product
    if not moe:
        return total + kept * hidden * c.intermediate_size
    met = c.num_experts_per_tok * (1 + imbalance)
    total += kept * hidden * c.moe_intermediate_size * (met + c.n_shared_experts)
    total += kept * c.hidden_size * met + 4 * c.n_routed_experts  # rows sent to experts; affinities
    return total + (a * c.hidden_size * c.num_experts_per_tok if keep_all else 0)


def layer_activation(c: ModelConfig, moe: bool, precision: Precision, recompute: Recompute, imbalance: float) -> float:
    """Bytes per token that one layer keeps until its backward pass."""
    if recompute == "full":
        return _widths(precision)[0] * c.hidden_size
    return attention_activation(c, precision, recompute) + feed_forward_activation(
        c, moe, precision, recompute, imbalance
    )


def _widths(precision: Precision) -> tuple[float, float]:
    """Bytes of an activation, and of one that is kept to feed a product."""
    return {"fp32": (4.0, 4.0), "bf16": (2.0, 2.0), "fp8": (2.0, 1 + SCALE)}[precision]


def ranks(c: ModelConfig, layout: Layout, known: dict[str, Fact]) -> list[Memory]:
    """Memory of every pipeline rank."""
    name = layout.schedule if layout.pp > 1 else "1f1b"
    moments = in_flight(name, layout.pp, layout.micro_batches)
    pieces = parts(c, layout.stages)
    imbalance = known["imbalance"].value if layout.ep > 1 else 0.0
    tokens = layout.micro_rows * layout.length
    whole, some = (
        {moe: layer_activation(c, moe, layout.precision, policy, imbalance) for moe in (False, True)}
        for policy in ("none", layout.recompute)
    )
    kept = [tokens * sum(some[c.is_moe(layer)] for layer in p.layers) for p in pieces]
    mean = sum(kept) / len(kept)
    found = []
    for rank in range(layout.pp):
        alive = max(sum(count * kept[stage] for stage, count in moment) for moment in moments[rank])
        held = [pieces[stage] for stage in layout.held(rank)]
        both_ends = any(p.embeds for p in held) and any(p.scores for p in held)
        sizes = [part_parameters(c, p, both_ends) for p in held]
        plain, routed = sum(s[0] for s in sizes), sum(s[1] for s in sizes) / layout.ep
        scores = 6 * c.vocab_size * tokens if any(p.scores for p in held) else 0.0  # fp32 and their gradient
        layers = [n for p in held for n in p.layers]
        again = max(whole[c.is_moe(n)] - some[c.is_moe(n)] for n in layers) * tokens
        weights, gradients, optimizer, gathered = _states(layout, plain, routed, len(layers))
        found.append(
            Memory(
                weights, gradients, optimizer, alive, scores + again + gathered, known["reserve"].value, alive / mean
            )
        )
    return found


def _states(layout: Layout, plain: float, routed: float, layers: int) -> tuple[float, float, float, float]:
    """Bytes of weights, gradients, optimizer, and of two layers gathered at a time by FSDP.

    DualPipe's second copy of each stage is one more rank to share the optimizer with.
    """
    per_weight, per_gradient, per_state = parameter_bytes(layout.precision, layout.optimizer)
    copies = 2 if layout.plan.title == "DualPipe" and layout.pp > 1 else 1
    of_plain, of_routed = (1, 1) if layout.zero == 0 else (layout.dp * copies, layout.dp // layout.ep * copies)
    optimizer = per_state * (plain / of_plain + routed / of_routed)
    if layout.zero < 3:
        held = plain + routed
        return per_weight * held, per_gradient * held, optimizer, 0.0
    shared = plain / layout.dp + routed / (layout.dp // layout.ep)
    gathered = 2 * per_weight * (plain + routed) / layers
    return per_weight * shared, per_gradient * shared, optimizer, gathered


@dataclass(frozen=True)
class Serving:
    """What serving takes of each device where experts are shared out over all and the rest is on each."""

    weights: float  # bytes
    cache_bytes_per_token: float
    tokens: float  # that the cache holds on one device
    fits: bool


def serving(c: ModelConfig, devices: int, memory: float, precision: Precision, known: dict[str, Fact]) -> Serving:
    """Weights in one byte for FP8, else two or four; the cache in bf16, beside a tenth left free."""
    width = {"fp32": 4.0, "bf16": 2.0, "fp8": 1 + 4 / 128**2}[precision]
    sizes = [part_parameters(c, p, shared_ends=True) for p in parts(c, 1)]
    over = min(devices, c.n_routed_experts) if c.n_routed_experts else 1
    weights = width * (sizes[0][0] + sizes[0][1] / over)
    free = memory * (1 - known["margin"].value) - known["reserve"].value - weights
    per_token = cache_bytes(c, 4 if precision == "fp32" else 2)
    return Serving(weights, per_token, max(free, 0.0) / per_token, free > 0)
