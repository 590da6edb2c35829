"""The one way from messages to token ids, and from a response back to its reasoning and answer.

A tokenizer with a chat template writes dialogues by it, as transformers does; special tokens in a user's words then
count. Without one the form is DeepSeek's, written from ids that nobody's words can forge: system messages and tools come
first, reasoning of the past is left out except in turns that called tools since the user last spoke, and calls and their
results are written as V3.1 writes them. A prompt is always a prefix of the lesson that teaches its answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from finback.config import UserError
from finback.data.template import CALL_PROBE
from finback.data.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER, Tokenizer
from finback.data.tools import CALL_BEGIN, OUTPUT_BEGIN, OUTPUT_END, Tool, ToolCall, call_pieces, tool_pieces

# what DeepSeek's form is written with, but for chains of thought and tools
FORM = (BOS, EOS, USER, ASSISTANT)
# the label of a token that is not learnt, as in transformers and torch
IGNORE = -100


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue; what a role does not have is empty."""

    # system, user, assistant or tool
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


@dataclass(frozen=True)
class Response:
    """A completion's reasoning and answer; whether it has reasoning at all, and whether that is closed."""

    reasoning: str
    answer: str
    thinks: bool
    closed: bool


@dataclass(frozen=True)
class Lesson:
    """A dialogue's ids, and its labels: the same ids where the assistant speaks, IGNORE elsewhere (not shifted)."""

    ids: list[int]
    labels: list[int]


def parse_response(text: str) -> Response:
    """Split generated text into reasoning and answer; unclosed reasoning has no answer."""
    text = text.lstrip()  # some models begin with a line break
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
    continue_last: bool = False,
) -> tuple[list[int], bool]:
    """Ids that ask for the next assistant turn, and whether they end inside a chain of thought.

    `think` True opens the chain, False asks for none, None leaves it to the model. `continue_last`, or `prefix` in the
    last message, goes on with the assistant's last message: in its reasoning if it has no content yet, else in its
    answer, which is then an answer without reasoning unless it came with some, whatever `think` says.
    UserError names what does not fit, as in `messages[2].content`.
    """
    begun = Message("assistant", "")
    if messages and (continue_last or messages[-1].prefix):
        *messages, begun = messages
        _check_begun(begun, len(messages))
        think = bool(begun.reasoning) if begun.reasoning or begun.content else think
    if tokenizer.template is not None:
        text = _render(messages, tokenizer, tools, think)
        reply, opened = _template_reply(text, begun, think)
        return tokenizer.encode_marked(text + reply), opened
    tokenizer.require(*FORM)
    knows_chains = {THINK, END_THINK} <= tokenizer.ids.keys()
    pieces = _prompt_pieces(messages, tools, knows_chains)
    if think and not knows_chains:
        problem = "the model's vocabulary has no marks for a chain of thought"
        raise UserError("think", True, problem, "Ask for an answer without one.")
    if think:
        pieces += [THINK, begun.reasoning, *([END_THINK] if begun.content else [])]
    return tokenizer.encode_pieces([*pieces, begun.content]), bool(think) and not begun.content


def begun_chain(message: Message) -> tuple[Message, bool]:
    """An assistant's message with the chain of thought that its content begins with in its place; whether it is open."""
    if not message.content.startswith(THINK):
        return message, False
    chain, closed, answer = message.content.removeprefix(THINK).partition(END_THINK)
    chain = chain.removeprefix("\n")
    return replace(message, reasoning=chain.rstrip() if closed else chain, content=answer.lstrip("\n")), not closed


