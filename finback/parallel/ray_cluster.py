"""What ranks and fleets need from Ray: joining it, reserving resources, calls with a timeout, and errors. The only file that uses Ray.

Ray is imported when it is joined, not before. Does not import torch.
"""

import os
import signal
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finback.client import RequestFailed
from finback.config import UserError
from finback.extras import how_to_get

if TYPE_CHECKING:
    from finback.parallel.mesh import World

PLACING = 60.0  # timeout for Ray to find resources, in seconds
THREADS = 64  # concurrent calls of an actor
NAMESPACE = "finback"
ANSWERING = 10.0  # timeout of a connection to Ray, in seconds
JOIN = "Start it (`ray start --head`), or correct the address."


@dataclass(frozen=True)
class Room:
    """The resources that a fleet needs from Ray."""

    # prefix of its actors' names, followed by a number
    name: str
    n: int
    num_cpus: int
    num_gpus: float
    address: str


class Cluster:
    """A Ray that this process has joined, with a bundle of CPUs and GPUs reserved for each actor; rank 0 owns them."""

    def __init__(self, ray: Any, asked: Room, field: str, is_owner: bool) -> None:
        self.ray, self.asked, self.field, self.is_owner = ray, asked, field, is_owner
        self.group: Any = None
        self.actors: dict[int, Any] = {}

    def reserve(self) -> None:
        """Reserves the bundles; UserError if Ray has too few resources or others hold them."""
        asked, there = self.asked, self.ray.cluster_resources()
        for kind, each in (("CPU", asked.num_cpus), ("GPU", asked.num_gpus)):
            if asked.n * each > (has := there.get(kind, 0.0)):
                problem = f"{asked.n} engines with {each:g} {kind}s each need {asked.n * each:g}, but Ray has {has:g}"
                knob = f"num_{kind.lower()}s"
                raise UserError(f"{self.field}.{knob}", each, problem, "Lower it or n, or add nodes to Ray.")
        bundle = {"CPU": asked.num_cpus} | ({"GPU": asked.num_gpus} if asked.num_gpus else {})
        self.group = self.ray.util.placement_group([bundle] * asked.n, strategy="PACK")
        try:
            self.ray.get(self.group.ready(), timeout=PLACING)
        except self.ray.exceptions.GetTimeoutError:
            self.leave()
            problem = f"Ray found no resources for them within {PLACING:.0f} s"
            raise UserError(f"{self.field}.n", asked.n, problem, "See `ray status`: others may use them.") from None

    def actor(self, number: int, kind: type, arguments: tuple[Any, ...]) -> Any:
        """An actor in its bundle, created by the owner and looked up by other ranks; RequestFailed if there is none."""
        name = f"{self.asked.name}-{number}"
        if not self.is_owner:
            try:
                return self.ray.get_actor(name, namespace=NAMESPACE)
            except ValueError as error:
                raise RequestFailed(f"is not there ({error})") from None
        place = self.ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self.group, number)
        options: dict[str, Any] = {"num_cpus": self.asked.num_cpus, "num_gpus": self.asked.num_gpus, "name": name}
        # restarted only by the member that loads its weights
        options |= {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": THREADS, "namespace": NAMESPACE}
        try:
            made = self.ray.remote(kind).options(scheduling_strategy=place, **options).remote(*arguments)
        except ValueError as error:  # its predecessor has not ended yet
            raise RequestFailed(f"cannot be started: {error}") from None
        self.actors[number] = made
        return made

    def put(self, value: Any) -> Any:
        """A reference that is passed to actors instead of a large value."""
        return self.ray.put(value)

    def get(self, call: Any, seconds: float) -> Any:
        """What a call returns. RequestFailed if its actor is gone or too slow; a final one for a UserError there."""
        errors = self.ray.exceptions
        try:
            return self.ray.get(call, timeout=seconds)
        except errors.GetTimeoutError:
            raise RequestFailed(f"silent for {seconds:g} s") from None
        except errors.RayTaskError as error:
            if isinstance(error.cause, UserError | RequestFailed):
                raise RequestFailed(str(error.cause), final=isinstance(error.cause, UserError)) from None
            raise RequestFailed(f"failed with {error.cause!r}") from None
        except errors.RayError as error:
            raise RequestFailed(f"was lost ({type(error).__name__})") from None

    def next(self, calls: Any, seconds: float) -> Any:
        """The next value of an actor's stream, as a reference; None at its end."""
        ready, _ = self.ray.wait([calls], timeout=seconds)
        if not ready:
            raise RequestFailed(f"silent for {seconds:g} s")
        try:
            return next(calls)
        except StopIteration:
            return None
        except self.ray.exceptions.RayError as error:
            raise RequestFailed(f"was lost ({type(error).__name__})") from None

    def end(self, actor: Any) -> None:
        """Ends an actor at once, if it exists and is ours."""
        if actor is not None and self.is_owner:
            self.ray.kill(actor)

    def leave(self) -> None:
        """Ends all actors and releases their bundles."""
        if not self.is_owner or not self.ray.is_initialized():
            return
        for actor in self.actors.values():
            self.ray.kill(actor)
        self.actors.clear()
        if self.group is not None:
            self.ray.util.remove_placement_group(self.group)
            self.group = None


def join(asked: Room, field: str, world: "World") -> Cluster:
    """Joins Ray, or starts one for this run. Collective. UserError if there is none, or it has too few resources."""
    ray = imported(field, "Fleet")
    address = ""
    if world.rank == 0:
        connect(ray, asked, field)
        address = ray.get_runtime_context().gcs_address
    address = world.gather(address)[0]
    if world.rank and not ray.is_initialized():
        _init(ray, {"address": address}, field)
    cluster = Cluster(ray, asked, field, is_owner=world.rank == 0)
    if cluster.is_owner:
        cluster.reserve()
    world.barrier()
    return cluster


def node_address() -> str:
    """Address of this worker's machine, as others reach it."""
    import ray.util

    return str(ray.util.get_node_ip_address())


def reserved_gpus() -> tuple[str, ...]:
    """Ids of the GPUs that are reserved for this worker."""
    import ray

    return tuple(str(each) for each in ray.get_runtime_context().get_accelerator_ids().get("GPU", []))


def imported(field: str, value: str) -> Any:
    """The module ray; UserError about a field and its value if it is not installed."""
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise UserError(field, value, "Ray is not installed here", how_to_get("scale")) from None
    return ray


def connect(ray: Any, asked: Room, field: str) -> None:
    """Joins the Ray that is asked for, or starts one; does nothing if this process has joined already."""
    if ray.is_initialized():
        return
    if asked.address:
        _demand_answer(asked.address, field)
        _init(ray, {"address": asked.address}, field)
    else:
        cores = max(os.cpu_count() or 1, asked.n * asked.num_cpus)
        _init(ray, {"num_cpus": cores, "include_dashboard": False}, field)


def _demand_answer(address: str, field: str) -> None:
    """Raises UserError if nothing listens at HOST:PORT, which Ray would try again for minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWERING).close()
    except (OSError, OverflowError) as error:
        problem = f"nothing answers there ({error})"
        raise UserError(f"{field}.address", address, problem, JOIN) from None


def _init(ray: Any, options: dict[str, Any], field: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "namespace": NAMESPACE}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # CPU engines must not change CUDA_VISIBLE_DEVICES
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options, **quiet)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # Ray's handler would stop at once, not at a safe point
    except Exception as error:  # Ray raises many types
        address = options.get("address", "")
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        if address:
            problem, remedy = (f"cannot join Ray there: {reason}", JOIN)
        else:
            problem, remedy = (
                f"Ray does not start here: {reason}",
                "See /tmp/ray/session_latest/logs, or give the address of a running Ray.",
            )
        raise UserError(f"{field}.address", address, problem, remedy) from None
