"""Tokenizes documents in batches, rearranging some for fill-in-the-middle."""

import hashlib
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np

from finback.data import pack
from finback.data.messages import document_pieces
from finback.data.sources import Document
from finback.data.tokenizer import BOS, EOS, FIM, SpecialToken, Tokenizer

TOGETHER = 512  # documents per batch


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, fim: float = 0.0, seed: int = 0
) -> Iterator[tuple[Document, np.ndarray]]:
    """Documents with their ids, bos and eos included; a share `fim` of plain training texts is rearranged to fill in the middle."""
    remaining = iter(documents)
    while batch := list(islice(remaining, TOGETHER)):
        yield from _encoded(batch, tokenizer, fim, seed)


def _encoded(
    batch: list[Document], tokenizer: Tokenizer, fim: float, seed: int
) -> Iterator[tuple[Document, np.ndarray]]:
    pieces = [_pieces(document, tokenizer, fim, seed) for document in batch]
    texts = [p for each in pieces for p in each if not isinstance(p, SpecialToken)]
    encoded = iter(tokenizer.encode_batch(texts))
    marks: dict[str, Sequence[int]] = {}
    for document, each in zip(batch, pieces, strict=True):
        ids = array("I")
        for piece in each:
            if not isinstance(piece, SpecialToken):
                ids.extend(next(encoded))
            else:
                if piece not in marks:
                    marks[piece] = tokenizer.encode_pieces([piece])
                ids.extend(marks[piece])
        yield document, np.array(ids, dtype="<u4")


def _pieces(document: Document, tokenizer: Tokenizer, fim: float, seed: int) -> list[str]:
    """Special tokens and the texts between them; no two texts are adjacent."""
    if document.messages:
        return document_pieces(document.messages, tokenizer)
    first = [BOS] if tokenizer.bos >= 0 else []  # some vocabularies have none (Qwen's)
    if fim and not pack.is_validation(document.text) and (cut := _cut(document.text, fim, seed)):
        tokenizer.require(*FIM)
        prefix, middle, suffix = cut
        hole, begin, end = FIM
        return [*first, begin, prefix, hole, suffix, end, middle, EOS]
    return [*first, document.text, EOS]


def _cut(text: str, fim: float, seed: int) -> tuple[str, str, str] | None:
    """Prefix, middle and suffix for a share `fim` of texts, cut at two uniformly drawn characters (Bavarian et al. 2022).

    V3 4.1 gives the rate, 0.1, and the order prefix, suffix, middle, but not where to cut. The cut depends only on the seed
    and the text, not on other documents.
    """
    key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=seed.to_bytes(8, "little"))
    rng = random.Random(key.digest())
    if rng.random() >= fim:
        return None
    first, second = sorted(rng.randint(0, len(text)) for _ in range(2))
    return text[:first], text[first:second], text[second:]
