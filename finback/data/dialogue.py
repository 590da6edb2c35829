"""A dialogue in OpenAI's and DeepSeek's words, with tools and chains of thought, to the tokens that ask for its next turn."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from finback.config import UserError
from finback.data.messages import is_open, require_special_tokens
from finback.data.openai_messages import Called, Tool, Turn, tools_of, turns
from finback.data.template import Template
from finback.data.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER, Tokenizer


class Mark(str):
    """Text that is one token where the vocabulary has it, and that nothing a user says can become."""

    __slots__ = ()


CALLS_BEGIN, CALLS_END = Mark("<｜tool▁calls▁begin｜>"), Mark("<｜tool▁calls▁end｜>")
CALL_BEGIN, CALL_END = Mark("<｜tool▁call▁begin｜>"), Mark("<｜tool▁call▁end｜>")
OUTPUT_BEGIN, OUTPUT_END = Mark("<｜tool▁output▁begin｜>"), Mark("<｜tool▁output▁end｜>")
SEPARATOR = Mark("<｜tool▁sep｜>")
_BOS, _EOS, _USER, _ASSISTANT = Mark(BOS), Mark(EOS), Mark(USER), Mark(ASSISTANT)
_THINK, _END_THINK = Mark(THINK), Mark(END_THINK)
_PROBE = (Turn("user", "?"), Turn("assistant", "", calls=(Called("f", "{}"),)))  # shows how a template writes calls


def dialogue(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    think: bool | None = None,
    continue_last: bool = False,
) -> tuple[list[int], bool]:
    """Ids that ask for the next assistant turn, and whether they end inside a chain of thought.

    `think` True opens the chain, False asks for none, None leaves it to the model. `continue_last`, or "prefix" in the
    last message, goes on with the assistant's last message: in its chain if it has no content yet, else in its answer,
    which is then an answer without a chain unless it came with one, whatever `think` says.

    A tokenizer with a chat template writes the dialogue by it; special tokens in what a user says then count. Without
    one the form is DeepSeek's, from ids that nobody's words can forge: past chains are left out but for turns that
    called tools since the user last spoke, and calls, results and tools are written as V3.1 writes them.
    UserError names what does not fit, as in `messages[2].content`.
    """
    said, known = turns(messages), tools_of(tools)
    begun: Turn | None = None
    if continue_last or said[-1].prefix:
        *said, begun = said
        _check_begun(begun, len(said))
    if tokenizer.template is not None:
        text, opened = _by_template(tokenizer, tokenizer.template, said, known, think, begun)
        return tokenizer.encode_marked(text), opened
    pieces, opened = _by_marks(tokenizer, said, known, think, begun)
    return _ids(pieces, tokenizer), opened


def written_call(tokenizer: Tokenizer) -> str:
    """A call by the assistant, of the function f, as the model's dialogues show it; "" where its template fails at one."""
    if tokenizer.template is None:
        return "".join(_calls(_PROBE[-1]))
    try:
        return _render(tokenizer.template, _PROBE)
    except UserError:
        return ""


def _check_begun(begun: Turn, place: int) -> None:
    if begun.role != "assistant":
        raise UserError(
            f"messages[{place}].role",
            begun.role,
            "only what the assistant said can be continued",
            "End with an assistant's message, or ask for a new one.",
        )
    if begun.calls:
        raise UserError(
            f"messages[{place}].tool_calls",
            [c.name for c in begun.calls],
            "a message with calls cannot be continued",
            "Leave them out, or send their results.",
        )


def _by_marks(
    tokenizer: Tokenizer, said: Sequence[Turn], tools: Sequence[Tool], think: bool | None, begun: Turn | None
) -> tuple[list[str], bool]:
    """The prompt in DeepSeek's form, marks and plain texts in turn, and whether it ends inside a chain."""
    require_special_tokens(tokenizer, (BOS, EOS, USER, ASSISTANT))
    thinks = THINK in tokenizer.ids and END_THINK in tokenizer.ids
    pieces: list[str] = [_BOS, *_system(said, tools)]
    asked = max((i for i, turn in enumerate(said) if turn.role == "user"), default=-1)
    answering = False  # results stand last: the assistant goes on without a mark of its own
    for i, turn in enumerate(said):
        if turn.role == "user":
            pieces += [_USER, turn.content]
        elif turn.role == "tool":
            pieces += [OUTPUT_BEGIN, turn.content, OUTPUT_END]
        elif turn.role == "assistant":
            pieces += [] if answering else [_ASSISTANT]
            if thinks and turn.calls and turn.reasoning and i > asked:
                pieces += [_THINK, turn.reasoning, _END_THINK]
            pieces += [turn.content, *_calls(turn), _EOS]
        answering = turn.role == "tool" or (answering and turn.role == "system")
    pieces += [] if answering else [_ASSISTANT]
    reasoning, content = (begun.reasoning, begun.content) if begun else ("", "")
    if not reasoning and (content or not think):
        return [*pieces, content], False
    if not thinks:
        raise UserError(
            "think",
            True,
            "the model's vocabulary has no marks for a chain of thought",
            "Ask for an answer without one.",
        )
    pieces += [_THINK, reasoning]
    return ([*pieces, _END_THINK, content], False) if content else (pieces, True)


def _system(said: Sequence[Turn], tools: Sequence[Tool]) -> list[str]:
    """All system messages and the tools, a blank line between them."""
    text = "\n\n".join(turn.content for turn in said if turn.role == "system")
    if not tools:
        return [text]
    return [text + "\n\n" if text else "", *_section(tools)]


