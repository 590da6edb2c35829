"""Messages to the token ids of a prompt, a training document or a lesson, and a response back to its parts.

What a server is sent, with tools and past chains, becomes ids in dialogue.py, in the same form.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from finback.config import UserError
from finback.data.tokenizer import ADDED, ASSISTANT, BOS, END_THINK, EOS, THINK, USER, Tokenizer


@dataclass(frozen=True)
class Message:
    """One turn. `reasoning` is the assistant's chain of thought: part of training text, never of later prompts (R1)."""

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning: str = ""


@dataclass(frozen=True)
class Response:
    """What a model said: its chain, its answer, whether it opened one and whether it closed it."""

    reasoning: str
    answer: str
    thinks: bool
    closed: bool


def parse_response(text: str) -> Response:
    """Split generated text into chain and answer; an unclosed chain has no answer."""
    text = text.lstrip()  # some models begin with a line break
    if not text.startswith(THINK):
        return Response("", text.strip(), thinks=False, closed=True)
    chain, closed, answer = text.removeprefix(THINK).partition(END_THINK)
    return Response(chain.strip(), answer.strip(), thinks=True, closed=bool(closed))


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer, think: bool = False) -> list[int]:
    """Ids that ask for the next assistant turn; `think` opens the chain for the model (the prefilled-<think> case).

    A tokenizer with a chat template writes the dialogue by it, as transformers would; special tokens in a user's
    words then count, as they do there. Without one the form is DeepSeek's.
    """
    if tokenizer.template is not None:
        return tokenizer.encode_marked(prompt_text(messages, tokenizer, think))
    require_special_tokens(tokenizer)
    ids = [tokenizer.bos]
    for message in messages:
        ids += turn(message, tokenizer, with_thinking=False)
    return ids + [tokenizer.ids[ASSISTANT]] + ([tokenizer.ids[THINK]] if think else [])


def prompt_text(messages: Sequence[Message], tokenizer: Tokenizer, think: bool = False) -> str:
    """The text of a prompt by the tokenizer's own template; `think` opens the chain where the template does not."""
    text = rendered(messages, tokenizer, think)
    return text + (THINK if think and not is_open(text) else "")


def rendered(messages: Sequence[Message], tokenizer: Tokenizer, think: bool) -> str:
    """What the template itself writes; V3.1's opens the chain, or closes it at once, by the variable `thinking`."""
    assert tokenizer.template is not None, "without a template a prompt is ids, not text"
    said = [{"role": m.role, "content": m.content} for m in messages]
    return tokenizer.template.render(said, add_generation_prompt=True, **({"thinking": True} if think else {}))


def opens_chain(tokenizer: Tokenizer) -> bool:
    """Whether the template itself opens the chain at the end of a prompt, as R1's does since February 2025."""
    if tokenizer.template is None:
        return False
    return is_open(tokenizer.template.render([{"role": "user", "content": "?"}], add_generation_prompt=True))


def is_open(text: str) -> bool:
    """Whether a prompt's text ends inside a chain that nothing stands in yet."""
    return text.rstrip().endswith(THINK)


IGNORE = -100  # the label of a token that is not learnt, as in transformers and torch
Piece = int | str  # a token, or text that is still to be encoded


