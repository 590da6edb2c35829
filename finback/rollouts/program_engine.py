"""One engine of a fleet that is a program of others, as it runs on a Ray worker. Ray is not needed to import it."""

import os

from finback.parallel.launch import free_port
from finback.rollouts import ray_cluster
from finback.rollouts.engine_process import STARTING, TRAINING_ENVIRONMENT, EngineProcess, EngineProgram
from finback.runs import provenance


class ProgramEngine:
    """Starts the program on the worker's machine, in the room that Ray has set aside; it ends with the worker."""

    def __init__(self, program: EngineProgram, flags: tuple[str, ...]) -> None:
        """flags: what makes it an engine to learn from, before the user's own."""
        self.program, self.flags = program, flags
        self._process: EngineProcess | None = None
        self._has_weights = False

    def software(self) -> dict[str, str]:
        """Versions that have to be the trainer's."""
        return provenance.software()

    def pid(self) -> int:
        """Of the worker's process."""
        return os.getpid()

    def start(self, model: str) -> str:
        """Its address, once it answers with the model of a folder."""
        host, port = ray_cluster.node_address(), free_port()
        command = self.program.command(model, host, port, self.flags)
        environment = self.program.environment(TRAINING_ENVIRONMENT[self.program.engine])
        process = EngineProcess(command, environment, f"http://{host}:{port}")
        try:
            process.wait(STARTING)
        except BaseException:
            process.close()
            raise
        self._process = process
        return process.url

    def announce(self) -> None:
        """Tell other ranks of it: it has the weights of the day."""
        self._has_weights = True

    def url(self) -> str:
        """Its address, "" before it is announced."""
        return self._process.url if self._process is not None and self._has_weights else ""

    def is_well(self) -> bool:
        """Whether it runs, and says that it is well."""
        return self._process is not None and self._process.is_well()
