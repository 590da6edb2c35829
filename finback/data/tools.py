"""Tools and their calls, and DeepSeek's format for both (V3.1; V3 fences the arguments)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from finback.data.tokenizer import SpecialToken

CALLS_BEGIN, CALLS_END = SpecialToken("<｜tool▁calls▁begin｜>"), SpecialToken("<｜tool▁calls▁end｜>")
CALL_BEGIN, CALL_END = SpecialToken("<｜tool▁call▁begin｜>"), SpecialToken("<｜tool▁call▁end｜>")
OUTPUT_BEGIN, OUTPUT_END = SpecialToken("<｜tool▁output▁begin｜>"), SpecialToken("<｜tool▁output▁end｜>")
SEPARATOR = SpecialToken("<｜tool▁sep｜>")


@dataclass(frozen=True)
class ToolCall:
    """A call by the assistant; `arguments` is JSON text."""

    name: str
    arguments: str
    id: str | None = None

    def to_openai(self) -> dict[str, Any]:
        """The call in OpenAI's format."""
        function = {"name": self.name, "arguments": self.arguments}
        return {**({} if self.id is None else {"id": self.id}), "type": "function", "function": function}


@dataclass(frozen=True)
class Tool:
    """A function that may be called."""

    name: str
    description: str
    # the JSON schema's text
    parameters: str
    # the tool in OpenAI's format, for templates
    source: Mapping[str, Any] = field(repr=False)


def call_pieces(calls: Sequence[ToolCall]) -> list[str]:
    """Calls as the assistant writes them: special tokens and plain texts."""
    if not calls:
        return []
    inner = (piece for c in calls for piece in (CALL_BEGIN, c.name, SEPARATOR, c.arguments, CALL_END))
    return [CALLS_BEGIN, *inner, CALLS_END]


def tool_pieces(tools: Sequence[Tool], fenced: bool = False) -> list[str]:
    """The section of the system message that describes the tools; `fenced`: V3's markup, otherwise V3.1's."""
    listed = "".join(
        f"\n\n### {tool.name}\nDescription: {tool.description}\n\nParameters: {tool.parameters}" for tool in tools
    )
    call = ["function", SEPARATOR, "NAME\n```json\nARGUMENTS\n```"] if fenced else ["NAME", SEPARATOR, "ARGUMENTS"]
    return [
        f"## Tools\n\nYou may call these functions:{listed}\n\nTo call one, end your turn with\n\n",
        CALLS_BEGIN,
        CALL_BEGIN,
        *call,
        CALL_END,
        CALLS_END,
        "\n\nwhere ARGUMENTS is one JSON object that fits the function's parameters. For several calls, repeat what stands "
        "from ",
        CALL_BEGIN,
        " to ",
        CALL_END,
        ". Where no function helps, answer without a call.",
    ]
