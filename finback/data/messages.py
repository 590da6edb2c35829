"""The only conversion from messages to token ids, and from a response back to its reasoning and answer.

A tokenizer with a chat template formats dialogues with it, as transformers does; special tokens in a user's text are then
effective. Without a template, one of DeepSeek's forms (prompt_forms.py) is written from ids, which no user text can forge. A
prompt is always a prefix of the training example (`Lesson`) of its answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finback.config import UserError
from finback.data.prompt_form import PromptForm, PromptOptions
from finback.data.prompt_forms import OWN, form_of
from finback.data.template import CALL_PROBE
from finback.data.tokenizer import END_THINK, EOS, THINK, Tokenizer
from finback.data.tools import CALL_BEGIN, Tool, tool_pieces
from finback.data.turn import Message

# label of tokens without loss, as in transformers and torch
IGNORE = -100


@dataclass(frozen=True)
class Response:
    """A completion's reasoning and answer; whether it has reasoning at all, and whether that is closed."""

    reasoning: str
    answer: str
    thinks: bool
    closed: bool


@dataclass(frozen=True)
class Lesson:
    """A dialogue's ids and labels: the same ids for the assistant's turns, IGNORE elsewhere (not shifted)."""

    ids: list[int]
    labels: list[int]


def parse_response(text: str) -> Response:
    """Splits generated text into reasoning and answer; unclosed reasoning has no answer."""
    text = text.lstrip()  # some models start with a line break
    if not text.startswith(THINK):
        return Response("", text.strip(), thinks=False, closed=True)
    chain, closed, answer = text.removeprefix(THINK).partition(END_THINK)
    return Response(chain.strip(), answer.strip(), thinks=True, closed=bool(closed))


def encode_prompt(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Tool] = (),
    think: bool | None = None,
    effort: str | None = None,
    reply_schema: Mapping[str, Any] | None = None,
    continue_last: bool = False,
) -> tuple[list[int], bool]:
    """Token ids that prompt the next assistant turn, and whether they end inside a chain of thought.

    `think`: True opens the chain, False requests none, None leaves it to the model. `effort` and `reply_schema` are used by
    forms that can state them. `continue_last`, or `prefix` in the last message, continues the assistant's last message:
    in its reasoning if it has no content yet, else in its answer. An answer that is continued has no reasoning unless it came
    with some, whatever `think` is; but if the prompt says whether the model thinks, `think` counts. UserError names what is
    invalid, as in `messages[2].content`.
    """
    begun = Message("assistant", "")
    if messages and (continue_last or messages[-1].prefix):
        *messages, begun = messages
        _check_begun(begun, len(messages))
    form = None if tokenizer.template is not None else form_of(tokenizer)
    if begun.reasoning or (begun.content and (form is None or form.thinks is None)):
        think = bool(begun.reasoning)
    if form is None:
        text = _render(messages, tokenizer, tools, think)
        reply, opened = _template_reply(text, begun, think)
        return tokenizer.encode_marked(text + reply), opened
    messages = _encodable(messages, form, tokenizer, think)
    pieces = form.prompt(messages, PromptOptions(tools, think, effort, reply_schema))
    opened = pieces[-1] is THINK
    chain = [begun.reasoning, *([END_THINK] if begun.content else [])] if opened else []
    return tokenizer.encode_pieces([*pieces, *chain, begun.content]), opened and not begun.content


def _check_begun(begun: Message, place: int) -> None:
    if begun.role != "assistant":
        remedy = "End with an assistant's message, or ask for a new one."
        raise UserError(f"messages[{place}].role", begun.role, "only an assistant's message can be continued", remedy)
    if begun.tool_calls:
        problem = "a message with calls cannot be continued"
        remedy = "Leave them out, or send their results."
        raise UserError(f"messages[{place}].tool_calls", [c.name for c in begun.tool_calls], problem, remedy)


def _encodable(
    messages: Sequence[Message], form: PromptForm, tokenizer: Tokenizer, think: bool | None
) -> Sequence[Message]:
    """The messages, without reasoning if the vocabulary has no tokens for it; UserError if it lacks other tokens."""
    tokenizer.require(*form.marks)
    if {THINK, END_THINK} <= tokenizer.ids.keys():
        return messages
    if think:
        problem = "the model's vocabulary has no tokens for a chain of thought"
        raise UserError("think", True, problem, "Request an answer without one.")
    return [replace(message, reasoning="") for message in messages]


def begun_chain(message: Message) -> tuple[Message, bool]:
    """An assistant's message with the chain of thought at the start of its content moved to its field; whether it is open."""
    begun = message.content.lstrip()
    if not begun.startswith(THINK):
        return message, False
    chain, closed, answer = begun.removeprefix(THINK).partition(END_THINK)
    chain = chain.removeprefix("\n")
    return replace(message, reasoning=chain.rstrip() if closed else chain, content=answer.lstrip("\n")), not closed


