"""Parses a model's text, as it streams, into reasoning, content and tool calls.

The rules depend only on the text, never on how it was split into pieces:

- There is a chain of thought if the prompt opened it or the text starts with `<think>`; a repeated tag at its start is
  dropped. The newline after `<think>` and whitespace at the chain's end do not belong to it. If the chain is never closed,
  the content is empty.
- Inside the chain, `</think>` closes it unless it is quoted as code: inside an open code fence and between two quotation
  marks (" ' or `) of the same line. So a fence that the model forgot to close hides nothing.
- Newlines and further `</think>` at the start of the answer are dropped. Later on, think tags are text.
- Tool calls are recognized only in the answer, outside code fences, and if the request has tools. The first mark found
  decides the form. Whitespace around calls belongs to the tool_calls.
- A text that starts with `<|channel|>` is written in channels (gpt-oss): analysis is the chain, final the answer, and a
  message to `functions.f` is a call.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from finback.data.tokenizer import END_THINK, THINK
from finback.serve import channels
from finback.serve.channels import ASSISTANT, CHANNEL, START
from finback.serve.deltas import Delta, DeltaCollector, ParsedCall, fresh_id
from finback.serve.incremental import Fence, IncrementalReader, Wait
from finback.serve.json_reader import is_whole
from finback.serve.tool_calls import OPENERS, CallReader, ToolForm, bare_calls


class Parser:
    """Takes the text piece by piece and returns the deltas of each piece; accepts any text without an error.

    `opened`: the prompt ends inside a chain of thought. `tools`: the request has tools, so calls are recognized. `form`: the
    only form of calls to recognize, None for all. `new_id` creates the calls' ids. `constrained`: the answer follows a
    grammar, so the first `</think>` ends the chain, marks inside a call's strings are text, and an answer that does not start
    with a call has none. `single_call`: calls after the first are dropped. `chains` False: think tags are text. `schemas`:
    schemas of the functions' arguments by name, which tell the types of values in forms without JSON.
    """

    def __init__(
        self,
        opened: bool,
        tools: bool,
        form: ToolForm | None = None,
        new_id: Callable[[], str] = fresh_id,
        *,
        constrained: bool = False,
        single_call: bool = False,
        chains: bool = True,
        schemas: Mapping[str, Any] | None = None,
    ) -> None:
        self._reader, self._constrained, self._schemas = IncrementalReader(), constrained, schemas or {}
        self._output = DeltaCollector(tools, new_id, single_call)
        self._parsing = self._parse(opened, tools, form) if chains else self._answer(tools, form)

    @property
    def reasoning(self) -> str:
        """The chain so far, complete after `end`."""
        return "".join(self._output.reasoning)

    @property
    def content(self) -> str:
        """The answer so far, complete after `end`."""
        return "".join(self._output.content)

    @property
    def calls(self) -> list[ParsedCall]:
        """The calls so far, complete after `end`."""
        return [ParsedCall(call_id, name, "".join(pieces)) for call_id, name, pieces in self._output.calls]

    @property
    def called(self) -> bool:
        """Whether there is a call to answer; one constrained by a grammar must be complete."""
        calls = self.calls
        return bool(calls) and not (self._constrained and not is_whole(calls[-1].arguments))

    def push(self, piece: str) -> list[Delta]:
        """Adds text. Returns the deltas that are certain now, with neighbors of one kind merged."""
        assert not self._reader.ended, "text after the end"
        self._reader.push(piece)
        next(self._parsing)  # the generator never returns before end()
        return self._output.take()

    def end(self) -> list[Delta]:
        """Ends the text and returns the remaining deltas. A second call returns nothing."""
        if not self._reader.ended:
            self._reader.ended = True
            next(self._parsing, None)
            self._output.end()
        return self._output.take()

    def _parse(self, opened: bool, tools: bool, form: ToolForm | None) -> Wait[None]:
        self._reader.mark(0)
        blank = yield from self._reader.blank()
        tag = yield from self._reader.match((THINK, END_THINK, START + ASSISTANT, CHANNEL))
        self._reader.marked()
        if tag in (START + ASSISTANT, CHANNEL):
            yield from channels.read(self._reader, self._output, tools)
            return
        if tag == THINK or (opened and not tag):
            if not tag:
                self._reader.back(len(blank))
            yield from self._chain()
        elif not tag:
            self._output.text(blank)
            yield from self._answer(tools, form)
            return
        while True:
            yield from self._reader.blank("\r\n")
            if not (yield from self._reader.match((END_THINK,))):
                break
        yield from self._answer(tools, form)

    def _chain(self) -> Wait[None]:
        fence = Fence()
        yield from self._reader.match(("\n", "\r\n"))
        while True:
            text, tag = yield from self._reader.until((END_THINK,))
            if tag and self._constrained:
                break
            if tag:
                quote = fence.quote() if fence.is_open else ""
                if not quote or not (yield from self._reader.comes_first(quote, "\n")):
                    break
            if not (text := text or tag):
                break
            fence.push(text)
            self._output.think(text)
        self._output.end_chain()

    def _answer(self, tools: bool, form: ToolForm | None) -> Wait[None]:
        openers = () if not tools else OPENERS if form is None else (form.opener,)
        if tools and not self._constrained:
            self._reader.mark(0)
            yield from bare_calls(self._reader, self._output, self._schemas)
            self._reader.marked()
        elif tools and not (yield from self._begins_with(openers)):
            openers = ()
        while True:
            text, tag = yield from self._reader.until(openers)
            if tag and not self._output.fence.is_open:
                kind = CallReader(form, self._constrained, self._schemas)
                yield from kind.read(self._reader, tag, self._output)
                openers = (tag,) if self._output.calls else openers
            elif text or tag:
                self._output.text(text or tag)
            else:
                return

    def _begins_with(self, tags: Sequence[str]) -> Wait[bool]:
        """Whether the next non-whitespace text is one of the tags; reads nothing."""
        self._reader.mark(0)
        blank = yield from self._reader.blank()
        tag = yield from self._reader.match(tags)
        self._reader.back(len(blank) + len(tag))
        self._reader.marked()
        return bool(tag)
