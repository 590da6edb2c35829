"""Ranks of a run on the machines of a Ray cluster: `finback run RECIPE --ray ADDRESS --ranks N`. Importing it does not need Ray."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from finback.client import RequestFailed
from finback.config import UserError
from finback.parallel import launch, ray_cluster
from finback.runs.recipe import Stage

ASKING = 30.0  # timeout of a question to a host, in seconds
STARTING = 300.0  # timeout until its worker runs: a new node imports Python modules from a slow disk
MOST = 16 << 20  # bytes of output per question
FIELD = "--ray"


@dataclass(frozen=True)
class Place:
    """Where Ray has placed a rank."""

    # the machine's address, as others reach it
    address: str
    # ids of the GPUs reserved for it
    gpus: tuple[str, ...]
    # a free port there
    port: int


class RankHost:
    """Runs one rank on the machine of a Ray worker; the rank ends with the worker."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._written: list[IO[bytes]] = []

    def place(self) -> Place:
        """Where it runs."""
        return Place(ray_cluster.node_address(), ray_cluster.reserved_gpus(), launch.free_port())

    def start(self, arguments: Sequence[str], folder: str, environment: dict[str, str]) -> None:
        """Starts `python -m finback <arguments>` in a folder, which must exist on this machine too."""
        if not Path(folder).is_dir():
            problem = f"no such folder on {ray_cluster.node_address()}"
            raise UserError("runs", folder, problem, "Start finback in a folder that all machines share.")
        self._written = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115 - read until the end
        command, (out, err) = [sys.executable, "-m", "finback", *arguments], self._written
        own: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True, "cwd": folder}
        self._process = subprocess.Popen(command, env=os.environ | environment, stdout=out, stderr=err, **own)

    def look(self, seen: Sequence[int]) -> tuple[int | None, list[bytes]]:
        """Its exit code, None while it runs, and its output since `seen` bytes of stdout and stderr; () asks for none."""
        assert self._process is not None, "started"
        code = self._process.poll()  # before reading, so that nothing is missed at the end
        return code, [os.pread(each.fileno(), MOST, at) for each, at in zip(self._written, seen, strict=False)]

    def send_signal(self, number: int) -> None:
        """Sends the rank a signal."""
        assert self._process is not None, "started"
        self._process.send_signal(number)


class _PlacedRank(launch.Child):
    """One rank, as the process that launches all of them sees it; rank 0's output is passed on."""

    def __init__(self, cluster: ray_cluster.Cluster, host: Any, shows: bool) -> None:
        self.cluster, self.host = cluster, host
        self.returncode: int | None = None
        # bytes of stdout and stderr that were passed on
        self.seen = [0, 0] if shows else []

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                self.returncode, written = self._look(self.seen)
            except RequestFailed:  # its machine or its worker is gone
                self.returncode, written = -signal.SIGKILL, []
            for number, text in enumerate(written):
                self.seen[number] += len(text)
                stream = (sys.stdout, sys.stderr)[number]
                stream.write(text.decode(errors="replace"))
                stream.flush()
        return self.returncode

    def _look(self, seen: Sequence[int]) -> tuple[int | None, list[bytes]]:
        found: tuple[int | None, list[bytes]] = self.cluster.get(self.host.look.remote(seen), ASKING)
        return found

    def written(self) -> bytes:
        """Output that was not passed on; b"" if its machine is gone."""
        try:
            return b"" if self.seen else b"".join(self._look((0, 0))[1])
        except RequestFailed:
            return b""

    def send_signal(self, number: int, /) -> None:
        self.host.send_signal.remote(int(number))  # without waiting: this may run in a signal handler

    def kill(self) -> None:
        self.cluster.end(self.host)
        self.returncode = -signal.SIGKILL

    def wait(self) -> int:
        assert self.returncode is not None, "it has ended"
        return self.returncode


