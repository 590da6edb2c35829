"""The tokenizer that a GGUF file carries: vocabulary, merges, special tokens and chat template, as a tokenizer.json.

A GGUF file names its split rules instead of spelling them; those of the families that finback runs are written here.
"""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from finback.checkpoint.gguf import field, open_gguf
from finback.config import UserError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_RULES = {
    "gpt-2": (_GPT2,),
    "default": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    "deepseek-r1-qwen": (_QWEN2,),
}
_CONTROL, _USER_DEFINED = 3, 4  # gguf.TokenType


def convert(path: Path, deepseek_splits: tuple[str, ...]) -> tuple[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json of a GGUF file; UserError for kinds that finback does not know."""
    reader = open_gguf(path)
    model, rules = field(reader, "tokenizer.ggml.model"), field(reader, "tokenizer.ggml.pre", "default")
    if model != "gpt2" or (rules not in _RULES and rules != "deepseek-v3"):
        remedy = f"It knows byte-level BPE with the rules {', '.join(_RULES)} and deepseek-v3."
        raise UserError("tokenizer", f"{path}: {model}/{rules}", "not a kind that finback converts", remedy)
    tokens: list[str] = field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = field(reader, "tokenizer.ggml.token_type", [1] * len(tokens))
    merges = [tuple(merge.split(" ", 1)) for merge in field(reader, "tokenizer.ggml.merges")]
    whole_words = rules in ("llama-bpe", "llama3")  # an entry of the vocabulary is taken before any merge
    vocabulary = {token: number for number, token in enumerate(tokens)}
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=whole_words))
    if rules.startswith(("qwen", "deepseek-r1-qwen")):
        bpe.normalizer = normalizers.NFC()
    patterns = deepseek_splits if rules == "deepseek-v3" else _RULES[rules]
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([*splits, as_bytes])
    bpe.decoder = decoders.ByteLevel()
    added = [(t, k) for t, k in zip(tokens, kinds, strict=True) if k in (_CONTROL, _USER_DEFINED)]
    bpe.add_tokens([AddedToken(t, normalized=False, special=k == _CONTROL) for t, k in added])
    return bpe.to_str(pretty=True), _settings(reader, tokens)


def _settings(reader: Any, tokens: list[str]) -> dict[str, Any]:
    """What tokenizer_config.json says of it."""
    found: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        number = field(reader, f"tokenizer.ggml.{key}_token_id", None)
        if number is not None and number < len(tokens):
            found[f"{name}_token"] = tokens[number]
    template = field(reader, "tokenizer.chat_template", None)
    return found | ({"chat_template": template} if template else {})
