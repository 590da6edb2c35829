"""Parses tool calls as models write them: DeepSeek V3 and R1, V3.1, V3.2 and V4, Hermes and Qwen, Qwen3-Coder, Kimi K2, GLM-4.5, Llama 3.1.

JSON arguments are emitted as they arrive, others as soon as a value is complete. Markup that turns out not to be a call is
emitted unchanged as text; an incomplete call keeps the arguments read so far. Nothing is emitted both as text and as a call.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finback.data import dsml
from finback.data.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR
from finback.serve import tool_markup
from finback.serve.deltas import DeltaCollector
from finback.serve.incremental import IncrementalReader, Wait
from finback.serve.json_reader import ARGUMENTS, BETWEEN, read_members, read_value, string_of
from finback.serve.tool_markup import DSML_OPENERS, FUNCTION, QWEN_BEGIN, QWEN_END

PYTHON_TAG = "<|python_tag|>"
_CLOSERS = "}] \t\r\n"
_NOTHING = "{}"  # arguments of a complete call without any: clients parse them as JSON
_KIMI_NAME = re.compile(r"(?:functions\.)?(.+?)(?::\d+)?")


@dataclass(frozen=True)
class Marks:
    """The marks around all calls (in all spellings), around one call, and between its head and its arguments."""

    calls: tuple[str, ...]
    call: str
    separator: str
    end: str
    ends: tuple[str, ...]

    @property
    def after(self) -> tuple[str, ...]:
        """Marks that end a call."""
        return (self.end, self.call, *self.ends)


DEEPSEEK = Marks((CALLS_BEGIN,), CALL_BEGIN, SEPARATOR, CALL_END, (CALLS_END,))
KIMI = Marks(
    ("<|tool_calls_section_begin|>", "<|tool_call_section_begin|>"),  # models write either, in the end mark too
    "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>",
    "<|tool_call_end|>",
    ("<|tool_calls_section_end|>", "<|tool_call_section_end|>"),
)
OPENERS = (CALLS_BEGIN, QWEN_BEGIN, *KIMI.calls, *DSML_OPENERS, FUNCTION, PYTHON_TAG)


class ToolForm(StrEnum):
    """Forms of calls. V3 and V3.1 start alike and differ in each call's head; DSML's forms differ in their first mark."""

    V3 = "v3"
    V31 = "v3.1"
    QWEN = "qwen"
    V32 = dsml.V32.opener
    V4 = dsml.V4.opener
    V41 = dsml.V41.opener

    @property
    def opener(self) -> str:
        """The first mark of calls in this form."""
        return {ToolForm.QWEN: QWEN_BEGIN, ToolForm.V3: CALLS_BEGIN, ToolForm.V31: CALLS_BEGIN}.get(self, self.value)


@dataclass(frozen=True)
class CallReader:
    """Reads calls.

    `form`: the only form to recognize, None for all. `constrained`: a grammar guarantees JSON arguments, so marks inside their
    strings are text. `schemas`: schemas of the functions' arguments by name, as far as they are known.
    """

    form: ToolForm | None
    constrained: bool
    schemas: Mapping[str, Any]

    def read(self, reader: IncrementalReader, opener: str, sink: DeltaCollector) -> Wait[None]:
        """Reads the calls that start with `opener`, which has just been read."""
        if marks := next((marks for marks in (DEEPSEEK, KIMI) if opener in marks.calls), None):
            yield from self._marked(reader, marks, opener, sink)
        elif opener == QWEN_BEGIN:
            yield from self._tagged(reader, sink)
        elif opener == PYTHON_TAG:
            reader.mark(len(opener))
            if (yield from bare_calls(reader, sink, self.schemas)):
                reader.marked()
            else:
                sink.text(reader.marked())
        else:
            yield from tool_markup.read(reader, opener, sink, self.schemas)
        sink.end_call()

    def _marked(self, reader: IncrementalReader, marks: Marks, opener: str, sink: DeltaCollector) -> Wait[None]:
        """<calls begin> calls <calls end>; if the last mark is missing, what follows is text."""
        undecided = opener  # emitted as text unless a call follows
        called = False
        while True:
            blank = yield from reader.blank()
            tag = yield from reader.match((marks.call, *marks.ends))
            if tag != marks.call:
                break
            reader.mark(len(tag))
            is_call = yield from self._marked_call(reader, marks, sink)
            raw = reader.marked()
            if not is_call:
                sink.text(undecided + blank + raw)
            undecided, called = "", called or is_call
        if not (called and tag):
            sink.text(undecided + blank + tag)

    def _marked_call(self, reader: IncrementalReader, marks: Marks, sink: DeltaCollector) -> Wait[bool]:
        """Reads what follows <call begin>, including its end mark; False if it is not a call."""
        head = yield from self._head(reader, marks)
        if head and marks is KIMI:
            met = _KIMI_NAME.fullmatch(head)
            sink.call(met[1] if met else head, head)
        elif head:
            sink.call(head)
        if head:
            yield from self._arguments(reader, marks, sink)
        else:
            yield from reader.before(marks.after)
        yield from reader.match((marks.end,))
        return bool(head)

    def _head(self, reader: IncrementalReader, marks: Marks) -> Wait[str]:
        """The name, or Kimi's id, up to the start of the arguments; "" if it is missing or incomplete."""
        name = yield from reader.before((marks.separator, *marks.after))
        if not (yield from reader.match((marks.separator,))):
            return ""
        is_v3 = self.form is ToolForm.V3
        if self.form is None and name.strip() == "function" and marks is DEEPSEEK:
            yield from reader.blank()
            is_v3 = (yield from reader.peek()) != "{"  # a V3.1 tool may be called "function"
        if is_v3:
            name = yield from reader.before(("\n", "`", "{", marks.separator, *marks.after))
            if not (yield from reader.peek()):
                return ""
        return name.strip()

    def _arguments(self, reader: IncrementalReader, marks: Marks, sink: DeltaCollector) -> Wait[None]:
        """JSON up to the call's end mark, without the code fence and blanks around it."""
        yield from reader.blank()
        if (yield from reader.match(("```",))):
            yield from reader.before(("\n", "{", "[", *marks.after))  # the fence's language
            yield from reader.blank()
        if self.constrained:
            if (yield from reader.peek()) == "{":  # otherwise the fence is incomplete
                yield from read_value(reader, sink.arguments, marks.after)
            yield from reader.before(marks.after)
            return
        undecided, has_arguments = "", False
        while True:
            text, tag = yield from reader.until(marks.after, torn=False)
            if not text:
                break
            undecided += text
            sure = undecided.rstrip()
            sure = sure[: max(len(sure.rstrip("`")), len(sure) - 3)].rstrip()
            if sure:
                sink.arguments(sure)
            undecided, has_arguments = undecided[len(sure) :], has_arguments or bool(sure)
        reader.back(len(tag))
        if tag and not has_arguments:
            sink.arguments(_NOTHING)
        if tag:
            sink.end_call()

    def _tagged(self, reader: IncrementalReader, sink: DeltaCollector) -> Wait[None]:
        """After <tool_call>: JSON (Hermes), a list of it, <function=…> (Qwen3-Coder), or a name and its arguments (GLM)."""
        reader.mark(len(QWEN_BEGIN))
        yield from reader.blank()
        if not (yield from reader.match(("{",))):
            is_call = False
            if not self.constrained and (is_call := (yield from bare_calls(reader, sink, self.schemas))):
                yield from tool_markup.closing(reader, QWEN_END)
            elif not self.constrained:
                is_call = yield from tool_markup.tagged(reader, sink, self.schemas)
            raw = reader.marked()
            if not is_call:
                sink.text(raw)  # text about calls
            return
        named, argued, is_whole = yield from read_members(reader, sink, (QWEN_END,))
        junk = yield from (reader.blank(_CLOSERS) if is_whole else reader.before((QWEN_END,)))
        end = yield from reader.match((QWEN_END,))
        raw = reader.marked()
        if not named:
            sink.text(raw)
            return
        if is_whole and not argued:
            sink.arguments(_NOTHING)
        if is_whole:
            junk = "" if end else junk.replace("}", "").replace("]", "")  # an extra brace is a common mistake
        sink.text(junk)


