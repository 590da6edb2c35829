"""Runs Python that a model wrote in a separate process with as few rights as possible. Does not import torch.

There are three forms. bubblewrap (own namespaces, no network, only the host's files that Python needs) is used where it
works, else a subprocess under resource limits, which is not a security boundary. monty, only on request, interprets a
subset of Python, for functions only. docs/concepts/sandbox.md states what each of them guarantees.
"""

import contextlib
import importlib.util
import marshal
import secrets
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from finback.config import UserError, check_fields, check_positive
from finback.extras import how_to_get
from finback.tasks import sandbox_child
from finback.tasks.child_process import ChildOutput, file_of, read_json, watch
from finback.tasks.isolation import Launch, bubble, bubblewrap, folder, pipe

Isolation = Literal["bubblewrap", "rlimits", "monty"]
Reason = Literal["ok", "error", "timeout", "memory", "output", "killed"]

_THREADS = 64  # threads; the kernel counts them as processes
_NOT_A_BOUNDARY = (
    "finback: bubblewrap does not work here, so code that a model wrote runs in a subprocess under resource limits. "
    "That is not a security boundary: it can read and change what its user can."
)


@dataclass(frozen=True)
class Limits:
    """Limits of one run. Memory is per process; with the default of one process, it is the total."""

    # wall time in seconds
    wall: float = 5.0
    # CPU time in seconds, rounded up to whole ones
    cpu: float = 5.0
    # bytes of address space
    memory: int = 512 << 20
    # concurrent processes, including the program; more than 1 needs bubblewrap
    processes: int = 1
    # bytes on stdout, the same on stderr, and the same of results
    output: int = 1 << 20
    # bytes: under bubblewrap of the whole working folder, else of each file
    files: int = 16 << 20

    def __post_init__(self) -> None:
        check_fields(self, "limits")
        check_positive(self, "limits", "wall", "cpu", "memory", "processes", "output", "files")


@dataclass(frozen=True)
class Outcome:
    """The result of a run. The program can forge everything here except `compiled`."""

    stdout: str
    stderr: str
    # 128 + n if it died of signal n
    exit_code: int
    reason: Reason
    # whether it compiled and, for a function, mentions its name
    compiled: bool = False
    # values that the function returned, as JSON values, call by call
    values: tuple[Any, ...] = ()
    seconds: float = 0.0


class Sandbox:
    """Runs programs, from any thread. `isolation` names the form in use."""

    isolation: Isolation

    def __init__(self, isolation: Literal["auto", "bubblewrap", "rlimits", "monty"] = "auto") -> None:
        if isolation == "auto":
            isolation = "bubblewrap" if why_unavailable("bubblewrap") is None else "rlimits"
            if isolation == "rlimits":
                warn_of_no_boundary()
        elif isolation not in ("bubblewrap", "rlimits", "monty"):
            raise UserError("sandbox.isolation", isolation, "no such isolation", "Known: bubblewrap, monty, rlimits.")
        if isolation != "monty" and (failure := why_unavailable(isolation)) is not None:
            remedy = f"{how_to_get('sandbox')}, and allow user namespaces, or run as a user that is not root."
            raise UserError("sandbox.isolation", isolation, failure, remedy)
        if isolation == "monty" and importlib.util.find_spec("pydantic_monty") is None:
            raise UserError("sandbox.isolation", isolation, "not installed", how_to_get("sandbox"))
        self.isolation = isolation

    def run(self, source: str, stdin: str = "", limits: Limits | None = None) -> Outcome:
        """Runs a program from start to end."""
        if self.isolation == "monty":
            raise UserError("sandbox.isolation", "monty", "can run functions only", "Use another isolation.")
        return _run(self.isolation, source, stdin, None, [], limits or Limits())

    def call(self, source: str, entry: str, arguments: list[list[Any]], limits: Limits | None = None) -> Outcome:
        """Runs a program, then calls its function `entry` with each list of arguments (JSON values), in one process."""
        if self.isolation == "monty":
            from finback.tasks.monty import call

            return Outcome(**call(source, entry, arguments, limits or Limits()))
        return _run(self.isolation, source, "", entry, arguments, limits or Limits())


@lru_cache
def shared(isolation: Literal["auto", "bubblewrap", "rlimits", "monty"] = "auto") -> Sandbox:
    """One sandbox for the whole process, because finding the form that works takes a run."""
    return Sandbox(isolation)


@lru_cache
def warn_of_no_boundary() -> None:
    """Warns once that the form in use does not contain hostile code."""
    print(f"{_NOT_A_BOUNDARY} {how_to_get('sandbox')}", file=sys.stderr)


