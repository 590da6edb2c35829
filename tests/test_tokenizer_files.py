"""Special tokens, stop tokens and templates from any file of a folder: read like transformers, and kept in exports."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from finback.checkpoint.export import export
from finback.config import UserError
from finback.data import tokenizer
from finback.data.messages import encode_prompt
from finback.data.tokenizer import Tokenizer
from finback.data.tools import Tool
from finback.data.turn import Message
from finback.report.export import export_model
from finback.report.tokenizer_parity import PIECES, texts
from finback.report.verify import verify
from tests.test_checkpoint import small
from tests.test_verify import check

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BASE, MARKS = "<｜end▁of▁sentence｜>", ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of 290 entries."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer.train(["hello world, 12 + 34 = 46. How are you today? hello hello world"], 290, folder / "tokenizer.json")
    return folder / "tokenizer.json"


def folder_of(trained: Path, to: Path, **files: Any) -> Path:
    """A folder with this tokenizer.json and these JSON files, `x__y` for x.y; `tokens` go into tokenizer.json."""
    to.mkdir(exist_ok=True)
    text = json.loads(trained.read_text())
    text["added_tokens"] += [
        {"id": 290 + i, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, **token}
        for i, token in enumerate(files.pop("tokens", ()))
    ]
    (to / "tokenizer.json").write_text(json.dumps(text))
    files = {
        "config": {"model_type": "llama"},
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast"},
    } | files
    for name, content in files.items():
        (to / f"{name}.json").write_text(json.dumps(content))
    return to


def flags(text: str, **more: Any) -> dict[str, Any]:
    return {"content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False} | more


SETTINGS = {"tokenizer_class": "PreTrainedTokenizerFast"}


@pytest.mark.parametrize(
    "files",
    [
        {"special_tokens_map": {"eos_token": "<|im_end|>", "pad_token": flags("<pad>", lstrip=True)}},
        {"tokenizer_config": {**SETTINGS, "eos_token": BASE}, "special_tokens_map": {"eos_token": "<|im_end|>"}},
        {"added_tokens": {"<|im_end|>": 291, "<|im_start|>": 290, "<tool>": 300}},
        {"added_tokens": {"<|im_end|>": 290}, "special_tokens_map": {"eos_token": "<|im_end|>"}},
        {"tokenizer_config": {**SETTINGS, "added_tokens_decoder": {"290": flags("<|im_end|>", special=True)}}},
        {  # ids beyond the vocabulary, and a flag that differs in tokenizer.json
            "tokens": [{"content": "<|im_end|>", "special": True}],
            "tokenizer_config": {
                **SETTINGS,
                "added_tokens_decoder": {
                    "290": flags("<|im_end|>", special=True, lstrip=True),
                    "900": flags("<tool>", special=False),
                },
            },
        },
        {  # with added_tokens_decoder the legacy files are ignored
            "tokenizer_config": {**SETTINGS, "added_tokens_decoder": {"290": flags("<|im_end|>", special=True)}},
            "special_tokens_map": {"eos_token": "<tool>"},
            "added_tokens": {"<pad>": 291},
        },
        {"tokenizer_config": {**SETTINGS, "extra_special_tokens": ["<|im_end|>", "<tool>"]}},
        {"tokenizer_config": {**SETTINGS, "extra_special_tokens": {"image_token": "<tool>"}, "eos_token": BASE}},
        {"tokenizer_config": {**SETTINGS, "additional_special_tokens": ["<|im_end|>", "<tool>"]}},
        {
            "tokenizer_config": {
                **SETTINGS,
                "boi_token": "<tool>",
                "eos_token": flags("<|im_end|>", __type="AddedToken"),
            }
        },
        {
            "tokenizer_config": {**SETTINGS, "extra_special_tokens": ["<tool>"]},
            "special_tokens_map": {"extra_special_tokens": ["<|im_end|>"], "unk_token": "<unk>"},
        },
    ],
)
def test_special_tokens_are_those_of_transformers(files: dict[str, Any], trained: Path, tmp_path: Path) -> None:
    folder = folder_of(trained, tmp_path, **files)
    ours, theirs = Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    assert (ours.eos if ours.settings.get("eos_token") else None) == theirs.eos_token_id
    assert (ours.pad if ours.settings.get("pad_token") else None) == theirs.pad_token_id
    assert {token: ours._full.token_to_id(token) for token in ours.added} == theirs.get_added_vocab()
    text = "hello <|im_start|> x <|im_end|>world <tool>12 <pad><unk>"
    assert ours.encode_marked(text) == theirs(text, add_special_tokens=False)["input_ids"]
    assert ours.decode(ours.encode(text)) == text  # a user's text is not parsed as special tokens
    ours.save(tmp_path)  # an export is read the same way
    again = transformers.AutoTokenizer.from_pretrained(folder)
    assert again(text)["input_ids"] == theirs(text)["input_ids"] and again.eos_token_id == theirs.eos_token_id


def test_line_breaks_that_are_tokens_are_read_in_anyones_words(trained: Path, tmp_path: Path) -> None:
    tokens = [{"content": "<mark>", "special": False}, {"content": "\n\n", "special": False}]
    folder = folder_of(trained, tmp_path, tokens=tokens)
    ours, theirs = Tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    said = "hello\n\nworld"
    assert 291 in ours.encode(said) and ours.encode_batch([said] * 2) == [ours.encode(said)] * 2
    assert ours.encode(said) == theirs(said)["input_ids"] and 290 not in ours.encode("<mark>")


@pytest.mark.parametrize("decoder", [{"290": "x"}, {"a": {"content": "x"}}, [1], {"290": {"special": True}}])
def test_a_damaged_table_of_tokens_is_named(decoder: Any, trained: Path, tmp_path: Path) -> None:
    folder_of(trained, tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
    with pytest.raises(tokenizer.UserError, match=r"added_tokens_decoder = .*not a table of ids and tokens"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer_config": []}, r"tokenizer_config.json = .*: not a JSON object"),
        ({"special_tokens_map": None}, r"special_tokens_map.json = .*: not a JSON object"),
        ({"tokenizer_config": {"eos_token": 5}}, "eos_token = .*: 5 is neither a token's text nor an object with it"),
        ({"special_tokens_map": {"pad_token": ["<pad>"]}}, r"pad_token = .*: \['<pad>'\] is neither"),
        ({"tokenizer_config": {"image_token": {"text": "<i>"}}}, "image_token = .*: {'text': '<i>'} is neither"),
        ({"tokenizer_config": {"extra_special_tokens": "<tool>"}}, "extra_special_tokens = .* is neither"),
        ({"tokenizer_config": {"additional_special_tokens": [5]}}, "additional_special_tokens = .*: 5 is neither"),
        ({"tokenizer_config": {"chat_template": [{"name": [], "template": "x"}]}}, "chat_template = .* named texts"),
        ({"tokenizer_config": {"chat_template": [{"template": "x"}]}}, "chat_template = .* list of named texts"),
        ({"generation_config": {"eos_token_id": "2"}}, "eos_token_id = '2': neither a token's id nor a list of them"),
        ({"config": {"model_type": "llama", "eos_token_id": [[2]]}}, r"eos_token_id = \[\[2\]\]: neither"),
    ],
)
def test_files_of_another_shape_are_named(files: dict[str, Any], message: str, trained: Path, tmp_path: Path) -> None:
    """transformers fails on these files; ignoring them would lose the model's stop token or template."""
    with pytest.raises(UserError, match=message):
        Tokenizer(folder_of(trained, tmp_path, **files))


