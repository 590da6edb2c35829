"""Constrains answers to a JSON schema or a grammar; llguidance computes the allowed tokens.

llguidance lets a number in a JSON answer have any number of digits, so a model could write digits for ever. They are bounded
here: a number with enough of them gets more only if the schema leaves nothing else.
"""

import functools
import json
from collections.abc import Callable

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from finback.config import UserError
from finback.data.tokenizer import Tokenizer

# digits of a number without its exponent: 64-bit integers have at most 20, doubles need 17; llguidance takes no larger bounds either
DIGITS = 20
EXPONENT_DIGITS = 3  # those of a double


class Grammars:
    """Creates constraints for one tokenizer; `vocab` is the model's vocabulary size, which may exceed the tokenizer's."""

    def __init__(self, tokenizer: Tokenizer, vocab: int) -> None:
        self.tokenizer, self.vocab = tokenizer, vocab

    @functools.cached_property
    def _vocabulary(self) -> LLTokenizer:
        stops = list(self.tokenizer.stops) or None
        state = json.loads(self.tokenizer.as_json())
        for token in state["added_tokens"]:
            # if only one text can follow, llguidance mistakes a marker in it for the token, and then fails
            if token["content"].startswith("<") and token["content"] not in state["model"]["vocab"]:
                token["content"] = f"<{token['id']}\0>"
        return LLTokenizer(json.dumps(state), n_vocab=self.vocab, eos_token=stops)

    def _bytes(self, token: int) -> bytes:
        return bytes(self._vocabulary.decode_bytes([token]))

    @functools.cached_property
    def _digits(self) -> Tensor:
        """(vocab,) bool, True for tokens that begin with a digit."""
        return torch.tensor([self._bytes(token)[:1].isdigit() for token in range(self._vocabulary.vocab_size)])

    def of(self, schema: str | None, grammar: str | None) -> "Constraint | None":
        """The constraint for a request's schema, else for its grammar; None if it has neither."""
        if schema is not None:
            return self.constraint(schema)
        return None if grammar is None else self.lark(grammar)

    def constraint(self, schema: str) -> "Constraint":
        """A constraint for one answer; UserError if the schema is invalid."""
        try:
            parsed = json.loads(schema)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError("response_format", schema[:80], f"not JSON ({error})", "Send a JSON schema.") from None
        if not isinstance(parsed, dict | bool):
            raise UserError("response_format", schema[:80], "not a JSON schema", "Send an object.")
        found = self._constraint("response_format", LLMatcher.grammar_from_json_schema, schema)
        found.bound_digits(self._digits, self._bytes)
        return found

    def lark(self, grammar: str) -> "Constraint":
        """A constraint from a Lark grammar of an answer's tool calls; UserError if the grammar is invalid."""
        return self._constraint("tools", LLMatcher.grammar_from_lark, grammar)

    def _constraint(self, field: str, compiled: Callable[[str], str], text: str) -> "Constraint":
        try:
            matcher = LLMatcher(self._vocabulary, compiled(text), log_level=0)
        except ValueError as error:
            raise UserError(field, text[:80], str(error), "Simplify the schema.") from None
        if matcher.is_error():
            problem = matcher.get_error().splitlines()[0]
            raise UserError(field, text[:80], f"cannot be followed ({problem})", "Simplify the schema.")
        return Constraint(matcher)


class Constraint:
    """The state of one answer in its grammar."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher
        # reads the answer to count digits; None: they are not bounded
        self._number: NumberReader | None = None

    def bound_digits(self, digits: Tensor, read: Callable[[int], bytes]) -> None:
        """Bounds the numbers of a JSON answer. digits: (vocab,) bool, the tokens that begin with one. read: a token's bytes."""
        self._number, self._digits, self._read = NumberReader(), digits, read

    def allowed(self) -> Tensor:
        """(vocab,) bool, True for tokens that may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        found = torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))
        if self._number is None or not self._number.is_full:
            return found
        ending = found.clone()
        ending[: len(self._digits)] &= ~self._digits
        return ending if ending.any() else found  # after a point or an exponent's sign a digit must follow

    @property
    def is_complete(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_accepting())

    @property
    def failed(self) -> bool:
        """Whether the grammar is stuck: nothing may follow although the answer is incomplete."""
        return self._matcher.is_error() or (self._matcher.is_stopped() and not self._matcher.is_accepting())

    def accept(self, token: int) -> bool:
        """Consumes a sampled token. Returns True if the answer is complete and must end."""
        if self._number is not None:
            self._number.read(self._read(token))
        self._matcher.consume_token(token)
        return self._matcher.is_stopped()


class NumberReader:
    """Counts the digits of the number that a JSON text ends in, if it ends in one."""

    def __init__(self) -> None:
        self._count, self._in_exponent = 0, False
        self._in_string = self._is_escaped = False

    @property
    def is_full(self) -> bool:
        """Whether the number has as many digits as it may have."""
        return self._count >= (EXPONENT_DIGITS if self._in_exponent else DIGITS)

    def read(self, text: bytes) -> None:
        """Reads the next part of the text."""
        for char in map(chr, text):
            if self._in_string:
                self._in_string = self._is_escaped or char != '"'
                self._is_escaped = char == "\\" and not self._is_escaped
            elif char in "0123456789":
                self._count += 1
            elif char in "eE" and self._count:
                self._count, self._in_exponent = 0, True
            elif char not in "+-.":
                self._count, self._in_exponent, self._in_string = 0, False, char == '"'
