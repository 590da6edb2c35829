"""Byte-level BPE with DeepSeek's split rules and special tokens; training and encoding are the tokenizers library's."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from finback.config import UserError

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"
FIM = ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>")
ADDED = (THINK, END_THINK, *FIM, USER, ASSISTANT)  # ordinary added tokens, as in DeepSeek's file

# Byte-exact from DeepSeek's tokenizer.json (spec 1.9): digits by threes, CJK runs, then words, signs and spaces.
SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)

SMALLEST = 3 + 256 + len(ADDED)  # specials, bytes, added tokens


class Tokenizer:
    """Text to ids and back. `encode` treats special tokens in the text as plain characters: a user cannot forge them."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(
                "tokenizer", str(path), "no such file", "Run the prepare stage or name another folder."
            )
        text = path.read_text(encoding="utf-8")
        try:
            self._full = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing more precise
            raise UserError("tokenizer", str(path), f"damaged ({error})", "Restore tokenizer.json.") from None
        bare = json.loads(text)
        bare["added_tokens"] = []
        self._bare = tokenizers.Tokenizer.from_str(json.dumps(bare))
        found = {token: self._full.token_to_id(token) for token in (BOS, EOS, PAD, *ADDED)}
        missing = [token for token, number in found.items() if number is None]
        if missing:
            raise UserError(
                "tokenizer", str(path), f"lacks the tokens {missing}", "Use a DeepSeek-style tokenizer."
            )
        self.ids = {token: number for token, number in found.items() if number is not None}
        self.bos, self.eos, self.pad = self.ids[BOS], self.ids[EOS], self.ids[PAD]
        self.vocab_size = self._full.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        return self._bare.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many plain texts, on all cores."""
        return [e.ids for e in self._bare.encode_batch(texts, add_special_tokens=False)]

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text whose special tokens mean what they say; for templates, never for a user's words."""
        return self._full.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; added tokens such as <think> stay, bos, eos and pad go when `skip_special`."""
        return self._full.decode(list(ids), skip_special_tokens=skip_special)

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Text pieces as ids arrive; a character split over several tokens is held back until it is whole."""
        held: list[int] = []
        said = 0
        for number in ids:
            held.append(number)
            text = self.decode(held)
            whole = text.removesuffix("\ufffd")  # only the last character can still change
            if whole[said:]:
                yield whole[said:]
            held, said = ([], 0) if whole == text else (held, len(whole))
        if held:
            yield self.decode(held)[said:]


def train(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Train a tokenizer of vocab_size entries on texts and write its tokenizer.json.

    Digits are kept apart while merges are learnt, so numbers stay sequences of single digits (arithmetic is then
    learnt in fewer tokens; docs/log.md); the split rules themselves stay DeepSeek's.
    """
    if not SMALLEST < vocab_size < 65536:
        raise UserError(
            "vocab_size", vocab_size, f"not in {SMALLEST + 1}..65535", "Use a value in that range."
        )
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED), special_tokens=[BOS, EOS, PAD], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    apart = re.compile(r"(?<=\d)(?=\d)")
    model.train_from_iterator((apart.sub(" ", text) for text in texts), trainer)
    model.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED])
    model.save(str(path))
    return Tokenizer(path)
