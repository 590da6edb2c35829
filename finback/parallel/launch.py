"""Starts this machine's ranks, forwards signals to them and stops them with their parent. Does not import torch."""

import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from finback.runs import processor

INTERRUPTED = 130
# exit codes of a rank that was asked to stop: at a safe point, or before it handled signals
LEFT = (INTERRUPTED, -signal.SIGTERM)
PARTING = 5.0  # seconds between the first rank that stops and the signal to the others


def default_ranks() -> int:
    """One rank for each GPU; without any, one single-threaded rank per core (`core_ranks`)."""
    return gpus() or core_ranks()


def gpus() -> int:
    """The number of NVIDIA GPUs this process may use, from the driver's device files and CUDA_VISIBLE_DEVICES."""
    there = len([path for path in Path("/dev").glob("nvidia*") if path.name.removeprefix("nvidia").isdigit()])
    asked = os.environ.get("CUDA_VISIBLE_DEVICES")
    return there if asked is None else min(there, len([name for name in asked.split(",") if name.strip()]))


def share(number: int, of: int) -> dict[str, str]:
    """The variable with one of several processes' GPUs, or without GPUs its number of threads; {} if each may use all."""
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    visible = visible or [str(i) for i in range(gpus())]
    if each := len(visible) // of:
        return {"CUDA_VISIBLE_DEVICES": ",".join(visible[number * each : (number + 1) * each])}
    # more threads than cores wait for each other most of the time (docs/log.md)
    return {"OMP_NUM_THREADS": str(max(1, processor.usable_cores() // of))} if of > 1 and not visible else {}


def core_ranks(limit: int = 8) -> int:
    """The number of ranks on a CPU, a power of two: one single-threaded rank per core is faster than threads (docs/log.md)."""
    return 1 << min(processor.usable_cores(), limit).bit_length() - 1


def threads(ranks: int) -> int:
    """Threads per rank: on a CPU one, unless there is a single rank."""
    return max(1, core_ranks(64) // ranks) if gpus() or ranks == 1 else 1


class Child(Protocol):
    """A rank that was started, with the methods of subprocess.Popen that supervise it."""

    returncode: int | None

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        ...

    def send_signal(self, number: int, /) -> None:
        """Sends it a signal, if it still runs."""
        ...

    def kill(self) -> None:
        """Ends it at once."""
        ...

    def wait(self) -> int:
        """Waits for its end, and returns its exit code."""
        ...


def launch(arguments: Sequence[str], ranks: int, keep_open: tuple[int, ...] = ()) -> int:
    """Runs `python -m finback <arguments>` as `ranks` processes that find each other as under torchrun; see `supervise`.

    `keep_open` file descriptors are inherited, so that a lock lives as long as the last rank.
    """
    port = free_port()
    with ExitStack() as stack:
        # Only rank 0 writes to the terminal; another rank's output is shown if that rank is the one that failed.
        output = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(1, ranks)]

        def begin(rank: int) -> Child:
            command, environment = [sys.executable, "-m", "finback", *arguments], _environment(rank, ranks, port)
            own: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT, "start_new_session": True}
            shown = output[rank - 1] if rank else sys.stderr
            return subprocess.Popen(command, env=environment, stdout=shown, pass_fds=keep_open, **own)

        def written(rank: int) -> bytes:
            if not rank:
                return b""
            output[rank - 1].seek(0)
            return output[rank - 1].read()

        return supervise(begin, ranks, written)


def supervise(begin: Callable[[int], Child], ranks: int, written: Callable[[int], bytes]) -> int:
    """Starts ranks and waits for them. Returns 0 when all succeed, otherwise the exit code of the first that fails.

    The others are then stopped. SIGTERM and the first Ctrl-C ask the ranks to stop at a safe point, the second Ctrl-C kills
    them. begin: starts one. written: output of one that has not been shown yet.
    """
    presses, asked = 0, False
    children: list[Child] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal presses, asked
        presses += number == signal.SIGINT
        if not asked:
            print("\nstopping at the next safe point; press Ctrl-C again to stop at once", file=sys.stderr)
        asked = True
        for child in children:
            child.send_signal(signal.SIGTERM if presses < 2 else signal.SIGKILL)

    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        children.extend(map(begin, range(ranks)))
        failed = wait(children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for s, handler in previous.items():
            signal.signal(s, handler)
    if presses > 1 or (failed is None and (asked or any(child.returncode for child in children))):
        return INTERRUPTED
    return _failure(failed, children[failed].wait(), written) if failed is not None else 0


def _failure(rank: int, code: int, written: Callable[[int], bytes]) -> int:
    """Prints the output of the rank that failed, and the signal if one killed it. Returns the exit code."""
    sys.stderr.write(written(rank).decode(errors="replace"))
    if code < 0:
        print(f"rank {rank} was killed (signal {-code}); run the same command to continue", file=sys.stderr)
        return 1
    return code


def wait(children: Sequence[Child]) -> int | None:
    """Waits until all ranks have succeeded or stopped at a safe point. Returns the first rank that failed, or None.

    A rank that stopped at a safe point has not failed: another may still be writing the checkpoint of that point. A rank
    that is stopped before it has joined the group cannot tell the others, so they are signalled a few seconds later.
    """
    left: float | None = None
    while True:
        codes = [child.poll() for child in children]
        bad = [rank for rank, code in enumerate(codes) if code not in (None, 0, *LEFT)]
        if bad:
            # A rank that lost its peer fails a moment later; the peer that died is the reason.
            time.sleep(0.3)
            killed = [r for r in range(len(children)) if (children[r].poll() or 0) < 0]
            refused = [r for r in range(len(children)) if children[r].poll() == 2]
            return (refused or killed or bad)[0]
        if None not in codes:
            return None
        if left is None and any(code in LEFT for code in codes):
            left = time.monotonic()
        elif left is not None and time.monotonic() - left > PARTING:
            left = math.inf
            for child in children:
                child.send_signal(signal.SIGTERM)
        time.sleep(0.05)


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    found = rendezvous(rank, ranks, "127.0.0.1", port)
    return os.environ | found | {"OMP_NUM_THREADS": str(threads(ranks)), "FINBACK_PARENT": str(os.getpid())}


def rendezvous(rank: int, ranks: int, address: str, port: int) -> dict[str, str]:
    """A rank's variables, as torchrun sets them; address: rank 0's, 127.0.0.1 if all ranks are on one machine."""
    found = {
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        # Spinning threads slow down drastically when another process is busy (docs/log.md); waiting ones do not.
        "OMP_WAIT_POLICY": "passive",
    }
    if address == "127.0.0.1":
        found["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    return found


def follow_parent() -> None:
    """Ends this rank soon after the launcher, torchrun agent or Ray worker that started it has ended."""
    if "FINBACK_PARENT" in os.environ:
        die_with_parent(int(os.environ["FINBACK_PARENT"]))
    elif "TORCHELASTIC_RUN_ID" in os.environ or "FINBACK_JOB" in os.environ:
        die_with_parent(os.getppid())


def die_with_parent(parent: int) -> None:
    """Ends this process soon after its parent has ended, even if the parent was killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def dismiss_agent(is_asked: bool) -> None:
    """Asks the torchrun agent that started this rank to end, since it would restart ranks that were asked to stop.

    If this rank itself was asked to stop (`is_asked`), its agent most likely asked and ends by itself, so the signal is sent
    a second later.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK") != "0":
        return
    agent, quiet = os.getppid(), subprocess.DEVNULL
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the agent forwards it to its ranks
    if is_asked:
        command = ["sh", "-c", f"sleep 1; kill -TERM {agent}"]
        subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
    else:
        os.kill(agent, signal.SIGTERM)


def job() -> str:
    """A name for this rank's job that stays the same when its ranks are restarted; "" outside Ray, torchrun and Slurm."""
    get = os.environ.get
    if get("FINBACK_JOB"):
        return os.environ["FINBACK_JOB"]
    if get("TORCHELASTIC_RUN_ID", "none") != "none":
        return f"torchrun {get('TORCHELASTIC_RUN_ID')}"
    return f"slurm {get('SLURM_JOB_ID')}.{get('SLURM_STEP_ID')}" if get("SLURM_JOB_ID") else ""


def free_port() -> int:
    """A free TCP port on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
