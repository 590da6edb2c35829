"""Ray, as far as a fleet needs it: joining it, room for actors, calls with a limit, and what goes wrong. Imported by nobody else.

Ray itself is imported when a fleet is opened, and not before.
"""

import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

from finback.client import RequestFailed
from finback.config import UserError
from finback.extras import how_to_get
from finback.parallel.mesh import World

PLACING = 60.0  # seconds in which Ray has to find room
THREADS = 64  # calls that an actor works on at once
NAMESPACE = "finback"


@dataclass(frozen=True)
class Room:
    """What a fleet wants of Ray."""

    # of its actors, with a number behind it
    name: str
    n: int
    num_cpus: int
    num_gpus: float
    address: str


class Cluster:
    """A Ray that this process has joined, with a bundle of CPUs and GPUs set aside for each actor; rank 0 holds them."""

    def __init__(self, ray: Any, asked: Room, field: str, is_owner: bool) -> None:
        self.ray, self.asked, self.field, self.is_owner = ray, asked, field, is_owner
        self.group: Any = None
        self.actors: dict[int, Any] = {}

    def reserve(self) -> None:
        """Set the bundles aside; UserError where Ray has not so much, or others hold it."""
        asked, there = self.asked, self.ray.cluster_resources()
        for kind, each in (("CPU", asked.num_cpus), ("GPU", asked.num_gpus)):
            if asked.n * each > (has := there.get(kind, 0.0)):
                problem = f"{asked.n} engines with {each:g} {kind}s each want {asked.n * each:g}, and Ray has {has:g}"
                knob = f"num_{kind.lower()}s"
                raise UserError(f"{self.field}.{knob}", each, problem, "Lower it or n, or add nodes to Ray.")
        bundle = {"CPU": asked.num_cpus} | ({"GPU": asked.num_gpus} if asked.num_gpus else {})
        self.group = self.ray.util.placement_group([bundle] * asked.n, strategy="PACK")
        try:
            self.ray.get(self.group.ready(), timeout=PLACING)
        except self.ray.exceptions.GetTimeoutError:
            self.leave()
            problem = f"Ray has found no room for them in {PLACING:.0f} s"
            raise UserError(f"{self.field}.n", asked.n, problem, "See `ray status`: others may hold it.") from None

    def actor(self, number: int, kind: type, arguments: tuple[Any, ...]) -> Any:
        """An actor in its bundle, made by the rank that holds them and looked up by the others; RequestFailed without one."""
        name = f"{self.asked.name}-{number}"
        if not self.is_owner:
            try:
                return self.ray.get_actor(name, namespace=NAMESPACE)
            except ValueError as error:
                raise RequestFailed(f"is not there ({error})") from None
        place = self.ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(self.group, number)
        options: dict[str, Any] = {"num_cpus": self.asked.num_cpus, "num_gpus": self.asked.num_gpus, "name": name}
        # started again by whoever gives it weights, and by nobody else
        options |= {"max_restarts": 0, "max_task_retries": 0, "max_concurrency": THREADS, "namespace": NAMESPACE}
        try:
            made = self.ray.remote(kind).options(scheduling_strategy=place, **options).remote(*arguments)
        except ValueError as error:  # the one before it has not left yet
            raise RequestFailed(f"cannot be started: {error}") from None
        self.actors[number] = made
        return made

    def put(self, value: Any) -> Any:
        """A reference that actors are given instead of a large value."""
        return self.ray.put(value)

    def get(self, call: Any, seconds: float) -> Any:
        """What a call returns; RequestFailed where its actor is gone or takes longer, a final one for a UserError there."""
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
        """The next of an actor's stream of values, as a reference; None at its end."""
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
        """End an actor at once, if it is there at all and ours."""
        if actor is not None and self.is_owner:
            self.ray.kill(actor)

    def leave(self) -> None:
        """End all actors, and give their bundles back."""
        if not self.is_owner or not self.ray.is_initialized():
            return
        for actor in self.actors.values():
            self.ray.kill(actor)
        self.actors.clear()
        if self.group is not None:
            self.ray.util.remove_placement_group(self.group)
            self.group = None


def join(asked: Room, field: str, world: World) -> Cluster:
    """Join Ray, or start one of this run's own; for all ranks at once. UserError where there is none, or too little of it."""
    ray = _imported(field)
    address = ""
    if world.rank == 0:
        _connect(ray, asked, field)
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
    """Of the machine that this worker is on, as others reach it."""
    import ray.util

    return str(ray.util.get_node_ip_address())


def _imported(field: str) -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise UserError(field, "Fleet", "Ray is not installed here", how_to_get("scale")) from None
    return ray


def _connect(ray: Any, asked: Room, field: str) -> None:
    if ray.is_initialized():
        return
    if asked.address:
        _init(ray, {"address": asked.address}, field)
    else:
        cores = max(os.cpu_count() or 1, asked.n * asked.num_cpus)
        _init(ray, {"num_cpus": cores, "include_dashboard": False}, field)


def _init(ray: Any, options: dict[str, Any], field: str) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR", "namespace": NAMESPACE}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anybody
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # engines on CPUs leave CUDA_VISIBLE_DEVICES alone
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**options, **quiet)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)  # a stage stops at a safe point, Ray's own handler at once
    except Exception as error:  # of many kinds
        address = options.get("address", "")
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__
        if address:
            problem, remedy = (
                f"no Ray can be joined there: {reason}",
                "Start it (`ray start --head`), or correct the address.",
            )
        else:
            problem, remedy = (
                f"Ray does not start here: {reason}",
                "See /tmp/ray/session_latest/logs, or join one by its address.",
            )
        raise UserError(f"{field}.address", address, problem, remedy) from None
