"""The prompt format of a model family without a Jinja template: special tokens, which no user text can forge, and plain texts."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from finback.data.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER
from finback.data.tools import Tool, ToolCall
from finback.data.turn import Message


@dataclass(frozen=True)
class PromptOptions:
    """Options of an answer, as far as the prompt states them."""

    tools: Sequence[Tool] = ()
    # whether to open the chain of thought; None: the model decides, in forms that allow it
    think: bool | None = None
    # low, medium, high and so on, as in the APIs; ignored by forms without efforts
    effort: str | None = None
    # JSON schema of the answer, for forms that state it
    reply_schema: Mapping[str, Any] | None = None


class PromptForm(ABC):
    """Writes prompts and answers as special tokens and plain texts."""

    # whether the model thinks by default; None: the model decides, and no prompt closes the chain
    thinks: ClassVar[bool | None] = False
    # whether the prompt states the effort of thinking
    has_efforts: ClassVar[bool] = False
    # whether turns of the role `developer` are requests; otherwise they count as the system's
    has_developer: ClassVar[bool] = False
    marks: ClassVar[tuple[str, ...]] = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK)

    @abstractmethod
    def prompt(self, messages: Sequence[Message], options: PromptOptions) -> list[str]:
        """A dialogue, and the start of the assistant's next turn: its mark, and that of the chain of thought."""

    @abstractmethod
    def calls(self, calls: Sequence[ToolCall]) -> list[str]:
        """Calls as the assistant writes them."""

    def answer(self, message: Message, think: bool | None) -> list[str]:
        """An assistant turn after its prompt, with eos; with the chain of thought if the prompt opened one."""
        chain = [message.reasoning, END_THINK] if think else []
        return [*chain, message.content, *self.calls(message.tool_calls), EOS]

    def learnt(self, message: Message, opened: bool) -> list[str]:
        """The answer to train on, after a prompt that has `opened` a chain of thought or not."""
        return self.answer(message, opened)

    def mode(self, options: PromptOptions) -> bool | None:
        """Whether the prompt opens the chain of thought."""
        return self.thinks if options.think is None else options.think


def chain_mark(think: bool | None) -> str:
    """The mark that opens the chain of thought, or that states that there is none."""
    return THINK if think else END_THINK


def last_asked(messages: Sequence[Message], roles: Sequence[str] = ("user",)) -> int:
    """Index of the last turn of one of these roles; -1 if there is none."""
    return max((i for i, m in enumerate(messages) if m.role in roles), default=-1)


def system_text(messages: Sequence[Message]) -> str:
    """All system messages, separated by blank lines."""
    return "\n\n".join(m.content for m in messages if m.role == "system")
