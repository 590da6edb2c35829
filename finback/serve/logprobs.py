"""Log-probabilities in OpenAI's two formats, with the text and bytes of each token."""

import functools
import json
import re
from collections.abc import Iterable
from typing import Any

from finback.data.tokenizer import Tokenizer
from finback.engine.request import TokenLogprobs

LEAST = -9999.0  # JSON has no minus infinity; OpenAI writes this

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Text and bytes of each token of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        content = json.loads(tokenizer.as_json())
        vocabulary = content["model"].get("vocab", {})
        entries = vocabulary.items() if isinstance(vocabulary, dict) else ((v[0], i) for i, v in enumerate(vocabulary))
        self._pieces: dict[int, str] = {number: piece for piece, number in entries}
        self._added = {t["id"]: t["content"] for t in content.get("added_tokens", [])}
        self._byte_level = "ByteLevel" in json.dumps(content.get("decoder"))
        self.longest = max(map(len, (*self._pieces.values(), *self._added.values())), default=1)

    def text(self, token: int) -> str:
        """A token decoded on its own; special tokens by their names."""
        return self.tokenizer.decode([token], skip_special=False)

    def bytes(self, token: int) -> list[int]:
        """The bytes of a token, even if they are only part of a character."""
        piece = self._pieces.get(token)
        if token in self._added or piece is None:
            return list(self.text(token).encode())
        if self._byte_level and all(c in _characters() for c in piece):
            return [_characters()[c] for c in piece]
        if met := _BYTE.fullmatch(piece):
            return [int(met[1], 16)]
        return list(self.text(token).encode())

    def label(self, token: int) -> str:
        """A token's label in a table: its text, or its bytes if they are not valid text, as OpenAI writes them."""
        text = self.text(token)
        return "bytes:" + "".join(f"\\x{b:02x}" for b in self.bytes(token)) if "\ufffd" in text else text

    def entry(self, alternatives: TokenLogprobs) -> dict[str, Any]:
        """One token in chat's format; `alternatives` starts with the token itself, then the likeliest."""
        own, *others = ({"token": self.text(t), "logprob": finite(p), "bytes": self.bytes(t)} for t, p in alternatives)
        return own | {"top_logprobs": others}

    def table(
        self, tokens: Iterable[int], found: Iterable[TokenLogprobs | None], offset: int
    ) -> tuple[dict[str, list[Any]], int]:
        """Tokens in the format of text completions, as parallel lists; and the offset of the text after them.

        `offset`: position of the first token in the text. `found` has None for a token that nothing predicts.
        """
        table: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, line in zip(tokens, found, strict=True):
            table["tokens"].append(self.label(token))
            table["token_logprobs"].append(None if line is None else finite(line[0][1]))
            # the token itself is listed among the likeliest, as OpenAI does
            has_others = line is not None and len(line) > 1
            table["top_logprobs"].append({self.label(t): finite(p) for t, p in line or ()} if has_others else None)
            table["text_offset"].append(offset)
            offset += len(self.tokenizer.decode([token]))
        return table, offset


def finite(logprob: float) -> float:
    """The log-probability, at least LEAST."""
    return max(logprob, LEAST)


@functools.cache
def _characters() -> dict[str, int]:
    """The characters that byte-level vocabularies use for bytes (GPT-2's table): printable ones represent themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
