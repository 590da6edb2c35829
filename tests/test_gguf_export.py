"""GGUF export and import: a file loads as the same model, ids, stop tokens and template. See also test_llama_cpp.py."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finback.checkpoint import gguf_export, k_quants
from finback.checkpoint.gguf import GGUF
from finback.checkpoint.gguf_types import kind_of
from finback.checkpoint.models import load_audited, save
from finback.config import UserError
from finback.data import gguf_vocabulary, tokenizer
from finback.data.messages import encode_prompt
from finback.data.tokenizer import Tokenizer
from finback.data.turn import Message
from finback.model.config import ModelConfig
from finback.model.rope_scaling import LinearRope, Llama3Rope, LongRope, Yarn
from finback.model.transformer import Transformer
from finback.report.gguf_file import export_gguf, quoted
from tests.test_model import DENSE, EXPERTS, OSS, TOY, random_model
from tests.toy import finback

gguf = pytest.importorskip("gguf")
YARN = Yarn(4.0, 16, mscale=0.707, mscale_all_dim=0.707)
LATENT = dataclasses.replace(TOY, num_nextn_predict_layers=0)
GEMMA = dataclasses.replace(
    DENSE,
    num_hidden_layers=4,
    norms="both",
    norm_offset=True,
    scale_embeddings=True,
    activation="gelu_tanh",
    qk_norm=True,
    query_pre_attn_scalar=DENSE.head_dim,
    sliding_window=8,
    layer_types=("sliding_attention", "full_attention", "full_attention", "sliding_attention"),
    local_rope_theta=500.0,
    rope_scaling=LinearRope(4.0),
)
# llama.cpp recognizes it by its number of layers, and scales its scores by another width than that of heads
GEMMA_27B = dataclasses.replace(GEMMA, num_hidden_layers=62, head_dim=16, layer_types=())
OLMO = dataclasses.replace(DENSE, norms="post", qk_norm=True, qk_norm_over="projection")
MODELS: dict[str, ModelConfig] = {
    "V3": LATENT,
    "V3, YaRN": dataclasses.replace(LATENT, rope_scaling=YARN, n_group=1, topk_group=1),
    "V2-Lite": dataclasses.replace(
        LATENT,
        num_hidden_layers=27,
        q_lora_rank=None,
        scoring_func="softmax",
        norm_topk_prob=False,
        n_group=1,
        topk_group=1,
    ),
    "V2": dataclasses.replace(
        LATENT, scoring_func="softmax", norm_topk_prob=False, rope_scaling=YARN, n_group=1, topk_group=1
    ),
    "dense latent": dataclasses.replace(LATENT, n_routed_experts=0, n_shared_experts=0, tie_word_embeddings=True),
    "smollm3": dataclasses.replace(DENSE, num_hidden_layers=5, nope_layers=(3,)),
    "gpt-oss": dataclasses.replace(
        OSS,
        num_hidden_layers=3,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
        swiglu_limit=7.0,
        moe_intermediate_size=32,
        rope_scaling=Yarn(4.0, 16, mscale_all_dim=0.0, truncate=False),
    ),
    "glm4moe": dataclasses.replace(
        EXPERTS,
        num_hidden_layers=3,
        dense_layers=(),
        first_k_dense_replace=1,
        num_nextn_predict_layers=1,
        attention_bias="qkv",
        scoring_func="sigmoid",
        n_shared_experts=1,
        routed_scaling_factor=1.5,
        partial_rotary_factor=0.5,
        head_dim=16,
        rope_scaling=None,
    ),
    "llama": dataclasses.replace(DENSE, rope_scaling=Llama3Rope(5.0, original_max_position_embeddings=8192)),
    "qwen2": dataclasses.replace(DENSE, attention_bias="qkv", rope_scaling=LinearRope(2.0)),
    "qwen3": dataclasses.replace(
        DENSE, qk_norm=True, rope_scaling=Yarn(4.0, 16, mscale_all_dim=0.0, attention_factor=1.5)
    ),
    "qwen3_moe": dataclasses.replace(EXPERTS, dense_layers=()),
    "mixtral": dataclasses.replace(EXPERTS, dense_layers=(), qk_norm=False, attention_bias="none"),
    "gemma3": GEMMA,
    "phi3": dataclasses.replace(
        DENSE, partial_rotary_factor=0.5, rope_scaling=LongRope((1.0, 1.125, 1.25), (1.5, 2.5, 4.0), 16, 1.25)
    ),
    "phi3, short rows": dataclasses.replace(
        DENSE, rope_scaling=LongRope((1.0, 1.125, 1.25, 1.375, 1.5, 2.0), (2.0,) * 6, 300, 1.125)
    ),
    "olmo2": dataclasses.replace(OLMO, rope_scaling=Yarn(4.0, 16, mscale_all_dim=0.0)),
    "olmo3": dataclasses.replace(
        OLMO,
        num_hidden_layers=3,
        tie_word_embeddings=False,
        sliding_window=8,
        layer_types=("full_attention", "sliding_attention", "sliding_attention"),
        rope_scaling=Yarn(4.0, 16, mscale_all_dim=0.0),
        local_rope_theta=DENSE.rope_theta,
    ),
}


def filled(config: ModelConfig) -> Transformer:
    """Random weights; files have no biases for softmax routers."""
    model = random_model(config)
    for router in model.routers():
        router.bias *= config.scoring_func == "sigmoid"
    return model


def written(writer: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a file with the gguf library alone."""
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.detach().contiguous().numpy())
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_what_is_written_is_read_back(config: ModelConfig, tmp_path: Path) -> None:
    model = filled(config)
    gguf_export.write(model, tmp_path / "m.gguf", "f32", {})
    back, audit = load_audited(tmp_path / "m.gguf")
    assert audit.holds and not audit.unexpected
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (model.logits(model(tokens)) - back.logits(back.eval()(tokens))).abs().max() <= 1e-4
    for stored, read in zip(model.mtp.parameters(), back.mtp.parameters(), strict=True):
        assert torch.equal(stored, read)
    rounded = config.rope_scaling if not isinstance(config.rope_scaling, Yarn) else back.config.rope_scaling
    assert back.config.rope_scaling == rounded


