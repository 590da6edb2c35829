"""Prompts of V3 and R1 (also the form of models trained here), of V3.1 and of V3.2."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from finback.data.dsml import V32, marked, reply_section, schema_lines
from finback.data.prompt_form import PromptForm, PromptOptions, chain_mark, last_asked, system_text
from finback.data.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER
from finback.data.tools import (
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    OUTPUT_BEGIN,
    OUTPUT_END,
    SEPARATOR,
    Tool,
    ToolCall,
    call_pieces,
    tool_pieces,
)
from finback.data.turn import Message


class V3Form(PromptForm):
    """The form common to V3, R1 and V3.1: system messages and tools come first, and marks enclose calls and results.

    After results the assistant continues without a mark.
    """

    # beginning of an answer
    begins: ClassVar[tuple[str, ...]] = (ASSISTANT,)

    def calls(self, calls: Sequence[ToolCall]) -> list[str]:
        return call_pieces(calls)

    @abstractmethod
    def tool_section(self, tools: Sequence[Tool]) -> list[str]:
        """The section of the system text that describes the tools."""

    def turns(self, messages: Sequence[Message], tools: Sequence[Tool], shown: set[int]) -> tuple[list[str], bool]:
        """Turns, with the reasoning of those that are `shown`; and whether the last ones are tool results."""
        text = system_text(messages)
        pieces: list[str] = [
            BOS,
            text,
            *(["\n\n"] if text and tools else []),
            *(self.tool_section(tools) if tools else []),
        ]
        is_answering = False
        for i, message in enumerate(messages):
            if message.role == "user":
                pieces += [USER, message.content]
            elif message.role == "tool":
                pieces += [OUTPUT_BEGIN, message.content, OUTPUT_END]
            elif message.role == "assistant":
                chain = [THINK, message.reasoning, END_THINK] if i in shown and message.reasoning else []
                pieces += [*([] if is_answering else self.begins), *chain, *self.answer(message, None)]
            is_answering = message.role == "tool" or (is_answering and message.role == "system")
        return pieces, is_answering


class R1Form(V3Form):
    """R1's form: the model opens its chain of thought itself. Calls and results are written as in V3.1.

    Past reasoning is left out, except in turns with calls since the user's last turn.
    """

    thinks = None
    marks = (BOS, EOS, USER, ASSISTANT)

    def prompt(self, messages: Sequence[Message], options: PromptOptions) -> list[str]:
        asked = last_asked(messages)
        shown = {i for i, m in enumerate(messages) if m.tool_calls and i > asked}
        pieces, is_answering = self.turns(messages, options.tools, shown)
        return [*pieces, *([] if is_answering else [ASSISTANT]), *([THINK] if options.think else [])]

    def tool_section(self, tools: Sequence[Tool]) -> list[str]:
        return tool_pieces(tools)

    def learnt(self, message: Message, opened: bool) -> list[str]:
        chain = [THINK, message.reasoning, END_THINK] if message.reasoning else []
        return [*chain, *self.answer(message, None)]

    def document(self, messages: Sequence[Message]) -> list[str]:
        """A dialogue with all its reasoning."""
        return self.turns(messages, (), set(range(len(messages))))[0]


V31_CALLS = (
    "\nIMPORTANT: ALWAYS adhere to this exact format for tool use:\n",
    CALLS_BEGIN,
    CALL_BEGIN,
    "tool_call_name",
    SEPARATOR,
    "tool_call_arguments",
    CALL_END,
    "{{additional_tool_calls}}",
    CALLS_END,
    "\n\nWhere:\n\n- `tool_call_name` must be an exact match to one of the available tools\n"
    "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
    "- For multiple tool calls, chain them directly without separators or spaces\n",
)


class V31Form(V3Form):
    """V3.1's form, after its template: every answer starts with <think> or </think>, past ones with </think>."""

    begins = (ASSISTANT, END_THINK)

    def prompt(self, messages: Sequence[Message], options: PromptOptions) -> list[str]:
        pieces, is_answering = self.turns(messages, options.tools, set())
        return pieces if is_answering else [*pieces, ASSISTANT, chain_mark(self.mode(options))]

    def tool_section(self, tools: Sequence[Tool]) -> list[str]:
        listed = "".join(f"\n### {t.name}\nDescription: {t.description}\n\nParameters: {t.parameters}\n" for t in tools)
        return [f"## Tools\nYou have access to the following tools:\n{listed}", *V31_CALLS]


V32_TOOLS = marked("""## Tools
You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the following as part of your reply to the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>
String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should use JSON \
format. The "string" attribute should be set to "true" for string type parameters and "false" for other types (numbers, \
booleans, arrays, objects).
If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. Here is \
an example:
<｜DSML｜function_calls>
...
</｜DSML｜function_calls>
<function_results>
...
</function_results>
<think>...thinking about results</think>
Here are the functions available in JSONSchema format:
<functions>
""")
RESULTS, END_RESULTS = "\n\n<function_results>", "\n</function_results>\n\n"
DEVELOPER = "\n\n# The user's message is: "


class V32Form(PromptForm):
    """V3.2's form, after the encoder published with the weights (encoding_dsv32.py, MIT).

    Reasoning is kept until the user's next turn; results of calls follow their turn without a role mark. A developer's turn,
    which search agents use, asks like a user's; tools remain in the system text.
    """

    has_developer = True

    def calls(self, calls: Sequence[ToolCall]) -> list[str]:
        return V32.calls(calls)

    def prompt(self, messages: Sequence[Message], options: PromptOptions) -> list[str]:
        think = self.mode(options)
        pieces = [BOS, system_text(messages), *self._told(options)]
        turns = [m for m in messages if m.role != "system"]
        asked = last_asked(turns, ("user", "developer"))
        for i, message in enumerate(turns):
            before = turns[i - 1].role if i else ""
            shows = think and i >= asked
            if message.role == "tool":
                pieces.append(f"{'' if before == 'tool' else RESULTS}\n<result>{message.content}</result>")
                if i + 1 == len(turns) or turns[i + 1].role != "tool":
                    pieces += [END_RESULTS, chain_mark(shows)]
            elif message.role == "assistant":
                begins = [] if before in ("user", "developer", "tool") else [ASSISTANT, chain_mark(shows)]
                pieces += [*begins, *self.answer(message, shows)]
            else:
                text = f"{DEVELOPER}{message.content}" if message.role == "developer" else message.content
                pieces += [USER, text, ASSISTANT, chain_mark(shows)]
        return pieces if turns and turns[-1].role != "assistant" else [*pieces, ASSISTANT, chain_mark(think)]

    def _told(self, options: PromptOptions) -> list[str]:
        """The sections of the system text on tools and on the form of the answer."""
        tools = ["\n\n", *V32_TOOLS, schema_lines(options.tools), "\n</functions>\n"] if options.tools else []
        return [*tools, *reply_section(options.reply_schema)]