def _section(tools: Sequence[Tool], fenced: bool = False) -> list[str]:
    """What a model is told of its tools; `fenced` asks for V3's markup, else for V3.1's."""
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


def _calls(turn: Turn) -> list[str]:
    if not turn.calls:
        return []
    return [
        CALLS_BEGIN,
        *(piece for c in turn.calls for piece in (CALL_BEGIN, c.name, SEPARATOR, c.arguments, CALL_END)),
        CALLS_END,
    ]


def _ids(pieces: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Marks as tokens, as far as the vocabulary has them; all other text as plain characters."""
    ids: list[int] = []
    framing: dict[str, list[int]] = {_BOS: [tokenizer.bos], _EOS: [tokenizer.eos]}
    for is_mark, group in groupby(pieces, key=lambda piece: isinstance(piece, Mark)):
        if is_mark:
            for mark in group:
                ids += framing.get(mark) or tokenizer.encode_marked(mark)
        else:
            ids += tokenizer.encode("".join(group))
    return ids


def _by_template(
    tokenizer: Tokenizer,
    template: Template,
    said: Sequence[Turn],
    tools: Sequence[Tool],
    think: bool | None,
    begun: Turn | None,
) -> tuple[str, bool]:
    """The prompt's text by the model's own template, and whether it ends inside a chain.

    What was begun is appended to the prompt for a new answer: templates tend to reshape a last message.
    """
    reasoning, content = (begun.reasoning, begun.content) if begun else ("", "")
    if reasoning or content:
        think = bool(reasoning)
    text = _rendered(tokenizer, template, said, tools, think)
    opened, is_spaced = is_open(text), not text.endswith(THINK)  # V3.1 writes no newlines around a chain
    if opened and think is False:
        text, opened = f"{text.rstrip()}\n\n{END_THINK}\n\n", False  # Qwen's way to say that there is none
    elif think and not opened:
        text, opened = text + THINK + ("\n" if reasoning else ""), True
    text += reasoning
    if reasoning and content:
        text, opened = text + (f"\n{END_THINK}\n\n" if is_spaced else END_THINK), False
    return text + content, opened


def _rendered(
    tokenizer: Tokenizer, template: Template, said: Sequence[Turn], tools: Sequence[Tool], think: bool | None
) -> str:
    """The dialogue by the template; tools that it leaves out are told in the system message, if the model can call."""
    switches = {} if think is None else {"thinking": think, "enable_thinking": think}
    if not tools:
        return _render(template, said, **switches)
    text = _render(template, said, tools=[tool.given for tool in tools], **switches)
    if text != _render(template, said, **switches):
        return text
    if len(tokenizer.encode_marked(CALL_BEGIN)) > 1:
        raise UserError(
            "tools",
            [tool.name for tool in tools],
            "the model's chat template writes no tools",
            "Leave them out, or use a model that was taught to call them.",
        )
    told = "".join(_section(tools, fenced="```json" in _render(template, _PROBE)))
    system = [turn.content for turn in said if turn.role == "system"]
    others = [turn for turn in said if turn.role != "system"]
    return _render(template, [Turn("system", "\n\n".join([*system, told])), *others], **switches)


def _render(template: Template, said: Sequence[Turn], **variables: Any) -> str:
    """Render with the arguments of calls as text, else as objects: templates want the one or the other.

    A template that asks for objects does not refuse text but quotes it once more; that is noticed.
    """
    if not any(turn.calls for turn in said):
        return template.render([_message(turn) for turn in said], add_generation_prompt=True, **variables)
    refusals: list[UserError] = []
    quoted: list[str] = []
    for empty in ("", None) if _writes_none(template) else (None, ""):
        for as_objects in (False, True):
            messages = [_message(turn, empty, as_objects) for turn in said]
            try:
                text = template.render(messages, add_generation_prompt=True, **variables)
            except UserError as error:
                refusals.append(error)
                continue
            if as_objects or not _is_quoted(text, said):
                return text
            quoted.append(text)
    if quoted:
        return quoted[0]
    raise refusals[0]


def _writes_none(template: Template) -> bool:
    """Whether a turn that only calls must have an empty content; some write None out, others call only if it is None."""
    try:
        none, empty = (
            template.render([_message(turn, content, True) for turn in _PROBE], True).count("None")
            for content in (None, "")
        )
    except UserError:
        return False
    return none > empty


def _is_quoted(text: str, said: Sequence[Turn]) -> bool:
    """Whether the JSON text of a call's arguments stands in a prompt as a JSON string."""
    written = (json.dumps(c.arguments, ensure_ascii=a) for t in said for c in t.calls for a in (True, False))
    return any(each in text for each in written)


def _message(turn: Turn, empty: str | None = None, as_objects: bool = False) -> dict[str, Any]:
    """A turn as templates know it; `empty` is the content of a turn that only calls."""
    message: dict[str, Any] = {"role": turn.role, "content": empty if turn.calls and not turn.content else turn.content}
    optional = {"name": turn.name, "tool_call_id": turn.call_id, "reasoning_content": turn.reasoning or None}
    message |= {key: value for key, value in optional.items() if value is not None}
    if turn.calls:
        message["tool_calls"] = [
            {
                **({} if c.id is None else {"id": c.id}),
                "type": "function",
                "function": {"name": c.name, "arguments": _object(c.arguments) if as_objects else c.arguments},
            }
            for c in turn.calls
        ]
    return message


def _object(arguments: str) -> Any:
    """The arguments as an object; as they stand if they are none."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments
