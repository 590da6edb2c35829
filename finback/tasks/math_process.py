"""Compares mathematics in a worker process that can be killed, since parsing a model's text can hang. Does not import torch."""

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.extras import how_to_install

WORKER = Path(__file__).with_name("math_worker.py")
MAX_CHARACTERS = 500  # characters of an answer
_DEEPEST = 12  # nested braces
_PATIENCE = 10  # wall seconds per CPU second


@dataclass(frozen=True)
class Comparison:
    """Whether an answer equals the gold answer, and whether it is mathematics at all."""

    same: bool
    read: bool


NOTHING = Comparison(same=False, read=False)


def compare(gold: str, answer: str) -> Comparison:
    """Compares two answers in LaTeX or plain notation; one that needs too much time or memory, or nests too deep, is wrong."""
    if len(answer) > MAX_CHARACTERS or "__" in answer or not _is_balanced(answer):
        return NOTHING
    return shared().compare(gold, answer)


class MathProcess:
    """One worker, started at first use and restarted when it has ended. Threads take turns.

    One comparison may use `seconds` of CPU time in the worker, so a busy machine gives the same marks as an idle one. A
    worker that hangs is ended after `_PATIENCE` times as many wall seconds.
    """

    def __init__(self, seconds: int = 5, megabytes: int = 1024, program: Path = WORKER) -> None:
        self.seconds, self.megabytes, self.program = seconds, megabytes, program
        self._lock, self._owner = threading.Lock(), os.getpid()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The worker's pid, None if there is no worker."""
        return self._process.pid if self._process is not None else None

    def compare(self, gold: str, answer: str) -> Comparison:
        """Whether two expressions are equal, and whether both could be parsed; starts the worker if none runs."""
        request = json.dumps({"gold": gold, "answer": answer}).encode() + b"\n"
        with self._lock:
            for _ in range(2):  # if it was killed from outside, ask a new worker
                reply = _asked(self._process or self._start(), request, _PATIENCE * self.seconds)
                if reply is not None:
                    return Comparison(reply["same"], reply["read"])
                if self._end() != -signal.SIGKILL:
                    break
            return NOTHING  # the time or the memory ran out

    def close(self) -> None:
        """Ends the worker, if this process started it."""
        if os.getpid() == self._owner:  # not in a forked process: the worker is its parent's
            with self._lock:
                self._end()

    def _start(self) -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-P", str(self.program), str(self.seconds), str(self.megabytes)]
        self._process = process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C must reach only the run, which then ends its worker
        )
        if _asked(process, b"", 120) is None:  # importing sympy takes a second on an idle machine
            self._end()
            raise UserError("math-verify", command[2], "its worker does not start", how_to_install("math-verify"))
        return process

    def _end(self) -> int | None:
        """Ends the worker, if there is one. Returns its exit status."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.terminate()  # SIGKILL would look like a kill from outside
        process.communicate()  # waits, and closes the pipes
        return process.returncode


def shared() -> MathProcess:
    """This process's worker; a forked process must not read replies to its parent."""
    return _of_process(os.getpid())


@lru_cache(maxsize=1)
def _of_process(pid: int) -> MathProcess:
    worker = MathProcess()
    atexit.register(worker.close)
    return worker


def _asked(process: "subprocess.Popen[bytes]", request: bytes, seconds: float) -> dict[str, Any] | None:
    """The worker's next line as JSON; None if it ended or took longer than `seconds`."""
    assert process.stdin and process.stdout
    until, reply = time.monotonic() + seconds, b""
    try:
        process.stdin.write(request)
        process.stdin.flush()
        while not reply.endswith(b"\n"):
            left = max(0.0, until - time.monotonic())
            part = os.read(process.stdout.fileno(), 4096) if select.select([process.stdout], [], [], left)[0] else b""
            if not part:
                return None
            reply += part
    except BrokenPipeError:
        return None
    return json.loads(reply)


def _is_balanced(text: str) -> bool:
    """Whether braces match and no brackets are nested deeply, which takes forever to parse."""
    braces = depth = 0
    for char in text:
        braces += (char == "{") - (char == "}")
        depth += (char in "{([") - (char in "})]")
        if braces < 0 or depth > _DEEPEST:
            return False
    return braces == 0
