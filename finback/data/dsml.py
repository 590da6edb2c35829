"""DSML, DeepSeek V3.2's and V4's format of tool calls: one element per call, and one per argument.

Its only special token is ｜DSML｜. Tool schemas are JSON lines in the system text.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finback.data.tokenizer import END_THINK, THINK, SpecialToken
from finback.data.tools import Tool, ToolCall

DSML = SpecialToken("｜DSML｜")
_MARKS = re.compile(f"({DSML}|{THINK}|{END_THINK})")


@dataclass(frozen=True)
class DsmlForm:
    """One version: `block` encloses all calls, `space` precedes all other names, `blank` replaces missing arguments."""

    block: str
    space: str = ""
    blank: str = "\n"

    @property
    def opener(self) -> str:
        """The text before the first call."""
        return f"<{DSML}{self.block}>"

    @property
    def closer(self) -> str:
        """The text after the last call."""
        return f"</{DSML}{self.block}>"

    def calls(self, calls: Sequence[ToolCall]) -> list[str]:
        """Calls after a blank line, as the assistant writes them."""
        if not calls:
            return []
        inner = [piece for call in calls for piece in (*self._call(call), "\n")]
        return ["\n\n<", DSML, f"{self.block}>\n", *inner, "</", DSML, f"{self.block}>"]

    def _call(self, call: ToolCall) -> list[str]:
        named = [piece for name, value in _arguments(call.arguments) for piece in self._argument(name, value)]
        head = ["<", DSML, f'{self.space}invoke name="{call.name}">\n']
        return [*head, *(named or [self.blank]), "</", DSML, f"{self.space}invoke>"]

    def _argument(self, name: str, value: object) -> list[str]:
        """An argument: a string unchanged, anything else as JSON."""
        is_text = isinstance(value, str)
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        head = f'{self.space}parameter name="{name}" string="{"true" if is_text else "false"}">'
        return ["<", DSML, head + text, "</", DSML, f"{self.space}parameter>\n"]


def schema_lines(tools: Sequence[Tool]) -> str:
    """The functions as JSON objects, one per line."""
    return "\n".join(
        f'{{"name": {_quoted(tool.name)}, "description": {_quoted(tool.description)}, "parameters": {tool.parameters}}}'
        for tool in tools
    )


V32, V4, V41 = DsmlForm("function_calls"), DsmlForm("tool_calls", blank=""), DsmlForm(" calls", " ")


def reply_section(schema: Mapping[str, Any] | None) -> list[str]:
    """The section of the system text on the schema of the answer."""
    if schema is None:
        return []
    text = "\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
    return [text + json.dumps(schema, ensure_ascii=False)]


def marked(text: str) -> list[str]:
    """Splits one of finback's own texts into special tokens and plain texts."""
    return [SpecialToken(part) if _MARKS.fullmatch(part) else part for part in _MARKS.split(text)]


def _arguments(text: str) -> list[tuple[str, object]]:
    """The arguments by name; if they are not a JSON object, all of them as one text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    return list(found.items()) if isinstance(found, dict) else [("arguments", text)]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
