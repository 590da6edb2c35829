"""Sentencepiece vocabularies of GGUF files (`tokenizer.ggml.model` is llama), as Llama 2, Mistral and Gemma have them.

llama.cpp merges whichever neighbours make the piece of the highest score, the first ones where scores are equal. That is BPE whose merges are
sorted by the score of what they make; what is no piece then falls apart into bytes.
"""

from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers

from finback.checkpoint.gguf_config import field

UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 2, 3, 4, 5, 6  # gguf.TokenType
SPACE = "▁"


def tokenizer_of(reader: Any) -> tokenizers.Tokenizer:
    """The tokenizer of such a file."""
    pieces: list[str] = field(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = field(reader, "tokenizer.ggml.token_type", [1] * len(pieces))
    scores: list[float] = field(reader, "tokenizer.ggml.scores")
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
    bpe.add_tokens(added_tokens(pieces, kinds))
    return bpe


def added_tokens(tokens: list[str], kinds: list[int]) -> list[AddedToken]:
    """Tokens that a text holds as wholes: control tokens and those of users."""
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (CONTROL, USER_DEFINED)]
    return [AddedToken(token, normalized=False, special=kind == CONTROL) for token, kind in added]


def _merges(plain: set[str], scores: dict[str, float], vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    """Every way to make a piece of two others, the highest scores first."""
    found = [
        (-scores[piece], vocabulary[piece[:cut]], vocabulary[piece[cut:]], (piece[:cut], piece[cut:]))
        for piece in plain
        for cut in range(1, len(piece))
        if piece[:cut] in plain and piece[cut:] in plain
    ]
    return [pair for *_, pair in sorted(found)]
