"""A conversation in the terminal: one line a turn, thinking dimmed while it streams."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finback.checkpoint import model as models
from finback.checkpoint.model import Answering, find_model
from finback.config import UserError
from finback.data.messages import Message, encode_prompt, parse_response
from finback.data.tokenizer import ASSISTANT, END_THINK, THINK, USER, Tokenizer
from finback.engine.engine import Engine
from finback.engine.request import SamplingParams

LONGEST = 32768  # tokens of a conversation that are kept
THINKING = {"on": True, "off": False, "auto": None}
HELP = "/new forgets the dialogue, /think on|off|auto, /seed N, /save FILE (JSON lines), Ctrl-C stops a reply, Ctrl-D ends."
DIM, PLAIN = "\033[2m", "\033[0m"


class Conversation:
    """Messages so far and a model to continue them; old turns are dropped when the window is full.

    `think` True opens the chain of thought for the model, False keeps it from thinking, None leaves it to the model.
    """

    def __init__(self, folder: Path, seed: int, dtype: Answering = "auto", **chosen: float | None) -> None:
        self.tokenizer = Tokenizer(folder)
        # a mark of a new turn ends this one; a small model sometimes goes on with the next
        turns = [] if self.tokenizer.template else [self.tokenizer.ids.get(t, -1) for t in (USER, ASSISTANT)]
        model = models.load_to_answer(folder, dtype)
        self.engine = Engine(
            model,
            (*self.tokenizer.stops, *turns),
            rows=1,
            tokenizer=self.tokenizer,
            tokens=min(model.config.max_position_embeddings, LONGEST),
            chunk=512,
            reuse=True,
            speculate=True,
        )
        self.sampling, self.seed = self._sampling(chosen), seed
        self.messages: list[Message] = []
        self.replies = 0
        self.think: bool | None = None

    def _sampling(self, chosen: dict[str, float | None]) -> SamplingParams:
        """What the user chose, else what the model's makers recommend in generation_config.json, else 0.7."""
        window = self._window
        settings: dict[str, Any] = {"temperature": 0.7, "max_tokens": min(1024, window // 8)}
        known = self.tokenizer.generation
        settings |= {n: known[n] for n in ("temperature", "top_p", "top_k", "min_p") if known.get(n) is not None}
        return SamplingParams(**settings | {n: v for n, v in chosen.items() if v is not None})

    def reply(self, text: str) -> Iterator[str]:
        """Pieces of the answer to `text` as they are made, tags included; remembers the answer when it is whole."""
        self.messages.append(Message("user", text))
        prompt, opened = self._prompt()
        said: list[str] = [THINK] if opened else []
        yield from said
        mark = self.tokenizer.ids.get(THINK)
        banned = ((mark, float("-inf")),) if self.think is False and mark is not None else ()
        sampling = dataclasses.replace(self.sampling, logit_bias=banned)
        stream = self.engine.talk(prompt, sampling, self.seed + self.replies, opened)
        self.replies += 1
        try:
            for piece in stream:
                said.append(piece)
                yield piece
        finally:  # also when the user stops the reply: what was said is part of the dialogue
            response = parse_response("".join(said))
            self.messages.append(Message("assistant", response.answer, response.reasoning))

    @property
    def _window(self) -> int:
        return min(self.engine.model.config.max_position_embeddings, LONGEST)

    def forget(self) -> None:
        """Start a new dialogue."""
        self.messages = []

    def command(self, line: str) -> str:
        """Obey a line that begins with a slash; what there is to say about it. UserError when it is unknown."""
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if word == "/new" and not rest:
            self.forget()
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
        turns = [
            {"role": m.role, "content": m.content} | ({"reasoning_content": m.reasoning} if m.reasoning else {})
            for m in self.messages
        ]
        try:
            with path.open("x", encoding="utf-8") as file:
                file.writelines(json.dumps(turn, ensure_ascii=False) + "\n" for turn in turns)
        except OSError as error:
            raise UserError("/save", str(path), error.strerror or str(error), "Name a new file.") from None
        return f"{len(turns)} messages in {path}"

    def _prompt(self) -> tuple[list[int], bool]:
        room = self._window - self.sampling.max_tokens
        while True:
            ids, opened = encode_prompt(self.messages, self.tokenizer, think=self.think)
            if len(ids) <= room:
                return ids, opened
            if len(self.messages) == 1:
                self.messages = []
                raise UserError("message", f"{len(ids)} tokens", f"the model reads {room}", "Say it in fewer words.")
            del self.messages[:2]


def loop(path: Path, seed: int, as_json: bool, color: bool, dtype: Answering = "auto", **chosen: float | None) -> None:
    """Read lines from stdin and answer each; prompts and help only when a person sits there.

    `chosen` are fields of SamplingParams; None leaves one to the model's own settings.
    """
    folder = find_model(path)
    conversation = Conversation(folder, seed, dtype, **chosen)
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
                answer = conversation.command(line.strip())
                print(answer, file=sys.stderr)
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
    if person:
        try:
            return input("you: ")
        except EOFError:
            print()
            return None
        except KeyboardInterrupt:
            print()
            return None
    line = sys.stdin.readline()
    return line or None


def _print(pieces: Iterator[str], color: bool) -> None:
    """Write pieces as they come; with color the chain is dim and its tags are gone, without they stay."""
    for piece in pieces:
        if color:
            piece = piece.replace(THINK, DIM).replace(END_THINK, f"{PLAIN}\n")
        print(piece, end="", flush=True)
    print(PLAIN if color else "")