def bare_calls(reader: IncrementalReader, sink: DeltaCollector, schemas: Mapping[str, Any]) -> Wait[bool]:
    """Reads Llama 3.1's objects, {"name": …, "parameters": …}. Returns whether there was one.

    They are separated by ";" or newlines, or are in a JSON list. Anything else is left unread: such an object must name a
    known function. The reader has a mark.
    """
    if not schemas:
        return False
    before = reader.position
    yield from reader.blank()
    is_list, found = bool((yield from reader.match(("[",)))), False
    while (yield from _follows(reader, is_list, found)) and (call := (yield from _bare_call(reader, schemas))):
        sink.call(call[0])
        sink.arguments(call[1])
        sink.end_call()
        before, found = reader.position, True
    reader.rewind(before)
    if found and is_list:
        yield from reader.blank(BETWEEN)
        if not (yield from reader.match(("]",))):
            reader.rewind(before)
    return found


def _follows(reader: IncrementalReader, is_list: bool, found: bool) -> Wait[bool]:
    """Whether another object may start here; reads the separator after a previous one."""
    gap = yield from reader.blank()
    joined = bool(found and (yield from reader.match((",",) if is_list else (";",))))
    yield from reader.blank()
    return not found or joined or (not is_list and "\n" in gap)


def _bare_call(reader: IncrementalReader, schemas: Mapping[str, Any]) -> Wait[tuple[str, str] | None]:
    """The name and the arguments of one object, read to its end; None as soon as it cannot be a call."""
    name, arguments, mark = "", _NOTHING, "{"
    argued = False
    while True:
        if not (yield from reader.match((mark,))):
            break
        yield from reader.blank()
        key: list[str] = []
        value: list[str] = []
        if (yield from reader.peek()) != '"' or not (yield from read_value(reader, key.append, ())):
            return None
        yield from reader.blank()
        member = string_of(key)
        if member not in ("name", "type", "id", *ARGUMENTS) or not (yield from reader.match((":",))):
            return None
        yield from reader.blank()
        if not (yield from read_value(reader, value.append, ())):
            return None
        if member == "name":
            name = string_of(value)
            if name not in schemas:
                return None
        elif member in ARGUMENTS:
            arguments, argued = "".join(value), True
        yield from reader.blank()
        mark = ","
    if not name or not argued or not (yield from reader.match(("}",))):
        return None
    return name, arguments
