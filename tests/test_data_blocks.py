"""Long texts in blocks: the same words, runs and tokens as for the whole text, with bounded memory."""

import random
import re
from itertools import pairwise
from pathlib import Path

import pytest

from finback.data import tokenizer
from finback.data.blocks import blocks, pieces, runs, squeeze
from finback.data.clean import Quality
from finback.data.decontamination import grams
from finback.data.encoding import encode_documents
from finback.data.sources import Document

TEXTS = [
    "",
    " ",
    "one",
    "a" * 50,
    "whales  sing\tof krill\n\nand the cold  deep\u2003sea, 12 times a day.\n" * 9,
    " \n".join("abcdefgh") * 7,
    "鲸鱼在唱歌。" * 20,
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 5, 17, 1000])
def test_blocks_hold_the_words_of_the_whole(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "".join(blocks(text, size)) == text == "".join(pieces(text, size))
    assert [word for block in blocks(text, size) for word in block.split()] == text.split()
    assert all(len(piece) <= size for piece in pieces(text, size)) or len(text) <= size
    monkeypatch.setattr(blocks, "__defaults__", (size,))
    words = text.split()
    assert squeeze(text) == " ".join(words)
    for n in (1, 3):
        assert list(runs(text, re.compile(r"\S+"), n)) == [
            " ".join(words[i : i + n]) for i in range(len(words) - n + 1)
        ]
    assert grams(text, 2) == [" ".join(pair) for pair in pairwise(re.findall(r"\w+", text.casefold()))]


def test_quality_of_a_long_text_is_that_of_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = (Quality(), Quality(max_repeated_lines=1.0), Quality(max_repeated_lines=1.0, min_letters=0.95))
    faults = [rule.fault(text) for rule in rules for text in TEXTS]
    monkeypatch.setattr(blocks, "__defaults__", (7,))
    assert [rule.fault(text) for rule in rules for text in TEXTS] == faults
    assert {*faults} == {"", "short", "repetitive", "few_letters"}


def test_a_long_text_has_the_tokens_of_the_whole_and_is_encoded_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefg", k=rng.randint(1, 8))) for _ in range(300)]
    signs = ["12,", "?!", "(x)", "\n", "\n  ", "鲸", "e\u0301"]
    texts = [" ".join(rng.choices([*words, *signs], k=k)) for k in (3000, 20, 2000)]
    words_of_all = tokenizer.train(texts, 500, tmp_path / "tokenizer.json")
    whole = [words_of_all.encode(text) for text in texts]
    monkeypatch.setattr(pieces, "__defaults__", (1000,))
    monkeypatch.setattr(tokenizer, "TOGETHER", 1000)
    assert tokenizer.train(texts, 500, tmp_path / "again.json").as_json() == words_of_all.as_json()
    seen: list[int] = []
    real = words_of_all._bare

    class Counting:
        def encode_batch(self, given: list[str], add_special_tokens: bool) -> object:
            seen.append(sum(map(len, given)))
            return real.encode_batch(given, add_special_tokens=add_special_tokens)

        def encode(self, text: str, add_special_tokens: bool) -> object:
            return real.encode(text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(words_of_all, "_bare", Counting())
    documents = [Document(text=text) for text in texts]
    ids = [found.tolist()[1:-1] for _, found in encode_documents(documents, words_of_all)]
    assert ids == whole and len(seen) > 10 and max(seen) <= 1000
