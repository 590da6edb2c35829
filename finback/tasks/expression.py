"""Evaluates arithmetic that a model wrote, exactly and without executing it."""

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

_LONGEST = 200  # characters; bounds the tree's depth and the size of numbers
_ALLOWED = re.compile(r"[0-9+\-*/() ]+")
_TOO_MANY_DIGITS = re.compile(r"[0-9]{11}")
_OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def evaluate(text: str) -> tuple[Fraction, tuple[int, ...]] | None:
    """The value of +, -, *, / over integers, and the integers used, sorted; None for any other text."""
    if len(text) > _LONGEST:
        return None
    text = " ".join(text.split())
    if not _ALLOWED.fullmatch(text) or _TOO_MANY_DIGITS.search(text):
        return None
    used: list[int] = []
    try:
        value = _value(ast.parse(text, mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return value, tuple(sorted(used))


def _value(node: ast.expr, used: list[int]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)):
            used.append(number)
            return Fraction(number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, used)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, used), _value(right, used))
    raise ValueError(f"{type(node).__name__} is not allowed")  # powers and // parse, but are rejected here
