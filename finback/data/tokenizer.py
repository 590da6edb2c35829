"""Byte-level BPE with DeepSeek's split rules and special tokens, on top of the tokenizers library."""

import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from finback.config import UserError
from finback.data import tokenizer_files
from finback.data.blocks import BLOCK, pieces
from finback.data.template import OWN, Template
from finback.data.tokenizer_files import CONFIG, GENERATION, TokenizerFiles
from finback.runs.adapters import tokenizer_place
from finback.runs.files import is_gguf


class SpecialToken(str):
    """Text that is one token if the vocabulary has it; user text can never become this token."""

    __slots__ = ()


BOS, EOS = SpecialToken("<｜begin▁of▁sentence｜>"), SpecialToken("<｜end▁of▁sentence｜>")
PAD = SpecialToken("<｜▁pad▁｜>")
USER, ASSISTANT = SpecialToken("<｜User｜>"), SpecialToken("<｜Assistant｜>")
THINK, END_THINK = SpecialToken("<think>"), SpecialToken("</think>")
FIM = tuple(map(SpecialToken, ("<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>")))
ADDED = (THINK, END_THINK, *FIM, USER, ASSISTANT)  # added tokens that are not special, as in DeepSeek's file

# Byte-exact from DeepSeek's tokenizer.json (spec 1.9): digits by threes, CJK runs, then words, signs and spaces.
SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)

OWN_FORM = "r1"  # form of models trained here, and of unknown models without a template
# prompt forms (prompt_forms.py) of models without a template, by model_type, or for GGUF by architecture
FORMS_BY_FAMILY = {"deepseek_v32": "v3.2", "deepseek32": "v3.2", "deepseek_v4": "v4", "deepseek4": "v4"}
V41_MARK = SpecialToken("<｜System｜>")

SMALLEST = 3 + 256 + len(ADDED)  # specials, bytes, added tokens
TOGETHER = 2 * BLOCK  # characters encoded at a time
TRAINED = 1 << 15  # characters trained on at a time: split into words they need 600 times as many bytes
# between digits, and within overlong words
_APART = re.compile(r"(?<=\d)(?=\d)|[^\W\d_]{1024}(?=[^\W\d_])|[^\w\s]{1024}(?=[^\w\s])")
LARGEST = 2**20  # several times the size in any published model


