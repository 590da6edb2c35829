"""Runs a command that ends with its parent: `python guard.py COMMAND ...`. Started by path, since it imports nothing of finback.

stdin is a pipe that nobody writes to. When its other end closes, however that process ended, the command and everything it
has started are killed, so that no orphaned engine keeps a GPU. A separate process in its own session watches, because Ray
kills the children of a worker and its whole process group.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    """Returns the command's exit code."""
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
    end()  # end whatever it has left running
    os._exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    sys.exit(main())
