"""Sentencepiece vocabularies of GGUF files against a plain version of llama.cpp's merging; files without rule names."""

import itertools
import json
from pathlib import Path

import gguf
import pytest

from finback.checkpoint import gguf_export
from finback.data import gguf_tokenizer
from finback.data.gguf_vocabulary import keys
from finback.data.tokenizer import Tokenizer
from finback.report.tokenizer_parity import texts

WORDS = "the they then hell hello held low lower world word old cold older 12 123 ll ld ol or er en ow"


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    """Special tokens, 256 bytes, letters, and all prefixes and suffixes of some words, with scores in another order."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), "<|im_end|>"]
    kinds = [2, 3, 3, *[6] * 256, 4]
    letters = sorted(set("▁" + WORDS.replace(" ", "") + "abcé,."))
    words = [*WORDS.split(), *(f"▁{word}" for word in WORDS.split())]
    parts = {word[a:b] for word in words for a in range(len(word)) for b in range(a + 2, len(word) + 1)}
    whole = sorted(parts - set(letters), key=lambda part: (len(part), part[::-1]))
    scores = [0.0] * len(pieces) + [-1000.0 - n for n in range(len(letters))] + [-float(n) for n in range(len(whole))]
    return [*pieces, *letters, *whole], scores, kinds + [1] * (len(letters) + len(whole))


def merged(text: str, pieces: list[str], scores: list[float], kinds: list[int], prefix: bool) -> list[int]:
    """Merges the neighbours whose piece has the highest score, the first of equal ones; the rest becomes bytes."""
    known = {piece: n for n, piece in enumerate(pieces) if kinds[n] == 1}
    parts = list((" " * prefix + text).replace(" ", "▁")) if text else []
    while True:
        pairs = [(scores[known[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in known]
        if not pairs:
            break
        at = -max(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    in_bytes = ([known[p]] if p in known else [3 + byte for byte in p.encode()] for p in parts)
    return [number for numbers in in_bytes for number in numbers]


def write(path: Path, prefix: bool, model: str = "llama") -> None:
    pieces, scores, kinds = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(model)
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(kinds)
    writer.add_token_merges(["h e"])
    writer.add_add_space_prefix(prefix)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_are_those_of_merging_by_score(prefix: bool, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", prefix)
    ours = Tokenizer(tmp_path / "m.gguf")
    pieces, scores, kinds = vocabulary()
    asked = [text for text in texts([])[:300] if len(text) < 200 and "▁" not in text]
    for text in (*asked, "hello older world", "  the  cold", "théy 1234 then.", "helloworld\n\tlow"):
        assert ours.encode(text) == merged(text, pieces, scores, kinds, prefix), repr(text)
    assert ours.decode(ours.encode("hello older wörld é")) == "hello older wörld é"
    assert (ours.bos, ours.eos) == (1, 2) and pieces.index("<|im_end|>") in ours.stops


@pytest.mark.parametrize("prefix", [True, False])
def test_a_vocabulary_goes_out_as_it_came(prefix: bool, tmp_path: Path) -> None:
    """Goes through tokenizer.json, which has merges and no scores."""
    write(tmp_path / "m.gguf", prefix)
    (tmp_path / "words").mkdir()
    Tokenizer(tmp_path / "m.gguf").save(tmp_path / "words")
    ours, (pieces, _, kinds) = Tokenizer(tmp_path / "words"), vocabulary()
    found = {name.removeprefix("tokenizer.ggml."): value for name, value in keys(ours, len(pieces)).items()}
    assert (found["tokens"], found["token_type"]) == (pieces, kinds)
    assert (found["model"], found["add_space_prefix"], found["bos_token_id"], found["eos_token_id"]) == (
        *("llama", prefix),
        *(1, 2),
    )
    for text in [text for text in texts([])[:300] if len(text) < 200 and "▁" not in text]:
        assert ours.encode(text) == merged(text, pieces, found["scores"], kinds, prefix), repr(text)


def test_a_file_that_names_no_rules_has_those_of_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "m.gguf", True, "gpt2")
    small = gguf_tokenizer.convert(tmp_path / "m.gguf", ())[0]
    assert "(?i:'s|'t" not in small and "'s|'t|'re" in small
    monkeypatch.setattr(gguf_tokenizer, "LLAMA3_ROWS", len(vocabulary()[0]))
    assert "(?i:'s|'t" in gguf_tokenizer.convert(tmp_path / "m.gguf", ())[0]


def stripping(path: Path, **flags: bool) -> Path:
    """A folder whose vocabulary has Phi-3's tokens, of which all but three strip the spaces after them."""
    pieces, scores, kinds = vocabulary()
    path.mkdir()
    pieces[258], kinds[258] = "<|endoftext|>", 3  # replaces a byte
    writer = gguf.GGUFWriter(path / "m.gguf", "llama")
    for add, value in (
        ("tokenizer_model", "llama"),
        ("token_list", pieces),
        ("token_scores", scores),
        ("token_types", kinds),
    ):
        getattr(writer, f"add_{add}")(value)
    for step in ("write_header_to_file", "write_kv_data_to_file", "close"):
        getattr(writer, step)()
    Tokenizer(path / "m.gguf").save(path)
    text = json.loads((path / "tokenizer.json").read_text())
    for token in text["added_tokens"]:
        token |= {"rstrip": token["content"] not in ("<unk>", "<s>", "<|endoftext|>")} | flags
    (path / "tokenizer.json").write_text(json.dumps(text))
    return path


def test_spaces_behind_tokens_go_by_the_models_name(tmp_path: Path) -> None:
    """llama.cpp infers from the name whether they are stripped, and rejects such a file if it lacks some tokens."""
    folder = stripping(tmp_path / "phi")
    words = Tokenizer(folder)
    found = keys(words, words.vocab_size, "mine")
    assert found["general.name"] == "phi-3 mine"
    writer = gguf.GGUFWriter(tmp_path / "out.gguf", "phi3")
    for name, value in found.items():
        gguf_export._add(writer, name, value)
    for step in ("write_header_to_file", "write_kv_data_to_file", "close"):
        getattr(writer, step)()
    said = "<s>  hello<unk>  x<|im_end|>  old <|im_end|>\n\nold</s> 12"
    assert Tokenizer(tmp_path / "out.gguf").encode_marked(said) == words.encode_marked(said)
    plain = Tokenizer(stripping(tmp_path / "plain", rstrip=False))
    assert keys(plain, plain.vocab_size, "my-Phi-3-mini")["general.name"] == "my-phi 3-mini"
    assert plain.encode_marked(said) != words.encode_marked(said)
