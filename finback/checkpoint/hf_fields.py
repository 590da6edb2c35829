"""Reads fields of a raw config.json and checks each value. Does not import torch."""

import math
from typing import Any, NoReturn

from finback.config import UserError

LARGEST = 1_000_000_000  # the largest whole number that a valid config holds


class Fields:
    """A raw config; `defaults` are those of transformers' config class, for fields that config.json omits."""

    def __init__(self, raw: dict[str, Any], defaults: dict[str, Any] | None = None) -> None:
        self.raw, self.defaults = raw, defaults or {}

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number from 0 to LARGEST; UserError otherwise."""
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LARGEST:
            self.refuse(name, f"not a whole number up to {LARGEST:,}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number as a float; UserError otherwise."""
        value = self._value(name, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            self.refuse(name, "not a number")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """True or false; UserError otherwise."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "neither true nor false")
        return value

    def integers(self, name: str, default: list[int]) -> list[int]:
        """A list of whole numbers from 0 to LARGEST; UserError otherwise."""
        value = self._value(name, default)
        if not isinstance(value, list) or not all(isinstance(n, int) and 0 <= n <= LARGEST for n in value):
            self.refuse(name, "not a list of whole numbers")
        return value

    def object(self, name: str) -> dict[str, Any]:
        """An object; an empty one where there is none."""
        value = self.raw.get(name) or {}
        if not isinstance(value, dict):
            self.refuse(name, "not an object")
        return value

    def words(self, name: str, known: tuple[str, ...]) -> list[str]:
        """Returns a list of known words; an absent field is an empty list."""
        value = self._value(name, [])
        if not isinstance(value, list) or not all(word in known for word in value):
            self.refuse(name, f"not a list of {', '.join(known)}", "Use another checkpoint.")
        return value

    def demand(self, name: str, wanted: Any) -> None:
        """Raises UserError for any value but the one that finback implements; the field may be absent."""
        if self._value(name, wanted) != wanted:
            self.refuse(name, f"finback supports {wanted!r} only", "Use another checkpoint.")

    def refuse(self, name: str, problem: str, remedy: str = "Correct config.json.") -> NoReturn:
        """Raises UserError for a field, with the value in the file."""
        raise UserError(f"config.json {name}", self.raw.get(name), problem, remedy)

    def _value(self, name: str, default: Any) -> Any:
        value = self.raw.get(name)
        default = self.defaults.get(name, default)
        if value is None and default is None:
            self.refuse(name, "missing", "Restore it; it cannot be guessed.")
        return default if value is None else value