def encode_document(messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
    """Ids of a whole dialogue as training text, chains included, ended by eos after every assistant turn."""
    return _encoded(document_pieces(messages, tokenizer), tokenizer)


def document_pieces(messages: Sequence[Message], tokenizer: Tokenizer) -> list[Piece]:
    """A dialogue as training text before its texts are encoded, so that many can be encoded together."""
    if tokenizer.template is not None:
        raise UserError(
            "tokenizer",
            str(tokenizer.path),
            "writes dialogues by a template of its own",
            "Training text is written in DeepSeek's form only: use a tokenizer that the prepare stage made.",
        )
    require_special_tokens(tokenizer)
    pieces: list[Piece] = [tokenizer.bos]
    for message in messages:
        pieces += _pieces(message, tokenizer, with_thinking=True)
    return pieces if messages and messages[-1].role == "assistant" else [*pieces, tokenizer.eos]


def require_special_tokens(tokenizer: Tokenizer, marks: Collection[str] = (BOS, EOS, *ADDED)) -> None:
    """UserError if a tokenizer without a template lacks one of these tokens."""
    if lacks := [token for token in tokenizer.lacks if token in marks]:
        raise UserError(
            "tokenizer",
            str(tokenizer.path),
            f"has no chat template and lacks the tokens {lacks}",
            "Use a model that was taught to chat, or put a chat_template.jinja beside it.",
        )


def turn(message: Message, tokenizer: Tokenizer, with_thinking: bool) -> list[int]:
    """Ids of one turn in DeepSeek's form, the mark that opens it included."""
    return _encoded(_pieces(message, tokenizer, with_thinking), tokenizer)


def _pieces(message: Message, tokenizer: Tokenizer, with_thinking: bool) -> list[Piece]:
    if message.role == "system":
        return [message.content]
    if message.role == "user":
        return [tokenizer.ids[USER], message.content]
    pieces: list[Piece] = [tokenizer.ids[ASSISTANT]]
    if with_thinking and message.reasoning:
        pieces += [tokenizer.ids[THINK], message.reasoning, tokenizer.ids[END_THINK]]
    return [*pieces, message.content, tokenizer.eos]


def _encoded(pieces: Sequence[Piece], tokenizer: Tokenizer) -> list[int]:
    return [i for piece in pieces for i in ([piece] if isinstance(piece, int) else tokenizer.encode(piece))]


@dataclass(frozen=True)
class Lesson:
    """A dialogue's ids, and its labels: the same ids where the assistant speaks, IGNORE elsewhere (not shifted)."""

    ids: list[int]
    labels: list[int]


def lessons(messages: Sequence[Message], tokenizer: Tokenizer) -> list[Lesson]:
    """The lessons of a dialogue. A prompt never holds the chains of earlier turns, so no lesson does either.

    In DeepSeek's form one lesson teaches all turns, and one more each turn whose chain the first had to leave out. A
    model with a template of its own gets one lesson for each assistant turn, behind the prompt that its template writes.
    """
    turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
    if not turns:
        raise UserError("messages", len(messages), "nothing that an assistant says", "Give it something to learn.")
    if tokenizer.template is not None:
        return [_lesson_by_template(messages[: i + 1], tokenizer) for i in turns]
    require_special_tokens(tokenizer)
    *earlier, last = turns
    chained = [i for i in earlier if messages[i].reasoning]
    whole = [replace(m, reasoning="") if i in chained else m for i, m in enumerate(messages[: last + 1])]
    bare = [replace(m, reasoning="") for m in messages]
    return [
        _lesson(whole, set(turns) - set(chained), tokenizer),
        *(_lesson([*bare[:i], messages[i]], {i}, tokenizer) for i in chained),
    ]


def _lesson(messages: Sequence[Message], learnt: set[int], tokenizer: Tokenizer) -> Lesson:
    """In DeepSeek's form; the mark that opens an assistant's turn belongs to the prompt."""
    ids, labels = [tokenizer.bos], [IGNORE]
    for index, message in enumerate(messages):
        said = turn(message, tokenizer, with_thinking=True)
        ids += said
        labels += [IGNORE, *said[1:]] if index in learnt else [IGNORE] * len(said)
    return Lesson(ids, labels)


def _lesson_by_template(messages: Sequence[Message], tokenizer: Tokenizer) -> Lesson:
    """The template's prompt for all but the last message, then that message as the model should say it."""
    *said, answer = messages
    text = rendered(said, tokenizer, think=bool(answer.reasoning))
    opened, spaced = is_open(text), text.endswith("\n")
    reply = answer.content
    if answer.reasoning or opened:
        gap = "\n" if spaced or not opened else ""
        reply = f"{'' if opened else THINK + gap}{answer.reasoning}{gap}{END_THINK}{gap * 2}{answer.content}"
    prompt = tokenizer.encode_marked(text)
    made = [*tokenizer.encode_marked(reply), _end(tokenizer)]
    return Lesson(prompt + made, [IGNORE] * len(prompt) + made)


def _end(tokenizer: Tokenizer) -> int:
    """The token that ends an answer: eos, or what generation_config.json stops at."""
    ends = [token for token in (tokenizer.eos, *tokenizer.stops) if token >= 0]
    if not ends:
        raise UserError(
            "tokenizer",
            str(tokenizer.path),
            "names no token that ends an answer",
            "Put eos_token into its tokenizer_config.json.",
        )
    return ends[0]
