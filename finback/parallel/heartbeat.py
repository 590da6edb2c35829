"""What ranks say to each other beside their collectives: that they live, and why they end.

Every rank holds one TCP connection to rank 0, on which lines of JSON travel. So a rank that stands still or dies is named,
and a mistake on one rank ends all of them with its message. Does not import torch.
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

WAIT = "FINBACK_RANK_TIMEOUT"  # the variable with the seconds that a rank may be silent
DEFAULT_WAIT = 40.0
GRACE = 5.0  # seconds in which a rank may end by itself once it knows why it has to
LONGEST = 1 << 24  # bytes of a message


@dataclass(frozen=True)
class Ending:
    """Why the ranks end, and with which exit code."""

    rank: int
    text: str
    code: int


@dataclass(eq=False)
class Line:
    """A connection, and what is known of the rank at its other end."""

    socket: socket.socket
    rank: int = 0
    who: str = "rank 0"
    heard: float = field(default_factory=time.monotonic)
    closed: bool = False
    # it said that it is done
    left: bool = False
    unread: bytes = b""

    def __post_init__(self) -> None:
        self.socket.settimeout(GRACE)

    def send(self, **message: Any) -> None:
        """Write a message; a connection that has broken shows when it is read."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.closed = True

    def read(self) -> list[dict[str, Any]]:
        """The messages that have come, once there is something to read."""
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
    """Those of the lines, and of listening sockets, on which something has come within so many seconds."""
    with selectors.DefaultSelector() as selector:
        for line in lines:
            selector.register(line.socket, selectors.EVENT_READ, line)
        for server in servers:
            selector.register(server, selectors.EVENT_READ, server)
        return [key.data for key, _ in selector.select(seconds)]


def wait_of(environment: Mapping[str, str]) -> float:
    """The seconds that a rank may be silent; UserError where the variable holds no such number."""
    text = environment.get(WAIT, "") or str(DEFAULT_WAIT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds < 1e6:
        raise UserError(WAIT, text, "not a number of seconds from 1 on", f"Leave it out for {DEFAULT_WAIT:.0f}.")
    return seconds


class Heartbeat:
    """A rank's connections to the others; a thread gives and takes signs of life until `leave`."""

    def __init__(self, rank: int, wait: float, lines: list[Line]) -> None:
        """wait: seconds that another rank may be silent. lines: to all others on rank 0, to rank 0 on the others."""
        self.rank, self.wait, self.lines = rank, wait, lines
        self.ending: Ending | None = None
        # done before the process is ended from outside its main thread
        self.at_end: Callable[[], None] = lambda: None
        self._known, self._done, self._writing = threading.Event(), threading.Event(), threading.Lock()
        self._since = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    def tell(self, text: str, code: int) -> None:
        """Tell all ranks why this one ends; they end as well."""
        self._end(Ending(self.rank, text, code))

    def reason(self, seconds: float = GRACE) -> Ending | None:
        """Why another rank has ended, as soon as that is known."""
        self._known.wait(seconds)
        return self.ending

    def leave(self) -> None:
        """Say that this rank is done, and stop listening."""
        self._say(bye=True)
        self._done.set()

    def _run(self) -> None:
        every = self.wait / 8
        mark = due = time.monotonic()
        while not self._done.is_set():
            self._listen(every / 4)
            now = time.monotonic()
            if now - mark > self.wait / 2:  # this process has stood still itself
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
        """Name the first rank that has gone or stands still."""
        for line in self.lines:
            if line.left:
                continue
            if line.closed:
                text = "has gone without a word: it was killed, or its machine is down"
            elif now - line.heard > self.wait:
                silent = f"{now - line.heard:.0f} s ({WAIT} changes the wait)"
                text = f"has given no sign of life for {silent}: it stands still, or its network does"
            else:
                continue
            again = "The same command goes on from the last checkpoint."
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