def test_other_forms_of_up_projections_and_experts_are_read(tmp_path: Path) -> None:
    """Old files store kv_b as one matrix, with the head counts and key lengths of the expanded form."""
    c = MODELS["V3"]
    model = random_model(c)
    settings = gguf_export._settings(c, "deepseek2")
    for name in ("key_length_mla", "value_length_mla"):
        del settings[f"deepseek2.attention.{name}"]
    settings |= {"deepseek2.attention.key_length": c.qk_head_dim, "deepseek2.attention.value_length": c.v_head_dim}
    writer = gguf.GGUFWriter(tmp_path / "old.gguf", "deepseek2")
    for name, value in settings.items():
        gguf_export._add(writer, name, value)
    held = dict(gguf_export.tensors(model))
    for layer, block in enumerate(model.blocks):
        del held[f"blk.{layer}.attn_k_b.weight"], held[f"blk.{layer}.attn_v_b.weight"]
        held[f"blk.{layer}.attn_kv_b.weight"] = block.attention.kv_up.weight
        if c.is_moe(layer):
            del held[f"blk.{layer}.ffn_gate_exps.weight"], held[f"blk.{layer}.ffn_up_exps.weight"]
            held[f"blk.{layer}.ffn_gate_up_exps.weight"] = block.feed_forward.gate_up
    written(writer, held)
    back, audit = load_audited(tmp_path / "old.gguf")
    tokens = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert audit.holds
        assert (model.logits(model(tokens)) - back.logits(back.eval()(tokens))).abs().max() <= 1e-4


