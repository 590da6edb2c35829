"""Contestants that take turns: each runs in its own processes, driven over pipes, and sleeps while others run.

A machine's speed drifts by tens of percent within minutes, so nothing here is timed alone: every round asks every
contestant for the same work, and ratios are formed within a round.
"""

import multiprocessing
import os
import random
import re
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import IO, Any

import torch

from finback.parallel.launch import core_ranks, die_with_parent

Settings = dict[str, Any]
Work = Callable[[Connection, Settings], None]
CORES = core_ranks(64)


class FailedError(Exception):
    """A contestant failed; the text goes into the results."""


@dataclass
class Contestant:
    """`ranks` processes of `threads` threads that run `work` and get every command at once."""

    name: str
    work: Work
    settings: Settings
    ranks: int = 1
    threads: int = 1
    wait_policy: str | None = "passive"
    spins: bool = False  # threads that never sleep: the processes are stopped between turns
    record: dict[str, Any] = field(default_factory=dict)  # what the results will say about it
    processes: list[BaseProcess] = field(default_factory=list)
    pipes: list[Connection] = field(default_factory=list)

    @property
    def layout(self) -> str:
        return f"{self.ranks}x{self.threads}"

    @property
    def alive(self) -> bool:
        return bool(self.processes)

    def start(self) -> None:
        """Starts the processes; `ready` waits for them."""
        context, port = multiprocessing.get_context("spawn"), _free_port()
        self.begun = time.perf_counter()
        for rank in range(self.ranks):
            ours, theirs = context.Pipe()
            settings = self.settings | {"rank": rank, "ranks": self.ranks}
            process = context.Process(target=_child, args=(theirs, self.work, settings))
            with _environment(self._variables(rank, port)):
                process.start()
            theirs.close()
            self.processes.append(process)
            self.pipes.append(ours)

    def ready(self, patience: float) -> None:
        """Waits for the first message, which each rank sends after its warm-up, and records it."""
        replies = self._replies(patience)
        self.record |= replies[0] | {"start_seconds": time.perf_counter() - self.begun}
        self._rest()

    def ask(self, command: Any, patience: float = 300) -> tuple[float, list[Any]]:
        """Seconds until the last rank has answered, and the answers."""
        if self.spins:
            self._signal(signal.SIGCONT)
        begin = time.perf_counter()
        try:
            for pipe in self.pipes:
                pipe.send(command)
        except OSError:
            raise FailedError("the process died") from None
        replies = self._replies(patience)
        seconds = time.perf_counter() - begin
        self._rest()
        return seconds, replies

    def stop(self) -> None:
        """Ends the processes: they exit when the pipe closes, or are killed."""
        if self.spins:
            self._signal(signal.SIGCONT)
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(timeout=5)
            process.kill()
            process.join()
        self.processes, self.pipes = [], []

    def fail(self, error: Exception) -> None:
        """Takes the contestant out of the race; records the reason."""
        self.stop()
        self.record["failed"] = str(error)
        say(f"{self.name}: FAILED, {error}")

    def _rest(self) -> None:
        if self.spins:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        for process in self.processes:
            assert process.pid is not None, "started"
            os.kill(process.pid, number)

    def _variables(self, rank: int, port: int) -> dict[str, str | None]:
        """The environment that finback's launcher sets; a single process must not look like one of several ranks."""
        several = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
        }
        return {
            "OMP_NUM_THREADS": str(self.threads),
            "OMP_WAIT_POLICY": self.wait_policy,
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            **(several if self.ranks > 1 else dict.fromkeys(several)),
        }

    def _replies(self, patience: float) -> list[Any]:
        """One answer from each rank, in rank order; the first failure of any rank ends the wait."""
        replies: dict[Connection, Any] = {}
        end = time.perf_counter() + patience
        while len(replies) < len(self.pipes):
            ready = wait([p for p in self.pipes if p not in replies], max(0.0, end - time.perf_counter()))
            if not ready:
                raise FailedError(f"no answer within {patience:.0f} s")
            for pipe in ready:
                assert isinstance(pipe, Connection)
                replies[pipe] = self._receive(pipe)
        return [replies[pipe] for pipe in self.pipes]

    def _receive(self, pipe: Connection) -> Any:
        try:
            reply = pipe.recv()
        except EOFError:
            raise FailedError("the process died") from None
        if isinstance(reply, FailedError):
            raise reply
        return reply


def _child(pipe: Connection, work: Work, settings: Settings) -> None:
    die_with_parent(os.getppid())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryFile() as log:  # libraries print; nothing measured may depend on a terminal
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            work(pipe, settings)
        except (EOFError, BrokenPipeError):
            return  # the parent has closed the pipe
        except Exception as error:
            pipe.send(FailedError(_describe(error, log)))


def _describe(error: Exception, log: IO[bytes]) -> str:
    """An error, and the last one that a library only logged, without the directories of this machine."""
    text = f"{type(error).__name__}: {error}"
    log.seek(0)
    logged = re.findall(rb"^\w+Error: .*", log.read(), re.MULTILINE)
    if logged:
        text += f"; logged before: {logged[-1].decode(errors='replace')}"
    return re.sub(r"\s+", " ", re.sub(r"(/[\w.+-]+)+/", "", text))[:600]


def start(contestants: Sequence[Contestant], at_once: int = CORES, patience: float = 600) -> None:
    """Starts contestants, a few at once, and waits until each has warmed up; one that fails is taken out."""
    for first in range(0, len(contestants), at_once):
        group = contestants[first : first + at_once]
        for contestant in group:
            contestant.start()
        for contestant in group:
            try:
                contestant.ready(patience)
                say(f"{contestant.name}: ready after {contestant.record['start_seconds']:.0f} s")
            except FailedError as error:
                contestant.fail(error)


@dataclass
class Field:
    """All contestants; `only` is a pattern that their names must match."""

    only: str = ""
    contestants: list[Contestant] = field(default_factory=list)

    def enter(self, contestants: Sequence[Contestant], at_once: int = CORES) -> list[Contestant]:
        """Starts those whose names match, a few at once, and returns them."""
        chosen = [c for c in contestants if re.search(self.only, c.name)]
        self.contestants.extend(chosen)
        start(chosen, at_once)
        return chosen


def turns(
    contestants: Sequence[Contestant], rounds: int, command: Any, take: Callable[[Contestant, float, list[Any]], None]
) -> None:
    """Sends a command to every contestant, `rounds` times, in reverse order every other round; `take` gets the answers."""
    for number in range(rounds):
        for contestant in contestants if number % 2 == 0 else list(reversed(contestants)):
            if not contestant.alive:
                continue
            try:
                take(contestant, *contestant.ask(command))
            except FailedError as error:
                contestant.fail(error)


def say(text: str) -> None:
    """One line of prose on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def _environment(variables: dict[str, str | None]) -> Iterator[None]:
    """Variables of a process about to be started; None unsets."""
    before = {name: os.environ.get(name) for name in variables}
    _set(variables)
    try:
        yield
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _free_port() -> int:
    # outside the range that the system assigns, so that no other program takes it before the ranks connect
    for port in random.sample(range(20_000, 30_000), 50):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise FailedError("no free port")