def test_named_templates(trained: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | length }} tools"}]
    folder = folder_of(trained, tmp_path, tokenizer_config={**SETTINGS, "chat_template": named})
    tool = Tool("add", "", {"type": "object"}, {"type": "function", "function": {"name": "add"}})

    def written(tools: tuple[Tool, ...]) -> str:
        words = Tokenizer(folder)
        return words.decode(encode_prompt([Message("user", "x")], words, tools=tools)[0])

    assert (written(()), written((tool,))) == ("plain", "1 tools")
    more = folder / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("other {{ tools | length }}")
    (folder / "chat_template.jinja").write_text("from the file")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.chat_template == {"default": "from the file", "tool_use": "other {{ tools | length }}"}
    assert (written(()), written((tool,))) == ("from the file", "other 1")
    Tokenizer(folder).save(tmp_path / "out" if (tmp_path / "out").mkdir() is None else tmp_path)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == theirs.chat_template
    (folder / "chat_template.jinja").unlink()
    assert Tokenizer(folder).template is None  # several without a default: transformers has none either
    (more / "tool_use.jinja").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "for processors"}))
    assert written(()) == "for processors"


# stop tokens


def model_folder(trained: Path, to: Path, rows: int = 300, **files: Any) -> Path:
    """An export whose tokenizer has ChatML's special tokens, and whose files name these stop tokens."""
    export(small(vocab_size=rows, num_nextn_predict_layers=0), to, "fp32")
    raw = json.loads((to / "config.json").read_text()) | files.pop("config", {})
    tokens = [{"content": mark, "special": True} for mark in MARKS]
    return folder_of(trained, to, config=raw, tokens=tokens, **files)


