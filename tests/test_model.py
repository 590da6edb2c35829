"""The model against transformers' DeepseekV3ForCausalLM, and its two forms of attention against each other."""

import dataclasses
from collections.abc import Callable
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finback.checkpoint.hf_config import raw_config
from finback.checkpoint.names import table
from finback.config import UserError
from finback.kernels import attention, decode, documents, moe_gemm, native, norm, reference
from finback.kernels.probe import experts_seconds
from finback.model import dsa
from finback.model.cache import PAGE, Cache, Pool
from finback.model.config import TINY, V2_LITE, V3, V3_2, ModelConfig
from finback.model.count import parameters
from finback.model.dsa import pick
from finback.model.lora import learnt_parameters
from finback.model.mla import MLA
from finback.model.moe import MoE
from finback.model.rope import softmax_scale
from finback.model.rope_scaling import LongRope, Yarn
from finback.model.transformer import Transformer
from finback.train.precision import ExpertKernel, use_expert_kernel

transformers = pytest.importorskip("transformers")

TOY = dataclasses.replace(
    TINY,
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=3,
    q_lora_rank=24,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=12,
    intermediate_size=64,
    n_routed_experts=8,
    n_group=4,
    topk_group=2,
    num_experts_per_tok=3,
    moe_intermediate_size=20,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
)
# with 16 heads no score is zero by chance
SPARSE = dataclasses.replace(TOY, index_topk=9, index_n_heads=16, index_head_dim=16)
DENSE = ModelConfig(
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=80,
    attention="gqa",
    num_key_value_heads=2,
    head_dim=12,
    tie_word_embeddings=True,
)
# layers that differ: windows, their own rope base, no rotation, half of each head rotated, norms after the sublayers
MIXED = dataclasses.replace(
    DENSE,
    num_hidden_layers=3,
    tie_word_embeddings=False,
    partial_rotary_factor=0.5,
    nope_layers=(2,),
    sliding_window=7,
    layer_types=("sliding_attention", "full_attention", "sliding_attention"),
    local_rope_theta=300.0,
    qk_norm=True,
    qk_norm_over="projection",
    norms="post",
)
EXPERTS = dataclasses.replace(
    DENSE,
    num_hidden_layers=3,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=20,
    scoring_func="softmax",
    dense_layers=(1,),
    qk_norm=True,
)
# gpt-oss: sinks, windows, experts with biases
OSS = dataclasses.replace(
    EXPERTS,
    tie_word_embeddings=False,
    dense_layers=(),
    qk_norm=False,
    attention_bias="all",
    attention_sinks=True,
    sliding_window=7,
    layer_types=MIXED.layer_types,
    swiglu_alpha=1.702,
    swiglu_limit=0.5,
)
PARITY = [
    TOY,
    dataclasses.replace(TOY, n_group=1, topk_group=1, q_lora_rank=None),
    dataclasses.replace(TOY, num_attention_heads=2, first_k_dense_replace=2, norm_topk_prob=False),
    dataclasses.replace(TOY, rope_scaling=Yarn(factor=4.0, original_max_position_embeddings=16)),
]


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Weights large enough that routing and attention differ between tokens; gains are not 1 and biases not 0."""
    model = Transformer(dataclasses.replace(config, initializer_range=0.1)).initialise(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))
        for router in model.routers():
            router.bias.add_(0.1 * torch.randn(router.bias.shape, generator=generator))
    return model.eval()


def to_transformers(model: Transformer) -> torch.nn.Module:
    """The same weights in transformers' own class, through the name table; every trunk tensor must be used."""
    c = model.config
    config = transformers.DeepseekV3Config.from_dict(raw_config(c, "float32"), attn_implementation="eager")
    other = transformers.DeepseekV3ForCausalLM(config).eval()
    state = {}
    for ours, theirs in table(c).items():
        if ours.startswith("mtp."):
            continue
        parts = model.state_dict()[ours]
        parts = parts.flatten(0, 1) if parts.ndim == 3 else parts
        state.update(zip(theirs, parts.chunk(len(theirs), dim=0), strict=True))
    own = other.state_dict()
    # transformers may stack experts; reshape ours like its own
    for name in list(own):
        if name.endswith("mlp.experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            state[name] = torch.stack(
                [
                    torch.cat([state.pop(f"{prefix}{e}.gate_proj.weight"), state.pop(f"{prefix}{e}.up_proj.weight")])
                    for e in range(c.n_routed_experts)
                ]
            )
        if name.endswith("mlp.experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            state[name] = torch.stack([state.pop(f"{prefix}{e}.down_proj.weight") for e in range(c.n_routed_experts)])
    other.load_state_dict(state, strict=True)
    return other


@pytest.mark.parametrize("config", PARITY)
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_equal_transformers(config: ModelConfig, seed: int) -> None:
    model = random_model(config, seed)
    tokens = torch.randint(0, config.vocab_size, (3, 33), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        ours = model.logits(model(tokens))
        theirs = to_transformers(model)(tokens).logits
    assert ours.std() > 0.3, "flat logits would agree even in broken code"
    assert (ours - theirs).abs().max() <= 1e-4


def pool_for(config: ModelConfig, rows: int, tokens: int) -> tuple[Pool, torch.Tensor]:
    """A pool, and a page table that scatters the pages of each row."""
    each = -(-tokens // PAGE)
    order = torch.randperm(rows * each, generator=torch.Generator().manual_seed(3)) + 1
    return Pool(config, rows * each + 1, torch.float32, torch.device("cpu")), order.view(rows, each)


@pytest.mark.parametrize("native_kernels", [True, False])
@pytest.mark.parametrize("config", [*PARITY, SPARSE, DENSE, MIXED, EXPERTS, OSS])
def test_cached_decoding_equals_the_whole(
    config: ModelConfig, native_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Expanded form over a whole text = prompts of unequal lengths, then one or two tokens at a time, absorbed."""
    if not native_kernels:
        monkeypatch.setattr(native, "library", lambda: None)
    model = random_model(config)
    tokens = torch.randint(0, config.vocab_size, (3, 40), generator=torch.Generator().manual_seed(5))
    lengths, rows = [25, 3, 14], torch.arange(3)
    pool, table = pool_for(config, 3, 40)
    with torch.no_grad():
        whole = model.logits(model(tokens))
        hidden = model(tokens[:, :25], Cache(pool, table, [0, 0, 0], 25, lengths))
        last = torch.tensor(lengths) - 1
        assert (model.logits(hidden[rows, last]) - whole[rows, last]).abs().max() <= 1e-4
        for new in (1, 1, 2, 1, 2, 1):
            at = torch.tensor(lengths)[:, None] + torch.arange(new)
            hidden = model(tokens[rows[:, None], at], Cache(pool, table, lengths, new))
            assert (model.logits(hidden) - whole[rows[:, None], at]).abs().max() <= 1e-4
            lengths = [n + new for n in lengths]
        left = torch.tensor([0, 2])  # one sequence leaves, the others continue
        at = torch.tensor(lengths)[left]
        hidden = model(tokens[left, at][:, None], Cache(pool, table[left], at.tolist(), 1))
        assert (model.logits(hidden[:, 0]) - whole[left, at]).abs().max() <= 1e-4


@pytest.mark.parametrize("config", [TOY, SPARSE, DENSE, MIXED, dataclasses.replace(TOY, kv_lora_rank=8)])
@pytest.mark.parametrize("piece", [4, 15, 20])
def test_chunked_prefill_equals_the_whole(config: ModelConfig, piece: int) -> None:
    model = random_model(config)
    tokens = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(6))
    pool, table = pool_for(config, 2, 60)
    with torch.no_grad():
        whole = model(tokens)
        pieces = [model(tokens[:, at : at + piece], Cache(pool, table, [at, at], piece)) for at in range(0, 60, piece)]
    assert (torch.cat(pieces, dim=1) - whole).abs().max() <= 1e-4


def test_the_latest_of_equal_scores_are_picked() -> None:
    """By hand: three of the visible tokens are selected, regardless of padding before them."""
    scores = torch.tensor([[[0.0, 3.0, 0.0, 0.0, 9.0], [0.0, 3.0, 0.0, 0.0, 9.0], [-1.0, -2.0, 5.0, 6.0, 7.0]]])
    seen = torch.tensor([[[True] * 4 + [False], [False] * 3 + [True] * 2, [True] * 5]])
    expected = [[False, True, True, True, False], [False] * 3 + [True] * 2, [False, False, True, True, True]]
    assert pick(scores, seen, 3).tolist() == [expected]
    assert pick(scores, seen, 5).tolist() == seen.tolist()


def test_long_rows_are_picked_from_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few queries, and rows of documents too long for one matrix, give the result of a single pass."""
    model = random_model(SPARSE)
    tokens = torch.randint(0, 97, (2, 60), generator=torch.Generator().manual_seed(6))
    numbers = torch.arange(60).repeat(2, 1) // 25
    prefixes, behind = torch.tensor([12, 20]), torch.tensor([[0] * 12 + [1] * 20 + [2] * 28, [0] * 20 + [1] * 40])
    masks = [{}, {"document_ids": numbers}, {"document_ids": behind, "prefixes": prefixes}]
    with torch.no_grad():
        once = [model(tokens, **mask) for mask in masks]
        monkeypatch.setattr(dsa, "SCORES", 60 * 16 * 2 * 7)
        monkeypatch.setattr(documents, "LONGEST_MASKED", 8)
        for whole, mask in zip(once, masks, strict=True):
            assert (model(tokens, **mask) - whole).abs().max() <= 1e-5
    assert (once[0] - once[1]).abs().max() > 0.01


def test_what_is_learnt_of_a_sparse_model_is_what_the_loss_reaches() -> None:
    model = random_model(SPARSE).train()
    tokens = torch.randint(0, 97, (2, 31), generator=torch.Generator().manual_seed(6))
    hidden = model(tokens[:, :30])
    (hidden.square().sum() + model.mtp_hidden_states(hidden, tokens)[0].square().sum()).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {name for name, _ in learnt_parameters(model)} - {"head.weight"}
    assert not any("indexer" in name for name in reached) and "mtp.0.block.attention.kv_up.weight" in reached


def test_the_short_form_of_attention_is_taken_where_it_saves_products() -> None:
    """170 new tokens for V3: for more, expanding the stored latents first costs less."""
    attention = MLA(dataclasses.replace(V3, hidden_size=8, q_lora_rank=8, num_attention_heads=1))
    assert attention.longest_absorbed == 170


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("new", [1, 3])
def test_paged_attention_equals_its_plain_form(dtype: torch.dtype, groups: int, new: int) -> None:
    if native.library() is None:
        pytest.skip("no C++ compiler: only the plain implementation runs")
    generator = torch.Generator().manual_seed(new + 10 * groups)
    rows, heads, key, value = 5, 6, 80, 24
    entries = torch.randn(40 * PAGE, 200, generator=generator).to(dtype)
    query = torch.randn(rows, new, heads, key, generator=generator)
    table = torch.randint(0, 40, (rows, 6), generator=generator)
    lengths = torch.tensor([0, 1, 15, 40, 6 * PAGE - new])
    for starts in (None, torch.tensor([0, 0, 3, 33, 17])):
        stored = decode.PagedRows(entries, table[:0], table, lengths, starts, PAGE)
        arguments = (query, stored, groups, value, 0 if groups == 1 else 152)
        fast = decode.paged_attention(*arguments, scale=0.3)
        plain = reference.paged_attention(*arguments, scale=0.3)
        assert (fast - plain).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-5)


def test_cache_holds_latents_only() -> None:
    """576 elements per layer for V3: 70,272 bytes per token in bf16 (spec 1.2)."""
    assert V3.cache_elements == 576
    narrow = dataclasses.replace(V3, vocab_size=8, hidden_size=8)
    pool = Pool(narrow, 4, torch.bfloat16, torch.device("cpu"))
    assert pool.data.untyped_storage().nbytes() == pool.bytes_per_token * 4 * PAGE
    assert pool.bytes_per_token == 70_272
    assert Pool(TINY, 3, torch.float32, torch.device("cpu")).bytes_per_token == 4 * (64 + 16) * 4
    assert Pool(TINY, 3, torch.float32, torch.device("cpu"), drafts=True).bytes_per_token == 5 * (64 + 16) * 4


def test_yarn_softmax_scale_of_v3() -> None:
    assert softmax_scale(V3) == pytest.approx(0.135234, abs=1e-6)


@pytest.mark.parametrize(
    ("config", "total"),
    [(V3, 671_026_419_200), (V3_2, 671_877_944_064), (V2_LITE, 15_706_484_224)],
    ids=["V3", "V3.2", "V2_LITE"],
)
def test_parameter_totals(config: ModelConfig, total: int) -> None:
    """Totals of section 2.3 of the specification, without the MTP module."""
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(config, num_nextn_predict_layers=0))
    count = sum(p.numel() for p in model.parameters())
    bias = sum(r.bias.numel() for r in model.routers()) if config.scoring_func == "sigmoid" else 0
    assert count + bias == total


def test_name_table_covers_every_tensor() -> None:
    for config in (TOY, SPARSE, DENSE, dataclasses.replace(TOY, q_lora_rank=None)):
        with torch.device("meta"):
            state = Transformer(config).state_dict()
        names = set(state) - ({"head.weight"} if config.tie_word_embeddings else set())
        assert set(table(config)) == names


@pytest.mark.parametrize("config", [TOY, DENSE, MIXED, EXPERTS, OSS], ids=["mla", "gqa", "mixed", "experts", "oss"])
def test_the_closed_form_counts_every_parameter(config: ModelConfig) -> None:
    model = Transformer(config)
    assert parameters(config) == sum(p.numel() for p in model.parameters())
    assert {name for name in model.state_dict() if name != "head.weight"} <= table(config).keys() | {"head.weight"} | {
        name for name in model.state_dict() if name.endswith("router.bias")
    }


@pytest.mark.parametrize("length", [5, 23])
def test_a_window_is_what_a_mask_says(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For plain rows, for documents in either form, and for a prefix that documents share."""
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, heads, length, 8, generator=rng) for heads in (4, 2, 2))
    ids = torch.tensor([[0] * 4 + [1] * (length - 4)])
    prefixes = torch.tensor([4])
    near = torch.arange(length)[:, None] - torch.arange(length) < 6
    for document_ids, prefix in ((None, None), (ids, None), (ids, prefixes)):
        seen = torch.ones(length, length).tril().bool()[None]
        seen = seen if document_ids is None else documents.masked(document_ids, prefix)
        expected = attention.torch_attention(q, k, v, 0.3, seen & near)
        for longest in (512, 1):
            monkeypatch.setattr(documents, "LONGEST_MASKED", longest)
            mask = None if document_ids is None else documents.mask_of(document_ids, prefix)
            found = attention.torch_attention(q, k, v, 0.3, documents.Windowed(mask, 6))
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("longest", [512, 1])
def test_sinks_take_weight_in_every_form_of_attention(longest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For documents, for a shared prefix and for windows, with gradients: against an explicit softmax."""
    monkeypatch.setattr(documents, "LONGEST_MASKED", longest)
    rng, length = torch.Generator().manual_seed(1), 23
    q, k, v = (torch.randn(2, heads, length, 8, generator=rng, requires_grad=True) for heads in (4, 2, 2))
    sink = torch.randn(4, generator=rng, requires_grad=True)
    ids = torch.tensor([[0] * 4 + [1] * 19, [0] * 4 + [1] * 9 + [2] * 10])
    near = torch.arange(length)[:, None] - torch.arange(length) < 6
    for document_ids, prefix in ((None, None), (ids, None), (ids, torch.tensor([4, 4]))):
        seen = torch.ones(length, length).tril().bool()[None].expand(2, -1, -1)
        mask: documents.Mask = None
        if document_ids is not None:
            seen, mask = documents.masked(document_ids, prefix), documents.mask_of(document_ids, prefix)
        for window in (False, True):
            scores = torch.einsum("bhtc,bhsc->bhts", q, k.repeat_interleave(2, dim=1)) * 0.3
            scores = scores.masked_fill(~(seen & near if window else seen)[:, None], float("-inf"))
            all_ = torch.cat([scores, sink[None, :, None, None].expand(2, -1, length, 1)], dim=-1).softmax(-1)
            expected = all_[..., :-1] @ v.repeat_interleave(2, dim=1)
            asked = documents.Windowed(mask, 6) if window else mask
            found = attention.with_sinks(attention.torch_attention, q, k, v, 0.3, asked, sink)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
            made, wanted = (torch.autograd.grad(x.square().sum(), (q, k, v, sink)) for x in (found, expected))
            for a, b in zip(made, wanted, strict=True):
                torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("experts", [moe_gemm.routed_experts, moe_gemm.grouped_experts])
def test_grouped_experts_equal_the_loop(experts: moe_gemm.Experts) -> None:
    """Outputs and gradients of both kernels equal those of the plain implementation."""
    generator = torch.Generator().manual_seed(3)
    x, gate_up, down = (torch.randn(s, generator=generator) for s in ((40, 16), (6, 24, 16), (6, 16, 12)))
    index = torch.stack([torch.randperm(5, generator=generator)[:2] for _ in range(40)])  # expert 5 gets no tokens
    weight = torch.rand(40, 2, generator=generator)
    outs, grads = [], []
    for form in (reference.routed_experts, experts):
        leaves = [t.clone().requires_grad_() for t in (x, weight, gate_up, down)]
        y = form(leaves[0], index, leaves[1], leaves[2], leaves[3])
        (y * torch.arange(16)).sum().backward()
        outs.append(y)
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(outs[0], outs[1])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_the_kernel_of_experts_is_pinned_or_measured() -> None:
    """A whole model's gradients with either kernel; on a CPU their speed is not measured."""
    gradients = []
    for kernel in get_args(ExpertKernel):
        model = random_model(TOY).train()
        assert use_expert_kernel(model, kernel) == ("loop" if kernel == "auto" else kernel)
        forms = {module.experts for module in model.modules() if isinstance(module, MoE)}
        assert forms == {moe_gemm.grouped_experts if kernel == "grouped_mm" else moe_gemm.routed_experts}
        model(torch.arange(48).view(2, 24)).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for others in gradients[1:]:
        torch.testing.assert_close(gradients[0], others, rtol=1e-4, atol=1e-5)
    seconds = experts_seconds(64, 2, (4, 16, 8), torch.float32, torch.device("cpu"))
    assert set(seconds) == {"loop", "grouped_mm"} and all(0 < s < 60 for s in seconds.values())
    with pytest.raises(UserError, match=r"expert_kernel.*rows of 16 bytes"):
        use_expert_kernel(Transformer(dataclasses.replace(TOY, moe_intermediate_size=18)), "grouped_mm")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_attention_and_norm_equal_their_twins(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(2, 3, 24, size, generator=generator).to(dtype) for size in (16, 16, 12))
    x, gain = torch.randn(5, 7, 20, generator=generator).to(dtype), torch.randn(20, generator=generator)
    pairs: list[tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor], float]] = [
        (reference.causal_attention, attention.causal_attention, [q, k, v], 0.3),
        (reference.rms_norm, norm.rms_norm, [x, gain], 1e-6),
    ]
    for plain, fast, inputs, constant in pairs:
        results = []
        for function in (plain, fast):
            leaves = [t.clone().requires_grad_() for t in inputs]
            y = function(*leaves, constant)
            (y.float() * torch.arange(y.size(-1))).sum().backward()
            results.append([y, *(leaf.grad for leaf in leaves)])
        tolerance = 1e-4 if dtype == torch.float32 else 0.03
        for a, b in zip(*results, strict=True):
            assert (a.float() - b.float()).norm() <= tolerance * a.float().norm()


def test_mtp_at_depth_one_by_hand() -> None:
    """h' = M [norm(Emb(t_{i+1})) ; norm(h_i)], block, norm: position i sees token i + 1 and no later one."""
    model = random_model(TOY)
    tokens = torch.randint(0, 97, (1, 10), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        hidden = model(tokens[:, :8])
        further = model.mtp_hidden_states(hidden, tokens)[0]
        m = model.mtp[0]
        joined = torch.cat([m.embed_norm(model.embed[tokens[:, 1:9]]), m.hidden_norm(hidden)], dim=-1)
        by_hand = m.norm(m.block(F.linear(joined, m.project.weight), model.cos[None, :8], model.sin[None, :8]))
        changed = tokens.clone()
        changed[0, 8] = (changed[0, 8] + 1) % 97
        moved = model.mtp_hidden_states(hidden, changed)[0]
    torch.testing.assert_close(further, by_hand)
    assert torch.equal(moved[:, :7], further[:, :7]) and not torch.equal(moved[:, 7], further[:, 7])


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"n_group": 3}, "n_group"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"hidden_size": 1.5}, "hidden_size"),
        ({"kv_lora_rank": 0}, "kv_lora_rank"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
        ({"index_topk": 4}, "index_n_heads"),
        ({"index_topk": 4, "index_n_heads": 2, "index_head_dim": 6}, "index_head_dim"),
        ({"index_topk": 4, "q_lora_rank": None}, "index_topk"),
        ({"sliding_window": 4}, "sliding_window"),
        (dataclasses.asdict(MIXED) | {"sliding_window": None}, "sliding_window"),
        (dataclasses.asdict(MIXED) | {"layer_types": ("full_attention",)}, "layer_types"),
        (dataclasses.asdict(MIXED) | {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        (dataclasses.asdict(EXPERTS) | {"norms": "post"}, "norms"),
    ],
)
def test_impossible_configs_name_the_field(change: dict[str, object], field: str) -> None:
    with pytest.raises(UserError, match=field):
        dataclasses.replace(TOY, **change)  # type: ignore[arg-type]


LONG = dataclasses.replace(
    DENSE, rope_scaling=LongRope((1.0, 1.2, 1.4, 1.6, 1.8, 2.0), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0), 11)
)


