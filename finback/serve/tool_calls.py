"""Tool calls as models write them: DeepSeek V3 and R1, DeepSeek V3.1, Qwen (Hermes).

The arguments of a call come out as they arrive. Markup that turns out to hold no call is given back as text, to the
character; a call that breaks off keeps what it had. A stretch of text is never both.
"""

import json
from collections.abc import Callable, Sequence
from enum import StrEnum

from finback.data.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR
from finback.serve.incremental import DeltaCollector, IncrementalReader, Wait

QWEN_BEGIN, QWEN_END = "<tool_call>", "</tool_call>"
OPENERS = (CALLS_BEGIN, QWEN_BEGIN)
_ENDS = (CALL_END, CALL_BEGIN, CALLS_END)  # of which each ends a call in DeepSeek's forms
_BETWEEN, _CLOSERS = ", \t\r\n", "}] \t\r\n"
_NOTHING = "{}"  # the arguments of a whole call that names none: clients read them as JSON


class ToolForm(StrEnum):
    """How calls are written; V3 and V3.1 begin alike and are distinguished by each call's head."""

    V3 = "v3"
    V31 = "v3.1"
    QWEN = "qwen"

    @property
    def opener(self) -> str:
        """What the first call begins with."""
        return QWEN_BEGIN if self is ToolForm.QWEN else CALLS_BEGIN


def read(
    reader: IncrementalReader, opener: str, form: ToolForm | None, sink: DeltaCollector, constrained: bool = False
) -> Wait[None]:
    """Read the calls that begin with `opener`, which has just been read; in Qwen's form one, else all of them.

    `constrained`: a grammar makes JSON of all arguments, so that marks in their strings are text.
    """
    if opener == QWEN_BEGIN:
        yield from _qwen(reader, sink)
    else:
        yield from _deepseek(reader, form, sink, constrained)


def is_whole(arguments: str) -> bool:
    """Whether the JSON of a call that follows a grammar is complete."""
    json_text = _Json()
    json_text.push(arguments)
    return json_text.is_whole


def _deepseek(reader: IncrementalReader, form: ToolForm | None, sink: DeltaCollector, constrained: bool) -> Wait[None]:
    """<calls begin> calls <calls end>; where the last mark is missing, what follows is text."""
    undecided: str = CALLS_BEGIN  # given back with what follows unless that is a call
    called = False
    while True:
        blank = yield from reader.blank()
        tag = yield from reader.match((CALL_BEGIN, CALLS_END))
        if tag != CALL_BEGIN:
            break
        reader.mark(len(tag))
        is_call = yield from _deepseek_call(reader, form, sink, constrained)
        raw = reader.marked()
        if not is_call:
            sink.text(undecided + blank + raw)
        undecided, called = "", called or is_call
    if not (called and tag):
        sink.text(undecided + blank + tag)


def _deepseek_call(
    reader: IncrementalReader, form: ToolForm | None, sink: DeltaCollector, constrained: bool
) -> Wait[bool]:
    """What follows <call begin>, its end included; False if it is no call."""
    name = yield from _deepseek_name(reader, form)
    if name:
        sink.call(name)
        yield from _deepseek_arguments(reader, sink, constrained)
    else:
        yield from reader.before(_ENDS)
    yield from reader.match((CALL_END,))
    return bool(name)


def _deepseek_name(reader: IncrementalReader, form: ToolForm | None) -> Wait[str]:
    """The name, up to where the arguments begin; "" if it is missing or broken off."""
    name = yield from reader.before((SEPARATOR, *_ENDS))
    if not (yield from reader.match((SEPARATOR,))):
        return ""
    is_v3 = form is ToolForm.V3
    if form is None and name.strip() == "function":
        yield from reader.blank()
        is_v3 = (yield from reader.peek()) != "{"  # a V3.1 tool may be called "function"
    if is_v3:
        name = yield from reader.before(("\n", "`", "{", SEPARATOR, *_ENDS))
        if not (yield from reader.peek()):
            return ""
    return name.strip()