@lru_cache
def why_unavailable(isolation: Isolation) -> str | None:
    """Why a form does not work on this machine, found by trying it; None if it works."""
    if isolation == "bubblewrap" and bubblewrap() is None:
        return "there is no bwrap"
    try:
        seen = _run(isolation, "import json, random, socket; print('works')", "", None, [], Limits())
    except (RuntimeError, OSError) as error:
        return f"it does not work here ({error})"
    return None if seen.stdout == "works\n" else f"it does not work here ({seen.stderr.strip()[-200:]})"


@lru_cache
def _child_source() -> str:
    return Path(sandbox_child.__file__).read_text(encoding="utf-8")


def _run(
    isolation: Isolation, source: str, stdin: str, entry: str | None, arguments: list[Any], limits: Limits
) -> Outcome:
    """Runs one fresh process. RuntimeError if it fails before the program starts: then the fault is ours."""
    if isolation == "rlimits" and limits.processes > 1:
        raise UserError("limits.processes", limits.processes, "only bubblewrap can contain several processes", "Use 1.")
    nonce = secrets.token_hex(16)
    request: dict[str, Any] = {"source": source, "entry": entry, "arguments": arguments, "nonce": nonce}
    request |= {"rlimits": _rlimits(limits), "user": -1, "stdlib": -1, "filter": b""}
    for _ in range(3):  # starting can fail on an overloaded machine, such as fork without memory
        with contextlib.ExitStack() as stack:
            launch = bubble(limits.files, limits.processes > 1) if isolation == "bubblewrap" else folder(request)
            seen = _start(request, stdin.encode(errors="replace"), limits, stack, stack.enter_context(launch))
        frames = _frames(bytes(seen.streams["reports"]), nonce)
        if frames or seen.stopped:
            return _outcome(seen, frames, limits)
    raise RuntimeError(seen.streams["stderr"].decode(errors="replace").strip()[-300:] or "no start")


def _rlimits(limits: Limits) -> dict[str, int]:
    values = {"RLIMIT_AS": limits.memory, "RLIMIT_CPU": -int(-limits.cpu // 1), "RLIMIT_CORE": 0}
    # NPROC counts all processes of a user in its namespace, so it is set only if the user is the program's own.
    return values | {"RLIMIT_FSIZE": limits.files, "RLIMIT_NOFILE": 64, "RLIMIT_NPROC": limits.processes + _THREADS}


def _start(
    request: dict[str, Any], stdin: bytes, limits: Limits, stack: contextlib.ExitStack, launch: Launch
) -> ChildOutput:
    reports, reports_end = stack.enter_context(pipe())
    given = stack.enter_context(file_of(stdin))
    request_file = stack.enter_context(file_of(marshal.dumps(request)))
    # -I would also ignore PYTHONHASHSEED, which makes a program that prints a set print the same in every run.
    python = [str(Path(sys.executable).resolve()), "-P", "-s", "-S", "-B", "-X", "utf8", "-c", _child_source()]
    setting = {"PYTHONHASHSEED": "0", "MALLOC_ARENA_MAX": "1"}
    before = list(launch.before)
    if before:
        at = before.index("--clearenv") + 1
        before[at:at] = [word for item in setting.items() for word in ("--setenv", *item)]
    process = stack.enter_context(
        subprocess.Popen(
            [*before, *python, str(request_file), str(reports_end)],
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=setting,
            cwd=launch.folder,
            pass_fds=(request_file, reports_end, *launch.passed),
            start_new_session=True,
        )
    )
    assert process.stdout is not None and process.stderr is not None, "both are pipes"
    streams = {process.stdout.fileno(): "stdout", process.stderr.fileno(): "stderr", reports: "reports"}
    return watch(process, streams, limits.wall, limits.output, launch.info)


def _frames(content: bytes, nonce: str) -> list[tuple[str, str]]:
    """The reports with the run's nonce: (kind, text)."""
    lines = [line.split(" ", 2) for line in content.decode(errors="replace").split("\n")]
    return [(line[1], line[2]) for line in lines if len(line) == 3 and line[0] == nonce]


def _outcome(seen: ChildOutput, frames: list[tuple[str, str]], limits: Limits) -> Outcome:
    reason: Reason = "ok" if seen.exit_code == 0 else "error" if seen.exit_code < 128 else "killed"
    if seen.stopped == "output":
        reason = "output"
    elif seen.stopped == "timeout" or ("timeout", "") in frames:
        reason = "timeout"
    elif ("memory", "") in frames:
        reason = "memory"
    elif seen.exit_code == 128 + signal.SIGKILL and seen.seconds >= limits.cpu:
        reason = "timeout"  # the kernel killed a process that ignored SIGXCPU
    return Outcome(
        stdout=seen.streams["stdout"].decode(errors="replace"),
        stderr=seen.streams["stderr"].decode(errors="replace"),
        exit_code=seen.exit_code,
        reason=reason,
        compiled=next((not text for kind, text in frames if kind == "compiled"), False),  # reported before it ran
        values=tuple(read_json(text) for kind, text in frames if kind == "value"),
        seconds=seen.seconds,
    )
