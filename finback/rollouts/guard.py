"""Runs a command that ends with whoever has started it: `python guard.py COMMAND ...`, by its path, for it imports nothing of finback.

Its standard input is a pipe that nobody writes to. When the other end closes, however that process ended, the command and all
that it has started are killed; a GPU is not left to an engine that nobody asks any more. A second process watches, in a
session of its own: Ray kills the children of a worker that it ends, and its whole process group.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    """The command's exit code."""
    if watcher := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(watcher, 0)[1]) & 0xFF
    os.setsid()
    process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    def watch() -> None:
        while os.read(0, 1 << 16):
            pass
        end()

    threading.Thread(target=watch, daemon=True).start()
    code = process.wait()
    end()  # what it has left behind
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    sys.exit(main())
