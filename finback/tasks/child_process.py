"""Supervises a child process: reads its output, limits its time, and reports how it ended. Does not import torch."""

import contextlib
import json
import os
import re
import secrets
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_TICK = 0.02  # seconds between polls, on systems without a descriptor for the end of a process


@dataclass
class ChildOutput:
    """A finished process; `stopped` is the reason why it was killed, or ""."""

    streams: dict[str, bytearray] = field(default_factory=dict)
    # 128 + n if it died of signal n
    exit_code: int = 0
    stopped: str = ""
    seconds: float = 0.0


@contextlib.contextmanager
def file_of(content: bytes) -> Iterator[int]:
    """A descriptor at the start of an unnamed file; unlike a pipe it takes any amount of data without a reader."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("finback")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.lseek(descriptor, 0, os.SEEK_SET)
        yield descriptor
    finally:
        os.close(descriptor)


def watch(
    process: subprocess.Popen[bytes], streams: dict[int, str], seconds: float, most: int, info: int = -1
) -> ChildOutput:
    """Reads the streams until the process ends, `seconds` have passed, or one stream exceeds `most` bytes.

    `info` is the descriptor on which bubblewrap reports the first process inside; killing that one ends all others inside.
    """
    start = time.monotonic()
    seen = ChildOutput({name: bytearray() for name in streams.values()})
    with selectors.DefaultSelector() as selector:
        for descriptor, name in streams.items():
            os.set_blocking(descriptor, False)
            selector.register(descriptor, selectors.EVENT_READ, name)
        with _end_of(process) as end:
            if end >= 0:
                selector.register(end, selectors.EVENT_READ, "")
            try:
                while not seen.stopped:
                    left = start + seconds - time.monotonic()
                    ready = selector.select(max(0.0, left if end >= 0 else min(left, _TICK)))
                    has_ended = any(key.fd == end for key, _ in ready) or (end < 0 and process.poll() is not None)
                    names = {key.fd: key.data for key, _ in ready} if not has_ended else streams
                    _read({d: n for d, n in names.items() if d != end}, seen, most, selector)
                    if has_ended:
                        break
                    if left <= 0:
                        seen.stopped = "timeout"
            finally:
                _kill(process, info)
    code = process.wait()
    seen.exit_code = code if code >= 0 else 128 - code
    seen.seconds = time.monotonic() - start
    return seen


def _read(names: dict[int, str], seen: ChildOutput, most: int, selector: selectors.BaseSelector) -> None:
    """Reads everything that is available now."""
    for descriptor, name in names.items():
        content = seen.streams[name]
        while len(content) <= most:
            try:
                chunk = os.read(descriptor, 1 << 16)
            except BlockingIOError:
                break
            if not chunk:
                with contextlib.suppress(KeyError):
                    selector.unregister(descriptor)
                break
            content += chunk
        if len(content) > most:
            del content[most:]
            seen.stopped = "output"


@contextlib.contextmanager
def _end_of(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """A descriptor that becomes readable when the process ends, or -1."""
    try:
        descriptor = os.pidfd_open(process.pid)
    except (AttributeError, OSError):
        yield -1
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _kill(process: subprocess.Popen[bytes], info: int) -> None:
    """Kills the process and its group; under bubblewrap first the namespace, by killing its first process."""
    if info >= 0 and process.returncode is None:
        os.set_blocking(info, False)
        with contextlib.suppress(BlockingIOError, ProcessLookupError, subprocess.TimeoutExpired):
            first = re.search(rb'"child-pid": (\d+)', os.read(info, 4096))
            # The pid cannot have been reused: it is bubblewrap's child as long as bubblewrap, our child, is running.
            if first and process.poll() is None:
                os.kill(int(first[1]), signal.SIGKILL)
                process.wait(5)  # bubblewrap ends once everything inside has ended
    if process.returncode is None or info < 0:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def remove(folder: Path) -> None:
    """Removes a folder of any depth and permissions; symbolic links are removed, not followed."""
    while True:
        entries = list(os.scandir(folder))
        if not entries:
            folder.rmdir()
            return
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)  # noqa: PTH108
                continue
            with contextlib.suppress(OSError):
                os.rmdir(entry.path)  # noqa: PTH106
                continue
            os.chmod(entry.path, 0o700)  # noqa: PTH101
            for inner in list(os.scandir(entry.path)):  # moved one level up, so that depth never grows
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)  # noqa: PTH101  a folder that is moved must be writable
                os.rename(inner.path, folder / secrets.token_hex(16))  # noqa: PTH104


def read_json(text: str) -> Any:
    """A JSON value; if the text is not JSON, an object that equals nothing, not even itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError, MemoryError):
        return float("nan")