@pytest.mark.parametrize(
    ("said", "problem"),
    [
        ({"attention.scale": 0.5}, "attention.scale = 0.5: the file says how something is computed"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"expert_shared_count": 1}, "expert_shared_count = 1"),
        ({"rope.scaling.attn_factor": 1.5}, "rope.scaling.attn_factor = 1.5"),
        ({"rope.freq_base_swa": 7.0}, "rope.freq_base_swa = 7.0"),
        ({"attention.value_length": 24}, "attention.value_length = 24"),
        ({"attention.sliding_window": 8}, "sliding_window = 8: finback knows no windows of this architecture"),
        ({"rope.dimension_count": 6}, "partial_rotary_factor = 0.5: qwen2 rotates whole heads"),
        # no effect: a key with the default value, and one of another architecture
        ({"attention.causal": True, "rope.freq_base_swa": 10000.0, "expert_shared_count": 0}, ""),
        ({"attention.sliding_window": 4096, "pooling_type": 3, "rope.scaling.yarn_attn_factor": 2.0}, ""),
    ],
)
def test_keys_that_change_what_is_computed_are_refused(
    said: dict[str, Any], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(MODELS["qwen2"], rope_scaling=None)
    settings = gguf_export._settings(config, "qwen2") | {f"qwen2.{name}": value for name, value in said.items()}
    monkeypatch.setattr(gguf_export, "_settings", lambda config, arch: settings)
    gguf_export.write(Transformer(config).initialise(0), tmp_path / "m.gguf", "f32", {})
    if problem:
        with pytest.raises(UserError, match=problem):
            load_audited(tmp_path / "m.gguf")
    else:
        assert load_audited(tmp_path / "m.gguf")[1].holds


WRONG: tuple[Any, ...] = ("x", -1, 0, 2.5, [1, 2], ["a"], "")


def test_a_key_of_any_type_is_read_or_named(tmp_path: Path, stage: Path) -> None:
    """Replaces every key of a file by values of other types, for the model and for its tokenizer."""
    config = dataclasses.replace(MODELS["qwen3"], num_hidden_layers=1, vocab_size=300)
    words = gguf_vocabulary.keys(Tokenizer(stage), 300)
    given = gguf_export._settings(config, "qwen3") | words | {"tokenizer.ggml.scores": [0.0] * 300}
    held, named = dict(gguf_export.tensors(filled(config))), 0
    for model in ("gpt2", "llama"):
        for name in (key for key in given if model == "gpt2" or key.startswith("tokenizer.")):
            for odd in WRONG:
                writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3")
                for key, value in (given | {"tokenizer.ggml.model": model, name: odd}).items():
                    gguf_export._add(writer, key, value) if value != -1 else writer.add_int32(key, value)
                written(writer, held if model == "gpt2" else {})
                for read in (GGUF, Tokenizer) if model == "gpt2" else (Tokenizer,):
                    try:
                        read(tmp_path / "m.gguf")
                    except UserError:
                        named += 1
    assert named > 2 * len(given)


def test_files_that_hold_no_model_or_scale_twice_are_named(tmp_path: Path) -> None:
    config = dataclasses.replace(MODELS["qwen3"], num_hidden_layers=1)
    held = dict(gguf_export.tensors(filled(config)))
    ones, llamas = torch.ones(6), dict(gguf_export.tensors(filled(MODELS["llama"])))["rope_freqs.weight"]
    for name, kind, more in (("m", "model", ones), ("twice", "model", llamas), ("lora", "adapter", ones)):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "qwen3")
        writer.add_type(kind)
        for key, value in gguf_export._settings(config, "qwen3").items():
            gguf_export._add(writer, key, value)
        written(writer, held | {"rope_freqs.weight": more})
    back, _ = load_audited(tmp_path / "m.gguf")
    assert isinstance(back.config.rope_scaling, Yarn)  # in addition to frequency factors of 1
    (tmp_path / "pointer.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    for name, problem in (
        ("twice", "scales its rotation in 2 ways at once"),
        ("lora", r"holds no model \(adapter\). Name the model's file; adapters are read as PEFT folders"),
        ("pointer", "a Git LFS pointer"),
    ):
        with pytest.raises(UserError, match=problem):
            load_audited(tmp_path / f"{name}.gguf")


