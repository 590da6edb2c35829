"""Open checkpoints imported and exported: transformers' logits in every family, every tensor accounted for."""

import dataclasses
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from finback.checkpoint.export import RELEASED_MTP_LAYERS, export
from finback.checkpoint.hf_config import model_config, raw_config
from finback.checkpoint.hf_families import FAMILIES as FAMILY_OF
from finback.checkpoint.models import load_audited as load
from finback.checkpoint.shards import BESIDE, INDEX, SCALE, Shards
from finback.config import UserError
from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import SamplingParams
from finback.kernels import fp8
from finback.model.config import ModelConfig
from finback.model.rope_scaling import LinearRope, LongRope, Yarn
from finback.model.transformer import Transformer
from finback.report.logit_parity import against_transformers
from tests.families import FAMILIES, OTHERS, build, spell_as_released

EXAMPLES = settings(max_examples=20)


KNOWN = FAMILIES | OTHERS


@pytest.mark.parametrize("family", KNOWN)
@settings(EXAMPLES, max_examples=3)
@given(data=st.data())
def test_logits_and_greedy_text_are_those_of_transformers(family: str, data: st.DataObject) -> None:
    agrees(data.draw(KNOWN[family]), data.draw(st.integers(0, 1000)), data.draw(st.booleans()))


@pytest.mark.slow
@pytest.mark.parametrize("family", KNOWN)
@EXAMPLES
@given(data=st.data())
def test_they_agree_on_more_configs(family: str, data: st.DataObject) -> None:
    agrees(data.draw(KNOWN[family]), data.draw(st.integers(0, 1000)), data.draw(st.booleans()))


def agrees(config: Any, seed: int, released: bool, model_type: str = "") -> None:
    """A random model from transformers' files computes the same logits, and so does our export of it."""
    theirs = build(config, seed)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        if released:
            spell_as_released(Path(folder))
        if model_type:
            edit(model_type=model_type)(Path(folder))
        ours, audit = load(Path(folder))
        assert audit.holds and not audit.unexpected
        if model_type:
            held, text, _ = against_transformers(ours.eval(), Path(folder), 1e-9)
            assert held, text
        back = transformers_loads(ours.eval(), Path(folder) / "out")
    tokens = torch.randint(3, config.vocab_size, (3, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (ours.logits(ours(tokens)) - expected).abs().max() <= 1e-4
        assert (back(tokens).logits - expected).abs().max() <= 1e-4
    # transformers chooses LongRoPE's factors per batch, where padding counts, and lets V4's windows include padding
    is_alone = "longrope" in str(config.rope_parameters) or config.model_type == "deepseek_v4"
    for some in ((0,), (1,), (2,)) if is_alone else ((0, 1, 2),):
        same_greedy_text(ours, theirs, tokens, some)


def transformers_loads(ours: Any, folder: Path) -> Any:
    """Our export as transformers loads it, with no key missing and none unexpected."""
    export(ours, folder, "fp32")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(info.values()), info
    return model.eval()


def same_greedy_text(ours: Any, theirs: Any, tokens: torch.Tensor, some: tuple[int, ...]) -> None:
    """32 tokens after prompts of unequal lengths, left-padded for transformers; ties of the two best may differ."""
    prompts = [[tokens[0, :5].tolist(), tokens[1, :9].tolist(), tokens[2, :1].tolist()][row] for row in some]
    longest = max(map(len, prompts))
    padded = torch.tensor([[2] * (longest - len(p)) + p for p in prompts])
    with torch.no_grad():
        made = theirs.generate(
            padded,
            attention_mask=(padded != 2).long(),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=2,
        )[:, longest:]
    engine = Engine(ours, stops=(), config=EngineConfig(chunk=4))  # reads the longest prompt in chunks
    mine = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=32), [0] * len(prompts))
    for prompt, ours_, their_ in zip(prompts, (c.tokens for c in mine), made.tolist(), strict=True):
        apart = next((i for i, pair in enumerate(zip(ours_, their_, strict=True)) if len(set(pair)) == 2), None)
        if apart is not None:
            with torch.no_grad():
                logits = theirs(torch.tensor([prompt + their_[:apart]])).logits[0, -1]
            assert logits[their_[apart]] - logits[ours_[apart]] <= 1e-5, f"token {apart} differs without a tie"


