"""Starts vLLM and SGLang as child processes: their commands, and a process that is ready once it answers. Does not import torch."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finback.client import Client, RequestFailed
from finback.config import UserError
from finback.rollouts import guard
from finback.rollouts.generation_server import ServedModel

ProgramName = Literal["vllm", "sglang"]
MODULES: dict[ProgramName, str] = {"vllm": "vllm.entrypoints.openai.api_server", "sglang": "sglang.launch_server"}
MODEL_FLAG: dict[ProgramName, str] = {"vllm": "--model", "sglang": "--model-path"}
# variables of finback's process that would break another environment
NOT_INHERITED = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OMP_NUM_THREADS")
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
HEALTH = 20.0  # timeout of a health check, in seconds
STARTING = 1800.0  # time to start, in seconds: loading and compiling a large model takes minutes
POLL = 0.2  # seconds between polls while one starts
SHOWN = 1500  # characters of a log to show


@dataclass(frozen=True)
class EngineProgram:
    """An external engine, and the environment it is installed in."""

    engine: ProgramName
    # Python interpreter of that environment
    python: str
    # added to the command after finback's own flags; the last of two counts
    flags: tuple[str, ...] = ()
    # NAME=value pairs for its environment
    env: tuple[str, ...] = ()

    def check(self, field: str) -> None:
        """Raises UserError about `field` if these are invalid."""
        if not self.python:
            problem = f"{self.engine} runs in its own environment"
            raise UserError(f"{field}.python", "", problem, "Give the path of that environment's Python.")
        for entry in self.env:
            if not entry.partition("=")[0].isidentifier() or "=" not in entry:
                raise UserError(f"{field}.env", entry, "not NAME=value", "Write for example VLLM_MLA_DISABLE=1.")

    def command(self, model: str, host: str, port: int, more: Sequence[str] = ()) -> list[str]:
        """The command that starts it on a folder or a name of the hub."""
        where = (MODEL_FLAG[self.engine], model, "--host", host, "--port", str(port))
        return [self.python, "-m", MODULES[self.engine], *where, *more, *self.flags]

    def environment(self, more: dict[str, str]) -> dict[str, str]:
        """This process's environment, without variables of finback's own installation."""
        inherited = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        return inherited | ENVIRONMENT | more | dict(entry.split("=", 1) for entry in self.env)


def training_flags(engine: ProgramName, dtype: str, model: ServedModel, sleeps: bool) -> tuple[str, ...]:
    """Flags that a training run needs: exact tokens, log-probabilities as sampled, and updatable weights.

    dtype: "fp32" or "bf16", also of its products. sleeps: it releases its memory between steps.
    """
    flags = ["--dtype", "float32" if dtype == "fp32" else "bfloat16"]
    if model.return_routed_experts:
        flags.append("--enable-return-routed-experts")
    if engine == "sglang":
        return (*flags, *(("--enable-memory-saver",) if sleeps else ()))
    flags += ["--enable-scale-out", "--logprobs-mode", "processed_logprobs"]
    if model.return_sampling_mask:
        flags.append("--return-sampling-mask")
    return (*flags, *(("--enable-sleep-mode",) if sleeps else ()))


# environment of an engine whose weights are updated
TRAINING_ENVIRONMENT: dict[ProgramName, dict[str, str]] = {"vllm": {"VLLM_SERVER_DEV_MODE": "1"}, "sglang": {}}


class EngineProcess:
    """A program that runs as long as this process does, or until it is closed."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], url: str) -> None:
        """Raises UserError if the program does not exist."""
        self.url = url
        handle, name = tempfile.mkstemp(prefix="finback-engine-", suffix=".log")
        self.log = Path(name)
        guarded = [sys.executable, str(guard.__file__), *command]
        with os.fdopen(handle, "wb") as log:
            if not Path(command[0]).is_file():
                raise UserError("python", command[0], "no such program on this machine", "Correct the path.")
            self._process = subprocess.Popen(
                guarded, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment
            )

    @property
    def pid(self) -> int:
        """pid of the process that supervises it."""
        return self._process.pid

    def wait(self, seconds: float) -> None:
        """Waits until it answers. RequestFailed, with the end of its log, if it ends first or takes longer."""
        until = time.monotonic() + seconds
        while not self.is_well():
            if self._process.poll() is not None:
                raise RequestFailed(f"ended with code {self._process.returncode}: {self._said()}")
            if time.monotonic() > until:
                raise RequestFailed(f"does not answer after {seconds:.0f} s: {self._said()}")
            time.sleep(POLL)

    def is_well(self) -> bool:
        """Whether it is running and healthy."""
        if self._process.poll() is not None:
            return False
        with Client(self.url, timeout=HEALTH) as client:
            return client.has("/health")

    def close(self) -> None:
        """Ends it and everything it has started, and deletes its log."""
        assert self._process.stdin is not None, "a pipe"
        self._process.stdin.close()
        self._process.wait()
        self.log.unlink(missing_ok=True)

    def _said(self) -> str:
        text = " ".join(self.log.read_text(encoding="utf-8", errors="replace")[-SHOWN:].split())
        return f"…{text} ({self.log})"
