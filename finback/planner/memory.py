"""Memory of each rank in training, and the memory left for the cache in serving. Does not import torch.

Bytes per parameter (V3 3.3.3): compute weights 2 (one bf16 copy, or two FP8 ones: Hopper needs a matrix and its transpose
separately), gradients 4, master weights 4, AdamW moments 2 + 2 (Muon: momentum 2), moving average 4. In fp32 the weights are
their own masters and moments are fp32. Activations per token, by recomputation policy:

  none       everything that a backward pass reads
  selective  V3's: norms, MLA's up-projections and SwiGLU are recomputed; FP8 stores inputs of products in one byte
             with a scale per 128, attention's output in E5M6
  attention  as none, but only the input of attention is stored, and attention is recomputed
  block      the input of each layer is stored, and the layer is recomputed
"""

from dataclasses import dataclass
from functools import lru_cache

from finback.model.adaptable import in_blocks
from finback.model.config import ModelConfig
from finback.model.count import cache_bytes, layer_parameters, parameters
from finback.parallel.layout import Layout, StageLayers, split_layers
from finback.parallel.schedules import in_flight
from finback.planner.hardware import Fact
from finback.planner.workload import Optimizer, Precision, Recompute, Workload

SCALE = 4 / 128  # one fp32 scale per 128 FP8 numbers
CHUNK = 256  # rows of logits that cross-entropy computes at a time (train/loss.py)


@dataclass(frozen=True)
class Memory:
    """Peak bytes on one pipeline rank."""

    weights: float
    gradients: float
    optimizer: float
    # of all micro-batches in flight
    activations: float
    # cross-entropy, one recomputed layer, layers gathered by FSDP; or a probe's whole model
    working: float
    reserve: float
    # micro-batches in flight, in stages of average size
    in_flight: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.working + self.reserve


def parameter_bytes(precision: Precision, optimizer: Optimizer) -> tuple[float, float, float]:
    """Bytes per parameter of weights, gradients, and optimizer including master weights."""
    moments = 2 if optimizer == "adamw" else 1
    return (4, 4, 4 * moments) if precision == "fp32" else (2, 4, 4 + 2 * moments)


def attention_activation(c: ModelConfig, precision: Precision, recompute: Recompute) -> float:
    """Bytes per token stored by one layer's attention and its norm."""
    a, saved = _widths(precision)
    if recompute == "attention":
        return a * c.hidden_size
    heads, keep_all = c.num_attention_heads, recompute == "none"
    value = c.v_head_dim if c.attention == "mla" else c.head_dim
    output = heads * value * (1.5 if precision == "fp8" else a) + 4 * heads  # and the softmax normalizer
    total = a * c.hidden_size + output + (saved * c.hidden_size if keep_all else 0)
    if c.attention == "compressed":  # queries, entries and records of the widest kind; mHC's streams, twice per layer
        made = (c.q_lora_rank or 0) + heads * c.head_dim + 5 * c.head_dim
        return total + a * (made + 2 * c.hc_mult * c.hidden_size)
    if c.attention == "gqa":
        return total + a * c.head_dim * (heads + 2 * c.num_key_value_heads)
    latents = (c.q_lora_rank or 0) + c.kv_lora_rank
    total += a * (latents + c.qk_rope_head_dim)
    if keep_all:
        total += saved * latents + a * heads * (2 * c.qk_head_dim + value)
    elif c.q_lora_rank is None:
        total += a * heads * c.qk_head_dim
    return total


def feed_forward_activation(
    c: ModelConfig, moe: bool, precision: Precision, recompute: Recompute, imbalance: float
) -> float:
    """Bytes per token stored by a layer's dense or MoE feed-forward and its norm; routed experts include the fullest rank's surplus."""
    a, saved = _widths(precision)
    keep_all = recompute != "selective"
    total = a * c.hidden_size + (saved * c.hidden_size if keep_all else 0)
    hidden = 3 if keep_all else 2  # gate, up, and their product
    if not moe:
        return total + saved * hidden * c.intermediate_size
    met = c.num_experts_per_tok * (1 + imbalance)
    total += saved * hidden * c.moe_intermediate_size * (met + c.n_shared_experts)
    total += saved * c.hidden_size * met + 4 * c.n_routed_experts  # rows sent to experts; affinities
    return total + (a * c.hidden_size * c.num_experts_per_tok if keep_all else 0)


