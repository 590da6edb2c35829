"""Jinja chat templates as Hugging Face folders carry them, rendered as transformers renders them.

Templates come from strangers: the sandbox keeps them from calling anything but what is listed here.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finback.config import UserError

# What our own exports carry: the built-in prompt of chat.py, said in Jinja. Chains of earlier turns are left out.
OWN = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{ '<｜User｜>' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{%- set said = message['content'] -%}"
    "{%- if '</think>' in said -%}{%- set said = said.split('</think>')[-1] -%}{%- endif -%}"
    "{{ '<｜Assistant｜>' + said + eos_token }}"
    "{%- else -%}{{ message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<｜Assistant｜>' }}{%- endif -%}"
)


class _Generation(jinja2.ext.Extension):
    """{% generation %}…{% endgeneration %}: marks assistant text for training masks; rendering ignores the mark."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser: Parser) -> Node | list[Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Callable[[], str]) -> str:
        return caller()


class Template:
    """A chat template; `specials` are bos_token and the like, which templates write out."""

    def __init__(self, source: str, specials: Mapping[str, str]) -> None:
        self.specials = dict(specials)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except Exception as error:
            where = f"line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else "as a whole"
            raise UserError("chat_template", where, str(error), "Correct the template in the model's folder.") from None

    def render(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, **variables: Any) -> str:
        """The text of a dialogue; `variables` are whatever a template asks for beside messages (tools, …)."""
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                **{"tools": None, "documents": None} | self.specials | variables,
            )
        except Exception as error:  # a stranger's program may fail in any way
            raise UserError(
                "messages",
                f"{len(messages)} of them",
                f"the model's chat template refuses them ({error})",
                "Say it as the template allows; most want user and assistant in turns.",
            ) from None


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)
