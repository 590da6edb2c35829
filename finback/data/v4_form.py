"""Prompts of V4 and V4.1, after DeepSeek's own recipe (MIT) and, for the version of April 2026, the encoder of the first release.

Tool results are blocks in the user's turn. With tools, the reasoning of all turns is kept, otherwise of none. The effort of
thinking is stated in words, which changed in July 2026: the former effort max became high, which is the default.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

from finback.data.dsml import V4, V41, DsmlForm, marked, reply_section, schema_lines
from finback.data.prompt_form import PromptForm, PromptOptions, chain_mark, system_text
from finback.data.tokenizer import ASSISTANT, BOS, USER, SpecialToken
from finback.data.tools import ToolCall
from finback.data.turn import Message

SYSTEM = SpecialToken("<｜System｜>")  # of V4.1
MAXIMUM = """Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, rigorously \
stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every intermediate step, considered alternative, and rejected \
hypothesis to ensure absolutely no assumption is left unchecked.

"""
BEYOND = """Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to chance: exhaustively decompose the problem into \
its most fundamental components, trace every causal chain to its root, and resolve the underlying cause rather than any surface \
symptom.
Do not stop reasoning until you have independently verified the solution from multiple angles and are certain that no assumption \
remains unchecked and no error remains undiscovered.

"""
OF_100 = "Reasoning Effort: {} (range 1-100, the higher the value, the more thorough the reasoning)\n\n"
TOOLS = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a "<｜DSML｜{block}>" block \
like the following:

<｜DSML｜{block}>
<｜DSML｜{space}invoke name="$TOOL_NAME">
<｜DSML｜{space}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜{space}parameter>
...
</｜DSML｜{space}invoke>
<｜DSML｜{space}invoke name="$TOOL_NAME2">
...
</｜DSML｜{space}invoke>
</｜DSML｜{block}>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, objects), \
pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> BEFORE any \
tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
END_TOOLS = "\n\nYou MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.\n"
JSON_OBJECT = {"type": "json_object"}  # stands for any object
ANY_OBJECT = (
    "\n\nYou are a helpful assistant designed to output JSON.\n## Response Format:\n\nReply with JSON object ONLY."
)


@dataclass(frozen=True)
class Efforts:
    """The words that state each effort: low, high (the default) and maximum."""

    low: str
    high: str
    maximum: str

    def text(self, effort: str | None) -> str:
        """The words for an effort by its name in the APIs."""
        return self.low if effort in ("minimal", "low") else self.maximum if effort in ("max", "ultra") else self.high


class V4Form(PromptForm):
    """V4's form of July 2026, unless other `efforts` are given: all system text comes first."""

    thinks = True
    has_efforts = True
    has_developer = True
    dsml: ClassVar[DsmlForm] = V4

    def __init__(self, efforts: Efforts = Efforts("", MAXIMUM, BEYOND)) -> None:
        self.efforts = efforts

    def calls(self, calls: Sequence[ToolCall]) -> list[str]:
        return self.dsml.calls(calls)

    def prompt(self, messages: Sequence[Message], options: PromptOptions) -> list[str]:
        think = bool(self.mode(options))
        effort = self.efforts.text(options.effort) if think else ""
        head, turns = self.system(messages)
        pieces = [BOS, *self.first([effort + head, *self.sections(options)])]
        for role, group in groupby(turns, key=lambda m: m.role if m.role in ("assistant", "system") else "user"):
            if role == "user":
                pieces += [USER, "\n\n".join(map(_block, group))]
                continue
            for message in group:
                shows = think and bool(options.tools)
                past = [ASSISTANT, chain_mark(shows), *self.answer(message, shows)]
                pieces += [SYSTEM, message.content] if role == "system" else past
        return [*pieces, ASSISTANT, chain_mark(think)]

    def system(self, messages: Sequence[Message]) -> tuple[str, list[Message]]:
        """The text before the tools, and the turns."""
        return system_text([m for m in messages if m.content]), [m for m in messages if m.role != "system"]

    def first(self, pieces: list[str]) -> list[str]:
        """What comes between bos and the first turn."""
        return pieces

    def sections(self, options: PromptOptions) -> list[str]:
        """The sections on tools and on the form of the answer."""
        head = TOOLS.format(block=self.dsml.block, space=self.dsml.space)
        tools = ["\n\n", *marked(head), schema_lines(options.tools), END_TOOLS] if options.tools else []
        return [*tools, *self.replies(options.reply_schema)]

    def replies(self, schema: Mapping[str, Any] | None) -> list[str]:
        """The section on the form of the answer."""
        return [ANY_OBJECT] if schema == JSON_OBJECT else reply_section(schema)


class V41Form(V4Form):
    """V4.1's form: system turns have a mark and keep their position, and an effort is a number."""

    dsml = V41

    def __init__(self) -> None:
        super().__init__(Efforts(OF_100.format(50), OF_100.format(75), OF_100.format(100)))

    def system(self, messages: Sequence[Message]) -> tuple[str, list[Message]]:
        turns = [m for m in messages if m.role != "system" or m.content]
        if turns and turns[0].role == "system":
            return turns[0].content, turns[1:]
        return "", turns

    def first(self, pieces: list[str]) -> list[str]:
        return [SYSTEM, *pieces] if any(pieces) else []

    def replies(self, schema: Mapping[str, Any] | None) -> list[str]:
        return reply_section(schema)


def _block(message: Message) -> str:
    """The text of a user's turn, or of a tool's."""
    return f"<tool_result>{message.content}</tool_result>" if message.role == "tool" else message.content
