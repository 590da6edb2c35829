"""Allows one run at a time in a folder, however it is started: by the command line, torchrun, Slurm, or in a notebook.

A system lock on `.lock` (flock) ends with the last process that holds it, so a kill leaves nothing stale; but on some
network file systems other machines do not see it. `.owner.json` is therefore created exclusively, which works on all file
systems; its modification time is refreshed every few seconds, to tell a live owner from a dead one. Does not import torch.
"""

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from finback.config import UserError
from finback.runs.files import LOCK, OWNER

BEAT = 5.0  # seconds between signs of life
STALE = 6 * BEAT  # without a sign of life for so long, an owner may be dead
MOMENT = 5.0  # seconds until ranks of a killed run notice
_BUSY = "another run is at work in this folder"


@contextmanager
def locked(root: Path, job: str = "") -> Iterator[int]:
    """Keeps a second run out of a folder; UserError names the current owner.

    Child processes may inherit the descriptor and hold the lock until the last of them ends. job: identifies a run that is
    restarted, perhaps on another machine; it takes over from its dead predecessor.
    """
    with (root / LOCK).open("a+") as handle:
        _lock(handle.fileno(), root)
        _own(root, job)
        ended = threading.Event()
        threading.Thread(target=_beat, args=(root / OWNER, ended), daemon=True, name="lock").start()
        try:
            yield handle.fileno()
        finally:
            ended.set()
            release(root)


def release(root: Path) -> None:
    """Gives up a folder that this process owns."""
    if _is_mine(owner(root)):
        (root / OWNER).unlink(missing_ok=True)


def owner(root: Path) -> dict[str, Any] | None:
    """The owner of a folder: host, pid and start time, as far as known; None if there is none."""
    try:
        found = json.loads((root / OWNER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:  # killed while writing it
        return {}
    return found if isinstance(found, dict) else {}


def is_busy_elsewhere(root: Path) -> bool:
    """Whether a live process on another machine owns a folder."""
    found = owner(root)
    if not found or found.get("host") == platform.node():
        return False
    with contextlib.suppress(OSError):
        return time.time() - (root / OWNER).stat().st_mtime < STALE
    return False


def _lock(descriptor: int, root: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no advisory locks on Windows
        return
    for _ in range(round(10 * MOMENT)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.1)
        except OSError:  # the file system has no locks
            return
    raise _taken(root, owner(root) or {})


def _own(root: Path, job: str) -> None:
    process = psutil.Process()
    mine = {
        "host": platform.node(),
        "pid": process.pid,
        "started": process.create_time(),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        "job": job,
    }
    while not _create(root / OWNER, json.dumps(mine)):
        theirs = owner(root)
        if theirs is not None:
            _demand_dead(root, theirs, job)
            (root / OWNER).unlink(missing_ok=True)


def _create(path: Path, text: str) -> bool:
    """Writes a new file; returns False if it exists."""
    try:
        with path.open("x", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
    except FileExistsError:
        return False
    return True


def _demand_dead(root: Path, theirs: dict[str, Any], job: str) -> None:
    """Raises UserError unless the owner of a folder is known to be dead; flock already detects most owners on this machine."""
    if theirs.get("host") == platform.node():
        if _is_alive(theirs):
            raise _taken(root, theirs)
        return
    if theirs.get("job") and theirs["job"] == job and _is_silent(root / OWNER):
        return
    age = _age(root)
    if age < STALE:
        raise _taken(root, theirs, f", last sign of life {max(age, 0.0):.0f} s ago")
    problem = f"no sign of life for {age:.0f} s from {_named(theirs)}, which cannot be checked from {platform.node()}"
    remedy = f"If it has ended, delete {root / OWNER} and start again."
    raise UserError("runs", str(root), problem, remedy)


def _taken(root: Path, theirs: dict[str, Any], more: str = "") -> UserError:
    about = f": {_named(theirs)}" if theirs else ""
    return UserError("runs", str(root), f"{_BUSY}{about}{more}", "Wait for it or stop it.")


def _named(theirs: dict[str, Any]) -> str:
    return f"process {theirs.get('pid', '?')} on {theirs.get('host', '?')}, since {theirs.get('since', '?')}"


def _is_mine(found: dict[str, Any] | None) -> bool:
    return bool(found) and (found["host"], found["pid"]) == (platform.node(), os.getpid())  # type: ignore[index]


def _is_alive(theirs: dict[str, Any]) -> bool:
    """Whether the process that wrote this is alive, and not another one with its pid."""
    try:
        process = psutil.Process(int(theirs["pid"]))
        return process.create_time() == theirs["started"] and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, ValueError):
        return False


def _is_silent(path: Path) -> bool:
    """Whether a file was not touched for three beats."""
    before = path.stat().st_mtime_ns
    for _ in range(30):
        time.sleep(BEAT / 10)
        if path.stat().st_mtime_ns != before:
            return False
    return True


def _age(root: Path) -> float:
    """Seconds since the owner's last sign of life, by the file system's clock."""
    os.utime(root / LOCK)
    try:
        return (root / LOCK).stat().st_mtime - (root / OWNER).stat().st_mtime
    except FileNotFoundError:  # the owner has just ended
        return 0.0


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(path)