def test_files_with_a_tensor_for_each_expert_are_named(tmp_path: Path) -> None:
    """Mixtral files of 2023; llama.cpp now wants experts in one tensor (check_tensor_dims: ffn_down_exps not found)."""
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    shapes = {"token_embd": (8, 4), "blk.0.ffn_gate.0": (6, 4), "blk.0.ffn_down.1": (4, 6)}
    written(writer, {f"{name}.weight": torch.ones(shape) for name, shape in shapes.items()})
    with pytest.raises(UserError, match=r"of 2023, with a tensor for each expert, .* Use a newer file of the model"):
        load_audited(tmp_path / "m.gguf")


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_matrices_are_stored_as_asked(kind: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(MODELS["qwen3_moe"], hidden_size=64, moe_intermediate_size=32, head_dim=16)
    model = filled(config)
    gguf_export.write(model, tmp_path / "m.gguf", kind, {})
    back, audit = load_audited(tmp_path / "m.gguf")
    assert audit.notes == [f"GGUF, dequantized from {', '.join(sorted({'F32', kind.upper()}))}"]
    assert torch.equal(back.blocks[0].feed_forward.router.weight, model.blocks[0].feed_forward.router.weight)
    worst = {"f16": 2e-3, "bf16": 8e-3, "q8_0": 8e-3, "q4_0": 0.13}[kind]
    for name, tensor in model.state_dict().items():
        gap = (back.state_dict()[name] - tensor).abs().max()
        assert gap <= worst * tensor.abs().max(), name


def test_k_quants_are_read_by_the_library_and_leave_less_than_q4_1() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = gguf.GGMLQuantizationType
    for x in (
        torch.randn(20, 512, generator=generator),
        torch.randn(20, 512, generator=generator) ** 3,
        torch.zeros(2, 256),
    ):
        size = x.square().mean().sqrt().clamp(min=1e-9)

        def error(values: Any, kind: Any, x: torch.Tensor = x, size: torch.Tensor = size) -> float:
            back = torch.from_numpy(gguf.quants.dequantize(values, kind))
            return float((back - x).square().mean().sqrt() / size)

        plain = {kind: error(gguf.quants.quantize(x.numpy(), kind), kind) for kind in (kinds.Q4_1, kinds.Q5_1)}
        assert error(k_quants.quantize(x, "Q4_K"), kinds.Q4_K) <= plain[kinds.Q4_1]
        assert error(k_quants.quantize(x, "Q6_K"), kinds.Q6_K) <= 0.6 * plain[kinds.Q5_1]


def test_a_mix_has_six_bits_where_llama_cpp_has_them() -> None:
    def found(name: str, shape: tuple[int, ...] = (8, 512), tied: bool = False) -> str:
        return kind_of(name, shape, "q4_k_m", 16, tied)

    assert found("output.weight") == "Q6_K" and found("token_embd.weight") == "Q4_K"
    assert found("token_embd.weight", tied=True) == "Q6_K" and found("output_norm.weight", (512,)) == "F32"
    assert [n for n in range(16) if found(f"blk.{n}.ffn_down_exps.weight") == "Q6_K"] == [0, 1, 4, 7, 10, 13, 14, 15]
    assert found("blk.0.attn_q.weight") == "Q4_K" and found("blk.0.ffn_gate_inp.weight") == "F32"
    assert found("blk.0.attn_v.weight", (8, 64)) == "Q8_0" and found("blk.3.attn_v.weight", (8, 64)) == "Q5_0"
    assert found("blk.0.attn_k_b.weight", (2, 8, 24)) == "F16"


def test_a_mixed_file_is_read_as_the_model_up_to_its_rounding(tmp_path: Path) -> None:
    config = dataclasses.replace(MODELS["qwen3"], hidden_size=256, intermediate_size=256, rope_scaling=None)
    model = random_model(config)
    gguf_export.write(model, tmp_path / "m.gguf", "q4_k_m", {})
    back, audit = load_audited(tmp_path / "m.gguf")
    assert audit.notes == ["GGUF, dequantized from F16, F32, Q4_K, Q6_K"]
    for layer, worst in ((0, 0.1), (1, 0.03)):  # four bits, then six bits
        down = model.blocks[layer].feed_forward.down.weight
        assert (back.blocks[layer].feed_forward.down.weight - down).abs().max() <= worst * down.abs().max()


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (dataclasses.replace(GEMMA_27B, query_pre_attn_scalar=16), "scores scaled by the width of heads"),
        (dataclasses.replace(MODELS["olmo3"], local_rope_theta=300.0), "layers of one base"),
        (dataclasses.replace(MODELS["phi3"], hidden_size=64), "together as wide as the hidden state"),
        (
            dataclasses.replace(DENSE, qk_norm=True, rope_scaling=Llama3Rope()),
            "as Llama 3 does in its own family alone",
        ),
        (dataclasses.replace(DENSE, nope_layers=(1,)), "without rotation in every fourth layer"),
        (dataclasses.replace(LATENT, scoring_func="softmax", norm_topk_prob=False), "does not limit V2's experts"),
        (dataclasses.replace(LATENT, q_lora_rank=None), "by its 26 or 27 layers"),
        (dataclasses.replace(DENSE, sliding_window=8), "would attend to the whole context"),
        (EXPERTS, "experts in every layer"),
        (dataclasses.replace(LATENT, rope_interleaved=False), "llama.cpp rotates neighbouring pairs"),
        (
            dataclasses.replace(LATENT, rope_scaling=dataclasses.replace(YARN, mscale=1.0)),
            "settings that GGUF has no key",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(config: Any, problem: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    with pytest.raises(UserError, match=problem):
        gguf_export.write(model, tmp_path / "m.gguf", "f32", {})
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage's output: a model and its tokenizer."""
    folder = tmp_path_factory.mktemp("stage")
    tokenizer.train(["hello world, 12 + 34 = 46. How are you today? hello hello world"], 290, folder / "tokenizer.json")
    save(folder, random_model(dataclasses.replace(LATENT, vocab_size=300)))
    return folder


def test_a_stage_goes_out_with_its_words_ends_and_template(stage: Path, tmp_path: Path) -> None:
    done = finback("export", stage, tmp_path / "m.gguf", "--format", "gguf", "--type", "q8_0", "--json")
    assert done.returncode == 0 and set(json.loads(done.stdout)["files"]) == {"m.gguf", "m.Modelfile"}, done.stderr
    ours, written = Tokenizer(stage), Tokenizer(tmp_path / "m.gguf")
    asked = [Message("system", "Be brief."), Message("user", "hello 12?")]
    assert encode_prompt(asked, ours) == encode_prompt(asked, written)
    assert (ours.stops, ours.bos, ours.eos, ours.adds_bos) == (
        written.stops,
        written.bos,
        written.eos,
        written.adds_bos,
    )
    modelfile = (tmp_path / "m.Modelfile").read_text()
    assert "<｜User｜>{{ .Prompt }}" in modelfile and 'PARAMETER stop "<｜end▁of▁sentence｜>"' in modelfile
    # Ollama reads quoted values literally
    values = quoted("<|end|>"), quoted("a\\b"), quoted("\n\n"), quoted('a "b" c')
    assert values == ('"<|end|>"', '"a\\b"', '"""\n\n"""', '"""a "b" c"""')
    assert "FROM ./m.gguf" in modelfile and "{{ if .System }}{{ .System }}{{ end }}" in modelfile
    refused = finback("export", stage, tmp_path / "m.gguf", "--format", "gguf")
    assert refused.returncode == 2 and "exists" in refused.stderr
    refused = finback("export", stage, tmp_path / "folder", "--format", "gguf")
    assert refused.returncode == 2 and "not a name for a GGUF file" in refused.stderr


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"normalizer": {"type": "NFC"}}, "no name for"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, r"no name for \(Whitespace\)"),
        ({"model": {"type": "Unigram", "vocab": []}}, "of the kind Unigram"),
    ],
)
def test_rules_that_have_no_name_are_refused(change: dict[str, Any], problem: str, stage: Path) -> None:
    text = json.loads((stage / "tokenizer.json").read_text())
    assert gguf_vocabulary.rules_of(text) == "deepseek-v3"
    with pytest.raises(UserError, match=problem):
        gguf_vocabulary.rules_of(text | change)


def test_ends_of_a_file_are_llama_cpps(tmp_path: Path, stage: Path) -> None:
    """eot and eom ids, Ollama's list, and special tokens recognized by their texts."""
    found = gguf_vocabulary.keys(Tokenizer(stage), 300)
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    tokens[290], kinds[290], tokens[291], kinds[291] = "<|im_end|>", 3, "<|end|>", 1
    found |= {"tokenizer.ggml.eot_token_id": 292, "tokenizer.ggml.eos_token_ids": [1, 7]}
    gguf_export.write(random_model(dataclasses.replace(LATENT, vocab_size=300)), tmp_path / "m.gguf", "f16", found)
    assert Tokenizer(tmp_path / "m.gguf").stops == (1, 7, 290, 292)


def test_export_gguf_names_a_text_that_would_be_read_otherwise(stage: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(gguf_vocabulary, "rules_of", lambda text: "qwen2")
    with pytest.raises(UserError, match="other ids than in training"):
        export_gguf(stage, tmp_path / "m.gguf", "f16")
    assert not list(tmp_path.iterdir())