def test_a_base_model_that_ends_dialogues_by_its_template(trained: Path, tmp_path: Path) -> None:
    """Qwen2.5's base: eos is <|endoftext|> everywhere, but the template writes <|im_end|>."""
    settings = {**SETTINGS, "eos_token": BASE, "chat_template": CHATML}
    source = model_folder(
        trained,
        tmp_path / "base",
        config={"eos_token_id": 1},
        tokenizer_config=settings,
        generation_config={"eos_token_id": 1, "max_new_tokens": 9},
    )
    words = Tokenizer(source)
    assert words.stops == (1, 291) and words.eos == 1
    found = check(verify(source), "tokenizer")
    assert found.holds and found.details[0].startswith(
        "dialogues end with 291 by the template, which no other file names"
    )
    assert "same ids as transformers for 1,000 texts" in found.text
    export_model(source, tmp_path / "out", "fp32")
    assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == [1, 291]
    assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == 1
    out = check(verify(tmp_path / "out"), "tokenizer")
    assert out.holds and not out.details and Tokenizer(tmp_path / "out").stops == (1, 291)


@pytest.mark.parametrize(
    ("files", "fault"),
    [
        (
            {"tokenizer_config": {**SETTINGS, "eos_token": "<|im_end|>"}, "generation_config": {"eos_token_id": [1]}},
            "contradict",
        ),
        ({"tokenizer_config": {**SETTINGS, "eos_token": "<|im_end|>"}, "config": {"eos_token_id": 5}}, "contradict"),
        (
            {"tokenizer_config": {**SETTINGS, "eos_token": BASE}, "generation_config": {"eos_token_id": [1, 299]}},
            "299, which is not a token",
        ),
        (
            {"tokenizer_config": {**SETTINGS, "eos_token": "<|mine|>"}, "rows": 292},
            "more entries than the model has rows",
        ),
        ({"rows": 400}, "108 rows of the model have no token"),
    ],
)
def test_ends_that_do_not_fit_never_verify(files: dict[str, Any], fault: str, trained: Path, tmp_path: Path) -> None:
    source = model_folder(trained, tmp_path / "odd", **files)
    found = check(verify(source), "tokenizer")
    assert found.holds is False and any(fault in line for line in found.details), found.details
    if fault == "contradict":  # the export is consistent
        export_model(source, tmp_path / "out", "fp32")
        assert check(verify(tmp_path / "out"), "tokenizer").holds


def test_a_folder_that_names_no_end_never_verifies(trained: Path, tmp_path: Path) -> None:
    source = model_folder(trained, tmp_path / "none")
    text = json.loads((source / "tokenizer.json").read_text())
    text["model"]["vocab"]["<｜no▁end｜>"] = text["model"]["vocab"].pop(BASE)
    text["added_tokens"] = [t for t in text["added_tokens"] if t["content"] != BASE]
    (source / "tokenizer.json").write_text(json.dumps(text))
    (source / "config.json").write_text(
        json.dumps(json.loads((source / "config.json").read_text()) | {"eos_token_id": None})
    )
    found = check(verify(source), "tokenizer")
    assert found.holds is False and found.details == [
        "no end-of-sequence token: add eos_token to tokenizer_config.json"
    ]


def test_another_tokenizer_than_transformers_builds(trained: Path, tmp_path: Path) -> None:
    """transformers 5 applies Qwen's splits under `model_type: qwen2`; DeepSeek's keep three digits together."""
    theirs = transformers.Qwen2Config(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=1,
        bos_token_id=0,
    )
    transformers.AutoModelForCausalLM.from_config(theirs).save_pretrained(tmp_path / "qwen")
    raw = json.loads((tmp_path / "qwen/config.json").read_text())
    folder_of(trained, tmp_path / "qwen", config=raw, tokenizer_config={**SETTINGS, "eos_token": BASE})
    found = check(verify(tmp_path / "qwen"), "tokenizer")
    assert found.holds is False and found.details[0].startswith("transformers builds Qwen2Tokenizer from it")


def test_the_texts_of_the_comparison_are_of_all_kinds() -> None:
    found = texts(["<mark>"])
    assert len(found) == 1000 and len(set(found)) > 950 and found == texts(["<mark>"])
    assert all(any(piece in text for text in found) for piece in (*PIECES, "<mark>"))
