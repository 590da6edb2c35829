"""Runs inside the sandbox, before the program: sets limits, then compiles, runs and reports. Does not import torch.

The sandbox passes the text of this file to `python -c`, so it does not import finback. The program can reach everything
here; that is harmless, because expected results never enter the sandbox.
"""

from __future__ import annotations

import _signal  # signal itself would import enum
import marshal
import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing would cost every run several milliseconds
    from typing import Any


def main() -> None:
    """argv: file with the request, descriptor for reports."""
    source, channel = int(sys.argv[1]), int(sys.argv[2])
    with open(source, "rb") as file:
        request: dict[str, Any] = marshal.load(file)
    sys.argv[:] = ["answer.py"]

    def report(kind: str, text: str = "") -> None:
        rest = f"{request['nonce']} {kind} {text}\n".encode()
        while rest:
            rest = rest[os.write(channel, rest) :]

    def out_of_time(*_: object) -> None:
        report("timeout")
        os._exit(128 + _signal.SIGXCPU)

    # The handler makes the first process of a namespace receive the signal too; the hard limit kills those that ignore it.
    _signal.signal(_signal.SIGXCPU, out_of_time)
    _confine(request)
    report("ready")
    try:
        program = compile(request["source"], "answer.py", "exec", dont_inherit=True)
        report("compiled", "" if request["entry"] is None or request["entry"] in program.co_names else "no entry")
        module = type(sys)("__main__" if request["entry"] is None else "answer")
        sys.modules[module.__name__] = module
        exec(program, module.__dict__)
        if request["entry"] is not None:
            _call(getattr(module, request["entry"]), request["arguments"], report)
    except MemoryError:
        report("memory")
        raise


def _call(function: Any, arguments: list[list[Any]], report: Any) -> None:
    """Reports what the function returns, as JSON, and exits at once, without atexit handlers or waiting for threads."""
    import json

    leave = os._exit
    for values in arguments:
        report("value", json.dumps(function(*values), allow_nan=False))
    sys.stdout.flush()
    leave(0)


def _confine(request: dict[str, Any]) -> None:
    for name, value in request["rlimits"].items():
        # A lower existing limit, or one that the system lacks (macOS has no working RLIMIT_AS), is left alone.
        if hasattr(resource, name):
            which = getattr(resource, name)
            hard = resource.getrlimit(which)[1]
            if hard == resource.RLIM_INFINITY or value <= hard:
                last = value + 1 if name == "RLIMIT_CPU" and (hard == resource.RLIM_INFINITY or value < hard) else value
                try:
                    resource.setrlimit(which, (value, last))
                except (ValueError, OSError):
                    if sys.platform.startswith("linux"):
                        raise
    if request["stdlib"] >= 0:  # an open descriptor: after dropping root, its path may be unreadable
        folder = f"/proc/self/fd/{request['stdlib']}"
        was = os.path.dirname(os.__file__)  # noqa: PTH120  pathlib is not imported
        sys.path[:] = [folder, f"{folder}/lib-dynload"]
        for module in [m for m in sys.modules.values() if hasattr(m, "__path__")]:
            module.__path__ = [path.replace(was, folder) for path in module.__path__]
    if request["filter"]:
        import ctypes
    if request["user"] >= 0:
        os.setgroups([])
        os.setresgid(request["user"], request["user"], request["user"])
        os.setresuid(request["user"], request["user"], request["user"])
    if request["filter"]:
        _install(ctypes, request["filter"])


def _install(ctypes: Any, code: bytes) -> None:
    """Installs the seccomp filter, irrevocably; the kernel then kills this process when the thread that started it ends."""

    class Program(ctypes.Structure):
        _fields_ = [("length", ctypes.c_ushort), ("code", ctypes.c_char_p)]  # noqa: RUF012

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    set_parent_death_signal, set_no_new_privileges, set_seccomp, filter_mode = 1, 38, 22, 2
    steps = (
        (set_parent_death_signal, 9, 0),
        (set_no_new_privileges, 1, 0),
        (set_seccomp, filter_mode, ctypes.byref(Program(len(code) // 8, code))),
    )
    for step, first, second in steps:
        if prctl(step, ctypes.c_ulong(first), second, 0, 0):
            raise OSError(ctypes.get_errno(), f"prctl({step}) failed")


if __name__ == "__main__":
    main()