def encode_document(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Ids of a whole dialogue as training text, all reasoning included, with eos after every assistant turn."""
    return tokenizer.encode_pieces(document_pieces(messages, tokenizer))


def document_pieces(messages: Sequence[Message], tokenizer: Tokenizer) -> list[str]:
    """A dialogue as training text before tokenization, so that many can be tokenized together."""
    if tokenizer.template is not None or form_of(tokenizer) is not OWN:
        remedy = "Training text uses DeepSeek's form only: use a tokenizer made by a prepare stage."
        problem = "has its own chat template" if tokenizer.template else f"writes {tokenizer.form}'s prompts"
        raise UserError("tokenizer", str(tokenizer.path), problem, remedy)
    tokenizer.require(*OWN.marks, THINK, END_THINK)
    pieces = OWN.document(messages)
    return pieces if messages and messages[-1].role == "assistant" else [*pieces, EOS]


def lessons(messages: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Tool] = ()) -> list[Lesson]:
    """The training examples of a dialogue: every answer that is `learnt`, after exactly its prompt.

    Without a template, one example contains the last answer and all answers whose prompts are prefixes of it; answers
    whose reasoning it omits get separate examples. A template may rewrite past turns, so with one each answer gets its own.
    """
    turns = [i for i, m in enumerate(messages) if m.role == "assistant" and m.learnt]
    if not turns:
        raise UserError("messages", len(messages), "there is no assistant turn", "Add one.")
    if tokenizer.template is not None:
        return [_template_lesson(messages[:i], messages[i], tokenizer, tools) for i in turns]
    form = form_of(tokenizer)
    tokenizer.require(*form.marks, THINK, END_THINK)
    prompts, answers = zip(*(_taught(messages, i, form, tools) for i in turns), strict=True)
    whole = prompts[-1] + answers[-1]
    within: list[tuple[int, int]] = []
    others: list[Lesson] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        pieces, span = prompt + answer, (len(prompt), len(prompt) + len(answer))
        if whole[: span[1]] == pieces:
            within.append(span)
        else:
            others.append(_lesson(pieces, [span], tokenizer))
    return [_lesson(whole, within, tokenizer), *others]


def _taught(
    messages: Sequence[Message], turn: int, form: PromptForm, tools: Sequence[Tool]
) -> tuple[list[str], list[str]]:
    """The prompt for a turn, and the turn as its answer.

    If the form's prompts state whether the model thinks, it thinks if the turn has reasoning; with tools, if any turn has,
    since all turns then share one mode.
    """
    thinks = any(m.reasoning for m in (messages if tools else [messages[turn]]))
    think = None if form.thinks is None else thinks
    prompt = form.prompt(messages[:turn], PromptOptions(tools, think))
    return prompt, form.learnt(messages[turn], opened=prompt[-1] is THINK)


def _lesson(pieces: Sequence[str], answers: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> Lesson:
    """A lesson for the pieces within `answers`; these start and end at special tokens."""
    ids: list[int] = []
    labels: list[int] = []
    start = 0
    for begin, end in answers:
        prompt, answer = map(tokenizer.encode_pieces, (pieces[start:begin], pieces[begin:end]))
        ids += prompt + answer
        labels += [IGNORE] * len(prompt) + answer
        start = end
    return Lesson(ids, labels)


def _template_lesson(asked: Sequence[Message], answer: Message, tokenizer: Tokenizer, tools: Sequence[Tool]) -> Lesson:
    """The template's prompt, followed by the answer as the model should give it."""
    if answer.tool_calls:
        problem = "training on calls is not supported with a chat template"
        remedy = "Leave them out, or use a model without a template."
        raise UserError("messages", [call.name for call in answer.tool_calls], problem, remedy)
    think = True if answer.reasoning else None
    text = _render(asked, tokenizer, tools, think)
    reply, _ = _template_reply(text, answer, think, is_whole=True)
    ends = [token for token in (tokenizer.eos, *tokenizer.stops) if token >= 0]
    if not ends:
        problem = "has no end-of-sequence token"
        raise UserError("tokenizer", str(tokenizer.path), problem, "Add eos_token to its tokenizer_config.json.")
    prompt, made = tokenizer.encode_marked(text), [*tokenizer.encode_marked(reply), ends[0]]
    return Lesson(prompt + made, [IGNORE] * len(prompt) + made)


def _template_reply(text: str, begun: Message, think: bool | None, is_whole: bool = False) -> tuple[str, bool]:
    """The text after a template's prompt, reasoning and answer so far, and whether it ends inside the reasoning.

    Templates tend to rewrite a last message, so a begun one is appended to the prompt for a new message.
    """
    is_open = text.rstrip().endswith(THINK)
    gap = "" if text.endswith(THINK) else "\n"  # V3.1 writes no newlines around a chain
    answers = bool(begun.content) or is_whole
    if begun.reasoning:
        start = begun.reasoning if is_open else f"{THINK}{gap}{begun.reasoning}"
        return (f"{start}{gap}{END_THINK}{gap}{gap}{begun.content}", False) if answers else (start, True)
    if is_open and (answers or think is False):  # Qwen's format of an empty chain
        newlines = "\n" * (2 - text[-2:].count("\n"))
        return f"{newlines}{END_THINK}\n\n{begun.content}", False
    return (THINK, True) if think and not is_open else (begun.content, is_open)


def _render(messages: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Tool], think: bool | None) -> str:
    """Renders the prompt; tools that the template omits are described in the system message, if the model can call."""
    assert tokenizer.template is not None, "DeepSeek's form has no template"
    render = tokenizer.template.render_prompt
    switches = {} if think is None else {"thinking": think, "enable_thinking": think}
    raw = [message.to_openai() for message in messages]
    text = render(raw, **switches)
    if not tools:
        return text
    with_tools = render(raw, tools=[tool.source for tool in tools], **switches)
    if with_tools != text:
        return with_tools
    if len(tokenizer.encode_marked(CALL_BEGIN)) > 1:
        remedy = "Leave them out, or use a model that was trained to call them."
        raise UserError("tools", [tool.name for tool in tools], "the model's chat template writes no tools", remedy)
    section = "".join(tool_pieces(tools, fenced="```json" in render(CALL_PROBE)))
    system = "\n\n".join([*(m.content for m in messages if m.role == "system"), section])
    return render([{"role": "system", "content": system}, *(m for m in raw if m["role"] != "system")], **switches)
