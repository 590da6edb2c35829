"""The calls that `tool_choice` demands, as a grammar that allows nothing else once the chain of thought is closed.

Marks are tokens where the vocabulary has them. The arguments follow the functions' schemas; white space between their
parts is limited, since a model that does not want to call may go on with it for ever.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from finback.config import did_you_mean
from finback.data.tokenizer import Tokenizer
from finback.data.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR, call_example
from finback.serve.errors import bad
from finback.serve.protocol import ChatRequest, FunctionParam, NamedToolParam, small
from finback.serve.tool_calls import QWEN_BEGIN, QWEN_END, ToolForm

# what stands before all calls, between two, and behind all; and how one is written
AROUND = {
    ToolForm.V3: (CALLS_BEGIN, "\n", CALLS_END),
    ToolForm.V31: (CALLS_BEGIN, "", CALLS_END),
    ToolForm.QWEN: ("", "\n", ""),
}
CALL = {
    ToolForm.V3: f"{CALL_BEGIN}function{SEPARATOR}NAME\n```json\nARGUMENTS\n```{CALL_END}",
    ToolForm.V31: f"{CALL_BEGIN}NAME{SEPARATOR}ARGUMENTS{CALL_END}",
    ToolForm.QWEN: f'{QWEN_BEGIN}\n{{"name": "NAME", "arguments": ARGUMENTS}}\n{QWEN_END}',
}
BLANK = {"whitespace_pattern": "[ \\t\\n]{0,20}"}

_MARK = re.compile(f"({'|'.join((CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR, QWEN_BEGIN, QWEN_END))})")


@dataclass(frozen=True)
class ToolChoiceGrammar:
    """The calls that an answer has to be: their form, the grammar (Lark), and the schemas by the fields they came in."""

    form: ToolForm
    grammar: str
    schemas: dict[str, str]


def tool_choice_grammar(request: ChatRequest, tokenizer: Tokenizer) -> ToolChoiceGrammar:
    """The grammar of the calls that a request demands."""
    demanded = _demanded(request)
    params = {f"tools[{i}].function.parameters": function for i, function in demanded.items()}
    schemas = {param: _schema(function, param) for param, function in params.items()}
    functions = [(function.name, schemas[param]) for param, function in params.items()]
    several = request.tool_choice == "required" and request.parallel_tool_calls is not False
    form = form_of(tokenizer)
    return ToolChoiceGrammar(form, _grammar(form, functions, several, tokenizer), schemas)


def form_of(tokenizer: Tokenizer) -> ToolForm:
    """The form of the model's calls, by its template; where that shows none that we read, by its vocabulary."""
    shown = call_example(tokenizer)
    if SEPARATOR in shown:
        return ToolForm.V3 if f"function{SEPARATOR}" in shown else ToolForm.V31
    return ToolForm.V31 if QWEN_BEGIN not in shown and _token(SEPARATOR, tokenizer) else ToolForm.QWEN


def _demanded(request: ChatRequest) -> dict[int, FunctionParam]:
    """The functions of which one must be called, by their places among the tools."""
    choice = request.tool_choice
    functions = {i: tool.function for i, tool in enumerate(request.tools or ())}
    if not functions:
        raise bad("a call is demanded, and there are no tools", "tool_choice")
    if not isinstance(choice, NamedToolParam):
        return functions
    name = choice.function.name
    if found := {i: function for i, function in functions.items() if function.name == name}:
        return found
    known = [function.name for function in functions.values()]
    raise bad(f"no function {name!r} among the tools. {did_you_mean(name, known)}", "tool_choice.function.name")


def _schema(function: FunctionParam, param: str) -> str:
    """The schema of the arguments, always an object; a function without a schema takes none."""
    given: dict[str, Any] = function.parameters or {}
    kinds = given.get("type", "object")
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise bad(f'arguments are an object; {param}.type must be "object"', param)
    try:
        small(given)
    except ValueError as error:
        raise bad(f"{param}: {error}", param) from None
    closed = {"additionalProperties": False} if function.parameters is None else {}
    return json.dumps(given | closed | {"type": "object", "x-guidance": BLANK}, ensure_ascii=False)


def _grammar(form: ToolForm, functions: list[tuple[str, str]], several: bool, tokenizer: Tokenizer) -> str:
    """Lark: the newlines that may follow a chain, then one call or more of functions with their schemas."""
    before, between, after = (_terms(text, tokenizer) for text in AROUND[form])
    calls = f"call ({between} call)*" if several else "call"
    head, tail = CALL[form].split("ARGUMENTS")
    rules = [
        f"f{i}: {_terms(head.replace('NAME', name), tokenizer)} %json {schema} {_terms(tail, tokenizer)}"
        for i, (name, schema) in enumerate(functions)
    ]
    choice = " | ".join(f"f{i}" for i in range(len(functions)))
    return "\n".join([f'start: "\\n"? "\\n"? {before} {calls} {after}', f"call: {choice}", *rules])


def _terms(text: str, tokenizer: Tokenizer) -> str:
    """A text in Lark."""
    pieces = ((piece, _token(piece, tokenizer)) for piece in _MARK.split(text) if piece)
    return " ".join(f"<[{token}]>" if token else json.dumps(piece, ensure_ascii=False) for piece, token in pieces)


def _token(mark: str, tokenizer: Tokenizer) -> int | None:
    """The token of a mark; None for other texts, and where the vocabulary has none that can be read again."""
    ids = tokenizer.encode_marked(mark) if _MARK.fullmatch(mark) else []
    return ids[0] if len(ids) == 1 and tokenizer.decode(ids) == mark else None