def test_kimi_is_deepseek_under_another_name() -> None:
    config = transformers.DeepseekV3Config(
        **{"vocab_size": 60, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "q_lora_rank": 20},
        **{"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8},
        **{"qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1},
        **{"topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827},
        **{"num_experts_per_tok": 3, "max_position_embeddings": 64, "num_nextn_predict_layers": 0},
        rope_parameters={
            "rope_theta": 50000.0,
            "rope_type": "yarn",
            "factor": 32.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    )
    agrees(config, 0, released=True, model_type="kimi_k2")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (  # tried with transformers 5.23: rope_scaling is used whole, with the base from its own field
            {
                "rope_theta": 5e5,
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_theta": 7.0},
            },
            {"rope_theta": 5e5, "rope_scaling": LinearRope(2.0)},
        ),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 7.0}}, {"rope_theta": 7.0, "rope_scaling": None}),
        (
            {
                "original_max_position_embeddings": 8,
                "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
            },
            {"rope_scaling": Yarn(2.0, 8, mscale_all_dim=0.0)},
        ),
        ({"model_type": "qwen3"}, {"head_dim": 128}),
        ({"model_type": "smollm3"}, {"rope_theta": 2e6, "tie_word_embeddings": True, "nope_layers": (3,)}),
        ({"model_type": "mistral"}, {"sliding_window": 4096, "max_position_embeddings": 131072}),
        ({"model_type": "mistral", "sliding_window": None}, {"sliding_window": None}),
        (
            {"model_type": "gpt_oss"},
            {"head_dim": 64, "sliding_window": 128, "rope_theta": 150000.0, "swiglu_limit": 7.0, "swiglu_alpha": 1.702},
        ),
        ({"model_type": "gpt_oss"}, {"rope_scaling": Yarn(32.0, 4096, mscale_all_dim=0.0, truncate=False)}),
        (
            {"model_type": "olmo3", "rope_theta": 9e3},
            {"rope_theta": 9e3, "local_rope_theta": 5e5, "sliding_window": 4096},
        ),
    ],
)
def test_what_a_config_leaves_out_is_as_in_transformers(raw: dict[str, Any], expected: dict[str, Any]) -> None:
    sizes = {
        "vocab_size": 60,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 8,
    }
    raw = {"model_type": "llama", "num_key_value_heads": 2} | sizes | raw
    config = model_config(raw)
    assert {name: getattr(config, name) for name in expected} == expected
    theirs = transformers.AutoConfig.for_model(**raw)
    own = {name: value for name, value in expected.items() if hasattr(theirs, name) and name != "rope_theta"}
    assert {name: getattr(theirs, name) for name in own if name != "rope_scaling"} == {
        name: value for name, value in own.items() if name != "rope_scaling"
    }


@pytest.mark.parametrize("family", FAMILIES | OTHERS)
@EXAMPLES
@given(data=st.data())
def test_a_config_survives_writing_and_reading(family: str, data: st.DataObject) -> None:
    config = model_config(data.draw((FAMILIES | OTHERS)[family]).to_dict())
    assert model_config(raw_config(config, "float32")) == config


# what transformers does not support: MTP and FP8

SMALL = ModelConfig(
    vocab_size=60,
    hidden_size=160,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=144,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    first_k_dense_replace=1,
    num_nextn_predict_layers=1,
    max_position_embeddings=64,
    initializer_range=0.1,
)


def small(seed: int = 0, **changes: Any) -> Transformer:
    """A V3 model with one MTP layer and nonzero router biases."""
    model = Transformer(dataclasses.replace(SMALL, **changes)).initialise(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    for router in model.routers():
        router.bias.normal_(0, 0.3, generator=generator)
    return model


def same(a: Transformer, b: Transformer) -> bool:
    """Whether two models have bit-identical tensors."""
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 100_000])
def test_mtp_layers_go_out_and_come_back_to_the_bit(shard_bytes: int, tmp_path: Path) -> None:
    model = small()
    export(model, tmp_path / "out", "fp32", shard_bytes=shard_bytes)
    assert (tmp_path / "out" / INDEX).is_file() == (shard_bytes < 5_000_000_000)
    back, audit = load(tmp_path / "out")
    assert same(model, back) and audit.holds
    assert set(audit.skipped) == {"model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"}
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    tokens = torch.randint(60, (2, 16))
    with torch.no_grad():
        assert (theirs(tokens).logits - back.logits(back(tokens))).abs().max() <= 1e-4


