"""JSON within a text that is still arriving: the end of a value, and the members of an object."""

import json
from collections.abc import Callable, Sequence

from finback.serve.deltas import DeltaCollector
from finback.serve.incremental import IncrementalReader, Wait

ARGUMENTS = ("arguments", "parameters")  # names that models use
BETWEEN = ", \t\r\n"


def is_whole(arguments: str) -> bool:
    """Whether the JSON arguments of a grammar-constrained call are complete."""
    json_text = JsonEnd()
    json_text.push(arguments)
    return json_text.is_whole


def read_members(reader: IncrementalReader, sink: DeltaCollector, ends: Sequence[str]) -> Wait[tuple[bool, bool, bool]]:
    """Reads the members of a call's object. Returns whether there was a name, whether there were arguments, and whether it was closed."""
    early: list[str] = []  # arguments that came before the name
    named = argued = False
    while True:
        yield from reader.blank(BETWEEN)
        if (yield from reader.match(("}",))):
            return named, argued, True
        if (yield from reader.peek()) != '"':
            return named, argued, False
        key: list[str] = []
        is_whole = yield from read_value(reader, key.append, ends)
        yield from reader.blank()
        if not is_whole or not (yield from reader.match((":",))):
            return named, argued, False
        yield from reader.blank()
        value: list[str] = []
        member, takes = string_of(key), value.append
        if member in ARGUMENTS and not argued:
            takes, argued = (sink.arguments if named else early.append), True
        is_whole = yield from read_value(reader, takes, ends)
        if is_whole and member == "name" and not named and (name := string_of(value)):
            named = True
            sink.call(name)
            for piece in early:
                sink.arguments(piece)
        if not is_whole:
            return named, argued, False


def read_value(reader: IncrementalReader, take: Callable[[str], None], ends: Sequence[str]) -> Wait[bool]:
    """Passes on one JSON value character by character; returns False if it is incomplete.

    Any of `ends` ends the value, except inside a string, where it is text as long as the string is valid.
    """
    json_text = JsonEnd()
    while not json_text.is_whole:
        text, tag = yield from reader.until(ends, torn=False)
        if tag and not json_text.is_quoting:
            reader.back(len(tag))
            return False
        if not (piece := text or tag):
            return False
        used = json_text.push(piece)
        reader.back(len(piece) - used)
        if used:
            take(piece[:used])
    return True


class JsonEnd:
    """Finds the end of a JSON value by its brackets and quotation marks."""

    def __init__(self) -> None:
        self.is_whole = False
        self.is_quoting = False  # inside a string without a raw newline, which JSON does not allow
        self._depth = 0
        self._in_string = self._escaped = False

    def push(self, text: str) -> int:
        """How many of these characters still belong to the value."""
        for place, character in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif self._in_string and character == '"':
                self._in_string = self.is_quoting = False
            elif self._in_string:
                self._escaped, self.is_quoting = character == "\\", self.is_quoting and character != "\n"
            elif character == '"':
                self._in_string = self.is_quoting = True
                continue
            elif character in "{[":
                self._depth += 1
                continue
            elif self._depth == 0 and (character in ",}]" or character.isspace()):
                self.is_whole = True  # a number or a word ends only with what follows
                return place
            elif character in "}]":
                self._depth -= 1
            else:
                continue
            if self._depth == 0 and not self._in_string:
                self.is_whole = True
                return place + 1
        return len(text)


def string_of(pieces: list[str]) -> str:
    """The decoded text of a JSON string; "" if it is not one."""
    raw = "".join(pieces)
    try:
        found = json.loads(raw, strict=False) if raw.startswith('"') else ""
    except ValueError:
        return ""
    return str(found).encode("utf-8", "replace").decode()  # a lone surrogate could not be encoded
