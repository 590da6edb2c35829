"""Reads text that is still arriving as if it were complete; and tracks code fences.

Readers are generators: they yield when the text so far is ambiguous, and continue when more has arrived. Their decisions
depend only on the text, never on how it was split into pieces.
"""

import re
from collections.abc import Generator, Sequence
from typing import TypeVar

from finback.engine.detokenizer import overlap

T = TypeVar("T")
Wait = Generator[None, None, T]  # yields to wait for more text, returns the result

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(.*)", re.DOTALL)
_PREFIXES = ("", "b", "f", "r", "u", "B", "F", "R", "U", "rb", "br", "rf", "fr")  # prefixes of Python strings


class IncrementalReader:
    """A growing text with a read position; after `end` no text follows and nothing waits."""

    def __init__(self) -> None:
        self.ended = False
        self._text = ""
        self._at = 0
        self._start = -1  # position of `mark`, -1 after `marked`

    def push(self, piece: str) -> None:
        """Appends text; what was read before the mark is dropped."""
        start = self._at if self._start < 0 else self._start
        self._text = self._text[start:] + piece
        self._at, self._start = self._at - start, min(self._start, 0)

    def mark(self, last: int) -> None:
        """Sets a mark, from which `marked` returns text, `last` characters before the read position."""
        self._start = self._at - last

    def marked(self) -> str:
        """The text read since `mark`; removes the mark."""
        text, self._start = self._text[self._start : self._at], -1
        return text

    def back(self, count: int) -> None:
        """Unreads `count` characters; they must have been read since the last wait, or since `mark`."""
        self._at -= count

    @property
    def position(self) -> int:
        """Number of characters read since the mark."""
        return self._at - self._start

    def rewind(self, position: int) -> None:
        """Unreads what was read after a position since the mark."""
        self._at = self._start + position

    def peek(self) -> Wait[str]:
        """The next character without reading it; "" at the end."""
        while self._at == len(self._text) and not self.ended:
            yield
        return self._text[self._at : self._at + 1]

    def is_over(self) -> Wait[bool]:
        """Whether everything has been read and no more text follows."""
        return not (yield from self.peek())

    def blank(self, characters: str | None = None) -> Wait[str]:
        """Reads any run of these characters; None means whitespace."""
        found = ""
        while (next_one := (yield from self.peek())) and (
            next_one.isspace() if characters is None else next_one in characters
        ):
            found += next_one
            self._at += 1
        return found

    def match(self, tags: Sequence[str]) -> Wait[str]:
        """Reads the one of `tags` that comes next; "" if none does. No tag may be a prefix of another."""
        while True:
            for tag in tags:
                if self._text.startswith(tag, self._at):
                    self._at += len(tag)
                    return tag
            rest = self._text[self._at :]
            if self.ended or not any(tag.startswith(rest) for tag in tags):
                return ""
            yield

    def until(self, tags: Sequence[str], torn: bool = True) -> Wait[tuple[str, str]]:
        """The next text that is not part of a tag, or the next tag, as (text, tag) with one of them "".

        Both are "" at the end. A tag that is incomplete at the end is text if `torn`, else it is dropped.
        """
        while True:
            if tag := next((t for t in tags if self._text.startswith(t, self._at)), ""):
                self._at += len(tag)
                return "", tag
            whole = [place for t in tags if (place := self._text.find(t, self._at)) >= 0]
            stop = min(whole, default=len(self._text) - overlap(self._text, tags, self._at))
            if self.ended and not whole and torn:
                stop = len(self._text)
            if stop > self._at or self.ended:
                text = self._text[self._at : stop]
                self._at = stop if text else len(self._text)
                return text, ""
            yield

    def before(self, tags: Sequence[str]) -> Wait[str]:
        """Reads all text before the first of the tags, which stays unread; to the end if there is none."""
        found = ""
        while True:
            text, tag = yield from self.until(tags)
            self.back(len(tag))
            if not text:
                return found
            found += text

    def comes_first(self, wanted: str, other: str) -> Wait[bool]:
        """Whether the character `wanted` comes before `other` in the unread text; False if neither ever comes."""
        while True:
            ours, theirs = self._text.find(wanted, self._at), self._text.find(other, self._at)
            if ours >= 0 or theirs >= 0 or self.ended:
                return ours >= 0 and not 0 <= theirs < ours
            yield


class Fence:
    """Whether the end of a Markdown text is inside a code fence, as in CommonMark, but with any indentation."""

    def __init__(self) -> None:
        self._mark = ""  # the fence that is open after the last complete line
        self._line: list[str] = []  # pieces of the current line

    def push(self, text: str) -> None:
        """Takes more text, and notes whether its last line is inside a code fence."""
        first, *others = text.split("\n")
        self._line.append(first)
        for line in others:
            self._mark = self._after("".join(self._line))
            self._line = [line]

    @property
    def is_open(self) -> bool:
        """Whether what comes next is code: true right after an opening fence, false right after a closing one."""
        return bool(self._after("".join(self._line)))

    def quote(self) -> str:
        """The quotation mark that is open on the last line, "" if none; an apostrophe within a word does not count."""
        line = "".join(self._line)
        found = _FENCE.match(line)
        open_, before, word = "", "", ""
        for character in found[2] if found else line:
            if open_:
                open_ = "" if character == open_ and before != "\\" else open_
            elif character in '"`' or (character == "'" and word in _PREFIXES):
                open_ = character
            word = word + character if character.isalnum() else ""
            before = character
        return open_

    def _after(self, line: str) -> str:
        """The value of `_mark` after this line."""
        found = _FENCE.match(line)
        if found is None:
            return self._mark
        run, rest = found.groups()
        if self._mark:
            return "" if run.startswith(self._mark) and not rest.strip() else self._mark
        return "" if run[0] == "`" and "`" in rest else run  # ```such a line``` is inline code, not a fence