@pytest.mark.slow
def test_the_mtp_layer_of_a_model_as_deep_as_the_release_is_in_the_index(tmp_path: Path) -> None:
    """As in V3's own folders: shards that include layer 61, which transformers ignores."""
    thin = {"hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "q_lora_rank": 8, "vocab_size": 40}
    model = small(num_hidden_layers=61, first_k_dense_replace=60, **thin)
    export(model, tmp_path / "out", "fp32", shard_bytes=100_000)
    index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert len(set(index.values())) > 3 and not (tmp_path / "out" / BESIDE).exists()
    assert {"model.layers.61.eh_proj.weight", "model.layers.61.shared_head.head.weight"} <= index.keys()
    back, audit = load(tmp_path / "out")
    assert same(model, back) and audit.holds and audit.config.num_nextn_predict_layers == 1
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    tokens = torch.randint(40, (1, 9))
    with torch.no_grad():
        assert (theirs(tokens).logits - back.logits(back(tokens))).abs().max() <= 1e-4


def test_the_layers_that_transformers_lets_be_are_those_it_names() -> None:
    for family, layers in RELEASED_MTP_LAYERS.items():
        words = getattr(transformers, FAMILY_OF[family].architecture)._keys_to_ignore_on_load_unexpected
        assert sorted(int(word.split(".layers\\.")[1].split("\\")[0].strip(".*")) for word in words) == list(layers)


def test_mtp_is_what_the_paper_says(tmp_path: Path) -> None:
    """V3 eq. 21-23 computed from the exported tensors: embedding first, then the block, then the head's own norm."""
    model = small(3)
    export(model, tmp_path / "out", "fp32")
    shards = Shards(tmp_path / "out")
    w = {n.removeprefix("model.layers.2."): shards.read(n) for n in shards.by_file() if "layers.2." in n}
    tokens = torch.randint(60, (2, 12))
    with torch.no_grad():
        hidden = model(tokens[:, :-1])
        found = model.logits(model.mtp_hidden_states(hidden, tokens)[0])

        def norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
            return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain

        embedded = w["embed_tokens.weight"][tokens[:, 1:]]
        joined = torch.cat([norm(embedded, w["enorm.weight"]), norm(hidden, w["hnorm.weight"])], -1)
        x = joined @ w["eh_proj.weight"].T
        x = x + attention(norm(x, w["input_layernorm.weight"]), w)
        x = x + experts(norm(x, w["post_attention_layernorm.weight"]), w)
        expected = norm(x, w["shared_head.norm.weight"]) @ w["shared_head.head.weight"].T
    assert (found - expected).abs().max() <= 1e-4


def attention(x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """MLA head by head, as V2 section 2.1 writes it."""
    c = SMALL
    length = x.size(1)

    def norm(y: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        return y * (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * gain

    def turned(y: torch.Tensor) -> torch.Tensor:  # rotates neighbouring pairs as complex numbers
        angle = torch.outer(torch.arange(length).float(), c.rope_theta ** (-torch.arange(0, 8, 2) / 8.0))
        turn = torch.polar(torch.ones_like(angle), angle)
        return torch.view_as_real(torch.view_as_complex(y.reshape(*y.shape[:-1], 4, 2).contiguous()) * turn).flatten(-2)

    a = "self_attn."
    q = norm(x @ w[a + "q_a_proj.weight"].T, w[a + "q_a_layernorm.weight"]) @ w[a + "q_b_proj.weight"].T
    down = x @ w[a + "kv_a_proj_with_mqa.weight"].T
    kv = norm(down[..., :16], w[a + "kv_a_layernorm.weight"]) @ w[a + "kv_b_proj.weight"].T
    shared = turned(down[..., 16:])
    heads = []
    for h in range(2):
        mine, keys = q[..., 16 * h : 16 * h + 16], kv[..., 16 * h : 16 * h + 16]
        score = mine[..., :8] @ keys[..., :8].transpose(1, 2) + turned(mine[..., 8:]) @ shared.transpose(1, 2)
        future = torch.ones(length, length).triu(1).bool()
        heads.append((score / 4).masked_fill(future, -torch.inf).softmax(-1) @ keys[..., 8:])
    return torch.cat(heads, -1) @ w[a + "o_proj.weight"].T


def experts(x: torch.Tensor, w: dict[str, torch.Tensor]) -> torch.Tensor:
    """DeepSeekMoE token by token (V3 eq. 12-16)."""

    def swiglu(y: torch.Tensor, prefix: str) -> torch.Tensor:
        gate, up = y @ w[prefix + "gate_proj.weight"].T, y @ w[prefix + "up_proj.weight"].T
        return (torch.nn.functional.silu(gate) * up) @ w[prefix + "down_proj.weight"].T

    out = torch.zeros_like(x)
    for row in range(x.size(0)):
        for t in range(x.size(1)):
            u = x[row, t]
            s = (w["mlp.gate.weight"] @ u).sigmoid()
            chosen = (s + w["mlp.gate.e_score_correction_bias"]).topk(2).indices.tolist()
            total = sum(s[e] for e in chosen)
            out[row, t] = swiglu(u, "mlp.shared_experts.") + sum(
                s[e] / total * swiglu(u, f"mlp.experts.{e}.") for e in chosen
            )
    return out


def test_a_config_that_declares_mtp_which_the_files_lack_is_told(tmp_path: Path) -> None:
    export(small(), tmp_path / "out", "fp32")
    (tmp_path / "out" / BESIDE).unlink()
    model, audit = load(tmp_path / "out")
    assert audit.holds and model.config.num_nextn_predict_layers == 0
    assert audit.notes[0].startswith("config.json declares 1 MTP layer(s) that the files lack")


@pytest.mark.parametrize("fmt", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize(
    "changes",
    [
        {"tie_word_embeddings": True},
        {"first_k_dense_replace": 2},
        {"n_routed_experts": 0},
        {"num_hidden_layers": 61, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8},
        {"num_hidden_layers": 61, "hidden_size": 16, "n_routed_experts": 0, "tie_word_embeddings": True},
        {"num_nextn_predict_layers": 2},
    ],
)
def test_rare_shapes_go_out_and_come_back(changes: dict[str, Any], fmt: Any, tmp_path: Path) -> None:
    model = small(**changes)
    export(model, tmp_path / "out", fmt)
    back, audit = load(tmp_path / "out")
    assert audit.holds and back.config.num_nextn_predict_layers == model.config.num_nextn_predict_layers
    assert (tmp_path / "out" / BESIDE).is_file() == (model.config.num_hidden_layers != 61)
    if fmt == "fp32":
        assert same(model, back)
    _, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32, **_spread(fmt)
    )
    assert not any(info.values()), info


def _spread(fmt: str) -> dict[str, Any]:
    return {"quantization_config": transformers.FineGrainedFP8Config(dequantize=True)} if fmt == "fp8" else {}


def test_a_head_that_is_said_to_be_tied_and_is_not(tmp_path: Path) -> None:
    config = transformers.Qwen2Config(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=False,
    )
    build(config, 0).save_pretrained(tmp_path)
    edit(tie_word_embeddings=True)(tmp_path)
    with pytest.raises(
        UserError, match=r"lm_head.weight = .*config.json ties it to model.embed_tokens.weight, but its"
    ):
        load(tmp_path)


def test_fp8_blocks_by_hand() -> None:
    weight = torch.randn(2, 130, 260) * torch.logspace(-3, 3, 130)[:, None]
    values, scale = fp8.quantize(weight)
    assert values.shape == weight.shape and scale.shape == (2, 2, 3)
    for n in range(2):
        for r in range(2):
            for c in range(3):
                block = weight[n, 128 * r : 128 * r + 128, 128 * c : 128 * c + 128]
                assert scale[n, r, c] == (block.abs().max() / 448)
    back = fp8.dequantize(values, scale, torch.float32)
    largest = fp8.expand_blocks(scale, 130, 260) * 448
    # E4M3 has three mantissa bits: half a step is 1/16 of a value, or of the smallest normal number
    assert ((back - weight).abs() <= (weight.abs() / 16).clamp(min=2**-10 / 448) + largest * 2**-16).all()
    again, factors = fp8.quantize(back)
    assert torch.equal(fp8.dequantize(again, factors, torch.float32), back)  # requantizing loses nothing


def test_every_e4m3_number_becomes_fp32_exactly() -> None:
    patterns = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for values in (patterns, patterns[:127], patterns.view(16, 16).T.contiguous()):
        assert torch.equal(fp8.to_fp32(values).nan_to_num(nan=1e9), values.float().nan_to_num(nan=1e9))


@pytest.mark.parametrize("kept", ["fp32", "bf16", "fp8"])
def test_fp8_weights_go_out_and_come_back_within_their_rounding(kept: Any, tmp_path: Path) -> None:
    model = small()
    export(model, tmp_path / "out", "fp8", shard_bytes=150_000)
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["quantization_config"]["weight_block_size"] == [128, 128]
    back, audit = load(tmp_path / "out", weights=kept)
    assert audit.holds and sum(n.endswith(SCALE) for n in audit.skipped) > 0
    experts = back.blocks[1].feed_forward
    assert (experts.gate_up.dtype == torch.float8_e4m3fn) == (kept == "fp8")
    if kept == "fp32":
        for name, tensor in model.state_dict().items():
            gap = (back.state_dict()[name] - tensor).abs()
            assert (gap <= tensor.abs() / 16 + tensor.abs().max() * 2**-9).all(), name
    exact, _ = load(tmp_path / "out")
    tokens = torch.randint(60, (2, 16))
    with torch.no_grad():
        a, b = exact.logits(exact(tokens)), back.eval().logits(back(tokens))
    assert (a - b).abs().max() <= {"fp32": 0.0, "bf16": 0.03, "fp8": 0.03}[kept] * a.abs().max()
    if kept == "fp8":  # exported again: the same FP8 values
        export(back, tmp_path / "again", "fp8")
        twice, _ = load(tmp_path / "again")
        assert (
            twice.state_dict()["blocks.1.feed_forward.down"] == exact.state_dict()["blocks.1.feed_forward.down"]
        ).all()


def test_factors_may_lie_in_another_file_than_their_tensor(tmp_path: Path) -> None:
    export(small(num_nextn_predict_layers=0), tmp_path / "out", "fp8")
    tensors = load_file(tmp_path / "out/model.safetensors")
    (tmp_path / "out/model.safetensors").unlink()
    parts = {"a.safetensors": {}, "b.safetensors": {}}  # type: ignore[var-annotated]
    for name, tensor in tensors.items():
        parts["b.safetensors" if name.endswith(SCALE) else "a.safetensors"][name] = tensor
    for file, held in parts.items():
        save_file(held, tmp_path / "out" / file)
    index = {name: file for file, held in parts.items() for name in held}
    (tmp_path / "out" / INDEX).write_text(json.dumps({"weight_map": index}))
    back, audit = load(tmp_path / "out")
    assert audit.holds and torch.isfinite(back.blocks[1].feed_forward.gate_up).all()


# refusals


def damage_truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def damage_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def with_index(folder: Path, names: dict[str, str]) -> None:
    """Moves the weights to a file that only an index names: a single file by the standard name takes precedence."""
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))


def damage_index(folder: Path) -> None:
    with_index(folder, {"lm_head.weight": "gone.safetensors"})


def damage_index_path(folder: Path) -> None:
    with_index(folder, {"lm_head.weight": "../part.safetensors"})


def damage_index_name(folder: Path) -> None:
    with_index(folder, {"more.weight": "part.safetensors"})


def damage_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / BESIDE).unlink(missing_ok=True)


def damage_nothing_left(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        path.unlink()


def edit(**changes: Any) -> Any:
    def damage(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))

    return damage


def tensors_edit(change: Any) -> Any:
    def damage(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors")

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit(model_type="qwen3_next"), "config.json model_type = 'qwen3_next': not run: three of four layers are"),
        (damage_truncate, "weights = .*model.safetensors': not a complete safetensors file .*Download it again"),
        (damage_header, "weights = .*model.safetensors': not a complete safetensors file"),
        (damage_index, "weights = .*gone.safetensors': the file is missing"),
        (damage_index_path, "index.json = .*not an index: it must map tensor names to file names in this folder"),
        (damage_index_name, "index.json = .*names 1 tensors that its files lack, such as more.weight"),
        (damage_pickle, "weights = .*pytorch_model.bin': a pickle, which can run arbitrary code"),
        (damage_nothing_left, "weights = .*: no .safetensors file there"),
        (edit(model_type="gpt_neox"), "config.json model_type = 'gpt_neox': not a supported family"),
        (edit(model_type="deepseek_v33"), "Did you mean 'deepseek_v3'"),
        (edit(model_type="own", auto_map={"x": "y"}), "brings its own code, which finback never runs"),
        (edit(hidden_act="gelu"), "config.json hidden_act = 'gelu': finback supports 'silu' only"),
        (edit(hidden_size=...), "config.json hidden_size = None: missing"),
        (edit(hidden_size="big"), "config.json hidden_size = 'big': not a whole number"),
        (
            edit(num_hidden_layers=3, num_nextn_predict_layers=0),
            "model.layers.2.eh_proj.weight = .*unexpected, with 5 more: the weights are not those of config",
        ),
        (edit(moe_intermediate_size=64), "shape .*, but config.json requires"),
        (edit(routed_scaling_factor=...), "config.json routed_scaling_factor = None: missing"),
        (edit(n_group=...), "config.json n_group = None: missing"),
        (edit(n_group=0), "n_group = 0: not above 0"),
        (edit(rope_theta="big"), "config.json rope_theta = 'big': not a number"),
        (edit(rope_theta=0.5), "config.json rope_theta = 0.5: not above 1"),
        (edit(partial_rotary_factor="x"), "config.json partial_rotary_factor = 'x': not a number"),
        (edit(vocab_size=10**20), "config.json vocab_size = .*: not a whole number up to"),
        (edit(rope_scaling={"type": "linear", "factor": 0}), "rope_scaling.factor = 0.0: not above 0"),
        (edit(rope_scaling={"type": "yarn", "factor": 2, "original_max_position_embeddings": -5}), "not above 0"),
        (edit(rope_scaling={"type": "ntk"}), "config.json rope_scaling = .*not a supported scaling"),
        (edit(rope_scaling={"type": "yarn"}), "config.json rope_scaling = .*bad or missing 'factor'"),
        (edit(quantization_config={"quant_method": "quark"}), "quantization_config = .*finback reads fp8"),
        (tensors_edit(lambda t: t.update({"model.extra": torch.ones(1)})), "model.extra = .*: unexpected"),
        (tensors_edit(lambda t: t.pop("model.norm.weight")), "model.norm.weight = .*: missing"),
        (
            tensors_edit(lambda t: t.update({"model.norm.weight": torch.ones(160, dtype=torch.int32)})),
            "model.norm.weight = .*dtype I32, which no weight",
        ),
        (
            tensors_edit(lambda t: t.update({"model.norm.weight": torch.ones(160).to(torch.float8_e4m3fn)})),
            "model.norm.weight = .*FP8 without factors",
        ),
    ],
)
def test_what_is_wrong_is_named(damage: Any, message: str, tmp_path: Path) -> None:
    export(small(), tmp_path / "out", "fp32")
    damage(tmp_path / "out")
    with pytest.raises(UserError, match=message):
        load(tmp_path / "out")


