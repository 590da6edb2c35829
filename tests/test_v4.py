"""DeepSeek-V4's parts: compressed entries, mHC, hash routing, clamps; names, configs. See also test_checkpoint.py."""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from finback.checkpoint import names
from finback.checkpoint.audit import shapes
from finback.checkpoint.export import export
from finback.checkpoint.hf_config import model_config, raw_config
from finback.checkpoint.models import load, load_audited, save
from finback.checkpoint.v4_names import released
from finback.config import UserError
from finback.kernels import moe_gemm, reference
from finback.kernels.packed import available
from finback.kernels.streams import sinkhorn
from finback.model.compressed_cache import CompressedCache, CompressedPool, pool_of
from finback.model.config import CSA, HCA, SLIDING, V3_2, V4_FLASH, V4_PRO, ModelConfig, from_json, to_json
from finback.model.count import cache_bytes, forward_flops, parameters, router_biases, token_flops
from finback.model.decode_flops import fp8_flops
from finback.model.pack import pack
from finback.model.recompute import use_recompute
from finback.model.rope_scaling import Yarn
from finback.model.transformer import Transformer
from finback.planner.this_machine import muon_parameters
from finback.report.verify import verify
from finback.train.optim import is_matrix
from tests.toy import V4, backward


@pytest.fixture(scope="module")
def model() -> Transformer:
    made = Transformer(V4).initialise(0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if name.endswith(("sink", "position_bias", "mix.bias", "mix.scale", "merge.bias", "merge.scale")):
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    return made.eval()


PREDICTING = dataclasses.replace(V4, num_nextn_predict_layers=2)


def tokens_of(rows: int, length: int) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_documents_that_share_a_row_are_as_alone(model: Transformer) -> None:
    """Windows, compressed entries and selections stay within a document; each exceeds every boundary, or is tiny."""
    tokens, cuts = tokens_of(2, 48), ((0, 13, 14, 48), (0, 31, 37, 48))
    ids = torch.stack([torch.repeat_interleave(torch.arange(3), torch.tensor(c).diff()) for c in cuts])
    together = model(tokens, document_ids=ids)
    for row, ends in enumerate(cuts):
        for start, stop in itertools.pairwise(ends):
            alone = model(tokens[row : row + 1, start:stop])
            assert (together[row, start:stop] - alone[0]).abs().max() <= 1e-5


@torch.no_grad()
def test_rows_in_blocks_of_queries_are_the_same(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tokens_of(2, 40)
    whole = model(tokens)
    monkeypatch.setattr("finback.model.swa.SCORES", 500)
    assert (model(tokens) - whole).abs().max() <= 1e-5


@torch.no_grad()
def test_padding_and_later_tokens_count_for_nothing(model: Transformer) -> None:
    tokens = tokens_of(1, 40)
    for length in (1, 4, 5, 8, 9, 23):
        assert (model(tokens)[:, :length] - model(tokens[:, :length])).abs().max() <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("rates", [(4, 8), (2, 5), (4, 128)])
def test_pieces_of_rows_are_the_whole(rates: tuple[int, int]) -> None:
    """Rows of unequal lengths, some without new tokens, on reused lines and pages in scattered order."""
    config = dataclasses.replace(
        V4, compress_rate_csa=rates[0], compress_rate_hca=rates[1], max_position_embeddings=192
    )
    made, tokens = Transformer(config).initialise(0).eval(), tokens_of(3, 150)
    whole, generator = made(tokens), torch.Generator().manual_seed(1)
    pool = CompressedPool(config, 40, 5, torch.float32, torch.device("cpu"))
    for ring in (*pool.windows, *pool.records, *pool.far):
        ring.normal_(generator=generator)
    table, lengths = torch.randperm(39, generator=generator)[:36].view(3, 12) + 1, [0, 0, 0]
    while min(lengths) < 150:
        most = 70 if not any(lengths) else 9
        counts = [
            min(int(n), 150 - done)
            for n, done in zip(torch.randint(0, most, (3,), generator=generator), lengths, strict=True)
        ]
        new = max(1, *counts)
        rows = [tokens[row, done : done + n] for row, (done, n) in enumerate(zip(lengths, counts, strict=True))]
        padded = torch.stack([torch.nn.functional.pad(row, (0, new - len(row))) for row in rows])
        found = made(padded, CompressedCache(pool, table, lengths, new, counts, lines=[4, 0, 2]))
        for row, (done, n) in enumerate(zip(lengths, counts, strict=True)):
            assert torch.allclose(found[row, :n], whole[row, done : done + n], atol=1e-5)
        lengths = [done + n for done, n in zip(lengths, counts, strict=True)]


def test_gradients_are_those_of_recomputed_blocks_and_reach_all_but_indexers() -> None:
    tokens = tokens_of(2, 21)
    plain, again = Transformer(V4).initialise(0).train(), use_recompute(Transformer(V4).initialise(0).train(), "block")
    for one in (plain, again):
        one.logits(one(tokens)).square().mean().backward()
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert (a.grad is None) == (".indexer." in name), name
        assert a.grad is None or torch.equal(a.grad, b.grad), name
    loads = [router.load for router in plain.routers()]
    assert all(load.sum() == 2 * tokens.numel() for load in loads)
    bias = plain.routers()[0].bias.clone()
    for router in plain.routers():
        router.update_bias(0.1)
    assert torch.equal(plain.routers()[0].bias, bias) and plain.routers()[1].bias.any()  # the first routes by a table
    assert all(not router.load.any() for router in plain.routers())


def test_mtp_is_a_plain_reimplementation_and_comes_back(tmp_path: Path) -> None:
    """e_proj(enorm(emb)) + h_proj(hnorm(x_k)) for each stream, a block with a window, and its own merge and norm."""
    save(tmp_path, Transformer(PREDICTING).initialise(3))
    export(load(tmp_path), tmp_path / "out", "fp32")
    made, audit = load_audited(tmp_path / "out")
    assert audit.holds and not audit.skipped and verify(tmp_path / "out").holds
    made.eval()
    tokens, length = tokens_of(2, 24), 22
    with torch.no_grad():
        hidden = made(tokens[:, :length])
        found = made.mtp_hidden_states(hidden, tokens)
        streams = made.embed[tokens[:, :length]][:, :, None].expand(-1, -1, 4, -1)
        cos, sin = made.cos[None, :length], made.sin[None, :length]
        for block in made.blocks:
            streams = block(streams, cos, sin, tokens=tokens[:, :length])
        for depth, module in enumerate(made.mtp, start=1):
            embedded = module.embed_norm(made.embed[tokens[:, depth : depth + length]]) @ module.embed_project.weight.T
            each = [module.hidden_norm(streams[:, :, k]) @ module.hidden_project.weight.T + embedded for k in range(4)]
            streams = module.block(torch.stack(each, dim=2), cos, sin)
            flat = streams.flatten(2)
            scores = flat * (flat.square().mean(-1, keepdim=True) + 1e-6).rsqrt() @ module.merge.weight.T
            shares = (scores * module.merge.scale + module.merge.bias).sigmoid() + 1e-6
            mixed = sum(shares[..., k, None] * streams[:, :, k] for k in range(4))
            assert torch.allclose(found[depth - 1], module.norm(mixed), atol=1e-5)
    losses = backward(made.train(), tokens)
    assert losses.mtp > 0 and all(p.grad is not None for n, p in made.named_parameters() if n.startswith("mtp."))
    with pytest.raises(AssertionError, match="follows a pass"):
        made.mtp_hidden_states(hidden, tokens)


def test_sinkhorn_by_hand_and_doubly_stochastic() -> None:
    """One step over the logits (0, ln 3; 0, 0): rows (1/4, 3/4), (1/2, 1/2), then columns divided by 3/4 and 5/4."""
    logits = torch.tensor([[0.0, 3.0], [1.0, 1.0]]).clamp(min=1).log()
    found = sinkhorn(logits, 1, 0.0)
    assert torch.allclose(found, torch.tensor([[1 / 3, 3 / 5], [2 / 3, 2 / 5]]))
    many = sinkhorn(torch.randn(7, 4, 4, generator=torch.Generator().manual_seed(0)), 20, 1e-6)
    assert (many.sum(-1) - 1).abs().max() < 1e-3 and (many.sum(-2) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("limit", [0.4, None])
def test_clamped_experts_are_their_twin(limit: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down, weight = (
        torch.randn(shape, generator=generator) for shape in ((40, 12), (5, 16, 12), (5, 12, 8), (40, 2))
    )
    index = torch.rand(40, 5, generator=generator).topk(2).indices
    results = []
    for form in (moe_gemm.routed_experts, reference.routed_experts):
        inputs = [t.clone().requires_grad_() for t in (x, weight, gate_up, down)]
        out = form(inputs[0], index, *inputs[1:], limit)
        results.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    for ours, plain in zip(*results, strict=True):
        assert torch.allclose(ours, plain, rtol=1e-4, atol=1e-4)


def test_counts_are_those_of_the_model_and_of_the_releases() -> None:
    with torch.device("meta"):
        built = Transformer(V4)
    assert parameters(V4) == sum(p.numel() for p in built.parameters())
    with torch.device("meta"):
        built = Transformer(PREDICTING)
    assert parameters(PREDICTING) == sum(p.numel() for p in built.parameters())
    found = [parameters(c, mtp=False) + router_biases(c) for c in (V4_FLASH, V4_PRO)]
    assert found == [284_332_240_471, 1_572_997_201_763]
    active = [parameters(c, active=True, mtp=False) for c in (V4_FLASH, V4_PRO)]
    assert [round(n / 1e9, 2) for n in active] == [13.80, 49.78]


def test_products_of_a_row_by_hand_and_shares_of_v3_2() -> None:
    """One layer of each kind, window 5, entries of 4 (3 selected) and 8: a row of 16, context 8; 5 - 25/32 are near."""
    near, head = 5 - 25 / 32, 2 * 4 * 2 * 16
    sliding, csa, hca = (
        token_flops(dataclasses.replace(V4, num_hidden_layers=1, layer_types=(kind,)), 8).attention_scores
        for kind in (SLIDING, CSA, HCA)
    )
    assert sliding == pytest.approx(near * head) and hca == pytest.approx((near + 1) * head)
    assert csa == pytest.approx((near + 3 - 9 / 8) * head + 2 * 2 * 16 * 16)
    million = 2**19
    assert [round(forward_flops(c, million) / forward_flops(V3_2, million), 2) for c in (V4_FLASH, V4_PRO)] == [
        0.14,
        0.34,
    ]
    shares = [fp8_flops(c, 2**20) / fp8_flops(V3_2, 2**20) for c in (V4_FLASH, V4_PRO)]
    assert [round(share, 2) for share in shares] == [0.10, 0.27]  # the report's
    one = dataclasses.replace(
        V4, num_hidden_layers=1, layer_types=(CSA,)
    )  # 5 near and 3 of 25 entries, in bf16; 25 keys in FP4
    weights = parameters(one, active=True) - 2 * 50 * 32
    assert fp8_flops(one, 100) == 2 * weights + 4 * 50 * 32 + 4 * (5 + 3) * 2 * 4 * 16 + 25 * 16 * 16
    assert [cache_bytes(c) for c in (V4_FLASH, V4_PRO)] == [6880, 9848]
    pool = pool_of(V4_FLASH, 1, 0, torch.bfloat16, torch.device("meta"))
    assert pool.bytes_per_token == 6880 + 20 * 2 * 7 * 512 // 128  # each of HCA's entries takes the space of eight


def test_muons_matrices_are_the_planners() -> None:
    with torch.device("meta"):
        built = Transformer(V4)
    found = [p.numel() for n, p in built.named_parameters() if is_matrix(n, p)]
    merge = V4.hc_mult**2 * V4.hidden_size
    assert sum(found) == muon_parameters(V4) + merge


@pytest.mark.parametrize("config", [V4, V4_FLASH, V4_PRO], ids=["toy", "flash", "pro"])
def test_configs_come_back(config: ModelConfig) -> None:
    raw = raw_config(config, "bfloat16")
    assert model_config(raw) == config and from_json(to_json(config)) == config
    theirs = transformers.DeepseekV4Config(**raw)
    kinds = list(config.layer_types)
    assert theirs.layer_types == kinds and theirs.rope_parameters["compress"]["rope_theta"] == config.rope_theta
    assert theirs.rope_parameters["main"]["rope_theta"] == config.local_rope_theta
    if config is not V4:
        assert raw["compress_ratios"][-3:] == [128, 4, 0] and isinstance(config.rope_scaling, Yarn)
    assert model_config(theirs.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"compress_ratios": [0, 4, 64]}, "compress_ratios"),
        ({"compress_ratios": [0, 4]}, "compress_ratios"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe"]}, "mlp_layer_types"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"norm_topk_prob": False}, "norm_topk_prob"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"o_groups": 3}, "o_groups"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
        ({"compress_rates": [4]}, "compress_rates"),
        ({"index_topk": 0}, "index_topk"),
    ],
)
def test_configs_that_are_not_v4s_are_refused(change: dict[str, Any], field: str) -> None:
    raw = {k: v for k, v in raw_config(V4, "float32").items() if k not in change}
    if "compress_ratios" in change:
        del raw["layer_types"]
    with pytest.raises(UserError, match=field):
        model_config(raw | change)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"hc_mult": 0}, "hc_mult"),
        ({"swiglu_limit": None}, "swiglu_limit"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace"),
    ],
)
def test_parts_of_v4_go_together_in_other_ways_too(change: dict[str, Any], field: str) -> None:
    """Such models compute; they only lack a public format."""
    config = dataclasses.replace(V4, **change)
    assert Transformer(config).initialise(0)(tokens_of(1, 9)).isfinite().all()
    with pytest.raises(UserError, match=field):
        raw_config(config, "float32")


