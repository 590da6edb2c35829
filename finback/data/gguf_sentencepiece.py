"""Sentencepiece vocabularies of GGUF files (`tokenizer.ggml.model` is llama), as in Llama 2, Mistral and Gemma.

llama.cpp always merges the pair that forms the piece with the highest score, the leftmost one in ties. This is BPE with
merges sorted by the score of their result; characters that are not in the vocabulary become bytes.
"""

import re
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from finback.checkpoint.gguf_keys import field, of_each_token

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # gguf.TokenType
SPACE = "▁"
# If a model's name contains one of STRIPPED, llama.cpp lets each added token except PLAIN absorb the spaces after it, and
# rejects a file that lacks one of NEEDED.
STRIPPED = ("phi-3", "phi3")
PLAIN = ("<unk>", "<s>", "<|endoftext|>")
NEEDED = ("</s>", *PLAIN)


def tokenizer_of(reader: Any) -> tokenizers.Tokenizer:
    """The tokenizer of a GGUF file with a sentencepiece vocabulary."""
    pieces: list[str] = field(reader, "tokenizer.ggml.tokens")
    kinds, scores = of_each_token(reader, "token_type", 1), of_each_token(reader, "scores")
    named = zip(pieces, kinds, strict=True)
    unknown = next((piece for piece, kind in named if kind == UNKNOWN), None)
    vocabulary = {p: n for n, (p, kind) in enumerate(zip(pieces, kinds, strict=True)) if kind != UNUSED}
    plain = {p for p, kind in zip(pieces, kinds, strict=True) if kind not in (CONTROL, UNUSED, BYTE, UNKNOWN)}
    bpe = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges(plain, dict(zip(pieces, scores, strict=True)), vocabulary),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=BYTE in kinds,
        )
    )
    prefixed = bool(field(reader, "tokenizer.ggml.add_space_prefix", True))
    first: list[Any] = [normalizers.Prepend(SPACE)] if prefixed else []
    bpe.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    stripped: list[Any] = [decoders.Strip(" ", 1, 0)] if prefixed else []
    bpe.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *stripped])
    bpe.add_tokens(added_tokens(reader, pieces, kinds))
    return bpe


def added_tokens(reader: Any, tokens: list[str], kinds: list[int]) -> list[AddedToken]:
    """Tokens that are matched as a whole: control tokens, the unknown one, and user-defined ones."""
    strips = any(mark in field(reader, "general.name", "").lower() for mark in STRIPPED)
    return [
        AddedToken(token, normalized=False, special=kind != USER_DEFINED, rstrip=strips and token not in PLAIN)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]


def name_of(name: str, text: dict[str, Any], tokens: list[str]) -> str:
    """A model name with which llama.cpp treats spaces after tokens like a tokenizer.json, as far as possible."""
    added = {token["content"]: token["rstrip"] for token in text["added_tokens"]}
    strips = all(rstrip == (token not in PLAIN) for token, rstrip in added.items()) and any(added.values())
    if strips and set(NEEDED) <= set(tokens):
        return f"{STRIPPED[0]} {name}"
    return re.sub("|".join(STRIPPED), "phi 3", name, flags=re.IGNORECASE)


def _merges(plain: set[str], scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to form a piece from two others, highest scores first."""
    found = [
        (-scores[piece], vocabulary[piece[:cut]], vocabulary[piece[cut:]], (piece[:cut], piece[cut:]))
        for piece in plain
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
    ]
    return [pair for *_, pair in sorted(found)]


def is_model(text: dict[str, Any]) -> bool:
    """Whether a tokenizer.json has a vocabulary of this kind: BPE on pieces with explicit spaces, not on bytes."""
    steps = [*_steps(text.get("normalizer"), "normalizers"), *_steps(text.get("pre_tokenizer"), "pretokenizers")]
    spaces = [s for s in steps if s.get("content") == SPACE or s.get("replacement") == SPACE]
    plain = all(s["type"] in ("Prepend", "Replace", "Metaspace") or s.get("pattern") == {"String": " "} for s in steps)
    return text["model"].get("type") == "BPE" and bool(spaces) and plain


def keys(text: dict[str, Any], tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    """The GGUF keys of such a tokenizer.json; updates `kinds` for bytes and the unknown token.

    A piece gets the score of the first merge that forms it, so llama.cpp merges in the same order.
    """
    model, ranks = text["model"], dict[str, int]()
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    bytes_ = {f"<0x{n:02X}>" for n in range(256)} if model.get("byte_fallback") else set()
    for number, token in enumerate(tokens):
        if token in bytes_:
            kinds[number] = BYTE
        elif token == model.get("unk_token"):
            kinds[number] = UNKNOWN
    steps = [*_steps(text.get("normalizer"), "normalizers"), *_steps(text.get("pre_tokenizer"), "pretokenizers")]
    prefixed = any(s["type"] == "Prepend" or s.get("prepend_scheme", "never") != "never" for s in steps)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    return {"model": "llama", "scores": scores, "add_space_prefix": prefixed}


def _steps(given: dict[str, Any] | None, within: str) -> list[dict[str, Any]]:
    return list(given.get(within, [given])) if given else []
