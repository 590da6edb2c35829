"""Chat in the terminal: one line per turn, thinking dimmed while it streams."""

import contextlib
import difflib
import hashlib
import json
import re
import select
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from finback.checkpoint.inference import InferenceDtype
from finback.checkpoint.models import find_model
from finback.config import UserError, did_you_mean
from finback.data.messages import parse_response
from finback.data.openai_messages import read_messages
from finback.data.tokenizer import END_THINK, THINK
from finback.data.turn import Message
from finback.engine.llm import LLM
from finback.engine.open import ANSWERING
from finback.report.options import ChatOptions
from finback.runs.files import write_json

THINKING = {"on": True, "off": False, "auto": None}
HELP = (
    "/new starts a new dialogue, /model MODEL changes the model, /think on|off|auto, /seed N, /save FILE (JSON lines). "
    "Ctrl-C stops a reply or clears the line; Ctrl-C twice or Ctrl-D quits. Write // for a / at the start of a text."
)
COMMANDS = ("/new", "/model", "/think", "/seed", "/save", "/help")
TWICE = 1.0  # seconds between two Ctrl-C that quit
DIM, PLAIN = "\033[2m", "\033[0m"


class Conversation:
    """The messages so far and a model to continue them; old turns are dropped when the window is full.

    `think`: True opens the chain of thought, False prevents thinking, None leaves it to the model.
    """

    def __init__(self, model: Path, seed: int, dtype: InferenceDtype = "auto", **chosen: float | None) -> None:
        self.dtype, self.chosen = dtype, {n: v for n, v in chosen.items() if v is not None}
        self.use(model)
        self.seed = seed
        self.messages: list[Message] = []
        self.replies = 0
        self.think: bool | None = None

    def use(self, model: Path) -> None:
        """Switches to another model; the dialogue stays. UserError if that is impossible."""
        llm = LLM(model, self.dtype, replace(ANSWERING, rows=1))
        sampling = llm.defaults(**{"max_tokens": min(1024, llm.window // 8)} | self.chosen)
        if sampling.max_tokens >= llm.window:
            problem = f"no room for a message: the model reads {llm.window} tokens"
            raise UserError("--max-tokens", sampling.max_tokens, problem, "Lower it.")
        self.llm, self.sampling = llm, sampling

    def reply(self, text: str) -> Iterator[str]:
        """Yields the answer to `text` in pieces, tags included; stores the complete answer."""
        self.messages.append(Message("user", text))
        made: list[str] = []
        stream = self.llm.stream(self._fitting(), self.sampling, self.think, self.seed + self.replies)
        self.replies += 1
        try:
            for piece in stream:
                made.append(piece)
                yield piece
        finally:  # also if the user stops the reply: its beginning stays in the dialogue
            response = parse_response("".join(made))
            self.messages.append(Message("assistant", response.answer, response.reasoning))

    def command(self, line: str) -> str:
        """Executes a command and returns a message. UserError if it is unknown."""
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
        if word == "/model" and rest:
            found = find_model(Path(rest))
            self.use(found)
            return f"now chatting with {found}"
        if word == "/help":
            return HELP
        raise UserError(
            "command", line, "not understood", did_you_mean(word, COMMANDS) if word not in COMMANDS else HELP
        )

    def _save(self, path: Path) -> str:
        turns = [m.to_openai() for m in self.messages]
        try:
            with path.open("x", encoding="utf-8") as file:
                file.writelines(json.dumps(turn, ensure_ascii=False) + "\n" for turn in turns)
        except OSError as error:
            raise UserError("/save", str(path), error.strerror or str(error), "Give a new file.") from None
        return f"{len(turns)} messages in {path}"

    def _fitting(self) -> list[dict[str, Any]]:
        """The dialogue without the oldest turns that no longer fit into the window."""
        room = self.llm.window - self.sampling.max_tokens
        while True:
            turns = [m.to_openai() for m in self.messages]
            length = len(self.llm.encode(turns, self.think)[0])
            if length <= room:
                return turns
            if len(self.messages) == 1:
                self.messages = []
                raise UserError("message", f"{length} tokens", f"the model reads {room}", "Shorten it.")
            del self.messages[:2]


def loop(options: ChatOptions, as_json: bool, color: bool) -> None:
    """Reads lines from stdin and answers each; prompts and help only if stdin is a terminal."""
    folder = find_model(options.model)
    conversation = Conversation(folder, options.seed, options.dtype, **options.sampling())
    person = sys.stdin.isatty() and not as_json
    kept = None
    if options.kept is not None:
        kept = options.kept / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]}.json"
    if options.resume and kept is not None:
        conversation.messages = _kept(kept)
        print(f"{len(conversation.messages)} messages of the last dialogue", file=sys.stderr)
    if person:
        with contextlib.suppress(ImportError):
            import readline  # lines can be edited and called back with the arrow keys

            # a paste arrives as one text, including line breaks
            readline.parse_and_bind("set enable-bracketed-paste on")
        print(f"{folder}: its answers may be wrong. /help lists commands.", file=sys.stderr)
    dialogue: list[dict[str, Any]] = []
    while (line := _ask(person)) is not None:
        line = line.strip()
        if not line:
            continue
        try:
            if is_command(line):
                print(conversation.command(line), file=sys.stderr)
                continue
            line = line[1:] if line.startswith("//") else line
            if as_json:
                "".join(conversation.reply(line))
            else:
                _print(conversation.reply(line), color and sys.stdout.isatty())
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print(f"{PLAIN if color else ''} (stopped)", file=sys.stderr)
        last = conversation.messages[-1]
        dialogue.append({"user": line, "thinking": last.reasoning, "assistant": last.content})
        if kept is not None and (person or options.resume) and not _keep(kept, conversation.messages):
            kept = None
    if as_json:
        print(json.dumps({"model": str(folder), "dialogue": dialogue}, ensure_ascii=False))


def _ask(person: bool) -> str | None:
    if not person:
        return sys.stdin.readline() or None
    stopped = -TWICE
    while True:
        try:
            return input("you: ") + _pasted()
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            now = time.monotonic()
            if now - stopped < TWICE:
                return None
            stopped = now
            print("(line cleared; press Ctrl-C again to quit)", file=sys.stderr)


def _pasted() -> str:
    """Further lines that arrived with the first: a paste, if the terminal does not mark pastes."""
    found = ""
    while select.select([sys.stdin], [], [], 0)[0] and (line := sys.stdin.readline()):
        found += "\n" + line.rstrip("\n")
    return found


def is_command(line: str) -> bool:
    """Whether a line is a command, perhaps misspelt, rather than a text that starts with a path."""
    word = line.split(maxsplit=1)[0]
    if not re.fullmatch("/[a-z]+", word) or (word not in COMMANDS and Path(word).exists()):
        return False
    return word in COMMANDS or bool(difflib.get_close_matches(word, COMMANDS, cutoff=0.7))


def _keep(path: Path, messages: Sequence[Message]) -> bool:
    """Stores a dialogue for --continue, readable by this user only. Returns whether that was possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(path, [m.to_openai() for m in messages])
        path.chmod(0o600)
    except OSError as error:
        print(f"this dialogue cannot be stored for --continue: {path}: {error.strerror}", file=sys.stderr)
        return False
    return True


def _kept(path: Path) -> list[Message]:
    """The stored dialogue; [] if there is none."""
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return read_messages(found) if found else []
    except (OSError, ValueError) as error:
        raise UserError("--continue", str(path), f"damaged ({error})", "Delete it, or leave out --continue.") from None


def _print(pieces: Iterator[str], color: bool) -> None:
    """Writes pieces as they arrive; with color the chain is dim and its tags are hidden, without color they stay."""
    for piece in pieces:
        if color:
            piece = piece.replace(THINK, DIM).replace(END_THINK, f"{PLAIN}\n")
        print(piece, end="", flush=True)
    print(PLAIN if color else "")