@pytest.mark.parametrize(
    "config", [TOY, SPARSE, DENSE, MIXED, LONG, OSS], ids=["mla", "dsa", "gqa", "mixed", "long", "oss"]
)
def test_documents_in_one_row_are_read_as_if_alone(config: ModelConfig) -> None:
    """Hidden states, MTP's included, and gradients of two packed documents equal those of each alone."""
    model = random_model(config).train()
    rng = torch.Generator().manual_seed(3)
    one, two = (torch.randint(97, (1, n), generator=rng) for n in (9, 14))
    row = torch.cat([one, two], dim=1)
    documents = torch.tensor([[0] * 9 + [1] * 14])
    alone = torch.cat([model(one), model(two)], dim=1)
    packed = model(row, document_ids=documents)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(model(row), alone, atol=1e-3), "without document ids the second must attend to the first"
    gradients = []
    for hidden in (packed, alone):
        model.zero_grad()
        hidden.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.blocks.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)
    if config.num_nextn_predict_layers:
        behind = torch.zeros(1, 1, dtype=torch.long)
        apart = [model.mtp_hidden_states(model(t), torch.cat([t, behind], dim=1))[0] for t in (one, two)]
        together = model.mtp_hidden_states(packed, torch.cat([row, behind], dim=1), document_ids=documents)[0]
        torch.testing.assert_close(together[:, 9:], apart[1], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together[:, :8], apart[0][:, :8], atol=1e-5, rtol=1e-4)
