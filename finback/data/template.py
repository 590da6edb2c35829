"""Jinja chat templates of Hugging Face folders, rendered as transformers does.

Templates are untrusted: the sandbox lets them call only what is listed here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finback.config import UserError

# The template in finback's exports: the prompt of messages.py in DeepSeek's form. Chains of earlier turns are left out.
OWN = "".join(Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8").splitlines())
# shows how a template renders a call
CALL_PROBE: Sequence[Mapping[str, Any]] = (
    {"role": "user", "content": "?"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
    },
)

ANSWER_PROBE = "finback-probe"  # shows what a template writes after an answer


class _Generation(jinja2.ext.Extension):
    """{% generation %}…{% endgeneration %}: marks assistant text for training masks; ignored in rendering."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser: Parser) -> Node | list[Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Callable[[], str]) -> str:
        return caller()


class Template:
    """A chat template; `specials` are bos_token and the like, which templates insert.

    `with_tools` is a second template for dialogues with tools, as in folders with several named templates.
    """

    def __init__(self, source: str, specials: Mapping[str, str], with_tools: str | None = None) -> None:
        self.specials = dict(specials)
        self._template = _compiled(source)
        self._with_tools = _compiled(with_tools) if with_tools else self._template

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, **variables: Any) -> str:
        """The text of a dialogue; `variables` are whatever else a template uses (tools, …)."""
        try:
            template = self._with_tools if variables.get("tools") else self._template
            return template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **{"tools": None, "documents": None} | self.specials | variables,
            )
        except Exception as error:  # an untrusted template may fail in any way
            problem = f"the model's chat template rejects them ({error})"
            remedy = "Use what the template allows; most require alternating user and assistant turns."
            raise UserError("messages", f"{len(messages)} of them", problem, remedy) from None

    def render_prompt(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The text that prompts the next turn, with calls of past turns in the shape that this template expects.

        Some expect arguments as text, others as an object, and the latter may accept text but quote it again. For a turn with calls
        only, some print a content of None, others render calls only if it is None.
        """
        if not any("tool_calls" in message for message in messages):
            return self.render(messages, add_generation_prompt=True, **variables)
        refusals: list[UserError] = []
        quoted: list[str] = []
        for empty in ("", None) if self._writes_none() else (None, ""):
            for as_objects in (False, True):
                try:
                    text = self.render([_shaped(m, empty, as_objects) for m in messages], True, **variables)
                except UserError as error:
                    refusals.append(error)
                    continue
                if as_objects or not _is_quoted(text, messages):
                    return text
                quoted.append(text)
        if quoted:
            return quoted[0]
        raise refusals[0]

    def after_answer(self) -> str:
        """The text after an answer that ends a dialogue; "" if the template does not determine it."""
        dialogue = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER_PROBE}]
        try:
            _, probe, after = self.render(dialogue, add_generation_prompt=False).rpartition(ANSWER_PROBE)
        except UserError:
            return ""
        return after if probe else ""

    def _writes_none(self) -> bool:
        """Whether the template prints a content of None for a turn with calls only."""
        try:
            none, empty = (
                self.render([_shaped(m, content, True) for m in CALL_PROBE], True).count("None")
                for content in (None, "")
            )
        except UserError:
            return False
        return none > empty


def _compiled(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except Exception as error:
        where = f"line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else "as a whole"
        raise UserError("chat_template", where, str(error), "Correct the template in the model's folder.") from None


def _shaped(message: Mapping[str, Any], empty: str | None, as_objects: bool) -> Mapping[str, Any]:
    """A message whose calls have arguments as text or as objects; `empty` is its content if it has calls only."""
    if "tool_calls" not in message:
        return message
    calls = [
        call | {"function": {"name": f["name"], "arguments": _object(f["arguments"]) if as_objects else f["arguments"]}}
        for call in message["tool_calls"]
        for f in (call["function"],)
    ]
    return {**message, "content": message["content"] or empty, "tool_calls": calls}


def _is_quoted(text: str, messages: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the JSON text of a call's arguments appears in a prompt as a JSON string."""
    arguments = [call["function"]["arguments"] for m in messages for call in m.get("tool_calls", ())]
    return any(json.dumps(each, ensure_ascii=ascii_only) in text for each in arguments for ascii_only in (True, False))


def _object(arguments: str) -> Any:
    """The arguments as an object; unchanged if they are not one."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)
