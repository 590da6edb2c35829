"""Converts tokens to text as they arrive: never emits partial characters, and catches stop strings before they are shown."""

from collections.abc import Sequence

from finback.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what decoders emit for an incomplete character


class Detokenizer:
    """The text of a request: `pieces` are final and in order; `stop` is the stop string that ended it."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, tuple(stops)
        self.pieces: list[str] = []
        self.stop: str | None = None
        self._ids: list[int] = []  # tokens since the last boundary of text and tokens, with some context before it
        self._whole = 0  # how many of these have been emitted
        self._pending = ""  # text that may be the start of a stop string
        self._is_answer = True  # whether stop strings apply

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.pieces)

    def push(self, tokens: Sequence[int], is_answer: bool = True) -> int | None:
        """Adds tokens one by one. Returns the number of tokens used when a stop string is complete, else None.

        Stop strings do not apply inside the chain of thought and the line breaks after it.
        """
        self._is_answer = self._is_answer and is_answer
        for used, token in enumerate(tokens, start=1):
            self._ids.append(token)
            # decoded with context: some decoders treat the first token of a text differently
            before = self.tokenizer.decode(self._ids[: self._whole])
            now = self.tokenizer.decode(self._ids)
            if now.endswith(UNFINISHED) and len(self._ids) - self._whole < 8:
                continue
            if now[len(before) :]:  # a token without text, such as a special token, cannot serve as context
                self._ids = self._ids[self._whole :]
            self._whole = len(self._ids)
            if self._release(now[len(before) :], is_answer):
                return used
        return None

    def end(self) -> None:
        """Releases the remaining text: no more tokens follow."""
        if self.stop is None:
            before = self.tokenizer.decode(self._ids[: self._whole])
            rest = self.tokenizer.decode(self._ids)[len(before) :]
            self._ids, self._whole = [], 0
            if not self._release(rest, self._is_answer):
                self._emit(self._pending)
                self._pending = ""

    def _release(self, new: str, is_answer: bool = True) -> bool:
        """Releases what cannot become a stop string. Returns True if one is complete."""
        if self.stops and not self._is_answer:
            answer = new.lstrip("\r\n") if is_answer else ""
            self._emit(new[: len(new) - len(answer)])
            self._is_answer, new = bool(answer), answer
        text = self._pending + new
        met = [(place, stop) for stop in self.stops if (place := text.find(stop)) >= 0]
        if met:
            place, self.stop = min(met)
            self._emit(text[:place])
            self._pending = ""
            return True
        withheld = overlap(text, self.stops)
        self._pending = text[len(text) - withheld :]
        self._emit(text[: len(text) - withheld])
        return False

    def _emit(self, text: str) -> None:
        if text:
            self.pieces.append(text)


def overlap(text: str, marks: Sequence[str], start: int = 0) -> int:
    """Length of the longest suffix of a text, from `start` on, that may be the beginning of one of the marks."""
    longest = min(max(map(len, marks), default=1) - 1, len(text) - start)
    return next((n for n in range(longest, 0, -1) if any(mark.startswith(text[-n:]) for mark in marks)), 0)
