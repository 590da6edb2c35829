"""One turn of a dialogue, as passed between all code that reads, writes and trains on dialogues."""

from dataclasses import dataclass
from typing import Any

from finback.data.tools import ToolCall


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue; fields that a role does not have are empty."""

    # system, user, assistant or tool; or developer, in models that know such turns
    role: str
    content: str
    # the assistant's chain of thought
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    # for a tool's result: id of the call it answers
    tool_call_id: str | None = None
    name: str | None = None
    # whether the answer continues from here
    prefix: bool = False
    # whether training has a loss on the turn
    learnt: bool = True

    def to_openai(self) -> dict[str, Any]:
        """The message in OpenAI's format, which templates read, with DeepSeek's name for the reasoning."""
        optional = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning or None,
            "tool_calls": [call.to_openai() for call in self.tool_calls] or None,
        }
        return {"role": self.role, "content": self.content} | {k: v for k, v in optional.items() if v is not None}
