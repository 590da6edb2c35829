"""Checks a folder's tokenizer: complete, the model's own, and equal to the one that transformers builds from the files."""

import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finback.data.tokenizer import Tokenizer
from finback.data.tokenizer_files import ids
from finback.report.logit_parity import Finding
from finback.runs.files import is_gguf

SAMPLE = "In 2024, 3.14 × 2 = 6.28;\n\tdef f(x): return x**2  # naïve café 北京 🐋\r\n  <b>end</b>"
TEXTS = 1000
UNUSED = 8  # at most 1 in 8 embedding rows may have no token; models pad their embeddings
# texts that tokenizers treat differently: digits, case, contractions, accents in both forms, scripts, signs, spaces
PIECES = (
    *(
        "hello",
        "World",
        "ABC",
        "it's",
        "don't",
        "I'LL",
        "we've",
        "x",
        "naïve",
        "cafe\u0301",
        "Å",
        "A\u030a",
        "straße",
        "ﬁn",
    ),
    *(
        "7",
        "12",
        "123",
        "2024",
        "3.14",
        "1,000,000",
        "١٢٣",
        "½",
        "x²",
        "0x1F",
        "北京",
        "ひらがな",
        "カタカナ",
        "한국어",
    ),
    *(
        "привет",
        "שלום",
        "مرحبا",
        "हिन्दी",
        "ไทย",
        "🐋",
        "👩‍🔬",
        "🇫🇷",
        "…",
        "“q”",
        "—",
        "€5",
        "a_b",
        "camelCase",
        "snake_case",
    ),
    *(
        "#",
        "//",
        "==",
        "!=",
        "->",
        "{}",
        "();",
        "<b>",
        "</b>",
        "@a",
        "\\n",
        "http://a.b/c?d=e",
        "\u00a0",
        "\u200b",
        "\u3000",
    ),
    *(
        " ",
        "  ",
        "    ",
        "\t",
        "\n",
        "\n\n",
        "\r\n",
        " \n",
        "\n ",
        ".",
        ",",
        "?",
        "!",
        "'",
        '"',
        "`",
        "$",
        "%",
        "^",
        "&",
        "|",
    ),
)


def texts(marks: Sequence[str], count: int = TEXTS) -> list[str]:
    """Test texts of all kinds, always the same; one in ten contains special tokens."""
    draw = random.Random(0)
    found = [SAMPLE]
    while len(found) < count:
        pieces = draw.choices(PIECES, k=draw.randint(1, 12))
        if marks and len(found) % 10 == 0:
            pieces.insert(draw.randint(0, len(pieces)), draw.choice(marks))
        found.append(draw.choice(("", " ")).join(pieces))
    return found


def faults(tokenizer: Tokenizer, rows: int) -> list[str]:
    """Errors in a tokenizer for a model with this many embedding rows."""
    found = []
    if tokenizer.decode(tokenizer.encode(SAMPLE), skip_special=False) != SAMPLE:
        found.append("encoding and decoding changes a text")
    if tokenizer.largest_id >= rows:
        found.append(f"more entries than the model has rows: up to id {tokenizer.largest_id:,}")
    elif rows - tokenizer.vocab_size > rows / UNUSED:
        found.append(f"{rows - tokenizer.vocab_size:,} rows of the model have no token: another model's tokenizer?")
    if not tokenizer.stops:
        found.append("no end-of-sequence token: add eos_token to tokenizer_config.json")
    found += [f"answers should end at {n}, which is not a token" for n in tokenizer.stops if n > tokenizer.largest_id]
    named = tokenizer.ends["generation"]
    if tokenizer.eos >= 0 and named and tokenizer.eos not in named:
        found.append(
            f"ends contradict each other: eos_token is {tokenizer.eos}, generation_config.json or config.json has "
            f"{list(named)}; finback stops at both, transformers at the latter alone"
        )
    return found


def remarks(tokenizer: Tokenizer, raw: dict[str, Any]) -> list[str]:
    """Remarks on a tokenizer that works; `raw` is the model's config.json."""
    said = {*tokenizer.ends["tokenizer"], *tokenizer.ends["generation"]}
    found = [
        f"dialogues end with {n} by the template, which no other file names; finback stops there, and exports say so"
        for n in tokenizer.ends.get("template", ())
        if n not in said
    ]
    for name, own in (("bos", tokenizer.bos), ("eos", tokenizer.eos)):
        listed = ids(raw.get(f"{name}_token_id"), f"{name}_token_id")
        if own >= 0 and listed and own not in listed and not (name == "eos" and listed == tokenizer.ends["generation"]):
            found.append(f"config.json has {name}_token_id {list(listed)}, the tokenizer {own}")
    return found


def against_transformers(tokenizer: Tokenizer, path: Path) -> Finding:
    """Compares the ids of TEXTS texts with AutoTokenizer's."""
    if is_gguf(path):
        return None, "not compared with transformers: export it first", []
    if importlib.util.find_spec("transformers") is None:
        return None, "not compared with transformers, which is not installed", []
    import transformers

    try:
        theirs = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        samples = texts(tokenizer.added)
        expected = theirs(samples, add_special_tokens=False)["input_ids"]
    except Exception as error:  # any error is a finding about this folder, not our failure
        return None, f"transformers cannot build it ({type(error).__name__}: {str(error)[:200]})", []
    found = tokenizer.encode_batch(samples)
    marks = [mark for mark in tokenizer.added if mark.strip()]
    different = [
        text
        for text, plain, wanted in zip(samples, found, expected, strict=True)
        if list(tokenizer.encode_marked(text) if any(m in text for m in marks) else plain) != list(wanted)
    ]
    if not different:
        return True, f"same ids as transformers for {len(samples):,} texts", []
    built = type(theirs).__name__
    why = f"transformers builds {built} from it, which gives other ids for {len(different):,} texts, first {different[0]!r}"
    return False, f"other ids than transformers for {len(different):,} of {len(samples):,} texts", [why]
