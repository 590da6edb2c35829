"""Weights in other folder layouts, and the errors for paths that hold no model or an unreadable one."""

import dataclasses
import functools
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from finback import cli
from finback.checkpoint.export import export
from finback.checkpoint.models import find_model, load, load_audited
from finback.checkpoint.shards import INDEX
from finback.config import UserError
from finback.data import tokenizer
from finback.data.tokenizer import Tokenizer
from finback.report.export import export_model
from finback.report.verify import verify
from tests.families import build
from tests.test_checkpoint import same, small
from tests.test_gguf_export import MODELS, filled
from tests.test_verify import R1_TEMPLATE, check, write_gguf

Tensors = dict[str, torch.Tensor]


def bare(tensors: Tensors) -> Tensors:
    """Removes the prefix."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def fused(tensors: Tensors) -> Tensors:
    """Stacks the experts as transformers 5 holds them in memory."""
    found = {n: t for n, t in tensors.items() if ".experts." not in n}
    stem = "model.layers.1.mlp.experts."

    def stacked(*kinds: str) -> torch.Tensor:
        return torch.stack([torch.cat([tensors[f"{stem}{e}.{k}_proj.weight"] for k in kinds]) for e in range(4)])

    return found | {stem + "gate_up_proj": stacked("gate", "up"), stem + "down_proj": stacked("down")}


@pytest.mark.parametrize("change", [bare, fused, lambda t: bare(fused(t))])
def test_other_names_are_read_as_transformers_reads_them(change: Callable[[Tensors], Tensors], tmp_path: Path) -> None:
    model = small(num_nextn_predict_layers=0)
    export(model, tmp_path / "out", "fp32")
    file = tmp_path / "out/model.safetensors"
    save_file({n: t.contiguous() for n, t in change(load_file(file)).items()}, file, metadata={"format": "pt"})
    back, audit = load_audited(tmp_path / "out")
    assert audit.holds and not audit.skipped and same(model, back)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"]
    tokens = torch.randint(60, (1, 16))
    with torch.no_grad():
        assert (theirs(tokens).logits - back.logits(back(tokens))).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "glm4moe", "gpt-oss", "phi3", "V3"])
def test_what_transformers_holds_in_memory_is_read(name: str, tmp_path: Path) -> None:
    """transformers saves the releases' names and parts by default, and those of its modules on request."""
    model = filled(dataclasses.replace(MODELS[name], num_nextn_predict_layers=0))
    export(model, tmp_path / "out", "fp32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "held", save_original_format=False)
    assert same(model, load_audited(tmp_path / "held")[0])


QWEN = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


def test_a_tied_model_that_stores_its_head_alone(tmp_path: Path) -> None:
    theirs = build(transformers.Qwen2Config(**QWEN, tie_word_embeddings=True), 0)
    theirs.save_pretrained(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held["lm_head.weight"] = held.pop("model.embed_tokens.weight")
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    ours, audit = load_audited(tmp_path)
    assert audit.holds and torch.equal(ours.embed, theirs.model.embed_tokens.weight)


def test_a_single_file_counts_before_an_index(tmp_path: Path) -> None:
    """Regardless of which is newer, since clones and downloads do not keep times."""
    first, second = small(0, num_nextn_predict_layers=0), small(1, num_nextn_predict_layers=0)
    export(first, tmp_path / "out", "fp32", shard_bytes=100_000)
    export(second, tmp_path / "new", "fp32")
    assert same(load(tmp_path / "out"), first)
    shutil.move(tmp_path / "new/model.safetensors", tmp_path / "out/model.safetensors")
    for file in (tmp_path / "out").glob("model-*.safetensors"):
        file.unlink()
    for age in (0, 1e9):
        os.utime(tmp_path / "out/model.safetensors", (age, age))
        os.utime(tmp_path / "out" / INDEX, (1e6, 1e6))
        assert same(load(tmp_path / "out"), second)
    raw = json.loads((tmp_path / "out/config.json").read_text()) | {"transformers_weights": "other.safetensors"}
    (tmp_path / "out/config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"transformers_weights = 'other\.safetensors': finback reads"):
        load(tmp_path / "out")


def test_a_split_gguf_file_is_read_from_its_first_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.Qwen2Config(**QWEN, head_dim=16)
    theirs = build(config, 0)
    monkeypatch.setattr(gguf, "GGUFWriter", functools.partial(gguf.GGUFWriter, split_max_tensors=5))
    write_gguf(tmp_path / "m.gguf", config, theirs)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert len(parts) > 2
    for number, part in enumerate(parts):  # the extension may be in any case
        parts[number] = part.rename(part.with_suffix(".GGUF"))
    assert find_model(parts[0]) == parts[0]
    ours, audit = load_audited(parts[0])
    tokens = torch.randint(40, (1, 16))
    with torch.no_grad():
        assert audit.holds and (theirs(tokens).logits - ours.logits(ours(tokens))).abs().max() <= 1e-4
    with pytest.raises(UserError, match=rf"part 2 of {len(parts)}\. Name the first one.*: {parts[0].name}"):
        load(parts[1])
    parts[2].unlink()
    with pytest.raises(UserError, match=rf"{parts[2].name}': no such file"):
        load(parts[0])


def test_a_template_beside_a_gguf_file_is_read(tmp_path: Path) -> None:
    words = tokenizer.train(["hello world"] * 3, 290, tmp_path / "tokenizer.json")
    text = json.loads(words.as_json())
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    ids = {**text["model"]["vocab"], **{t["content"]: t["id"] for t in text["added_tokens"]}}
    writer.add_token_list(sorted(ids, key=lambda token: ids[token]))
    writer.add_token_merges([" ".join(pair) for pair in text["model"]["merges"]])
    writer.add_eos_token_id(1)
    writer.add_chat_template("its own")
    for step in ("write_header_to_file", "write_kv_data_to_file", "write_tensors_to_file", "close"):
        getattr(writer, step)()
    assert Tokenizer(tmp_path / "m.gguf").settings["chat_template"] == "its own"
    (tmp_path / "chat_template.jinja").write_text(R1_TEMPLATE)
    assert Tokenizer(tmp_path / "m.gguf").settings["chat_template"] == R1_TEMPLATE


# the errors


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def files_of_gguf(folder: Path) -> None:
    for name in ("a.Q4_K_M.gguf", "b.GGUF"):
        (folder / name).write_bytes(b"GGUF")


def cache(folder: Path) -> None:
    (folder / "snapshots/abc").mkdir(parents=True)
    (folder / "snapshots/abc/config.json").write_text('{"model_type": "llama"}')


def within(folder: Path) -> None:
    (folder / "hf").mkdir()
    (folder / "hf/config.json").write_text('{"model_type": "llama"}')


def weights_alone(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"x")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (adapter, "holds an adapter, not a model. Name it where a model runs or trains"),
        (files_of_gguf, r"holds 2 GGUF file\(s\) and no config.json. Name the file: .*/a.Q4_K_M.gguf"),
        (cache, "is a repository in the hub's cache, not a model's folder. Name the snapshot: .*/snapshots/abc"),
        (within, "holds no model itself, but one of its folders does. Name the folder: .*/hf"),
        (weights_alone, "holds weights but no config.json. Add the model's config.json."),
        (lambda folder: None, "neither a Hugging Face folder nor a .gguf file. Export a stage's model with"),
    ],
)
def test_a_path_that_holds_no_model_says_where_one_is(
    make: Callable[[Path], Any], message: str, tmp_path: Path
) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=f"^FOLDER = .*{message}"):
        verify(tmp_path)