def test_an_export_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")  # the message of safetensors

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space") as caught:
        patch.setattr("finback.checkpoint.export.save_file", full)
        export(small(), tmp_path / "out", "fp32")
    assert caught.value.errno == 28 and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 1000))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"folder = .*needs 0.0 GB, 0.0 GB are free"):
        export(small(), tmp_path / "out", "fp32")
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(UserError, match="exists and is not empty"):
        export(small(), tmp_path / "out", "fp32")
    assert (tmp_path / "out/mine").read_text() == "x"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scoring_func": "softmax"}, "DeepSeek-V2 has neither normalised weights nor MTP"),
        (
            {"attention": "gqa", "num_key_value_heads": 1, "head_dim": 8, "scoring_func": "softmax"},
            "n_shared_experts = 1: the family with such experts has 0",
        ),
    ],
)
def test_models_that_no_family_covers_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        export(small(**changes), tmp_path / "out", "fp32")
    assert not (tmp_path / "out").exists()


GQA_SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
KINDS = ["sliding_attention", "full_attention"]
LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        # fields that change what transformers computes
        ({"model_type": "qwen3", "is_causal": False}, "is_causal = False: finback supports True only"),
        ({"model_type": "mistral", "layer_types": KINDS}, "this family has a window in all layers or in none"),
        ({"model_type": "mixtral", "layer_types": KINDS}, "this family has a window in all layers or in none"),
        (
            {"model_type": "deepseek_v2", "rope_interleave": False},
            "rope_interleave = False: finback supports True only",
        ),
        ({"model_type": "phi3", "rope_scaling": {"type": "linear", "factor": 2.0}}, "phi3 has longrope or none"),
        (
            {"model_type": "olmo3", "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
            "rotates parts of heads, but this family rotates whole heads",
        ),
        # and fields that do not
        ({"model_type": "olmo3", "partial_rotary_factor": 0.5}, ""),
        ({"model_type": "gemma3_text", "partial_rotary_factor": 0.5, "query_pre_attn_scalar": 8}, ""),
        ({"model_type": "phi3", "rope_scaling": {"type": "yarn", "factor": 4.0} | LONG}, ""),
    ],
)
def test_fields_count_as_transformers_counts_them(changes: dict[str, Any], message: str) -> None:
    if message:
        with pytest.raises(UserError, match=message):
            model_config(GQA_SIZES | changes)
        return
    config = model_config(GQA_SIZES | changes)
    assert config.partial_rotary_factor == 1.0 and isinstance(config.rope_scaling, LongRope | None)