def test_mhc_and_hash_routing_with_latent_attention() -> None:
    """Residual streams, attention and router can be combined freely."""
    latent = {
        "attention": "mla",
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 0,
        "o_lora_rank": 0,
    }
    none = {"sliding_window": None, "layer_types": (), "local_rope_theta": None, "index_topk": 0, "o_groups": 1}
    config = dataclasses.replace(V4, **latent, **none)
    made = Transformer(config).initialise(0)
    assert parameters(config) == sum(p.numel() for p in made.parameters())
    assert backward(made, tokens_of(2, 9)).main.isfinite() and len(made.routers()) == 3
    with pytest.raises(UserError, match="hc_mult"):
        raw_config(config, "float32")


def test_every_name_of_transformers_modules_is_the_releases() -> None:
    raw = raw_config(dataclasses.replace(V4, num_hash_layers=2), "float32")
    with torch.device("meta"):
        theirs = transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**raw))
    found = {released(name): tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    wanted = {n: s for n, s in shapes(model_config(raw)).items() if ".experts." not in n}
    assert {n: s for n, s in found.items() if ".experts." not in n} == wanted


def test_files_of_every_spelling_and_a_card(model: Transformer, tmp_path: Path) -> None:
    """finback's form, the release's, and transformers' version of it; verify passes; fp32 stays in a bf16 folder."""
    save(tmp_path, model)
    export(load(tmp_path), tmp_path / "out", "fp32")
    card = verify(tmp_path / "out")
    assert card.holds, card.as_text()
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    theirs.save_pretrained(tmp_path / "theirs")
    back, audit = load_audited(tmp_path / "theirs")
    assert audit.holds and all(torch.equal(a, model.state_dict()[n]) for n, a in back.state_dict().items())
    export(model, tmp_path / "short", "bf16")
    short = load(tmp_path / "short", torch.bfloat16, "bf16")
    assert short.merge.weight.dtype == torch.float32 and short.embed.dtype == torch.bfloat16
    assert torch.equal(short.blocks[0].attention.sink, model.blocks[0].attention.sink)
    assert torch.equal(short.blocks[0].feed_forward.router.table, model.blocks[0].feed_forward.router.table)
    assert names.copies(V4) == {}


@torch.no_grad()
def test_packed_matrices_answer_as_bf16_does() -> None:
    """Also for V4, where the grouped matrices are not packed."""
    tokens, made = tokens_of(2, 30), Transformer(V4, torch.bfloat16, torch.bfloat16).initialise(0).eval()
    exact = Transformer(V4).initialise(0).eval()
    expected, plain = exact.logits(exact(tokens)), made.logits(made(tokens))
    for form, most in (("bf16", 1.3), ("int8", 4.0)):
        if available(form):
            packed = pack(Transformer(V4, torch.bfloat16, torch.bfloat16).initialise(0).eval(), form)
            off = (packed.logits(packed(tokens)) - expected).abs().median()
            assert off <= most * (plain - expected).abs().median()
