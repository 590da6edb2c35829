"""Grammars for tool calls: those that `tool_choice` demands, allowing nothing else after the chain of thought; or those that
tools allow if the answer must follow a schema.

Marks are tokens if the vocabulary has them. Arguments follow the functions' schemas; whitespace between their parts is
limited, since a model that does not want to call might write it forever.
"""

import itertools
import json
import re
from typing import Any

from finback.config import did_you_mean
from finback.data.prompt_forms import call_example
from finback.data.tokenizer import Tokenizer
from finback.data.tools import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEPARATOR
from finback.serve import dsml_choice
from finback.serve.answer_grammar import AnswerGrammar, readable
from finback.serve.errors import bad
from finback.serve.protocol import ChatRequest, FunctionParam, NamedToolParam, small
from finback.serve.tool_calls import ToolForm
from finback.serve.tool_markup import DSML_FORMS, QWEN_BEGIN, QWEN_END

# text before all calls, between two, and after all; and the form of one
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


def tool_grammar(
    request: ChatRequest, tokenizer: Tokenizer, is_demanded: bool, answer: AnswerGrammar | None
) -> AnswerGrammar:
    """The calls that a request demands; if it demands none, those that it allows instead of the `answer`."""
    functions_at = _demanded(request) if is_demanded else _offered(request)
    params = {f"tools[{i}].function.parameters": function for i, function in functions_at.items()}
    schemas = {param: _schema(function, param) for param, function in params.items()}
    functions = [(function.name, schemas[param]) for param, function in params.items()]
    several = request.tool_choice in ("required", "auto", None) and request.parallel_tool_calls is not False
    form = form_of(tokenizer)
    if form in DSML_FORMS and not all(dsml_choice.is_plain(json.loads(schema)) for _, schema in functions):
        form = ToolForm.V31  # the form with arguments as one JSON object
    grammar = _grammar(form, functions, several, tokenizer, None if is_demanded else answer)
    if answer is None or is_demanded:
        return AnswerGrammar("tools", grammar=grammar, schemas=schemas, form=form)
    text = {answer.param: answer.schema} if answer.schema is not None else {}
    return AnswerGrammar("tools", grammar=grammar, schemas=text | schemas, form=form, notes=answer.notes)


def form_of(tokenizer: Tokenizer) -> ToolForm:
    """The form of the model's calls, from its template; if that shows no known form, from its vocabulary."""
    shown = call_example(tokenizer)
    if written := next((opener for opener in DSML_FORMS if opener in shown), None):
        return ToolForm(written)
    if SEPARATOR in shown:
        return ToolForm.V3 if f"function{SEPARATOR}" in shown else ToolForm.V31
    return ToolForm.V31 if QWEN_BEGIN not in shown and _token(SEPARATOR, tokenizer) else ToolForm.QWEN


def _demanded(request: ChatRequest) -> dict[int, FunctionParam]:
    """The candidates for the required call, by index among the tools."""
    choice, functions = request.tool_choice, _offered(request)
    if not functions:
        raise bad("a call is demanded, but there are no tools", "tool_choice")
    if not isinstance(choice, NamedToolParam):
        return functions
    name = choice.function.name
    if found := {i: function for i, function in functions.items() if function.name == name}:
        return found
    known = [function.name for function in functions.values()]
    raise bad(f"no function {name!r} among the tools. {did_you_mean(name, known)}", "tool_choice.function.name")


def _offered(request: ChatRequest) -> dict[int, FunctionParam]:
    return {i: tool.function for i, tool in enumerate(request.tools or ())}


def _schema(function: FunctionParam, param: str) -> str:
    """The schema of the arguments, always an object; a function without a schema takes no arguments."""
    given: dict[str, Any] = function.parameters or {}
    kinds = given.get("type", "object")
    if "object" not in (kinds if isinstance(kinds, list) else [kinds]):
        raise bad(f'arguments must be an object; {param}.type must be "object"', param)
    try:
        small(given)
    except ValueError as error:
        raise bad(f"{param}: {error}", param) from None
    closed = {"additionalProperties": False} if function.parameters is None else {}
    given, _ = readable(given, bool(function.strict), param)
    return json.dumps(
        given | closed | {"type": "object", "x-guidance": BLANK | {"coerce_one_of": True}}, ensure_ascii=False
    )


def _grammar(
    form: ToolForm, functions: list[tuple[str, str]], several: bool, tokenizer: Tokenizer, answer: AnswerGrammar | None
) -> str:
    """Lark: optional newlines after a chain, then one or more calls of functions with their schemas, or the answer."""
    written = DSML_FORMS.get(form)
    around = AROUND[form] if written is None else (f"\n\n{written.opener}\n", "", written.closer)
    before, between, after = (_terms(text, tokenizer) for text in around)
    calls = f"{before} call ({between} call)* {after}" if several else f"{before} call {after}"
    if written is None:
        rules = [_call(form, i, name, schema, tokenizer) for i, (name, schema) in enumerate(functions)]
    else:
        each = (dsml_choice.rules(written, i, name, json.loads(s)) for i, (name, s) in enumerate(functions))
        rules = [*itertools.chain(*each), dsml_choice.text_rule(written)]
    if answer is not None:
        calls = f"({calls} | answer)"
        rules.append(f"answer: %json {answer.schema}")
    choice = " | ".join(f"f{i}" for i in range(len(functions)))
    blank = "" if written else '"\\n"? "\\n"? '
    return "\n".join([f"start: {blank}{calls}", f"call: {choice}", *rules])


def _call(form: ToolForm, number: int, name: str, schema: str, tokenizer: Tokenizer) -> str:
    """The rule for a function whose arguments are one JSON object."""
    head, tail = CALL[form].split("ARGUMENTS")
    return f"f{number}: {_terms(head.replace('NAME', name), tokenizer)} %json {schema} {_terms(tail, tokenizer)}"


def _terms(text: str, tokenizer: Tokenizer) -> str:
    """A text as Lark terminals."""
    pieces = ((piece, _token(piece, tokenizer)) for piece in _MARK.split(text) if piece)
    return " ".join(f"<[{token}]>" if token else json.dumps(piece, ensure_ascii=False) for piece, token in pieces)


def _token(mark: str, tokenizer: Tokenizer) -> int | None:
    """The token of a mark; None for other texts, and if no token of the vocabulary decodes to it."""
    ids = tokenizer.encode_marked(mark) if _MARK.fullmatch(mark) else []
    return ids[0] if len(ids) == 1 and tokenizer.decode(ids) == mark else None