def launch_ranks(stages: Sequence[Stage], arguments: Sequence[str], ranks: int, address: str) -> int:
    """Runs `python -m finback <arguments>` as `ranks` processes that Ray places; returns what `launch.supervise` returns.

    Each rank reserves a CPU and, if Ray has GPUs, a GPU. Machines must share the current folder under one path.
    """
    ray = ray_cluster.imported(FIELD, address)
    room = ray_cluster.Room(f"finback-ranks-{os.getpid()}", ranks, 1, 0, address)
    try:
        ray_cluster.connect(ray, room, FIELD)
    except UserError as error:
        raise UserError(FIELD, address, error.problem, error.remedy) from None
    there = ray.cluster_resources()
    _check_room([stage.rollouts for stage in stages if hasattr(stage, "rollouts")], ranks, there)
    room = replace(room, num_gpus=1 if there.get("GPU") else 0)
    cluster = ray_cluster.Cluster(ray, room, FIELD, is_owner=True)
    try:
        _reserve(cluster)
        hosts = _placed([cluster.actor(number, RankHost, ()) for number in range(ranks)], cluster)
        job = f"ray {ray.get_runtime_context().gcs_address}"
        started: list[_PlacedRank] = []

        def begin(rank: int) -> launch.Child:
            host, environment = hosts[rank][0], _environment([place for _, place in hosts], rank) | {"FINBACK_JOB": job}
            cluster.get(host.start.remote(list(arguments), str(Path.cwd()), environment), ASKING)
            started.append(_PlacedRank(cluster, host, shows=rank == 0))
            return started[-1]

        return launch.supervise(begin, ranks, lambda rank: started[rank].written())
    except RequestFailed as error:
        raise UserError(
            "--ranks", ranks, f"Ray cannot start them: {error}", "See `ray status` and Ray's logs."
        ) from None
    finally:
        cluster.leave()


def _check_room(rollouts: Sequence[Any], ranks: int, there: dict[str, float]) -> None:
    """Raises UserError if Ray has too little for the ranks and the largest fleet together, or they want the same GPUs."""
    fleets = [each for each in rollouts if hasattr(each, "colocated")]
    for kind, own in ("CPU", "num_cpus"), ("GPU", "num_gpus"):
        has, engines = there.get(kind, 0.0), max((each.n * getattr(each, own) for each in fleets), default=0)
        if ranks + engines > has and (kind == "CPU" or has):
            problem = f"they need {ranks} {kind}s and the recipe's engines {engines:g}, but Ray has {has:g}"
            remedy = "Lower it, add nodes to Ray, or use --ranks 1 for a rank outside Ray."
            raise UserError("--ranks", ranks, problem, remedy)
    if there.get("GPU") and any(each.colocated for each in fleets):
        problem = "a fleet is colocated, but Ray reserves each GPU once, for a rank or for an engine"
        raise UserError("--ranks", ranks, problem, "Start the ranks with torchrun and --ray, or leave out colocated.")


def _reserve(cluster: ray_cluster.Cluster) -> None:
    """Reserves the ranks' CPUs and GPUs; UserError about --ranks if that fails."""
    try:
        cluster.reserve()
    except UserError as error:
        raise UserError("--ranks", cluster.asked.n, error.problem, error.remedy) from None


def _placed(hosts: Sequence[Any], cluster: ray_cluster.Cluster) -> list[tuple[Any, Place]]:
    """Hosts in the order of their ranks, those of one machine together, and where they are."""
    asked = [host.place.remote() for host in hosts]
    found = list(zip(hosts, (cluster.get(each, STARTING) for each in asked), strict=True))
    order = list(dict.fromkeys(place.address for _, place in found))
    return sorted(found, key=lambda pair: order.index(pair[1].address))


def _environment(places: Sequence[Place], rank: int) -> dict[str, str]:
    """A rank's variables. Ranks of one machine see each other's GPUs, which NCCL needs."""
    here = [number for number, place in enumerate(places) if place.address == places[rank].address]
    gpus = [gpu for number in here for gpu in places[number].gpus]
    address = "127.0.0.1" if len(here) == len(places) else places[0].address
    found = launch.rendezvous(rank, len(places), address, places[0].port)
    found |= {"LOCAL_RANK": str(here.index(rank)), "LOCAL_WORLD_SIZE": str(len(here)), "OMP_NUM_THREADS": "1"}
    return found | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})
