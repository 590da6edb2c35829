"""Text that is still arriving: read as if it were whole, its code fences, and what was found in it as deltas.

Readers are generators: they yield where what has come does not decide what it is, and go on when more has come. Their
decisions depend on the text alone and never on how it was cut into pieces.
"""

import re
import uuid
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from finback.engine.detokenizer import overlap

T = TypeVar("T")
Wait = Generator[None, None, T]  # yields for more text, returns what was read

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})(.*)", re.DOTALL)
_PREFIXES = ("", "b", "f", "r", "u", "B", "F", "R", "U", "rb", "br", "rf", "fr")  # of Python's strings


@dataclass(frozen=True)
class Delta:
    """What a piece of text adds. A call's first delta has its name and id and no text, later ones only text."""

    kind: Literal["reasoning", "content", "tool"]
    # of a call: a fragment of the arguments' JSON text
    text: str = ""
    # of a call: which one, counted from 0
    index: int = 0
    name: str | None = None
    call_id: str | None = None


@dataclass(frozen=True)
class ParsedCall:
    """A tool call; `arguments` is JSON text as the model wrote it, which may be broken off or no JSON at all."""

    id: str
    name: str
    arguments: str


def fresh_id() -> str:
    """A new call id: call_ and 24 random hex digits."""
    return f"call_{uuid.uuid4().hex[:24]}"


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

    def peek(self) -> Wait[str]:
        """The next character, unread; "" at the end."""
        while self._at == len(self._text) and not self.ended:
            yield
        return self._text[self._at : self._at + 1]

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


class DeltaCollector:
    """Takes what a parser finds and hands it out as deltas; whitespace waits for what follows it."""

    def __init__(self, tools: bool, new_id: Callable[[], str], single_call: bool) -> None:
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.calls: list[tuple[str, str, list[str]]] = []
        self.fence = Fence()  # of the content since the last call
        self._new_id, self._single_call = new_id, single_call
        self._left_out = False  # the call that is being read
        self._waits = tools  # whether content's whitespace may yet belong to a call
        self._blank = ""  # the whitespace that waits
        self._called = False  # no content since the last call
        self._new: list[Delta] = []

    def take(self) -> list[Delta]:
        """The deltas since the last call."""
        new, self._new = self._new, []
        return new

    def think(self, text: str) -> None:
        if shown := self._shown(text):
            self.reasoning.append(shown)
            self._add(Delta("reasoning", shown))

    def end_chain(self) -> None:
        """Drop the chain's last whitespace."""
        self._blank = ""

    def text(self, text: str) -> None:
        self.fence.push(text)
        if shown := self._shown(text) if self._waits else text:
            if self._called and not self.content:
                shown = shown.lstrip()
            self._called = False
            self.content.append(shown)
            self._add(Delta("content", shown))

    def call(self, name: str) -> None:
        self._blank, self._called, self.fence = "", True, Fence()
        self._left_out = self._single_call and bool(self.calls)
        if self._left_out:
            return
        self.calls.append((self._new_id(), name, []))
        self._new.append(Delta("tool", "", len(self.calls) - 1, name, self.calls[-1][0]))

    def arguments(self, text: str) -> None:
        if self._left_out:
            return
        self.calls[-1][2].append(text)
        self._add(Delta("tool", text, len(self.calls) - 1))

    def end(self) -> None:
        """Whitespace that ends a plain answer is part of it."""
        if self._blank and not self._called:
            self.content.append(self._blank)
            self._add(Delta("content", self._blank))
        self._blank = ""

    def _shown(self, text: str) -> str:
        text = self._blank + text
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        return shown

    def _add(self, delta: Delta) -> None:
        last = self._new[-1] if self._new else None
        if last and (last.kind, last.index, last.name) == (delta.kind, delta.index, None):
            self._new[-1] = Delta(delta.kind, last.text + delta.text, delta.index)
        else:
            self._new.append(delta)
