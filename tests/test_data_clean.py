"""Cleaning rules by hand, near duplicates against the true Jaccard index, exam questions against a plain search."""

import random
import re
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finback.config import UserError
from finback.data.clean import CleaningCounts, CleaningRules, DocumentFilter, Quality, check
from finback.data.decontamination import Decontaminator
from finback.data.near_duplicates import MinHashSigner, NearDuplicates, SignatureIndex, dump_signature
from finback.data.sources import Document
from finback.data.turn import Message

WORDS = [f"w{i}" for i in range(2000)]


def sifted(
    texts: list[str], rules: CleaningRules, index: SignatureIndex | None = None
) -> tuple[list[str], CleaningCounts, list[Any]]:
    sieve, notes = DocumentFilter("s", index), list[Any]()
    kept = [c.document.text for _, c in sieve.sift((check(Document(text=t), rules) for t in texts), notes.append)]
    return kept, sieve.counts, notes


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("four words are few", "short"),
        ("five words are now enough", ""),
        ("a b c d e\n" * 2 + "f g\nh i", ""),  # 1 of 4 lines is a repeat
        ("a b c d e\n" * 2 + "f g", "repetitive"),  # 1 of 3
        ("a b c d e\n\n\n a b c d e\nf g", "repetitive"),
        ("abc de 12345 678 90", "few_letters"),  # 5 of 15
        ("abcdef ghi 123 4 5 6", ""),  # 9 of 15
        ("鲸 鱼 在 唱 歌", ""),
    ],
)
def test_quality_by_hand(text: str, fault: str) -> None:
    assert Quality().fault(text) == fault
    assert Quality(min_words=0, max_repeated_lines=1.0, min_letters=0.0).fault(text) == ""
    kept, counts, notes = sifted([text, text], CleaningRules(Quality()))
    assert len(kept) == (not fault) and notes == []
    assert counts.duplicate == (not fault) and (not fault or getattr(counts, fault) == 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quality(min_letters=60.0), "quality.min_letters = 60.0: a share is between 0 and 1. Correct it."),
        (
            lambda: NearDuplicates(threshold=1.0),
            "near.threshold = 1.0: not between 0 and 1. Exact repeats are dropped anyway.",
        ),
        (lambda: NearDuplicates(shingle=0), "near.shingle = 0: not above 0. Use 1 or more."),
    ],
)
def test_rules_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        make()


def shingles(text: str, n: int = 5) -> set[tuple[str, ...]]:
    words = text.casefold().split()
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def edited(text: str, edits: int, rng: random.Random) -> str:
    words = text.split()
    for place in rng.sample(range(len(words)), edits):
        words[place] = rng.choice(WORDS)
    return " ".join(words)


def test_near_duplicates_are_those_of_the_true_index() -> None:
    """Pairs well above the threshold go and pairs well below stay: 4 standard errors of the estimate are 0.14."""
    rng = random.Random(1)
    near = NearDuplicates(threshold=0.7)
    signer = MinHashSigner(near, seed=3)
    seen = {"near": 0, "far": 0}
    for _ in range(100):
        text = " ".join(rng.choices(WORDS, k=200))
        other = edited(text, rng.randint(0, 40), rng)
        jaccard = len(shingles(text) & shingles(other)) / len(shingles(text) | shingles(other))
        index = SignatureIndex(near)
        index.add("s:0", signer.sign(text))
        found = index.closest(signer.sign(other))
        if abs(jaccard - 0.7) > 0.15:
            assert (found == "s:0") == (jaccard > 0.7), jaccard
            seen["near" if found else "far"] += 1
    assert min(seen.values()) > 10


def test_the_first_of_near_duplicates_stays_and_is_named() -> None:
    pytest.importorskip("datasketch")
    rng = random.Random(2)
    texts = [" ".join(rng.choices(WORDS, k=100)) for _ in range(30)]
    given = [t for text in texts for t in (text, text + " indeed", "Well " + text)]
    near = NearDuplicates()
    kept, counts, notes = sifted(given, CleaningRules(signer=MinHashSigner(near, 0)), SignatureIndex(near))
    assert kept == texts and counts == CleaningCounts(read=90, near_duplicate=60, kept=30)
    assert notes == [
        {"id": f"s:{3 * i + k}", "reason": "near_duplicate", "like": f"s:{3 * i}"} for i in range(30) for k in (1, 2)
    ]


def test_sources_are_compared_near_but_not_exactly() -> None:
    """An exact repeat in another source is dropped as a near duplicate if these are enabled, and stays otherwise."""
    near, text = NearDuplicates(), " ".join(WORDS[:80])
    for index, kept in ((SignatureIndex(near), 0), (None, 1)):
        rules = CleaningRules(signer=MinHashSigner(near, 0) if index else None)
        sieves = [DocumentFilter(name, index) for name in ("a", "b")]
        found = [list(sieve.sift([check(Document(text=text), rules)])) for sieve in sieves]
        assert [len(each) for each in found] == [1, kept] and sieves[1].counts.near_duplicate == 1 - kept