class Tokenizer:
    """Text to ids and back, from a tokenizer.json, a folder with one, or a GGUF file.

    `encode` treats special tokens in the text as plain characters, so users cannot forge them. A folder's other files add
    special tokens, end tokens and the chat template (tokenizer_files.py); without a template, a vocabulary with DeepSeek's
    tokens uses DeepSeek's form (messages.py).
    """

    def __init__(self, path: Path) -> None:
        self.path = path = tokenizer_place(path)
        files = self._files = _read(path)
        self.settings, self.generation = files.settings, files.generation
        try:
            self._full = tokenizers.Tokenizer.from_str(files.text)
        except Exception as error:  # the library raises nothing more specific
            raise UserError("tokenizer", str(path), f"damaged ({error})", "Restore tokenizer.json.") from None
        is_more = tokenizer_files.add_tokens(self._full, self.settings, path)
        self._bare, self._moved = _without_marks(self._full.to_str() if is_more else files.text, self._full)
        for each in (self._full, self._bare):  # disables truncation and padding that a file may define
            each.no_truncation()
            each.no_padding()
        found = {token: self._full.token_to_id(token) for token in (BOS, EOS, PAD, *ADDED)}
        self.ids: dict[str, int] = {token: number for token, number in found.items() if number is not None}
        self.vocab_size = self._full.get_vocab_size()
        self.bos, self.pad = self._special("bos", BOS), self._special("pad", PAD)
        self.eos = self._special("eos", EOS)
        source, with_tools = tokenizer_files.templates(self.settings, path)
        # our own template is written from ids, which user text cannot forge
        self.template = None if source in (None, OWN) else Template(source, self.specials, with_tools)
        self.form = OWN_FORM if source is not None else self._form(files.family)
        self.ends = self._ends()
        self.stops = tuple(sorted({number for given in self.ends.values() for number in given}))
        marks = (BOS, EOS, *ADDED) if self.template is None else ()
        # missing tokens, without which it cannot write dialogues
        self.lacks = [token for token in marks if token not in self.ids]

    @property
    def vocabulary(self) -> dict[str, int]:
        """The ids of all tokens."""
        return self._full.get_vocab()

    @property
    def specials(self) -> dict[str, str]:
        """bos_token, eos_token, pad_token, unk_token and the like, as far as they are defined."""
        ours = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
        names = (*ours, *(name for name in self.settings if name.endswith("_token")))
        named = {n: tokenizer_files.content(self.settings.get(n)) or ours.get(n) for n in names}
        return {n: t for n, t in named.items() if t and self._full.token_to_id(t) is not None}

    @property
    def writes_own_form(self) -> bool:
        """Whether dialogues use the form of models trained here, for which exports contain a template."""
        return self.template is None and self.form == OWN_FORM and not self.lacks

    @property
    def adds_bos(self) -> bool:
        """Whether a text to be continued starts with bos, as training texts do."""
        return self.bos >= 0 and bool(self.settings.get("add_bos_token", True))

    @property
    def largest_id(self) -> int:
        """The highest possible token id: a vocabulary may have holes."""
        return max(self._full.get_vocab().values())

    @property
    def added(self) -> list[str]:
        """The texts of all added tokens, special or not."""
        return [token.content for token in self._full.get_added_tokens_decoder().values()]

    def _special(self, name: str, default: str) -> int:
        """The id of bos, eos or pad; -1 if the vocabulary has none."""
        number = self._full.token_to_id(tokenizer_files.content(self.settings.get(f"{name}_token")) or default)
        return -1 if number is None else number

    def _form(self, family: str) -> str:
        """The prompt form without a template: `prompt_form` in the settings, else the family's."""
        form = FORMS_BY_FAMILY.get(family, OWN_FORM)
        found = "v4.1" if form == "v4" and V41_MARK in self._full.get_vocab() else form
        return str(self.settings.get("prompt_form") or found)

    def _ends(self) -> dict[str, tuple[int, ...]]:
        """Ids that end an answer, by source: the tokenizer, generation settings (Llama 3 has three), the template.

        Qwen's base models end a text with one token and, by their template, a dialogue with another.
        """
        found: dict[str, tuple[int, ...]] = {"tokenizer": (self.eos,) if self.eos >= 0 else ()}
        found["generation"] = tokenizer_files.ids(self.generation.get("eos_token_id"))
        if self.template is not None and (text := self.template.after_answer().lstrip()):
            first = self.encode_marked(text)[:1]
            found["template"] = tuple(n for n in first if n in self._full.get_added_tokens_decoder())
        return found

    def export(self, folder: Path) -> None:
        """As `save`, plus everything that other programs need for a tokenizer trained here."""
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.specials,
        }
        if self.writes_own_form:
            settings["chat_template"] = OWN
        self.settings = settings | self.settings
        generation = {"bos_token_id": self.bos} | self.generation | {"eos_token_id": list(self.stops)}
        self.generation = {k: v for k, v in generation.items() if v not in (-1, [])}
        self.save(folder)

    def save(self, folder: Path) -> None:
        """Writes tokenizer.json and its companion files in Hugging Face's format; a prompt form other than ours is named."""
        if self.form != OWN_FORM:
            self.settings = {**self.settings, "prompt_form": self.form}
        (folder / "tokenizer.json").write_text(self._full.to_str(pretty=True), encoding="utf-8")
        for name, content in ((CONFIG, self.settings), (GENERATION, self.generation)):
            if content:
                text = json.dumps(content, indent=2, ensure_ascii=False)
                (folder / name).write_text(text + "\n", encoding="utf-8")

    def as_json(self) -> str:
        """The text of tokenizer.json."""
        return self._full.to_str()

    def encode(self, text: str) -> list[int]:
        """Ids of plain text."""
        return self._moved_ids(self._bare.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Ids of many plain texts, on all cores; few long ones at a time, since a token temporarily takes 300 bytes."""
        if sum(map(len, texts)) <= TOGETHER:
            return [self._moved_ids(e.ids) for e in self._bare.encode_batch(texts, add_special_tokens=False)]
        found = [array("I") for _ in texts]
        parts = ((i, part) for i, text in enumerate(texts) for part in (pieces(text) if self._has_seams else [text]))
        for batch in _batches(parts):
            encoded = self._bare.encode_batch([part for _, part in batch], add_special_tokens=False)
            for (i, _), each in zip(batch, encoded, strict=True):
                found[i].extend(self._moved_ids(each.ids))
        return found

    def _moved_ids(self, ids: list[int]) -> list[int]:
        return [self._moved.get(number, number) for number in ids] if self._moved else ids

    @cached_property
    def _has_seams(self) -> bool:
        """Whether a text tokenizes like its parts, split between words; not if the vocabulary adds a space at the start."""
        halves = (("a", " b"), ("a\n", "b"))
        return all(self.encode(a + b) == self.encode(a) + self.encode(b) for a, b in halves)

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text in which special tokens are effective; for templates, never for user text."""
        return self._full.encode(text, add_special_tokens=False).ids

    def encode_whole(self, text: str) -> list[int]:
        """Like `encode_marked`, with the tokens that the vocabulary's post-processor adds before and after a text."""
        return self._full.encode(text).ids

    def encode_pieces(self, pieces: Iterable[str], encode: Callable[[str], list[int]] | None = None) -> list[int]:
        """Ids of special tokens (of their characters if the vocabulary lacks them), and of plain texts between them.

        Adjacent texts are encoded as one, with `encode` if given.
        """
        ids: list[int] = []
        own: dict[str, int] = {BOS: self.bos, EOS: self.eos}
        for is_special, group in groupby(pieces, key=lambda piece: isinstance(piece, SpecialToken)):
            if is_special:
                for token in group:
                    known = self.ids.get(token) if token not in own else own[token]
                    ids += self.encode_marked(token) if known is None else [known]
            else:
                ids += (encode or self.encode)("".join(group))
        return ids

    def require(self, *tokens: str) -> None:
        """Raises UserError if the vocabulary lacks one of these tokens."""
        if lacks := [token for token in tokens if token not in self.ids]:
            reason = "" if self.template else "has no chat template and "
            remedy = "Use a model that was trained to chat, or add a chat_template.jinja to its folder."
            raise UserError("tokenizer", str(self.path), f"{reason}lacks the tokens {lacks}", remedy)

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of ids; added tokens such as <think> are kept, bos, eos and pad are removed if `skip_special`."""
        return self._full.decode(list(ids), skip_special_tokens=skip_special)


def _batches(parts: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """Numbered texts in lists of TOGETHER characters; a longer text is a list of its own."""
    batch: list[tuple[int, str]] = []
    size = 0
    for part in parts:
        if batch and size + len(part[1]) > TOGETHER:
            yield batch
            batch, size = [], 0
        batch.append(part)
        size += len(part[1])
    yield batch


def _read(path: Path) -> TokenizerFiles:
    """The contents of a folder, a tokenizer.json or a GGUF file; a template next to a GGUF file overrides its own."""
    if is_gguf(path):
        from finback.data import gguf_tokenizer  # imports torch, which workers that encode text do not need

        text, settings = gguf_tokenizer.convert(path, SPLITS)
        tokenizer_files.add_templates(path.parent, settings)
        ends = gguf_tokenizer.ends(path)
        family = gguf_tokenizer.family(path)
        return TokenizerFiles(text, settings, {"eos_token_id": ends} if ends else {}, family=family)
    return tokenizer_files.read(path)


def _without_marks(text: str, full: tokenizers.Tokenizer) -> tuple[tokenizers.Tokenizer, dict[int, int]]:
    """The tokenizer for plain text: of the added tokens, only those that are spaces and line breaks, with their ids in both."""
    bare = json.loads(text)
    bare["added_tokens"] = [t for t in bare["added_tokens"] if not t["special"] and not t["content"].strip()]
    found = tokenizers.Tokenizer.from_str(json.dumps(bare))
    pairs = [(found.token_to_id(t["content"]), full.token_to_id(t["content"])) for t in bare["added_tokens"]]
    return found, {here: there for here, there in pairs if here is not None and there is not None and here != there}


def train(texts: Iterable[str], vocab_size: int, path: Path) -> Tokenizer:
    """Trains a tokenizer of vocab_size entries on texts and writes its tokenizer.json.

    Digits are split one by one during training, so that numbers stay runs of single digits (arithmetic then needs fewer tokens to
    learn; docs/log.md); the split rules stay DeepSeek's. A run of 1,024 letters or signs without a space, such as encoded data, is
    cut, since training time grows with the square of a word's length.
    """
    if not SMALLEST < vocab_size <= LARGEST:
        raise UserError("vocab_size", vocab_size, f"not in {SMALLEST + 1}..{LARGEST}", "Use a value in that range.")
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in SPLITS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(ADDED),
        special_tokens=[BOS, EOS, PAD],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    parts = (part for text in texts for part in pieces(text, TRAINED))
    model.train_from_iterator((_APART.sub(r"\g<0> ", part) for part in parts), trainer)
    model.add_tokens([AddedToken(token, normalized=False, special=False) for token in ADDED])
    model.save(str(path))
    return Tokenizer(path)
