"""Converts records in common formats to dialogues for training; UserError names the faulty field of an unusable one.

A record has one of these; the first that exists counts:

- `messages`, `conversations` or `conversation`: OpenAI's messages (role, content), or ShareGPT's (from, value)
- `question`, `prompt`, `instruction`, `query`, `problem` or `input` with its answer (see `PAIRS`), as text or numbers; an
  instruction may be followed by its `input` or `context`; prompt and completion may be lists of messages

In addition: `tools` (OpenAI's format), `system`, `history` (pairs of texts), and the answer's `reasoning_content`, `reasoning` or
`thinking`. An answer that is empty, or whose `weight` is 0, is part of the context but not trained on.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from finback.config import UserError
from finback.data.openai_messages import read_messages, read_tools
from finback.data.tokenizer import END_THINK, THINK
from finback.data.tools import Tool
from finback.data.turn import Message

LISTS = ("messages", "conversations", "conversation")
PAIRS = {
    "question": ("answer", "response", "output", "completion", "solution"),
    "prompt": ("completion", "response", "output", "answer"),
    "instruction": ("output", "response", "completion", "answer"),
    "query": ("response", "answer", "output", "completion"),
    "problem": ("solution", "answer", "response", "output"),
    "input": ("output", "response", "answer", "completion"),
}
SECOND = ("input", "context")  # input of an instruction
SYSTEM = ("system", "system_prompt")
REASONING = ("reasoning_content", "reasoning", "thinking")
CHOICES = ("choices", "options")
BESIDE = (*SYSTEM, *REASONING, *CHOICES, *SECOND, "tools", "functions", "history", "weight", "label")
# all fields that are read
FIELDS = frozenset(("text", *LISTS, *PAIRS, *(name for names in PAIRS.values() for name in names), *BESIDE))
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
_CALL = "function_call"
_EXPONENT = re.compile(r"e\+?(-?)0*(\d+)")  # write 1e-07 as 1e-7
# other markers of a chain of thought at the start of an answer
_OTHERS = re.compile(
    r"\s*(?:<\s*(think|thinking|thought|thoughts|reasoning)\s*>(.*?)<\s*/\s*\1\s*>|"
    r"<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>|\[THINK\](.*?)\[/THINK\])",
    re.DOTALL | re.IGNORECASE,
)
_SOLUTION = re.compile(r"\s*<\|begin_of_solution\|>(.*?)(?:<\|end_of_solution\|>\s*)?", re.DOTALL)
# markers of a chain of thought, except quoted ones
_MARK = re.compile(r"(?<![`'\"])</?think>")
_REMEDY = "Correct the record, or leave it out."


@dataclass(frozen=True)
class Dialogue:
    """Turns to train on, and the assistant's tools."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()
    # number of empty answers, which are not trained on
    empty: int = 0


def read_dialogue(record: Any) -> Dialogue:
    """The dialogue of a record; UserError names the field and why it cannot be used."""
    if not isinstance(record, Mapping):
        raise UserError("record", record, "not an object", _REMEDY)
    given = _said(record)
    system = next((_text(record[name], name) for name in SYSTEM if _there(record, name)), "")
    if system.strip() and not any(message.get("role") == "system" for message in given):
        given = [{"role": "system", "content": system}, *given]
    tools = read_tools([_tool(tool) for tool in _list(record, "tools") or _list(record, "functions")])
    return _checked([_split(message, f"messages[{i}]") for i, message in enumerate(read_messages(given))], tools)


def _checked(messages: list[Message], tools: Sequence[Tool]) -> Dialogue:
    """The dialogue to train on, after validation."""
    for i, message in enumerate(messages):
        if message.role == "user" and not message.content.strip():
            raise UserError(f"messages[{i}].content", message.content, "empty", _REMEDY)
        bad = [call.arguments for call in message.tool_calls if not isinstance(_parsed(call.arguments), Mapping)]
        if bad and message.learnt:
            raise UserError(f"messages[{i}].tool_calls", bad[0][:60], "the arguments are not a JSON object", _REMEDY)
    is_empty = [m.role == "assistant" and not m.content.strip() and not m.tool_calls for m in messages]
    learnt = tuple(replace(m, learnt=m.learnt and not none) for m, none in zip(messages, is_empty, strict=True))
    if not any(m.role == "assistant" and m.learnt for m in learnt):
        answers = [i for i, m in enumerate(messages) if m.role == "assistant"]
        wrong = "the answer is empty" if any(is_empty) else "every answer has weight 0"
        raise UserError("messages", len(messages), wrong if answers else "there is no assistant turn", _REMEDY)
    return Dialogue(learnt, tuple(tools), sum(is_empty))