def layer_activation(c: ModelConfig, moe: bool, precision: Precision, recompute: Recompute, imbalance: float) -> float:
    """Bytes per token that one layer stores until its backward pass."""
    if recompute == "block":
        return _widths(precision)[0] * c.hidden_size
    feed_forward = feed_forward_activation(c, moe, precision, recompute, imbalance)
    return attention_activation(c, precision, recompute) + feed_forward


def cross_entropy(c: ModelConfig, tokens: int, precision: Precision, in_flight: int) -> float:
    """Bytes of the trunk's loss and of each MTP module's, with `in_flight` micro-batches of `tokens` at the head.

    Each stores the gradients of its hidden states and of the head from its forward to its backward pass. In addition: a chunk of logits,
    and if activations are not fp32, their gradient and a copy of the head; or the head's gradient once more, scaled.
    """
    a, size = _widths(precision)[0], c.vocab_size * c.hidden_size
    kept = (1 + c.num_nextn_predict_layers) * (a * c.hidden_size * tokens + 4.0 * size)
    rounded = a if a < 4 else 0.0
    forward = (4 + rounded) * c.vocab_size * min(CHUNK, tokens) + rounded * size
    return in_flight * kept + max(forward, 4.0 * size)


def _widths(precision: Precision) -> tuple[float, float]:
    """Bytes of an activation, and of one stored as input of a product."""
    return {"fp32": (4.0, 4.0), "bf16": (2.0, 2.0), "fp8": (2.0, 1 + SCALE)}[precision]


def stage_parameters(c: ModelConfig, stage: StageLayers, shared_ends: bool) -> tuple[int, int]:
    """Parameters of a stage: those on every data-parallel rank, and those of routed experts, which are sharded over ep.

    If MTP and the embedding are on different ranks, MTP needs a copy of it; `shared_ends`: both are on one rank.
    """
    d, embedding = c.hidden_size, c.vocab_size * c.hidden_size
    moe = sum(c.is_moe(layer) for layer in stage.layers)
    routed = moe * c.n_routed_experts * 3 * d * c.moe_intermediate_size
    ends = stage.layers[:: max(len(stage.layers) - 1, 1)]
    one_of = {c.is_moe(layer): layer_parameters(c, layer, active=False) for layer in ends}
    plain = moe * one_of.get(True, 0) + (len(stage.layers) - moe) * one_of.get(False, 0) - routed
    modules = sum(layer >= c.num_hidden_layers for layer in stage.layers)
    plain += modules * (2 * d * d + 3 * d)
    if stage.embeds:
        plain += embedding
    if stage.has_head:
        plain += d + (0 if c.tie_word_embeddings and shared_ends else embedding)
        if modules and not shared_ends:
            plain += embedding
    return plain, routed


@dataclass(frozen=True)
class RankStages:
    """The part of the model on one pipeline rank."""

    layers: tuple[int, ...]
    # parameters outside of routed experts, the same on every data-parallel rank
    plain: int
    # parameters of its share of routed experts
    routed: float


@lru_cache(maxsize=256)
def rank_stages(c: ModelConfig, layout: Layout) -> list[RankStages]:
    """The part of the model on each pipeline rank. Training copies the embedding to both ends, except with DualPipe or one stage."""
    stages, found = split_layers(c, layout.stages), []
    for rank in range(layout.pp):
        mine = [stages[stage] for stage in layout.stages_of(rank)]
        shared_ends = (layout.pipeline.copies == 2 and rank in (0, layout.pp - 1)) or layout.pp == 1
        sizes = [stage_parameters(c, stage, shared_ends) for stage in mine]
        layers = tuple(layer for stage in mine for layer in stage.layers)
        routed = sum(size[1] for size in sizes) / layout.ep
        found.append(RankStages(layers, sum(size[0] for size in sizes), routed))
    return found


