"""Text that is still arriving: read as if it were whole, and its code fences.

Readers are generators: they yield where what has come does not decide what it is, and go on when more has come. Their
decisions depend on the text alone and never on how it was cut into pieces.
"""

import re
from collections.abc import Generator, Sequence
from typing import TypeVar

from finback.engine.detokenizer import overlap

T = TypeVar("T")
Wait = Generator[None, None, T]  # yields for more text, returns what was read

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(.*)", re.DOTALL)
_PREFIXES = ("", "b", "f", "r", "u", "B", "F", "R", "U", "rb", "br", "rf", "fr")  # of Python's strings


class IncrementalReader:
    """A growing text with a reading position; after `end` nothing more comes and every wait is over."""

    def __init__(self) -> None:
        self.ended = False
        self._text = ""
        self._at = 0
        self._start = -1  # where `mark` was called, -1 after `marked`

    def push(self, piece: str) -> None:
        """Add text at the end; what was read before a mark is forgotten."""
        start = self._at if self._start < 0 else self._start
        self._text = self._text[start:] + piece
        self._at, self._start = self._at - start, min(self._start, 0)

    def mark(self, last: int) -> None:
        """Remember what is read from now on, and the `last` characters before."""
        self._start = self._at - last

    def marked(self) -> str:
        """What was read since `mark`, which ends here."""
        text, self._start = self._text[self._start : self._at], -1
        return text

    def back(self, count: int) -> None:
        """Unread `count` characters; they must have been read since the last wait, or since `mark`."""
        self._at -= count

    @property
    def position(self) -> int:
        """How much is read since the mark."""
        return self._at - self._start

    def rewind(self, position: int) -> None:
        """Unread what was read behind a position since the mark."""
        self._at = self._start + position

    def peek(self) -> Wait[str]:
        """The next character, unread; "" at the end."""
        while self._at == len(self._text) and not self.ended:
            yield
        return self._text[self._at : self._at + 1]

    def is_over(self) -> Wait[bool]:
        """Whether all is read and no more comes."""
        return not (yield from self.peek())

    def blank(self, characters: str | None = None) -> Wait[str]:
        """Read all of these characters that come next; None stands for whitespace."""
        found = ""
        while (next_one := (yield from self.peek())) and (
            next_one.isspace() if characters is None else next_one in characters
        ):
            found += next_one
            self._at += 1
        return found

    def match(self, tags: Sequence[str]) -> Wait[str]:
        """Read the one of `tags` that comes next; "" if none does. No tag may begin another."""
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
        """The next text that is no part of a tag, or the tag that comes next, as (text, tag) of which one is "".

        Both are "" at the end. What is left of a tag that the end has torn is text if `torn`, else it is dropped.
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
        """Read all text before the first of the tags, which stays unread; to the end if there is none."""
        found = ""
        while True:
            text, tag = yield from self.until(tags)
            self.back(len(tag))
            if not text:
                return found
            found += text

    def comes_first(self, wanted: str, other: str) -> Wait[bool]:
        """Whether the character `wanted` comes before `other` in what is unread; not so if neither ever comes."""
        while True:
            ours, theirs = self._text.find(wanted, self._at), self._text.find(other, self._at)
            if ours >= 0 or theirs >= 0 or self.ended:
                return ours >= 0 and not 0 <= theirs < ours
            yield


class Fence:
    """Whether the end of a Markdown text lies in a code fence, after CommonMark; any indentation may precede one."""

    def __init__(self) -> None:
        self._mark = ""  # what opened the fence on a line that is over
        self._line: list[str] = []  # pieces of the last line

    def push(self, text: str) -> None:
        first, *others = text.split("\n")
        self._line.append(first)
        for line in others:
            self._mark = self._after("".join(self._line))
            self._line = [line]

    @property
    def is_open(self) -> bool:
        """Whether what comes next is code: also right after the mark that opens, not right after the one that closes."""
        return bool(self._after("".join(self._line)))

    def quote(self) -> str:
        """The quotation mark that is open on the last line, "" if none is; an apostrophe within a word is none."""
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
        """What `_mark` becomes if the last line is this one."""
        found = _FENCE.match(line)
        if found is None:
            return self._mark
        run, rest = found.groups()
        if self._mark:
            return "" if run.startswith(self._mark) and not rest.strip() else self._mark
        return "" if run[0] == "`" and "`" in rest else run  # ```such a line``` is code, but no fence
