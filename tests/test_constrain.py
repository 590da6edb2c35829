"""Numbers in JSON answers end: their digits are bounded, at lengths that every 64-bit number fits in."""

import json
import math
import random
import struct
from typing import Any

import pytest
import torch

from finback.config import UserError
from finback.engine.constrain import DIGITS, Constraint, Grammars
from tests.serving import small_tokenizer

WORDS = small_tokenizer()
GRAMMARS = Grammars(WORDS, WORDS.vocab_size)
NUMBER = {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"], "additionalProperties": False}


def constraint(schema: Any) -> Constraint:
    return GRAMMARS.constraint(json.dumps(schema))


def follows(held: Constraint, text: str) -> bool:
    """Whether an answer of this text is allowed, token by token, and complete."""
    for token in WORDS.encode(text):
        if not held.allowed()[token]:
            return False
        held.accept(token)
    return held.is_complete


def endless(held: Constraint, start: str, liked: str, most: int) -> str:
    """The answer of a model that begins with `start` and prefers characters of `liked` to anything else."""
    found = ""
    for token in WORDS.encode(start):
        assert held.allowed()[token]
        held.accept(token)
    tokens = {WORDS.decode([i], skip_special=False): i for i in range(WORDS.vocab_size)}
    for _ in range(most):
        allowed = held.allowed()
        wanted = [text for text in tokens if text and allowed[tokens[text]] and set(text) <= set(liked)]
        if not wanted and held.is_complete:
            break
        text = max(wanted, key=len) if wanted else next(end for end in "}]" if allowed[tokens[end]])
        assert allowed[tokens[text]], start + found
        found += text
        if held.accept(tokens[text]):
            break
    return start + found


@pytest.mark.parametrize("liked", ["7", "7.", "70", "7e", "7.e-", "0", "0."])
@pytest.mark.parametrize("start", ['{"x": ', '{"x": -', '{"x": 1.', '{"x": 1e'])
def test_a_model_that_likes_digits_comes_to_an_end(start: str, liked: str) -> None:
    text = endless(constraint(NUMBER), start, liked, 60)
    assert math.isfinite(json.loads(text)["x"]) or "e" in text
    assert sum(char.isdigit() for char in text) <= DIGITS + 3 + 2 + 3, "mantissa, exponent, and tokens of three digits"


def test_the_library_alone_never_ends_a_number() -> None:
    """Otherwise the bound would be superfluous."""
    held = constraint(NUMBER)
    held._number = None
    assert len(endless(held, '{"x": 1.', "7", 200)) > 200


@pytest.mark.parametrize(
    "schema", [{"type": "object"}, {"type": "array"}, {"type": "integer"}, {"type": "number"}, True]
)
def test_numbers_that_no_schema_names_end_too(schema: Any) -> None:
    start = {"object": '{"whale": ', "array": "["}.get(schema["type"] if schema is not True else "", "")
    held = constraint(schema)
    text = endless(held, start + "4", "0123456789", 60)
    assert held.is_complete or "whale" in text or text.startswith("[")
    assert sum(char.isdigit() for char in text) <= DIGITS + 2


def test_every_double_and_every_64_bit_integer_fits() -> None:
    rng = random.Random(0)
    doubles = [struct.unpack("d", rng.randbytes(8))[0] for _ in range(150)]
    numbers = [x for x in doubles if math.isfinite(x)]
    numbers += [0.1 + 0.2, 5e-324, 1.7976931348623157e308, 123456.789e-10, 2**63 - 1, -(2**63), 2**64 - 1]
    for number in numbers:
        assert follows(constraint(NUMBER), json.dumps({"x": number})), number
    assert follows(constraint({"type": "array", "items": {"type": "integer"}}), f"[{2**64 - 1}, {-(2**63)}, 0]")


def test_no_schema_can_ask_for_more() -> None:
    """llguidance clamps bounds of integers to 64 bits, and refuses larger ones of numbers."""
    long = 10**40 + 7
    for schema in ({"type": "array"}, {"type": "array", "items": {"type": "integer", "maximum": 10**41}}):
        assert not follows(constraint(schema), f"[{long}]")
    with pytest.raises(UserError, match="cannot be followed"):
        constraint({"type": "number", "maximum": 10**41})


def test_digits_of_strings_are_free() -> None:
    held = constraint({"type": "object"})
    assert follows(held, json.dumps({"a": '1\\"2' + "3" * 50, "b\\": "4" * 50, "c": [1.5, "5" * 50, None, True, 2e5]}))


def test_the_mask_is_the_librarys_but_for_digits() -> None:
    """Up to the bound every token that llguidance allows is allowed; beyond it all but those that begin with a digit."""
    held = constraint(NUMBER)
    for token in WORDS.encode('{"x": '):
        held.accept(token)
    digit = WORDS.encode("7")[0]
    for count in range(DIGITS + 3):
        number, held._number = held._number, None
        plain = held.allowed()
        held._number = number
        found = held.allowed()
        if count < DIGITS:
            assert torch.equal(found, plain)
        else:
            lost = [WORDS.decode([i], skip_special=False) for i in (plain & ~found).nonzero().flatten().tolist()]
            assert lost and all(text[0].isdigit() for text in lost) and found.any()
        held.accept(digit)


def test_a_schema_that_is_none_is_refused() -> None:
    for text in ("[1", "3", "[" * 100_000):
        with pytest.raises(UserError, match="response_format"):
            GRAMMARS.constraint(text)
