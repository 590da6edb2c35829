"""A model's text, as it streams, into reasoning, content and tool calls.

The rules, which depend on the text alone and never on how it was cut into pieces:

- A chain of thought is there if the prompt opened it or if `<think>` is the first thing said; said again at its start
  the tag is dropped. The newline after `<think>` and the whitespace at the chain's end are no part of it. A chain that
  is never closed leaves the content empty.
- In the chain, `</think>` closes unless it is quoted in code: within an open code fence and between two quotation marks
  (" ' or `) of the same line. So a fence that the model forgot to close hides nothing.
- Newlines and further `</think>` where the answer begins are dropped. Later on, think tags are text.
- Tool calls are looked for in the answer only, outside code fences, if the request has tools. The first mark that is
  seen decides the form. Whitespace around calls belongs to the markup.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from finback.data.tokenizer import END_THINK, THINK
from finback.serve import tool_calls as markup
from finback.serve.incremental import Fence, IncrementalReader, Wait
from finback.serve.tool_calls import OPENERS, ToolForm


@dataclass(frozen=True)
class Delta:
    """What a piece of text adds. A call's first delta has its name and id and no text, later ones only text."""

    kind: Literal["reasoning", "content", "tool"]
    text: str = ""  # for tool: a fragment of the arguments' JSON text
    index: int = 0  # for tool: which call, counted from 0
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


class Parser:
    """Takes the text piece by piece and returns what each adds; any text is taken without an error.

    `opened`: the prompt ends inside a chain of thought. `tools`: the request has tools, so that calls are looked for.
    `form`: the only form of calls to look for, None for all. `new_id` makes the calls' ids. `held`: a grammar holds the
    answer, so that the first `</think>` ends the chain and marks in a call's strings are text. `single`: calls behind the
    first are left out.
    """

    def __init__(
        self,
        opened: bool,
        tools: bool,
        form: ToolForm | None = None,
        new_id: Callable[[], str] = fresh_id,
        *,
        held: bool = False,
        single: bool = False,
    ) -> None:
        self._feed, self._held = IncrementalReader(), held
        self._said = _ParsedOutput(tools, new_id, single)
        self._reader = self._read(opened, tools, form)

    @property
    def reasoning(self) -> str:
        """The chain so far, or the whole of it after `end`."""
        return "".join(self._said.reasoning)

    @property
    def content(self) -> str:
        """The answer so far, or the whole of it after `end`."""
        return "".join(self._said.content)

    @property
    def calls(self) -> list[ParsedCall]:
        """The calls so far, or all of them after `end`."""
        return [ParsedCall(call_id, name, "".join(pieces)) for call_id, name, pieces in self._said.calls]

    @property
    def called(self) -> bool:
        """Whether there is a call to answer; one that a grammar should have completed must have been."""
        calls = self.calls
        return bool(calls) and not (self._held and not markup.is_whole(calls[-1].arguments))

    def push(self, piece: str) -> list[Delta]:
        """Add text; what it makes certain, neighbours of one kind as one delta."""
        assert not self._feed.ended, "text after the end"
        self._feed.push(piece)
        next(self._reader)  # it waits for ever: only the end ends it
        return self._said.take()

    def end(self) -> list[Delta]:
        """Let out what was held back: nothing more comes. A second call returns nothing."""
        if not self._feed.ended:
            self._feed.ended = True
            next(self._reader, None)
            self._said.end()
        return self._said.take()

    def _read(self, opened: bool, tools: bool, form: ToolForm | None) -> Wait[None]:
        self._feed.keep(0)
        blank = yield from self._feed.blank()
        tag = yield from self._feed.match((THINK, END_THINK))
        self._feed.release()
        if tag == THINK or (opened and not tag):
            if not tag:
                self._feed.back(len(blank))
            yield from self._chain()
        elif not tag:
            self._said.text(blank)
            yield from self._answer(tools, form)
            return
        while True:
            yield from self._feed.blank("\r\n")
            if not (yield from self._feed.match((END_THINK,))):
                break
        yield from self._answer(tools, form)

    def _chain(self) -> Wait[None]:
        fence = Fence()
        yield from self._feed.match(("\n", "\r\n"))
        while True:
            text, tag = yield from self._feed.until((END_THINK,))
            if tag and self._held:
                break
            if tag:
                quote = fence.quote() if fence.is_open else ""
                if not quote or not (yield from self._feed.comes_first(quote, "\n")):
                    break
            if not (text := text or tag):
                break
            fence.push(text)
            self._said.think(text)
        self._said.end_chain()

    def _answer(self, tools: bool, form: ToolForm | None) -> Wait[None]:
        openers = () if not tools else OPENERS if form is None else (form.opener,)
        while True:
            text, tag = yield from self._feed.until(openers)
            if tag and not self._said.fence.is_open:
                yield from markup.read(self._feed, tag, form, self._said, self._held)
                openers = (tag,) if self._said.calls else openers
            elif text or tag:
                self._said.text(text or tag)
            else:
                return


class _ParsedOutput:
    """What has been said so far, and what of it is still to be handed out; whitespace waits for what follows it."""

    def __init__(self, tools: bool, new_id: Callable[[], str], single: bool) -> None:
        self.reasoning: list[str] = []
        self.content: list[str] = []
        self.calls: list[tuple[str, str, list[str]]] = []
        self.fence = Fence()  # of the content since the last call
        self._new_id, self._single = new_id, single
        self._left_out = False  # the call that is being read
        self._waits = tools  # whether content's whitespace may yet belong to a call
        self._blank = ""  # the whitespace that waits
        self._called = False  # no content since the last call
        self._news: list[Delta] = []

    def take(self) -> list[Delta]:
        """What is new."""
        news, self._news = self._news, []
        return news

    def think(self, text: str) -> None:
        """More of the chain."""
        if visible := self._visible(text):
            self.reasoning.append(visible)
            self._add(Delta("reasoning", visible))

    def end_chain(self) -> None:
        """The chain's last whitespace is nobody's."""
        self._blank = ""

    def text(self, text: str) -> None:
        """More of the answer."""
        self.fence.push(text)
        if visible := self._visible(text) if self._waits else text:
            if self._called and not self.content:
                visible = visible.lstrip()
            self._called = False
            self.content.append(visible)
            self._add(Delta("content", visible))

    def call(self, name: str) -> None:
        """A call begins."""
        self._blank, self._called, self.fence = "", True, Fence()
        self._left_out = self._single and bool(self.calls)
        if self._left_out:
            return
        self.calls.append((self._new_id(), name, []))
        self._news.append(Delta("tool", "", len(self.calls) - 1, name, self.calls[-1][0]))

    def arguments(self, text: str) -> None:
        """More of the last call's arguments."""
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

    def _visible(self, text: str) -> str:
        text = self._blank + text
        visible = text.rstrip()
        self._blank = text[len(visible) :]
        return visible

    def _add(self, delta: Delta) -> None:
        last = self._news[-1] if self._news else None
        if last and (last.kind, last.index, last.name) == (delta.kind, delta.index, None):
            self._news[-1] = Delta(delta.kind, last.text + delta.text, delta.index)
        else:
            self._news.append(delta)