# ---- formats -----------------------------------------------------------------------------------------------------------


def _said(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The turns of a record as OpenAI's messages."""
    for name in LISTS:
        if messages := _list(record, name):
            return [_turn(message, f"{name}[{i}]") for i, message in enumerate(messages)]
    asked = _first(record, PAIRS)
    answered = _first(record, PAIRS[asked]) if asked else None
    if asked is None or answered is None:
        known, remedy = ", ".join(map(str, record))[:200], "Give messages, or a question and its answer."
        raise UserError("record", known, "no usable field", remedy)
    if record.get("label") is False:
        raise UserError("label", False, "a completion marked as a negative example", _REMEDY)
    if choices := next((name for name in CHOICES if _there(record, name)), None):
        remedy = "Write the choices into the question."
        raise UserError(choices, record[choices], "choices that the question does not show", remedy)
    question, history = _asked(record, asked), [turn for pair in _list(record, "history") for turn in _pair(pair)]
    return [*history, *question, *_answered(record, answered)]


def _asked(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """A question's turns; assistant turns in it are not trained on, as in TRL."""
    if isinstance(value := _messages(record[name]), list):
        turns = [_turn(message, f"{name}[{i}]") for i, message in enumerate(value)]
        return [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in turns]
    second = next((n for n in SECOND if name == "instruction" and _there(record, n)), None)
    parts = [_text(record[name], name), _text(record[second], second) if second else ""]
    text = "\n\n".join(part for part in parts if part.strip())
    if not text:
        raise UserError(name, record[name], "empty", _REMEDY)
    return [{"role": "user", "content": text}]


def _answered(record: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    value = _messages(record[name])
    if isinstance(value, list):
        return [_turn(message, f"{name}[{i}]") for i, message in enumerate(value)]
    beside = {n: record[n] for n in (*REASONING, "weight") if _there(record, n)}
    text = "" if value is None else _text(value, name)
    return [_turn({"role": "assistant", "content": text, **beside}, name)]


def _pair(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise UserError("history", given, "not pairs of a question and an answer", _REMEDY)
    return [{"role": r, "content": _text(v, "history")} for r, v in zip(("user", "assistant"), given, strict=True)]


def _turn(given: Any, where: str) -> dict[str, Any]:
    """A turn in OpenAI's or ShareGPT's format, converted to OpenAI's."""
    if not isinstance(given, Mapping):
        raise UserError(where, given, "not an object", _REMEDY)
    key = "role" if "role" in given else "from"
    named = str(given.get(key)).strip().lower()
    role = _ROLES.get(named, named)
    content = given.get("content", given.get("value"))
    turn = {
        **{k: v for k, v in given.items() if k not in ("from", "value")},
        "role": role,
        "content": _content(content),
    }
    chains = {name: str(given[name]).strip() for name in REASONING if _there(given, name)}
    if len({*chains.values()}) > 1:
        raise UserError(f"{where}.{next(iter(chains))}", list(chains), "two chains of thought", _REMEDY)
    if given.get("train") is False:  # axolotl's flag
        turn["weight"] = 0
    if role == _CALL:
        turn |= {"role": "assistant", "content": "", "tool_calls": _calls(content, where)}
    elif role == "assistant":
        calls = _parsed(turn.get("tool_calls")) or (_calls(turn[_CALL], where) if _there(turn, _CALL) else None)
        turn |= {"content": "" if content is None else turn["content"], "tool_calls": calls}
    return turn


def _calls(given: Any, where: str) -> list[dict[str, Any]]:
    """Calls in ShareGPT's format, or the single call of OpenAI's older format."""
    value = _parsed(given)
    if isinstance(value, str):
        raise UserError(f"{where}.{_CALL}", value[:60], "not a call in JSON", _REMEDY)
    return [{"function": call} for call in (value if isinstance(value, list) else [value])]


def _tool(given: Any) -> Any:
    bare = isinstance(given, Mapping) and "function" not in given and "name" in given
    return {"type": "function", "function": given} if bare else given


# ---- values -------------------------------------------------------------------------------------------------------------


def _there(record: Mapping[str, Any], name: str) -> bool:
    value = record.get(name)
    return value is not None and value != "" and value != [] and value != {}


def _first(record: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """The first of these fields that is not empty, else the first that exists."""
    return next((n for n in names if _there(record, n)), next((n for n in names if n in record), None))


def _messages(value: Any) -> Any:
    """Converts a single message, or JSON of messages, to a list; other text stays text."""
    found = _parsed(value)
    found = [found] if isinstance(found, Mapping) else found
    are_turns = isinstance(found, list) and all(isinstance(m, Mapping) and ("role" in m or "from" in m) for m in found)
    return found if found and (are_turns or not isinstance(value, str)) else value


def _list(record: Mapping[str, Any], name: str) -> list[Any]:
    """A list, possibly written as JSON; [] if absent."""
    if not _there(record, name):
        return []
    value = _parsed(record[name])
    if not isinstance(value, list | tuple):
        raise UserError(name, record[name], "not a list", _REMEDY)
    return list(value)


def _parsed(value: Any) -> Any:
    """The list or object that a JSON text encodes, as tables store them; otherwise the value itself."""
    if not isinstance(value, str) or not value.strip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _content(value: Any) -> Any:
    return _text(value, "content") if isinstance(value, int | float | Decimal) else value


def _text(value: Any, where: str) -> str:
    """A text, or a number as text."""
    is_number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if isinstance(value, str) or (is_number and math.isfinite(value)):
        return _EXPONENT.sub(r"e\1\2", str(value)) if isinstance(value, float) else str(value)
    raise UserError(where, value, "expected a text", _REMEDY)


# ---- chains of thought --------------------------------------------------------------------------------------------------


def _split(message: Message, where: str) -> Message:
    """Moves a chain of thought from the answer to `reasoning`, and removes its markers."""
    if message.role != "assistant":
        return message
    reasoning, behind = _reasoning(message.reasoning, where)
    if behind and message.content.strip() not in ("", behind):
        raise UserError(f"{where}.content", behind[:60], "differs from the answer after the chain of thought", _REMEDY)
    chain, answer = _answer(message.content, where)
    if reasoning and chain and reasoning.strip() != chain:
        raise UserError(f"{where}.reasoning", chain[:60], "differs from the chain of thought in the answer", _REMEDY)
    return replace(message, content=answer or behind, reasoning=reasoning or chain)


def _reasoning(text: str, where: str) -> tuple[str, str]:
    """A chain without its markers, and the text after it."""
    text = _OTHERS.sub(_usual, text, count=1) if _OTHERS.match(text) else text
    if not _MARK.search(text):
        return (text if text.strip() else ""), ""
    return _apart(text.strip().removeprefix(THINK), f"{where}.reasoning")


def _answer(text: str, where: str) -> tuple[str, str]:
    """The chain at the start of an answer ("" if none), and the rest; templates may open the chain before the answer."""
    if others := _OTHERS.match(text):
        solution = _SOLUTION.fullmatch(text, others.end())
        text = _usual(others) + (solution[1] if solution else text[others.end() :])
    if not _MARK.search(text):
        return "", text
    begun = text.strip()
    if not begun.startswith(THINK) and THINK in begun:
        raise UserError(f"{where}.content", text[:60], "a chain of thought within the answer", _REMEDY)
    if END_THINK not in begun:
        raise UserError(f"{where}.content", text[:60], "its chain of thought never ends", _REMEDY)
    return _apart(begun.removeprefix(THINK), f"{where}.content")


def _usual(match: re.Match[str]) -> str:
    return f"{THINK}{next(each for each in match.groups()[1:] if each is not None)}{END_THINK}"


def _apart(text: str, where: str) -> tuple[str, str]:
    chain, _, behind = (part.strip() for part in text.partition(END_THINK))
    if _MARK.search(chain) or _MARK.search(behind):
        raise UserError(where, text[:60], "more than one chain of thought", _REMEDY)
    return chain, behind