def encode_document(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Ids of a whole dialogue as training text, all reasoning included, with eos after every assistant turn."""
    return tokenizer.encode_pieces(document_pieces(messages, tokenizer))


def document_pieces(messages: Sequence[Message], tokenizer: Tokenizer) -> list[str]:
    """A dialogue as training text before its texts are encoded, so that many can be encoded together."""
    if tokenizer.template is not None:
        remedy = "Training text is written in DeepSeek's form only: use a tokenizer that the prepare stage made."
        raise UserError("tokenizer", str(tokenizer.path), "writes dialogues by a template of its own", remedy)
    tokenizer.require(*FORM, THINK, END_THINK)
    pieces, _ = _turn_pieces(messages, (), set(range(len(messages))))
    return pieces if messages and messages[-1].role == "assistant" else [*pieces, EOS]


def lessons(messages: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Tool] = ()) -> list[Lesson]:
    """The lessons of a dialogue: every answer that is `learnt` behind the very prompt that asks for it.

    In DeepSeek's form one lesson teaches the last answer and all whose prompts it begins with; those whose reasoning it
    leaves out have lessons of their own. A template may reshape past turns, so there each answer has its own.
    """
    turns = [i for i, m in enumerate(messages) if m.role == "assistant" and m.learnt]
    if not turns:
        raise UserError("messages", len(messages), "nothing that an assistant says", "Give it something to learn.")
    if tokenizer.template is not None:
        return [_template_lesson(messages[:i], messages[i], tokenizer, tools) for i in turns]
    tokenizer.require(*FORM, THINK, END_THINK)
    prompts = [_prompt_pieces(messages[:i], tools) for i in turns]
    answers = [_answer_pieces(messages[i], with_reasoning=True) for i in turns]
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


def _check_begun(begun: Message, place: int) -> None:
    if begun.role != "assistant":
        remedy = "End with an assistant's message, or ask for a new one."
        raise UserError(f"messages[{place}].role", begun.role, "only an assistant's message can be continued", remedy)
    if begun.tool_calls:
        problem = "a message with calls cannot be continued"
        remedy = "Leave them out, or send their results."
        raise UserError(f"messages[{place}].tool_calls", [c.name for c in begun.tool_calls], problem, remedy)


def _prompt_pieces(messages: Sequence[Message], tools: Sequence[Tool] = (), knows_chains: bool = True) -> list[str]:
    """A prompt in DeepSeek's form, special tokens and plain texts."""
    asked = max((i for i, m in enumerate(messages) if m.role == "user"), default=-1)
    shown = {i for i, m in enumerate(messages) if knows_chains and m.tool_calls and i > asked}
    pieces, is_answering = _turn_pieces(messages, tools, shown)
    return pieces if is_answering else [*pieces, ASSISTANT]


def _turn_pieces(messages: Sequence[Message], tools: Sequence[Tool], shown: set[int]) -> tuple[list[str], bool]:
    """Turns in DeepSeek's form, with the reasoning of those that are `shown`; whether the last ones are tools' results.

    After results the assistant goes on without a mark of its own.
    """
    pieces: list[str] = [BOS, *_system_pieces(messages, tools)]
    is_answering = False
    for i, message in enumerate(messages):
        if message.role == "user":
            pieces += [USER, message.content]
        elif message.role == "tool":
            pieces += [OUTPUT_BEGIN, message.content, OUTPUT_END]
        elif message.role == "assistant":
            pieces += [*([] if is_answering else [ASSISTANT]), *_answer_pieces(message, i in shown)]
        is_answering = message.role == "tool" or (is_answering and message.role == "system")
    return pieces, is_answering


def _system_pieces(messages: Sequence[Message], tools: Sequence[Tool]) -> list[str]:
    """All system messages and the tools, a blank line between them."""
    text = "\n\n".join(m.content for m in messages if m.role == "system")
    if not tools:
        return [text]
    return [text + "\n\n" if text else "", *tool_pieces(tools)]


def _answer_pieces(message: Message, with_reasoning: bool) -> list[str]:
    reasoning = [THINK, message.reasoning, END_THINK] if with_reasoning and message.reasoning else []
    return [*reasoning, message.content, *call_pieces(message.tool_calls), EOS]


def _lesson(pieces: Sequence[str], answers: Sequence[tuple[int, int]], tokenizer: Tokenizer) -> Lesson:
    """A lesson of the pieces that lie in `answers`; these begin and end at special tokens."""
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
    """The template's prompt, then the answer as the model should give it."""
    if answer.tool_calls:
        problem = "calls are not learnt in the form of a chat template"
        remedy = "Leave them out, or use a model without a template."
        raise UserError("messages", [call.name for call in answer.tool_calls], problem, remedy)
    think = True if answer.reasoning else None
    text = _render(asked, tokenizer, tools, think)
    reply, _ = _template_reply(text, answer, think, is_whole=True)
    ends = [token for token in (tokenizer.eos, *tokenizer.stops) if token >= 0]
    if not ends:
        problem = "names no token that ends an answer"
        raise UserError("tokenizer", str(tokenizer.path), problem, "Put eos_token into its tokenizer_config.json.")
    prompt, made = tokenizer.encode_marked(text), [*tokenizer.encode_marked(reply), ends[0]]
    return Lesson(prompt + made, [IGNORE] * len(prompt) + made)


def _template_reply(text: str, begun: Message, think: bool | None, is_whole: bool = False) -> tuple[str, bool]:
    """What follows a template's prompt: reasoning and answer as far as they go; whether it ends inside the reasoning.

    Templates tend to reshape a last message, so what was begun is appended to the prompt for a new one.
    """
    is_open = text.rstrip().endswith(THINK)
    gap = "" if text.endswith(THINK) else "\n"  # V3.1 writes no newlines around a chain
    answers = bool(begun.content) or is_whole
    if begun.reasoning:
        start = begun.reasoning if is_open else f"{THINK}{gap}{begun.reasoning}"
        return (f"{start}{gap}{END_THINK}{gap}{gap}{begun.content}", False) if answers else (start, True)
    if is_open and (answers or think is False):  # Qwen's way to say that there is none
        newlines = "\n" * (2 - text[-2:].count("\n"))
        return f"{newlines}{END_THINK}\n\n{begun.content}", False
    return (THINK, True) if think and not is_open else (begun.content, is_open)


def _render(messages: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Tool], think: bool | None) -> str:
    """The prompt by the template; tools that it leaves out are described in the system message, if the model can call."""
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