def rank_memory(c: ModelConfig, work: Workload, known: dict[str, Fact]) -> list[Memory]:
    """Memory of every pipeline rank."""
    layout, tokens = work.layout, work.micro_tokens
    moments = in_flight(layout.schedule if layout.pp > 1 else "1f1b", layout.pp, layout.micro_batches)
    imbalance = known["imbalance"].value if layout.ep > 1 else 0.0
    whole, some = (
        {moe: layer_activation(c, moe, work.precision, policy, imbalance) for moe in (False, True)}
        for policy in ("none", work.recompute)
    )
    saved = [tokens * sum(some[c.is_moe(layer)] for layer in s.layers) for s in split_layers(c, layout.stages)]
    mean = sum(saved) / len(saved)
    found = []
    for moment, mine in zip(moments, rank_stages(c, layout), strict=True):
        alive = max(sum(count * saved[stage] for stage, count in stages) for stages in moment)
        at_head = max(dict(stages).get(len(saved) - 1, 0) for stages in moment)
        loss = cross_entropy(c, tokens, work.precision, at_head) if at_head else 0.0
        again = max(whole[c.is_moe(n)] - some[c.is_moe(n)] for n in mine.layers) * tokens
        weights, gradients, optimizer, gathered = _states(c, work, mine)
        working = loss + again + gathered
        if work.probed:  # after a step, when its activations have been freed
            working = max(working, 4.0 * parameters(c) - alive)
        found.append(Memory(weights, gradients, optimizer, alive, working, known["reserve"].value, alive / mean))
    return found


def _states(c: ModelConfig, work: Workload, mine: RankStages) -> tuple[float, float, float, float]:
    """Bytes of weights, gradients, optimizer, and of two layers gathered at a time by FSDP.

    With DualPipe, the second copy of each stage is one more rank to shard the optimizer over.
    """
    layout, plain, routed = work.layout, mine.plain, mine.routed
    per_weight, per_gradient, per_state = parameter_bytes(work.precision, work.optimizer)
    copies = layout.pipeline.copies
    of_plain, of_routed = (1, 1) if layout.sharding == "ddp" else (layout.holders * copies, layout.edp * copies)
    per_gradient += 2 * (layout.reduce == "bf16")  # the rounded copy that is exchanged
    per_state += 4 * work.averaged  # in fp32
    optimizer = per_state * (plain / of_plain + routed / of_routed)
    if work.rounded and layout.ranks == 1:  # refused with a layout
        optimizer -= 4 * in_blocks(c)
    if layout.sharding != "fsdp":
        return per_weight * (plain + routed), per_gradient * (plain + routed), optimizer, 0.0
    shared = plain / layout.holders + routed / layout.edp
    gathered = 2 * per_weight * (plain + routed) / len(mine.layers)
    return per_weight * shared, per_gradient * shared, optimizer, gathered


def serving(
    c: ModelConfig, devices: int, memory: float, precision: Precision, known: dict[str, Fact]
) -> dict[str, float]:
    """Memory per device in serving, if experts are sharded over all devices and the rest is replicated.

    Bytes of weights (one byte each for FP8, else two or four), bytes of cache per token (fp32 or bf16), and the number
    of cached tokens that fit on one device with the margin left free.
    """
    width = {"fp32": 4.0, "bf16": 2.0, "fp8": 1 + 4 / 128**2}[precision]
    plain, routed = stage_parameters(c, split_layers(c, 1)[0], shared_ends=True)
    over = min(devices, c.n_routed_experts) if c.n_routed_experts else 1
    weights = width * (plain + routed / over)
    free = memory * (1 - known["margin"].value) - known["reserve"].value - weights
    per_token = cache_bytes(c, 4 if precision == "fp32" else 2)
    tokens = max(free, 0.0) / per_token
    return {"weights": weights, "cache_bytes_per_token": per_token, "tokens": tokens, "fits": free > 0}
