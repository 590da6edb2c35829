"""Heartbeats between ranks, outside their collectives: signs of life, and the reason when a rank ends.

Every rank has one TCP connection to rank 0, which carries lines of JSON. So a rank that hangs or dies is named, and an
error on one rank ends all of them with its message. Does not import torch.
"""

import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from finback.config import UserError

WAIT = "FINBACK_RANK_TIMEOUT"  # the environment variable with the seconds that a rank may be silent
DEFAULT_WAIT = 40.0
GRACE = 5.0  # seconds that a rank has to end by itself after it learns of a failure
LONGEST = 1 << 24  # most bytes of a message


@dataclass(frozen=True)
class Ending:
    """The reason why the ranks end, the rank that caused it, and the exit code."""

    rank: int
    text: str
    code: int


@dataclass(eq=False)
class Line:
    """A connection and the state of the rank at its other end."""

    socket: socket.socket
    rank: int = 0
    who: str = "rank 0"
    heard: float = field(default_factory=time.monotonic)
    closed: bool = False
    # whether the rank has announced that it is done
    left: bool = False
    unread: bytes = b""

    def __post_init__(self) -> None:
        self.socket.settimeout(GRACE)

    def send(self, **message: Any) -> None:
        """Writes a message; marks a broken connection as closed instead of raising."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.closed = True

    def read(self) -> list[dict[str, Any]]:
        """Reads from a readable connection and returns the complete messages; marks it closed at its end or on bad input."""
        try:
            found = self.socket.recv(1 << 16)
        except OSError:
            found = b""
        self.heard = time.monotonic()
        *lines, self.unread = (self.unread + found).split(b"\n")
        self.closed = self.closed or not found or len(self.unread) > LONGEST
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            messages = []
            self.closed = True
        return [message for message in messages if isinstance(message, dict)]


def readable(lines: Iterable[Line], seconds: float, *servers: socket.socket) -> list[Any]:
    """The lines and listening sockets that become readable within `seconds`."""
    with selectors.DefaultSelector() as selector:
        for line in lines:
            selector.register(line.socket, selectors.EVENT_READ, line)
        for server in servers:
            selector.register(server, selectors.EVENT_READ, server)
        return [key.data for key, _ in selector.select(seconds)]


def wait_of(environment: Mapping[str, str]) -> float:
    """The seconds that a rank may be silent; UserError if the environment variable is not a number of at least 1."""
    text = environment.get(WAIT, "") or str(DEFAULT_WAIT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e6:
        raise UserError(
            WAIT, text, "not a number of seconds of at least 1", f"Unset it for {DEFAULT_WAIT:.0f} seconds."
        )
    return seconds


class Heartbeat:
    """A rank's connections to the others; a thread sends and receives signs of life until `leave`."""

    def __init__(self, rank: int, wait: float, lines: list[Line]) -> None:
        """wait: seconds that another rank may be silent. lines: on rank 0 to all others, on the others to rank 0."""
        self.rank, self.wait, self.lines = rank, wait, lines
        self.ending: Ending | None = None
        # called before the heartbeat thread exits the process
        self.at_end: Callable[[], None] = lambda: None
        self._known, self._done, self._writing = threading.Event(), threading.Event(), threading.Lock()
        self._since = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    def tell(self, text: str, code: int) -> None:
        """Sends all ranks the reason why this one ends; they end as well."""
        self._end(Ending(self.rank, text, code))

    def reason(self, seconds: float = GRACE) -> Ending | None:
        """The reason why a rank has ended, waiting up to `seconds` for it; None if it remains unknown."""
        self._known.wait(seconds)
        return self.ending

    def leave(self) -> None:
        """Announces that this rank is done, and stops listening."""
        self._say(bye=True)
        self._done.set()

    def _run(self) -> None:
        every = self.wait / 8
        mark = due = time.monotonic()
        while not self._done.is_set():
            self._listen(every / 4)
            now = time.monotonic()
            if now - mark > self.wait / 2:  # this process was suspended, so silence says nothing about the others
                for line in self.lines:
                    line.heard = now
            mark = now
            if now >= due:
                self._say()
                due = now + every
            if self.ending is None:
                self._judge(now)
            elif now - self._since > GRACE and not self._done.is_set():
                self.at_end()
                print(f"error: {self.ending.text}", file=sys.stderr, flush=True)
                os._exit(self.ending.code)
        for line in self.lines:
            line.socket.close()

    def _listen(self, seconds: float) -> None:
        lines = [line for line in self.lines if not line.closed]
        if not lines:
            self._done.wait(seconds)
        for line in readable(lines, seconds) if lines else ():
            for message in line.read():
                line.left = line.left or "bye" in message
                if "end" in message:
                    self._end(Ending(**message["end"]))

    def _judge(self, now: float) -> None:
        """Ends all ranks if one has disconnected or is silent for too long, and names it."""
        for line in self.lines:
            if line.left:
                continue
            if line.closed:
                text = "has disconnected: it was killed, or its machine is down"
            elif now - line.heard > self.wait:
                silent = f"{now - line.heard:.0f} s ({WAIT} changes the limit)"
                text = f"has given no sign of life for {silent}: it hangs, or its network is down"
            else:
                continue
            again = "The same command continues from the last checkpoint."
            self._end(Ending(line.rank, f"{line.who} {text}. {again}", 1))
            return

    def _end(self, ending: Ending) -> None:
        if self.ending is None:
            self.ending, self._since = ending, time.monotonic()
            self._say(end=vars(ending))
            self._known.set()

    def _say(self, **message: Any) -> None:
        with self._writing:
            for line in self.lines:
                if not line.closed:
                    line.send(**message)
