"""The parser's output as deltas: reasoning, content, and tool calls."""

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from finback.serve.incremental import Fence


@dataclass(frozen=True)
class Delta:
    """What a piece of text adds. A call's first delta has its name and id but no text, later ones only text."""

    kind: Literal["reasoning", "content", "tool"]
    # for a call: a fragment of its arguments' JSON
    text: str = ""
    # index of the call, counted from 0
    index: int = 0
    name: str | None = None
    call_id: str | None = None


@dataclass(frozen=True)
class ParsedCall:
    """A tool call; `arguments` is JSON text as the model wrote it, possibly incomplete or invalid."""

    id: str
    name: str
    arguments: str


def fresh_id() -> str:
    """A new call id: call_ and 24 random hex digits."""
    return f"call_{uuid.uuid4().hex[:24]}"


class DeltaCollector:
    """Collects the parser's output as deltas; whitespace is held back until the text after it is known."""

    def __init__(self, tools: bool, new_id: Callable[[], str], single_call: bool) -> None:
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.calls: list[tuple[str, str, list[str]]] = []
        self.fence = Fence()  # code fences in the content since the last call
        self._new_id, self._single_call = new_id, single_call
        self._left_out = False  # whether the current call is left out
        self._waits = tools  # whether whitespace may still belong to a call
        self._blank = ""  # whitespace held back
        self._called = False  # whether no content has followed the last call
        self._held: str | None = None  # arguments given as a string or null
        self._new: list[Delta] = []

    def take(self) -> list[Delta]:
        """The deltas since the last call of this method."""
        new, self._new = self._new, []
        return new

    def think(self, text: str) -> None:
        """Takes text of the chain of thought."""
        if shown := self._shown(text):
            self.reasoning.append(shown)
            self._add(Delta("reasoning", shown))

    def end_chain(self) -> None:
        """Drops the chain's trailing whitespace."""
        self._blank = ""

    def text(self, text: str) -> None:
        """Takes text of the answer."""
        self.end_call()
        self.fence.push(text)
        if shown := self._shown(text) if self._waits else text:
            if self._called and not self.content:
                shown = shown.lstrip()
            self._called = False
            self.content.append(shown)
            self._add(Delta("content", shown))

    def call(self, name: str, ident: str | None = None) -> None:
        """Starts a call; `ident` is its id if the model has written one."""
        self.end_call()
        self._blank, self._called, self.fence = "", True, Fence()
        self._left_out = self._single_call and bool(self.calls)
        if self._left_out:
            return
        is_new = ident is not None and ident not in (known for known, _, _ in self.calls)
        self.calls.append((ident if is_new and ident else self._new_id(), name, []))
        self._new.append(Delta("tool", "", len(self.calls) - 1, name, self.calls[-1][0]))

    def arguments(self, text: str) -> None:
        """Adds a piece of the arguments' JSON."""
        if self._left_out or not text:
            return
        if self._held is not None:
            self._held += text
        elif not self.calls[-1][2] and text[0] in '"n':  # a string that contains them, or null
            self._held = text
        else:
            self._argue(text)

    def end_call(self) -> None:
        """Ends the call: arguments given as a string are unpacked, and null means none."""
        if self._held is None:
            return
        held, self._held = self._held, None
        try:
            value = json.loads(held)
            inner = json.loads(value) if isinstance(value, str) else value
        except (ValueError, RecursionError):
            self._argue(held)
            return
        self._argue("{}" if inner is None else value if isinstance(inner, dict) else held)

    def _argue(self, text: str) -> None:
        self.calls[-1][2].append(text)
        self._add(Delta("tool", text, len(self.calls) - 1))

    def end(self) -> None:
        """Ends the text: whitespace at the end of a plain answer belongs to it."""
        self.end_call()
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