def _deepseek_arguments(reader: IncrementalReader, sink: DeltaCollector, constrained: bool) -> Wait[None]:
    """JSON up to the call's end, without the code fence and the blanks around it."""
    yield from reader.blank()
    if (yield from reader.match(("```",))):
        yield from reader.before(("\n", "{", "[", *_ENDS))  # the fence's language
        yield from reader.blank()
    if constrained:
        if (yield from reader.peek()) == "{":  # else the fence has broken off
            yield from _value(reader, sink.arguments, _ENDS)
        yield from reader.before(_ENDS)
        return
    undecided, has_arguments = "", False
    while True:
        text, tag = yield from reader.until(_ENDS, torn=False)
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


def _qwen(reader: IncrementalReader, sink: DeltaCollector) -> Wait[None]:
    """One call, <tool_call> read already: a JSON object with "name" and "arguments" in any order."""
    reader.mark(len(QWEN_BEGIN))
    yield from reader.blank()
    if not (yield from reader.match(("{",))):
        sink.text(reader.marked())  # text about calls
        return
    named, argued, is_whole = yield from _qwen_members(reader, sink)
    junk = yield from (reader.blank(_CLOSERS) if is_whole else reader.before((QWEN_END,)))
    end = yield from reader.match((QWEN_END,))
    raw = reader.marked()
    if not named:
        sink.text(raw)
        return
    if is_whole and not argued:
        sink.arguments(_NOTHING)
    if is_whole:
        junk = "" if end else junk.replace("}", "").replace("]", "")  # a brace too many is a common slip
    sink.text(junk)


def _qwen_members(reader: IncrementalReader, sink: DeltaCollector) -> Wait[tuple[bool, bool, bool]]:
    """The members of the object: whether they hold a name, hold arguments, and end with the object's brace."""
    early: list[str] = []  # arguments before the name
    named = argued = False
    while True:
        yield from reader.blank(_BETWEEN)
        if (yield from reader.match(("}",))):
            return named, argued, True
        if (yield from reader.peek()) != '"':
            return named, argued, False
        key: list[str] = []
        is_whole = yield from _value(reader, key.append)
        yield from reader.blank()
        if not is_whole or not (yield from reader.match((":",))):
            return named, argued, False
        yield from reader.blank()
        value: list[str] = []
        member, takes = _string(key), value.append
        if member == "arguments" and not argued:
            takes, argued = (sink.arguments if named else early.append), True
        is_whole = yield from _value(reader, takes)
        if is_whole and member == "name" and not named and (name := _string(value)):
            named = True
            sink.call(name)
            for piece in early:
                sink.arguments(piece)
        if not is_whole:
            return named, argued, False


def _value(reader: IncrementalReader, take: Callable[[str], None], ends: Sequence[str] = (QWEN_END,)) -> Wait[bool]:
    """Hand on one JSON value, character by character as it stands; False if it breaks off.

    One of `ends` ends a value except within a string, where it is text as long as the string is sound.
    """
    json_text = _Json()
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


class _Json:
    """Where a JSON value ends, from its brackets and quotation marks."""

    def __init__(self) -> None:
        self.is_whole = False
        self.is_quoting = False  # within a string without a raw newline, which JSON does not allow
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
                self.is_whole = True  # a number or a word, which only what follows can end
                return place
            elif character in "}]":
                self._depth -= 1
            else:
                continue
            if self._depth == 0 and not self._in_string:
                self.is_whole = True
                return place + 1
        return len(text)


def _string(pieces: list[str]) -> str:
    """The text that a JSON string stands for; "" if it is none."""
    raw = "".join(pieces)
    try:
        found = json.loads(raw, strict=False) if raw.startswith('"') else ""
    except ValueError:
        return ""
    return str(found).encode("utf-8", "replace").decode()  # half a surrogate pair could not be sent on
