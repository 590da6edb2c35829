"""How a family of models without a Jinja template writes dialogues: special tokens, which nobody's words can forge, and texts."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from finback.data.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER
from finback.data.tools import Tool, ToolCall
from finback.data.turn import Message


@dataclass(frozen=True)
class PromptOptions:
    """What an answer may use and has to be."""

    tools: Sequence[Tool] = ()
    # whether the chain of thought is opened; None leaves it to the model, in forms that can
    think: bool | None = None
    # low, medium, high and so on, as the interfaces name them; forms without efforts leave it out
    effort: str | None = None
    # the JSON schema of the answer, for forms that tell it
    reply_schema: Mapping[str, Any] | None = None


class PromptForm(ABC):
    """Writes prompts and answers as special tokens and plain texts."""

    # whether the model thinks unless it is told; None: that is up to the model, and no prompt closes the chain
    thinks: ClassVar[bool | None] = False
    # whether the prompt says how long to think
    has_efforts: ClassVar[bool] = False
    # a turn of the role `developer` asks; elsewhere it is the system's
    has_developer: ClassVar[bool] = False
    marks: ClassVar[tuple[str, ...]] = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK)

    @abstractmethod
    def prompt(self, messages: Sequence[Message], options: PromptOptions) -> list[str]:
        """A dialogue up to where the assistant goes on: its mark, and that of the chain of thought."""

    @abstractmethod
    def calls(self, calls: Sequence[ToolCall]) -> list[str]:
        """Calls as the assistant writes them."""

    def answer(self, message: Message, think: bool | None) -> list[str]:
        """A turn of the assistant behind its prompt, eos included; with the chain of thought if the prompt opened one."""
        chain = [message.reasoning, END_THINK] if think else []
        return [*chain, message.content, *self.calls(message.tool_calls), EOS]

    def learnt(self, message: Message, opened: bool) -> list[str]:
        """The answer as training teaches it behind a prompt that has `opened` a chain of thought or not."""
        return self.answer(message, opened)

    def mode(self, options: PromptOptions) -> bool | None:
        """Whether the prompt opens the chain of thought."""
        return self.thinks if options.think is None else options.think


def chain_mark(think: bool | None) -> str:
    """What opens the chain of thought, or says that there is none."""
    return THINK if think else END_THINK


def last_asked(messages: Sequence[Message], roles: Sequence[str] = ("user",)) -> int:
    """The place of the last turn that asks; -1 if there is none."""
    return max((i for i, m in enumerate(messages) if m.role in roles), default=-1)


def system_text(messages: Sequence[Message]) -> str:
    """All system messages, a blank line between them."""
    return "\n\n".join(m.content for m in messages if m.role == "system")
