"""Reads messages and tools in OpenAI's and DeepSeek's format; UserError gives the location of invalid ones."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from finback.config import UserError, did_you_mean
from finback.data.tools import Tool, ToolCall
from finback.data.turn import Message

ROLES = ("system", "developer", "user", "assistant", "tool")


def read_messages(messages: Sequence[Mapping[str, Any]], developer: bool = False) -> list[Message]:
    """Reads messages; UserError gives the location, as in `messages[2].content`.

    Tool results are sorted into the order of the turn's calls, since most models see no ids. A developer's messages count as the
    system's, as OpenAI intends, except in models that know a `developer`, who may also ask.
    """
    if not messages:
        raise UserError("messages", [], "no messages", "Send at least one.")
    found = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    followers = [*(m.role for m in found[1:]), "assistant"]
    found = [
        replace(m, role="system") if m.role == "developer" and not (developer and after in ("assistant", "tool")) else m
        for m, after in zip(found, followers, strict=True)
    ]
    for i, message in enumerate(found):
        if message.prefix and (message.role != "assistant" or i < len(found) - 1):
            problem = "only the last message can be continued, and only the assistant's"
            raise UserError(f"messages[{i}].prefix", True, problem, "Leave it out here.")
    return _ordered(found)


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Tool]:
    """Reads tools in OpenAI's format, {"type": "function", "function": {…}}."""
    found = []
    for i, given in enumerate(tools or ()):
        where = f"tools[{i}]"
        tool = _mapping(given, where, "Send OpenAI's form of a tool.")
        kind = tool.get("type", "function")
        _demand(kind == "function", f"{where}.type", kind, "no such kind of tool", 'Use "function".')
        where = f"{where}.function"
        function = _mapping(tool.get("function"), where, "Describe the function in it.")
        at, parameters = f"{where}.parameters", function.get("parameters")
        is_schema = isinstance(parameters, Mapping | None)
        _demand(is_schema, at, parameters, "not a JSON schema", "Send an object, or leave it out.")
        name = _text(function.get("name"), f"{where}.name")
        _demand(bool(name), f"{where}.name", name, "empty", "Name the function.")
        description = _text(function.get("description") or "", f"{where}.description")
        found.append(Tool(name, description, _json({} if parameters is None else parameters, at), tool))
    return found


def _message(given: Any, where: str) -> Message:
    message = _mapping(given, where, "Send a role and a content.")
    role = message.get("role")
    _demand(role in ROLES, f"{where}.role", role, "no such role", did_you_mean(str(role), ROLES))
    assert isinstance(role, str)
    calls: tuple[ToolCall, ...] = ()
    reasoning = ""
    if role == "assistant":
        calls = _calls(message.get("tool_calls"), f"{where}.tool_calls")
        for name in ("thinking", "reasoning", "reasoning_content"):
            reasoning = _text(message.get(name) or "", f"{where}.{name}") or reasoning
    prefix = message.get("prefix") or False
    _demand(isinstance(prefix, bool), f"{where}.prefix", prefix, "neither true nor false", "Use true.")
    content = message.get("content")
    if content is None and (calls or reasoning or prefix):
        content = ""
    names = {n: message.get(n) for n in ("tool_call_id", "name")}
    for name, value in names.items():
        _demand(isinstance(value, str | None), f"{where}.{name}", value, "not a text", "Send a text.")
    weight = message.get("weight")
    _demand(weight in (None, 0, 1), f"{where}.weight", weight, "neither 0 nor 1", "Leave it out, or use 0 or 1.")
    answer, thought = _content(content, f"{where}.content", role == "assistant")
    return Message(role, answer, reasoning or thought, calls, names["tool_call_id"], names["name"], prefix, weight != 0)


def _content(content: Any, where: str, thinks: bool) -> tuple[str, str]:
    """The text of a string or of text parts, and the text of parts that are an assistant's chain of thought."""
    if not isinstance(content, list | tuple):
        return _text(content, where), ""
    texts, thoughts = [], []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if thinks and kind in ("thinking", "reasoning"):
            value = part.get(kind, part.get("text"))
            thoughts.append(_content(value, f"{where}[{i}].{kind}", thinks=False)[0])
            continue
        is_text = kind in ("text", "input_text", "output_text")
        _demand(is_text, f"{where}[{i}].type", kind, "the model reads text only", 'Send parts of type "text".')
        texts.append(_text(part.get("text"), f"{where}[{i}].text"))
    return "".join(texts), "".join(thoughts)


def _calls(given: Any, where: str) -> tuple[ToolCall, ...]:
    _demand(isinstance(given, list | tuple | None), where, given, "not a list", "Send a list of calls.")
    found = []
    for i, call in enumerate(given or ()):
        at, function = f"{where}[{i}].function", call.get("function") if isinstance(call, Mapping) else None
        function = _mapping(function, at, "Send the call unchanged, as in the model's answer.")
        arguments = function.get("arguments") or "{}"
        if not isinstance(arguments, str):
            arguments = _json(arguments, f"{at}.arguments")
        name, call_id = _text(function.get("name"), f"{at}.name"), call.get("id")
        _demand(bool(name), f"{at}.name", name, "empty", "Name the function that was called.")
        _demand(isinstance(call_id, str | None), f"{where}[{i}].id", call_id, "not a text", "Send the id unchanged.")
        found.append(ToolCall(name, _text(arguments, f"{at}.arguments"), call_id))
    return tuple(found)


def _ordered(found: list[Message]) -> list[Message]:
    """Sorts the tool results after each message into the order of its calls; UserError for results without a call."""
    ordered: list[Message] = []
    ids: list[str | None] = []  # ids of calls that may be answered now
    start = 0  # position of the first answer to them
    for i, message in enumerate(found):
        if message.role != "tool":
            ids, start = [call.id for call in message.tool_calls], len(ordered) + 1
        elif not ids:
            remedy = "Put it directly after the assistant's message with the tool_calls."
            raise UserError(f"messages[{i}].role", "tool", "no tool was called before it", remedy)
        elif message.tool_call_id is not None and None not in ids and message.tool_call_id not in ids:
            problem = "no such call in the assistant's message"
            remedy = f"Use one of {', '.join(map(str, ids))}."
            raise UserError(f"messages[{i}].tool_call_id", message.tool_call_id, problem, remedy)
        ordered.append(message)
        if message.role == "tool" and all(m.tool_call_id in ids for m in ordered[start:]):
            ordered[start:] = sorted(ordered[start:], key=lambda m: ids.index(m.tool_call_id))
    return ordered


def _text(value: Any, where: str) -> str:
    _demand(isinstance(value, str), where, value, "expected a text", "Send a text.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half, problem = value[error.start : error.end], "half a character (a lone surrogate)"
        raise UserError(where, half, problem, "Send whole characters.") from None
    return value


def _json(value: Any, where: str) -> str:
    try:
        return _text(json.dumps(value, ensure_ascii=False), where)
    except UserError:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(where, type(value).__name__, f"not JSON ({error})", "Send plain JSON.") from None


def _mapping(value: Any, where: str, remedy: str) -> Mapping[str, Any]:
    _demand(isinstance(value, Mapping), where, value, "not an object", remedy)
    return value


def _demand(holds: bool, where: str, value: Any, problem: str, remedy: str) -> None:
    if not holds:
        raise UserError(where, value, problem, remedy)
