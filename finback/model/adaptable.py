"""Which matrices of a model an adapter can be applied to, and its size, from a config alone; builds nothing. Does not import torch."""

from collections.abc import Iterable

from finback.model.config import CSA, SLIDING, ModelConfig

# group, PEFT's name, number of matrices, and rows and columns of each
Adaptable = tuple[str, str, int, int, int]


def adaptable(c: ModelConfig, layer: int) -> list[Adaptable]:
    """The matrices of a layer that can have an adapter.

    Gate and up of a routed expert are one matrix, as in PEFT's fused form.
    """
    d, heads, kv = c.hidden_size, c.num_attention_heads, c.num_key_value_heads * c.head_dim
    if c.attention == "gqa":
        shapes = {"q_proj": (heads * c.head_dim, d), "k_proj": (kv, d), "v_proj": (kv, d)}
        shapes["o_proj"] = (d, heads * c.head_dim)
    elif c.attention == "compressed":
        return _adaptable_compressed(c, layer) + _adaptable_feed_forward(c, layer)
    else:
        query = (heads * c.qk_head_dim, c.q_lora_rank or d)
        shapes = {"q_proj": query} if c.q_lora_rank is None else {"q_a_proj": (c.q_lora_rank, d), "q_b_proj": query}
        shapes["kv_a_proj_with_mqa"] = (c.kv_lora_rank + c.qk_rope_head_dim, d)
        shapes["kv_b_proj"] = (heads * (c.qk_nope_head_dim + c.v_head_dim), c.kv_lora_rank)
        shapes["o_proj"] = (d, heads * c.v_head_dim)
    return [("attention", name, 1, *shape) for name, shape in shapes.items()] + _adaptable_feed_forward(c, layer)


def _adaptable_compressed(c: ModelConfig, layer: int) -> list[Adaptable]:
    """The matrices of V4's attention, without indexers; both projections of a compressor have all its series as rows."""
    assert c.q_lora_rank is not None, "compressed attention has a query latent"
    d, heads, kind = c.hidden_size, c.num_attention_heads * c.head_dim, c.layer_type(layer)
    shapes = [("q_a_proj", c.q_lora_rank, d), ("q_b_proj", heads, c.q_lora_rank), ("kv_proj", c.head_dim, d)]
    shapes += [
        ("o_a_proj", c.o_groups * c.o_lora_rank, heads // c.o_groups),
        ("o_b_proj", d, c.o_groups * c.o_lora_rank),
    ]
    if kind != SLIDING:
        height = (2 if kind == CSA else 1) * c.head_dim
        shapes += [(name, height, d) for name in ("kv_proj", "gate_proj")]
    return [("attention", name, 1, rows, columns) for name, rows, columns in shapes]


def _adaptable_feed_forward(c: ModelConfig, layer: int) -> list[Adaptable]:
    d, found = c.hidden_size, list[Adaptable]()
    width = c.n_shared_experts * c.moe_intermediate_size if c.is_moe(layer) else c.intermediate_size
    if width:
        found += [("mlp", name, 1, width, d) for name in ("gate_proj", "up_proj")]
        found.append(("mlp", "down_proj", 1, d, width))
    if c.is_moe(layer):
        found.append(("experts", "experts", c.n_routed_experts, 2 * c.moe_intermediate_size, d))
        found.append(("experts", "experts", c.n_routed_experts, d, c.moe_intermediate_size))
    return found


def in_blocks(c: ModelConfig) -> int:
    """Number of weights in these matrices of all layers: the model without embedding, head, norms and MTP modules."""
    return sum(
        number * rows * columns for n in range(c.num_hidden_layers) for _, _, number, rows, columns in adaptable(c, n)
    )


def adapter_size(c: ModelConfig, rank: int, targets: Iterable[str], dora: bool = False) -> int:
    """Number of parameters of LoRA on a model's trunk, or of DoRA, which adds the row norms."""
    chosen = set(targets)
    return sum(
        number * (rank * (rows + columns) + rows * dora)
        for layer in range(c.num_hidden_layers)
        for group, name, number, rows, columns in adaptable(c, layer)
        if group in chosen or name in chosen
    )
