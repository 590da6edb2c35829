"""Constrains answers to a JSON schema or a grammar; llguidance computes the allowed tokens."""

import functools
import json
from collections.abc import Callable

import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer
from torch import Tensor

from finback.config import UserError
from finback.data.tokenizer import Tokenizer


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
        return self._constraint("response_format", LLMatcher.grammar_from_json_schema, schema)

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

    def allowed(self) -> Tensor:
        """(vocab,) bool, True for tokens that may come next."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        return torch.from_numpy(np.unpackbits(bits, bitorder="little").astype(bool))

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
        self._matcher.consume_token(token)
        return self._matcher.is_stopped()
