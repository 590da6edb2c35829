"""A tokenizer as GGUF keys: vocabulary, merges, name of its split rules, end tokens and template."""

import json
from typing import Any

from finback.config import UserError
from finback.data import gguf_sentencepiece
from finback.data.gguf_tokenizer import DEEPSEEK, GPT2, NORMALIZED, RULES, WHOLE_WORDS
from finback.data.template import OWN
from finback.data.tokenizer import SPLITS, Tokenizer
from finback.data.tokenizer_files import templates

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # gguf.TokenType


def keys(tokenizer: Tokenizer, rows: int, name: str = "model") -> dict[str, Any]:
    """The keys of a tokenizer for a model with `rows` embeddings; UserError if GGUF has no name for its split rules."""
    text = json.loads(tokenizer.as_json())
    is_pieces = gguf_sentencepiece.is_model(text)
    rules = "" if is_pieces else rules_of(text)
    tokens, kinds = [f"[PAD{n}]" for n in range(rows)], [UNUSED] * rows
    for token, number in text["model"]["vocab"].items():
        tokens[number], kinds[number] = token, NORMAL
    for token in text["added_tokens"]:
        kind = CONTROL if token["special"] else USER_DEFINED
        tokens[token["id"]], kinds[token["id"]] = token["content"], kind
    found: dict[str, Any] = {"tokens": tokens, "token_type": kinds}
    if is_pieces:
        found |= gguf_sentencepiece.keys(text, tokens, kinds)
    else:
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in text["model"]["merges"]]
        found |= {"model": "gpt2", "pre": rules, "merges": merges}
    ends = [n for n in (tokenizer.eos, *tokenizer.ends.get("template", ()), *tokenizer.stops) if n >= 0]
    # llama.cpp reads three end tokens from keys, and finds more by their text
    for key, number in zip(("eos", "eot", "eom"), dict.fromkeys(ends), strict=False):
        found[f"{key}_token_id"] = number
    for key, number in (("bos", tokenizer.bos), ("padding", tokenizer.pad)):
        if number >= 0:
            found[f"{key}_token_id"] = number
    if len(tokenizer.stops) > 1:
        found["eos_token_ids"] = list(tokenizer.stops)  # Ollama's key
    found["add_bos_token"] = _adds_bos(tokenizer, text)
    named = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    named["general.name"] = gguf_sentencepiece.name_of(name, text, tokens)
    template = templates(tokenizer.settings, tokenizer.path)[0] or (OWN if tokenizer.writes_own_form else None)
    return named | ({"tokenizer.chat_template": template} if template else {})


def _adds_bos(tokenizer: Tokenizer, text: dict[str, Any]) -> bool:
    """Whether texts start with bos: according to the post-processor, or without one as in finback's training texts."""
    if text.get("post_processor") is None:
        return tokenizer.template is None and tokenizer.adds_bos
    return tokenizer.bos >= 0 and tokenizer.encode_whole("a")[:1] == [tokenizer.bos]


def rules_of(text: dict[str, Any]) -> str:
    """GGUF's name for the split rules of a tokenizer.json; UserError if there is none.

    Rules must match exactly, not approximately: a wrong name gives different ids without an error.
    """
    model = text["model"]
    if model.get("type") != "BPE":
        raise _unnamed(f"a vocabulary of the kind {model.get('type')}, not byte-level BPE")
    patterns = _patterns(text.get("pre_tokenizer"))
    whole, normal = bool(model.get("ignore_merges")), _normalizer(text.get("normalizer"))
    for name, known in ({DEEPSEEK: SPLITS} | RULES).items():
        if (patterns, whole, normal) == (known, name in WHOLE_WORDS, "NFC" if name in NORMALIZED else ""):
            return name
    raise _unnamed("split rules or a normalizer that llama.cpp has no name for")


def _patterns(given: dict[str, Any] | None) -> tuple[str, ...]:
    """The regular expressions that split a text, in order."""
    steps = given.get("pretokenizers", [given]) if given else []
    found: list[str] = []
    for step in steps:
        match step:
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                found.append(pattern)
            case {"type": "Digits", "individual_digits": True}:
                found.append(r"\p{N}")
            case {"type": "ByteLevel", "add_prefix_space": False}:
                found += [GPT2] if step.get("use_regex", True) else []
            case _:
                raise _unnamed(f"splits that llama.cpp has no name for ({step.get('type')})")
    return tuple(found)


def _normalizer(given: dict[str, Any] | None) -> str:
    steps = given.get("normalizers", [given]) if given else []
    return "".join(step["type"] for step in steps)


def _unnamed(problem: str) -> UserError:
    return UserError("--format", "gguf", f"the tokenizer has {problem}", "Export a Hugging Face folder.")