def test_the_command_line_sends_people_the_right_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr and exit code 2, for any kind of path."""

    def sentencepiece(folder: Path) -> None:
        export(small(num_nextn_predict_layers=0), folder / "out", "fp32")
        (folder / "out/tokenizer.model").write_bytes(b"\x0a\x00")

    def unreadable(folder: Path) -> None:
        (folder / "out").mkdir()
        (folder / "out/config.json").mkdir()

    for number, (make, command, words) in enumerate(
        (
            (sentencepiece, "chat out", "the folder has its tokenizer only as tokenizer.model. With sentencepiece or"),
            (adapter, "verify .", "holds an adapter, not a model. Name it where a model runs or trains"),
            (files_of_gguf, "export . new", "holds 2 GGUF file(s) and no config.json. Name the file: "),
            (cache, "verify .", "is a repository in the hub's cache, not a model's folder. Name the snapshot: "),
            (within, "export . new", "holds no model itself, but one of its folders does. Name the folder: "),
            (unreadable, "verify out", "config.json': cannot be read (Is a directory). Check the file's permissions"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder)
        words_of_line = [str(folder / word) if word in (".", "out", "new") else word for word in command.split()]
        monkeypatch.setattr(sys, "argv", ["finback", *words_of_line])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr().err
        assert left.value.code == 2 and said.count("\n") == 1 and words in said, said


def test_files_that_cannot_be_read_are_not_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(small(num_nextn_predict_layers=0), tmp_path / "out", "fp32")
    config, weights = tmp_path / "out/config.json", tmp_path / "out/model.safetensors"
    own = Path.open

    def closed(file: Path) -> Any:
        def open_(self: Path, *args: Any, **kwargs: Any) -> Any:
            if self == file:
                raise PermissionError(13, "Permission denied", str(self))
            return own(self, *args, **kwargs)

        return open_

    for file in (config, weights):
        with (
            monkeypatch.context() as patch,
            pytest.raises(UserError, match=rf"{file.name}': cannot be read \(Permission"),
        ):
            patch.setattr(Path, "open", closed(file))
            load(find_model(tmp_path / "out"))
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match=r"a Git LFS pointer, not the file itself. Run `git lfs pull`"):
        load(tmp_path / "out")
    weights.unlink()
    with pytest.raises(UserError, match=r"no \.safetensors file there"):
        load(tmp_path / "out")


def test_a_tokenizer_of_sentencepiece_alone_is_named_and_goes_out_as_it_is(tmp_path: Path) -> None:
    export(small(num_nextn_predict_layers=0), tmp_path / "out", "fp32")
    (tmp_path / "out/tokenizer.model").write_bytes(b"\x0a\x00")
    (tmp_path / "out/tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    with pytest.raises(UserError, match=r"the folder has its tokenizer only as tokenizer.model. With sentencepiece"):
        Tokenizer(tmp_path / "out")
    found = check(verify(tmp_path / "out"), "tokenizer")
    assert found.holds is None and found.text == "only as tokenizer.model"
    export_model(tmp_path / "out", tmp_path / "again", "fp32")
    assert (tmp_path / "again/tokenizer.model").read_bytes() == b"\x0a\x00"
    assert (tmp_path / "again/tokenizer_config.json").is_file() and not (tmp_path / "again" / INDEX).exists()
