"""One external engine of a fleet, as it runs on a Ray worker. Importing it does not need Ray."""

import os

from finback.parallel import ray_cluster
from finback.parallel.launch import free_port
from finback.rollouts.engine_process import STARTING, TRAINING_ENVIRONMENT, EngineProcess, EngineProgram
from finback.runs import provenance


class ProgramEngine:
    """Starts the program on the worker's machine, within the resources Ray has reserved; it ends with the worker."""

    def __init__(self, program: EngineProgram, flags: tuple[str, ...], threads: int) -> None:
        """flags: flags for training, which come before the user's own. threads: number of CPU threads."""
        self.program, self.flags, self.threads = program, flags, threads
        self._process: EngineProcess | None = None
        self._has_weights = False

    def software(self) -> dict[str, str]:
        """Versions that must equal the trainer's."""
        return provenance.software()

    def pid(self) -> int:
        """pid of the worker's process."""
        return os.getpid()

    def start(self, model: str) -> str:
        """Starts it with the model in a folder. Returns its address once it answers."""
        host, port = ray_cluster.node_address(), free_port()
        command = self.program.command(model, host, port, self.flags)
        process = EngineProcess(command, self.environment(), f"http://{host}:{port}")
        try:
            process.wait(STARTING)
        except BaseException:
            process.close()
            raise
        self._process = process
        return process.url

    def environment(self) -> dict[str, str]:
        """The program's environment. Without a number of threads, each engine of a machine would take one per core."""
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        return self.program.environment(TRAINING_ENVIRONMENT[self.program.engine] | threads)

    def announce(self) -> None:
        """Makes it visible to other ranks, once it has the current weights."""
        self._has_weights = True

    def url(self) -> str:
        """Its address, "" before it is announced."""
        return self._process.url if self._process is not None and self._has_weights else ""

    def is_well(self) -> bool:
        """Whether it is running and healthy."""
        return self._process is not None and self._process.is_well()
