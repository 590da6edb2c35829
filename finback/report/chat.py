"""A conversation in the terminal: one line a turn, thinking dimmed while it streams."""

import contextlib
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from finback.checkpoint.inference import InferenceDtype
from finback.checkpoint.models import find_model
from finback.config import UserError
from finback.data.messages import Message, parse_response
from finback.data.tokenizer import END_THINK, THINK
from finback.engine.llm import LLM
from finback.engine.open import ANSWERING
from finback.report.options import ChatOptions

THINKING = {"on": True, "off": False, "auto": None}
HELP = "/new forgets the dialogue, /think on|off|auto, /seed N, /save FILE (JSON lines), Ctrl-C stops a reply, Ctrl-D ends."
DIM, PLAIN = "\033[2m", "\033[0m"


class Conversation:
    """Messages so far and a model to continue them; old turns are dropped when the window is full.

    `think` True opens the chain of thought for the model, False keeps it from thinking, None leaves it to the model.
    """

    def __init__(self, model: Path, seed: int, dtype: InferenceDtype = "auto", **chosen: float | None) -> None:
        self.llm = LLM(model, dtype, replace(ANSWERING, rows=1))
        self.sampling = self.llm.defaults(
            **{"max_tokens": min(1024, self.llm.window // 8)} | {n: v for n, v in chosen.items() if v is not None}
        )
        if self.sampling.max_tokens >= self.llm.window:
            problem = f"no room for a message: the model reads {self.llm.window} tokens"
            raise UserError("--max-tokens", self.sampling.max_tokens, problem, "Lower it.")
        self.seed = seed
        self.messages: list[Message] = []
        self.replies = 0
        self.think: bool | None = None

    def reply(self, text: str) -> Iterator[str]:
        """Pieces of the answer to `text` as they are made, tags included; remembers the answer when it is whole."""
        self.messages.append(Message("user", text))
        made: list[str] = []
        stream = self.llm.stream(self._fitting(), self.sampling, self.think, self.seed + self.replies)
        self.replies += 1
        try:
            for piece in stream:
                made.append(piece)
                yield piece
        finally:  # also when the user stops the reply: its beginning is part of the dialogue
            response = parse_response("".join(made))
            self.messages.append(Message("assistant", response.answer, response.reasoning))

    def command(self, line: str) -> str:
        """Obey a line that begins with a slash; what there is to say about it. UserError when it is unknown."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "/new" and not rest:
            self.messages = []
            return "a new dialogue"
        if word == "/think" and rest in THINKING:
            self.think = THINKING[rest]
            return f"thinking: {rest}"
        if word == "/seed" and rest.isdigit():
            self.seed, self.replies = int(rest), 0
            return f"seed {rest}"
        if word == "/save" and rest:
            return self._save(Path(rest))
        if word == "/help":
            return HELP
        raise UserError("command", line, "not understood", HELP)

    def _save(self, path: Path) -> str:
        turns = [m.to_openai() for m in self.messages]
        try:
            with path.open("x", encoding="utf-8") as file:
                file.writelines(json.dumps(turn, ensure_ascii=False) + "\n" for turn in turns)
        except OSError as error:
            raise UserError("/save", str(path), error.strerror or str(error), "Name a new file.") from None
        return f"{len(turns)} messages in {path}"

    def _fitting(self) -> list[dict[str, Any]]:
        """The dialogue without its oldest turns, which no longer fit into the window."""
        room = self.llm.window - self.sampling.max_tokens
        while True:
            turns = [m.to_openai() for m in self.messages]
            length = len(self.llm.encode(turns, self.think)[0])
            if length <= room:
                return turns
            if len(self.messages) == 1:
                self.messages = []
                raise UserError("message", f"{length} tokens", f"the model reads {room}", "Say it in fewer words.")
            del self.messages[:2]


def loop(options: ChatOptions, as_json: bool, color: bool) -> None:
    """Read lines from stdin and answer each; prompts and help only when a person sits there."""
    folder = find_model(options.model)
    conversation = Conversation(folder, options.seed, options.dtype, **options.sampling())
    person = sys.stdin.isatty() and not as_json
    if person:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - lines can be edited and called back with the arrow keys
        print(f"{folder}: what it says may be wrong. /help says what else it understands.", file=sys.stderr)
    dialogue: list[dict[str, Any]] = []
    while (line := _ask(person)) is not None:
        if not line.strip():
            continue
        try:
            if line.startswith("/"):
                print(conversation.command(line.strip()), file=sys.stderr)
                continue
            if as_json:
                "".join(conversation.reply(line.strip()))
            else:
                _print(conversation.reply(line.strip()), color and sys.stdout.isatty())
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print(f"{PLAIN if color else ''} (stopped)", file=sys.stderr)
        last = conversation.messages[-1]
        dialogue.append({"user": line.strip(), "thinking": last.reasoning, "assistant": last.content})
    if as_json:
        print(json.dumps({"model": str(folder), "dialogue": dialogue}, ensure_ascii=False))


def _ask(person: bool) -> str | None:
    if not person:
        return sys.stdin.readline() or None
    try:
        return input("you: ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _print(pieces: Iterator[str], color: bool) -> None:
    """Write pieces as they come; with color the chain is dim and its tags are gone, without they stay."""
    for piece in pieces:
        if color:
            piece = piece.replace(THINK, DIM).replace(END_THINK, f"{PLAIN}\n")
        print(piece, end="", flush=True)
    print(PLAIN if color else "")