def test_signatures_depend_on_words_and_seed_alone() -> None:
    signer, again, other = (MinHashSigner(NearDuplicates(), seed) for seed in (1, 1, 2))
    text = " ".join(WORDS[:50])
    assert (signer.sign(text) == again.sign(text.upper().replace(" ", "\n"))).all()
    assert (signer.sign(text) != other.sign(text)).mean() > 0.9
    short = [signer.sign(t) for t in ("a b", "a b c", "\udc80")]
    assert short[0].dtype == np.uint32 and (short[0] != short[1]).mean() > 0.9


def test_an_index_goes_on_after_a_restart(tmp_path: Any) -> None:
    near = NearDuplicates()
    signer, index, again = MinHashSigner(near, 0), SignatureIndex(near), SignatureIndex(near)
    rng = random.Random(3)
    texts = [" ".join(rng.choices(WORDS, k=60)) for _ in range(20)]
    with (tmp_path / "a.signatures").open("wb") as handle:
        for number, text in enumerate(texts):
            index.add(f"a:{number}", signer.sign(text))
            handle.write(dump_signature(number, signer.sign(text)))
    again.load(tmp_path / "a.signatures", "a")
    for text in [*texts, *(edited(t, 1, rng) for t in texts), "else"]:
        assert again.closest(signer.sign(text)) == index.closest(signer.sign(text))


PROSE = "How many songs does a blue whale sing in one year if it sings three of them every day?"


@pytest.mark.parametrize(
    ("document", "found"),
    [
        (Document(text=f"He asked: {PROSE.upper()} Nobody knew."), True),
        (Document(text="how many songs -- does a blue-whale sing, in one year (if it sings?)"), True),  # 13 words
        (Document(text="How many songs does a blue whale sing in one year if?"), False),  # 12 words
        (Document((Message("user", "Hi"), Message("assistant", "So", f"hm {PROSE}"))), True),
        (Document((Message("user", "12 + 7 = "), Message("assistant", "19"))), True),
        (Document(text="Homework\n 12 + 7 =\n13 + 7 ="), True),
        (Document(text="12 - 7 ="), False),  # another sum
        (Document(text="Question: who wrote  Hamlet? Answer: he."), True),  # no n-gram, and not a line of its own
        (Document((Message("system", "Who wrote Hamlet? Or so."), Message("user", "Hi"))), False),
        (Document(text="She, who wrote Hamlet? Not I."), True),
        (Document(text="Who wrote Hamlets?"), False),
        (Document(text="What is 12 + 7 = 19?"), False),
        (Document(text="Answer this question with care and give the number alone behind four number signs"), False),
    ],
)
def test_questions_are_found_by_hand(document: Document, found: bool) -> None:
    frame = " Answer this question with care and give the number alone behind four number signs."
    held, trained = {"t": [PROSE + frame, "12 + 7 =", "Who wrote Hamlet?"]}, {"t": ["How old is she?" + frame]}
    assert Decontaminator(held, trained, 13).find(document) == ("t" if found else None)


@given(st.data())
def test_n_grams_are_found_as_by_plain_search(data: st.DataObject) -> None:
    words = st.lists(st.sampled_from("abc"), min_size=1, max_size=12)
    question, text = (data.draw(words) for _ in range(2))
    overlap = Decontaminator({"t": [" ".join(question)]}, {}, 4)
    runs = (" ".join(question[i : i + 4]) for i in range(len(question) - 3))
    expected = question == text or any(f" {run} " in f" {' '.join(text)} " for run in runs)
    assert (overlap.find(Document(text=", ".join(text))) == "t") == (expected and (len(text) >= 4 or len(text) == 1))


def test_the_first_reason_counts_and_contaminated_text_is_noted() -> None:
    overlap = Decontaminator({"t": ["12 + 7 ="]}, {}, 13)
    texts = ["12 + 7 =", "Look:\n12 + 7 =\nis easy, is it not?", "is easy, is it not?", "IS easy, is it not?", ""]
    kept, counts, notes = sifted(texts, CleaningRules(Quality(min_letters=0.0, min_words=5), overlap))
    assert kept == ["is easy, is it not?"]
    assert counts == CleaningCounts(read=5, empty=1, short=1, contaminated=1, duplicate=1, kept=1)
    assert list(islice(notes, 2)) == [{"id": "s:1", "reason": "contaminated", "like": "t"}]


def test_without_datasketch_near_duplicates_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    with pytest.raises(
        UserError,
        match=r"^near = 'MinHash': the package `datasketch` is not installed\. Run: .* -m pip install .*'datasketch>=2'",
    ):
        MinHashSigner(NearDuplicates(), 0)
