"""Answers from a fleet of engines (finback's own, vLLM or SGLang) that Ray places on this machine or a cluster."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from finback.client import RequestFailed
from finback.config import UserError, check_fields, check_not_negative, check_positive
from finback.engine.request import SamplingParams
from finback.model.transformer import Transformer
from finback.parallel import ray_cluster
from finback.rollouts.engine_process import EngineProgram
from finback.rollouts.fleet_engine import pack
from finback.rollouts.fleet_members import FleetMember, ProgramMember, RayEngine
from finback.rollouts.generation import Backend, PolicyModel, Rollouts
from finback.rollouts.remote import RemoteRollouts
from finback.rollouts.weight_files import WeightFiles, merged
from finback.runs import provenance
from finback.runs.external import EnginePrice

SILENT = {"finback": 120.0, "vllm": 1800.0, "sglang": 1800.0}  # default timeout in seconds


@dataclass(frozen=True)
class Fleet(Backend):
    """Engines in separate processes share the prompts. An engine that dies is restarted with the current weights.

    One engine with the same number of threads gives bit-identical answers to `Here`, with dtype="fp32" even if the trainer computes in bf16.
    """

    # number of engines
    n: int
    # finback's own engine, or a program that is installed in its own environment
    engine: Literal["finback", "vllm", "sglang"] = "finback"
    # Ray's address, such as 10.0.0.5:6379, or auto: the Ray of this machine; "": start one for this run
    address: str = ""
    # CPUs that Ray reserves for each engine, and its number of threads
    num_cpus: int = 1
    # GPUs that Ray reserves for each engine
    num_gpus: float = 0.0
    # dollars per hour of each engine; None: its CPUs are priced like the ranks', and the price of GPUs is unknown
    price_hour: float | None = None
    # engines share their GPUs with the trainer and release their memory while it learns
    colocated: bool = False
    # precision of the matrices sent to engines; auto: the one in which the trainer computes
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    # largest allowed difference from the trainer's log-probabilities before the first step, in nats; None: 1e-3 in fp32, 0.1 in bf16
    probe_gap: float | None = None
    # seconds without a sign of life after which an engine is restarted; None: 120 for finback's, which reports progress during an
    # answer, and 1800 for programs, which do not
    timeout: float | None = None
    # consecutive failures after which an engine is not used for the rest of the step
    tries: int = 6
    # seconds before a failed engine is asked again; doubles with each failure
    backoff: float = 1.0
    # programs only: Python interpreter of their environment
    python: str = ""
    # programs only: flags added to their command
    flags: tuple[str, ...] = ()
    # programs only: NAME=value pairs for their environment
    env: tuple[str, ...] = ()
    # folder for weights that all nodes see under the same path; "": the stage's own
    folder: str = ""
    # concurrent requests to each program
    concurrency: int = 64
    # name of vLLM's worker method that reloads weights, called with weights_path
    reload_method: str = "reload_weights"

    def __post_init__(self) -> None:
        check_fields(self, "rollouts")
        check_positive(self, "rollouts", "n", "num_cpus", "probe_gap", "timeout", "tries", "concurrency")
        check_not_negative(self, "rollouts", "num_gpus", "backoff", "price_hour")
        if self.engine != "finback":
            self.program.check("rollouts")
            return
        given = [name for name in ("python", "flags", "env", "folder") if getattr(self, name)]
        if given:
            problem = "applies to programs, but finback's engines run in this environment"
            raise UserError(
                f"rollouts.{given[0]}", getattr(self, given[0]), problem, 'Leave it out, or set engine="vllm".'
            )

    @property
    def program(self) -> EngineProgram:
        """The program that each engine starts, if it is not finback's own."""
        assert self.engine != "finback", "a program"
        return EngineProgram(self.engine, self.python, self.flags, self.env)

    @property
    def price(self) -> EnginePrice:
        """What each engine costs."""
        return EnginePrice(None, None, self.price_hour, self.num_cpus, self.num_gpus, is_here=not self.address)

    @property
    def patience(self) -> float:
        """Seconds without a sign of life after which an engine is considered lost."""
        return self.timeout if self.timeout is not None else SILENT[self.engine]

    def check_ahead(self, field: str, max_staleness: int) -> None:
        if self.colocated and max_staleness:
            problem = "the engines answer while the trainer learns"
            raise UserError(f"{field}.colocated", True, problem, "Leave it out, or use max_staleness=0.")

    def open(self, policy: PolicyModel, sampling: SamplingParams) -> Rollouts:
        return FleetRollouts(self, policy, sampling)


class FleetRollouts(RemoteRollouts):
    """The fleet of one stage; rank 0 starts the engines."""

    is_owner = True

    def __init__(self, fleet: Fleet, policy: PolicyModel, sampling: SamplingParams) -> None:
        super().__init__(fleet, policy, sampling)
        self.fleet = fleet
        self.concurrency = None if fleet.engine == "finback" else fleet.concurrency
        folder = Path(fleet.folder).resolve() if fleet.folder else policy.run.folder / ".weights"
        self.files = WeightFiles(folder, self.field, policy.tokenizer.export)
        name = f"finback-{self.token}"
        asked = ray_cluster.Room(name, fleet.n, fleet.num_cpus, fleet.num_gpus, fleet.address)
        self.cluster = ray_cluster.join(asked, self.field, self.world)
        member = RayEngine if fleet.engine == "finback" else ProgramMember
        try:
            self.servers = [member(self, number, self.served) for number in range(fleet.n)]
            self.hire(fleet.price)
            if policy.run.is_writer:
                self._check()
        except BaseException:
            self.close()
            raise

    @property
    def members(self) -> list[FleetMember]:
        """The engines, typed as members of a fleet."""
        return [server for server in self.servers if isinstance(server, FleetMember)]

    def _check(self) -> None:
        """Starts all actors at once; UserError if software versions differ from this process."""
        for member in self.members:
            with suppress(RequestFailed):  # tried again below
                member.begun()
        for member in self.members:
            try:
                theirs = member.software()
            except RequestFailed as error:
                remedy = "See the logs of Ray; finback must be installed on its nodes, or they must see this machine's files."
                raise member.unfit(f"did not start: {error}", remedy) from None
            for name, version in provenance.software().items():
                if theirs.get(name) != version:
                    remedy = "Install the same version on all nodes."
                    raise member.unfit(f"has {name} {theirs.get(name)}, but the trainer has {version}", remedy)

    def _take_weights(self, version: int) -> int:
        if self.fleet.colocated and torch.cuda.is_available():
            torch.cuda.empty_cache()  # frees what the trainer only caches
        return super()._take_weights(version)

    def _write(self, model: Transformer, label: str) -> tuple[Any, int]:
        """Writes weights as files for programs; otherwise into Ray's store, shared memory that Ray also sends to other machines."""
        if self.fleet.engine != "finback":
            return self.files.write(model, label, self._dtype)
        weights = pack(merged(model, self._dtype), torch.float32 if self._dtype == "fp32" else torch.bfloat16)
        return self.cluster.put(weights), sum(array.nbytes for array in weights.values())

    def _rest(self) -> bool:
        if not self.fleet.colocated:
            return False
        self.world.barrier()  # no rank is generating any more
        if self.policy.run.is_writer:
            with ThreadPoolExecutor(self.fleet.n) as pool:
                list(pool.map(lambda member: member.sleep(), self.members))
        self.world.barrier()
        return True

    def close(self) -> None:
        """Ends the engines."""
        self.leave()
        for member in self.members:
            member.close()
        self.cluster.leave()
        if self.policy.run.is_writer:
            self.files.clear()
