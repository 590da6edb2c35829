"""A fleet without Ray: actors are objects of this process, and programs are servers in a thread of it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from finback.client import RequestFailed
from finback.parallel import ray_cluster
from finback.rollouts.fleet_engine import FleetEngine
from finback.rollouts.program_engine import ProgramEngine
from tests.engine_servers import FakeEngineServer, engine_server


@dataclass(eq=False)
class FakeActor:
    """An object's methods, called through Ray's interface; a dead actor does not answer."""

    made: Any
    # of the engine within its fleet
    number: int
    alive: bool = True

    def __getattr__(self, name: str) -> Any:
        return _Method(lambda *given: self._call(name, given))

    def _call(self, name: str, given: tuple[Any, ...]) -> Callable[[], Any]:
        def call() -> Any:
            if not self.alive:
                raise RequestFailed("was lost")
            return getattr(self.made, name)(*given)

        return call


@dataclass(frozen=True)
class _Method:
    remote: Callable[..., Any]

    def options(self, num_returns: str) -> "_Method":
        return _Method(lambda *given: iter(self.remote(*given)()))


class FakeProgram:
    """Replaces the program that a ProgramEngine starts by one on finback's engine."""

    def __init__(self, asked: ProgramEngine, servers: list[FakeEngineServer], stack: ExitStack) -> None:
        self.asked, self.servers, self.stack = asked, servers, stack
        self.well, self._url = True, ""
        # programs start in parallel, in any order
        self.server: FakeEngineServer | None = None

    def software(self) -> dict[str, str]:
        return self.asked.software()

    def start(self, model: str) -> str:
        self._url, self.server = self.stack.enter_context(engine_server(Path(model), self.asked.program.engine))
        self.servers.append(self.server)
        return self._url

    def announce(self) -> None:
        pass

    def url(self) -> str:
        return self._url

    def is_well(self) -> bool:
        return self.well


@dataclass
class FakeCluster:
    """Replaces ray_cluster.Cluster; `servers` are the started programs, in order."""

    stack: ExitStack
    actors: list[FakeActor] = field(default_factory=list)
    servers: list[FakeEngineServer] = field(default_factory=list)

    def actor(self, number: int, kind: type, arguments: tuple[Any, ...]) -> FakeActor:
        made = kind(*arguments)
        program = FakeProgram(made, self.servers, self.stack) if kind is ProgramEngine else made
        self.actors.append(FakeActor(program, number))
        return self.actors[-1]

    def put(self, value: Any) -> Any:
        return value

    def get(self, call: Any, seconds: float) -> Any:
        return call() if callable(call) else call

    def next(self, calls: Iterator[Any], seconds: float) -> Any:
        for value in calls:
            return lambda: value
        return None

    def end(self, actor: FakeActor | None) -> None:
        if actor is not None:
            actor.alive = False

    def leave(self) -> None:
        for actor in self.actors:
            if isinstance(actor.made, FleetEngine):
                actor.made.sleep()
            actor.alive = False


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    """The cluster that every fleet of a test joins."""
    with ExitStack() as stack:
        found = FakeCluster(stack)
        monkeypatch.setattr(ray_cluster, "join", lambda *given: found)
        yield found