ODD: tuple[Any, ...] = ("x", "2", -1, 0, 1.5, True, None, [], [1], {}, {"a": 1}, 10**12, float("nan"), float("inf"))


@pytest.mark.parametrize("family", FAMILY_OF)
def test_a_field_of_any_type_is_read_or_named(family: str) -> None:
    """Replaces every field of the family's config, nested ones included, by values of other types."""
    sizes = GQA_SIZES | {"num_key_value_heads": 2, "moe_intermediate_size": 16, "o_groups": 2}
    raw = FAMILY_OF[family].defaults | sizes | ({"num_key_value_heads": 1} if family == "deepseek_v4" else {})
    if family in ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", "kimi_k2", "glm4_moe_lite"):
        raw = raw_config(SMALL, "float32") | {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 8}
    raw |= {"model_type": family, "rope_theta": 300.0}
    if family == "deepseek_v2":
        raw |= {"scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
    within = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16, "rope_theta": 300.0}
    long = {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "attention_factor": 1.0}
    low = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    kinds = ("full_attention", "sliding_attention", "main", "compress")
    both = {kind: {"rope_type": "default", "rope_theta": 300.0} for kind in kinds}
    changes = [{name: odd} for name in (*raw, "rope_scaling", "rope_parameters") if name != "model_type" for odd in ODD]
    for place, whole in (
        ("rope_scaling", within),
        ("rope_scaling", long),
        ("rope_scaling", low),
        ("rope_parameters", both),
    ):
        changes += [{place: whole | {name: odd}} for name in whole for odd in ODD]
    named = 0
    for change in changes:
        try:
            model_config(raw | change)
        except UserError:
            named += 1
    assert model_config(raw) and len(changes) / 3 < named < len(changes)


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_a_list_of_dense_layers_counts_before_their_number(family: str) -> None:
    raw = json.loads(json.dumps(raw_config(dataclasses.replace(SMALL, num_nextn_predict_layers=0), "float32")))
    raw |= {"model_type": family, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 8, "num_hidden_layers": 4}
    kinds = ["dense", "sparse", "dense", "sparse"]
    config = model_config(raw | {"mlp_layer_types": kinds, "first_k_dense_replace": 3})
    assert [config.is_moe(layer) for layer in range(4)] == [kind == "sparse" for kind in kinds]
    assert model_config(raw | {"first_k_dense_replace": 3}).is_moe(3)


def test_sliding_layers_that_are_scaled_go_out_as_no_family() -> None:
    for family in ("olmo3", "gemma3_text"):
        config = model_config(GQA_SIZES | {"model_type": family, "rope_scaling": {"type": "linear", "factor": 2.0}})
        with pytest.raises(UserError, match="families of this shape do not scale sliding layers"):
            raw_config(dataclasses.replace(config, local_rope_theta=None), "float32")
        assert model_config(raw_config(config, "float32")) == config
