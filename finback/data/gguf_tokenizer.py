"""Converts the tokenizer of a GGUF file (vocabulary, merges, special tokens and chat template) to a tokenizer.json.

A GGUF file gives its split rules by name only; those of the supported families are listed here.
"""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from finback.checkpoint.gguf import open_gguf
from finback.checkpoint.gguf_keys import field, of_each_token
from finback.config import UserError
from finback.data import gguf_sentencepiece
from finback.data.gguf_sentencepiece import added_tokens

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
RULES = {
    "gpt-2": (GPT2,),
    "default": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
}
WHOLE_WORDS = ("llama-bpe", "llama3")  # whole vocabulary entries take precedence over merges
NORMALIZED = ("qwen2", "deepseek-r1-qwen")
DEEPSEEK = "deepseek-v3"
LLAMA3_ROWS = 128_256  # vocabulary size of the first Llama 3 files, which name no rules
# texts that end an answer in llama.cpp if they are tokens (llama-vocab.cpp)
END_TEXTS = frozenset(
    [
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<|return|>",
        "<|call|>",
        "<|flush|>",
        "<|calls|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "</s>",
        "<|eom_id|>",
        "<EOT>",
        "_<EOT>",
        "[EOT]",
        "[EOS]",
        "<|end_of_text|>",
        "<end_of_utterance>",
        "<eos>",
        "<turn|>",
        "<|tool_response>",
        "<｜end▁of▁sentence｜>",
        "[e~[",
    ]
)
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5  # gguf.TokenType


def convert(path: Path, deepseek_splits: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json of a GGUF file; UserError for unknown types."""
    reader = open_gguf(path)
    model, rules = (
        field(reader, "tokenizer.ggml.model"),
        field(reader, "tokenizer.ggml.pre", "") or _missing_rules(reader),
    )
    if model == "llama":
        return gguf_sentencepiece.tokenizer_of(reader).to_str(pretty=True), _settings(reader, _tokens(reader))
    if model != "gpt2" or (rules not in RULES and rules != DEEPSEEK):
        remedy = f"Supported are sentencepiece (llama), and byte-level BPE (gpt2) with the rules {', '.join(RULES)} and deepseek-v3."
        raise UserError("tokenizer", f"{path}: {model}/{rules}", "not a supported type", remedy)
    tokens, kinds = _tokens(reader), _kinds(reader)
    merges = [tuple(merge.split(" ", 1)) for merge in field(reader, "tokenizer.ggml.merges")]
    if any(len(pair) < 2 for pair in merges):
        raise UserError("GGUF tokenizer.ggml.merges", str(path), "not pairs of tokens", "Use a complete file.")
    vocabulary = {t: n for n, (t, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind != _UNUSED}
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=rules in WHOLE_WORDS))
    if rules in NORMALIZED:
        bpe.normalizer = normalizers.NFC()
    patterns = deepseek_splits if rules == DEEPSEEK else RULES[rules]
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])
    bpe.decoder = decoders.ByteLevel()
    bpe.add_tokens(added_tokens(reader, tokens, kinds))
    return bpe.to_str(pretty=True), _settings(reader, tokens)


def _tokens(reader: Any) -> list[str]:
    found: list[str] = field(reader, "tokenizer.ggml.tokens")
    return found


def _kinds(reader: Any) -> list[int]:
    return of_each_token(reader, "token_type", 1)


def _missing_rules(reader: Any) -> str:
    """Rules of a file that names none: Llama 3's for files with its vocabulary size, else llama.cpp's default."""
    is_llama3 = field(reader, "general.architecture", "") == "llama" and len(_tokens(reader)) == LLAMA3_ROWS
    return "llama-bpe" if is_llama3 else "default"


def family(path: Path) -> str:
    """The architecture of the model in a file."""
    return str(field(open_gguf(path), "general.architecture", ""))


def ends(path: Path) -> list[int]:
    """Ids at which llama.cpp and Ollama end an answer: from the file's keys and the texts of its tokens.

    gpt-oss's <|end|> only ends a channel.
    """
    reader = open_gguf(path)
    tokens, kinds = _tokens(reader), _kinds(reader)
    found = {field(reader, f"tokenizer.ggml.{name}_token_id", -1) for name in ("eos", "eot", "eom")}
    found |= set(field(reader, "tokenizer.ggml.eos_token_ids", []))
    marks = {token for token, kind in zip(tokens, kinds, strict=True) if kind in (_CONTROL, _USER_DEFINED)}
    texts = END_TEXTS - ({"<|end|>"} if {"<|return|>", "<|call|>"} <= marks else set())
    found |= {number for number, token in enumerate(tokens) if token in marks & texts}
    return sorted(number for number in found if 0 <= number < len(tokens))


def _settings(reader: Any, tokens: list[str]) -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if (adds := field(reader, "tokenizer.ggml.add_bos_token", None)) is not None:
        found["add_bos_token"] = bool(adds)
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = field(reader, f"tokenizer.ggml.{key}_token_id", None)
        if number is not None and number < len(tokens):
            found[f"{name}_token"] = tokens[number]
    template = field(reader, "tokenizer.chat_template", None)
    return found | ({"chat_template": template} if template else {})
