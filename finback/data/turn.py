"""One turn of a dialogue, as all who read, write and learn dialogues pass it on."""

from dataclasses import dataclass
from typing import Any

from finback.data.tools import ToolCall


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue; what a role does not have is empty."""

    # system, user, assistant or tool; developer where it asks, in models that know such turns
    role: str
    content: str
    # the assistant's chain of thought
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    # of a tool's result: the call it answers
    tool_call_id: str | None = None
    name: str | None = None
    # whether the answer goes on from here
    prefix: bool = False
    # whether training learns the turn or only reads it
    learnt: bool = True

    def to_openai(self) -> dict[str, Any]:
        """The message in OpenAI's form, which templates read; DeepSeek's name for the reasoning."""
        optional = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning or None,
            "tool_calls": [call.to_openai() for call in self.tool_calls] or None,
        }
        return {"role": self.role, "content": self.content} | {k: v for k, v in optional.items() if v is not None}
