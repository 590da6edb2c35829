"""Answers from a fleet of finback's engines, which Ray places: on this machine, or on a cluster."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch

from finback.client import Client, RequestFailed
from finback.config import check_fields, check_not_negative, check_positive
from finback.engine.engine import EngineConfig
from finback.engine.request import SamplingParams
from finback.model.transformer import Transformer
from finback.rollouts import ray_cluster
from finback.rollouts.fleet_engine import FleetEngine, pack
from finback.rollouts.generation import Backend, PolicyModel, Rollouts
from finback.rollouts.generation_server import GenerationServer, ServedModel, TokenAnswer, TokenPrompt
from finback.rollouts.live_engine import SIGNS
from finback.rollouts.remote import RemoteRollouts
from finback.rollouts.weight_files import merged
from finback.runs import provenance

T = TypeVar("T")
STARTING = 300.0  # seconds in which an engine has to be there


@dataclass(frozen=True)
class Fleet(Backend):
    """Engines in processes of their own share the prompts. Those that die come back with the weights of the day.

    One engine of as many threads gives `Here`'s answers to the bit, given dtype="fp32" where the trainer computes in bf16.
    """

    # engines
    n: int
    # what generates; vLLM and SGLang work as `Servers`
    engine: Literal["finback"] = "finback"
    # of Ray, such as 10.0.0.5:6379, or auto: the one of this machine; "": one of its own, for this run
    address: str = ""
    # of each engine: its threads, and what Ray sets aside for it
    num_cpus: int = 1
    # GPUs that Ray sets aside for each engine
    num_gpus: float = 0.0
    # of the matrices that are sent; auto: that in which the trainer computes
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    # largest distance from the trainer's log-probabilities before the first step, in nats; None: 1e-3 in fp32, 0.1 in bf16
    probe_gap: float | None = None
    # seconds that an engine may be silent before it is ended and started anew
    timeout: float = 120.0
    # failures in a row after which an engine is asked nothing more in this step
    tries: int = 6
    # seconds before an engine that has failed is asked again, the first time; then twice that
    backoff: float = 1.0

    def __post_init__(self) -> None:
        check_fields(self, "rollouts")
        check_positive(self, "rollouts", "n", "num_cpus", "probe_gap", "timeout", "tries")
        check_not_negative(self, "rollouts", "num_gpus", "backoff")

    def open(self, policy: PolicyModel, sampling: SamplingParams) -> Rollouts:
        return FleetRollouts(self, policy, sampling)


class FleetRollouts(RemoteRollouts):
    """A fleet of one stage; it is rank 0 that starts engines."""

    def __init__(self, fleet: Fleet, policy: PolicyModel, sampling: SamplingParams) -> None:
        super().__init__(fleet, policy, sampling)
        self.fleet = fleet
        name = f"finback-{self.token}"
        asked = ray_cluster.Room(name, fleet.n, fleet.num_cpus, fleet.num_gpus, fleet.address)
        self.cluster = ray_cluster.join(asked, self.field, self.world)
        try:
            self.servers = [RayEngine(self, number, self.served) for number in range(fleet.n)]
            if policy.run.is_writer:
                self._check()
        except BaseException:
            self.close()
            raise

    def _check(self) -> None:
        """Start all engines at once; UserError where one runs other versions than this process."""
        engines = [server for server in self.servers if isinstance(server, RayEngine)]
        calls = [engine.handle().software.remote() for engine in engines]
        for engine, call in zip(engines, calls, strict=True):
            try:
                theirs: dict[str, str] = self.cluster.get(call, STARTING)
            except RequestFailed as error:
                remedy = "See the logs of Ray; finback has to be installed on its nodes, or they see this one's files."
                raise engine.unfit(f"did not start: {error}", remedy) from None
            for name, version in provenance.software().items():
                if theirs.get(name) != version:
                    remedy = "Install the same version on all nodes."
                    raise engine.unfit(f"has {name} {theirs.get(name)}, the trainer {version}", remedy)

    def _write(self, model: Transformer, label: str) -> tuple[Any, int]:
        """In Ray's store: memory that the engines of a machine share, and that Ray sends to others."""
        weights = pack(merged(model, self._dtype), torch.float32 if self._dtype == "fp32" else torch.bfloat16)
        return self.cluster.put(weights), sum(array.nbytes for array in weights.values())

    def close(self) -> None:
        """End the engines."""
        self.cluster.leave()


class RayEngine(GenerationServer):
    """One engine of a fleet, wherever Ray has placed it, and after it was lost the one in its place."""

    kind = "Ray"

    def __init__(self, fleet: FleetRollouts, number: int, model: ServedModel) -> None:
        # it has no address of its own
        super().__init__(f"engine {number}", Client("http://ray"), "", fleet.field, model)
        self.fleet, self.number, self.cluster = fleet, number, fleet.cluster
        self.drops = fleet.policy.in_flight == "drop"
        # the weights that one which is started anew has to have, and their version
        self.weights: Any = None
        self.newest = ""
        self._actor: Any = None

    def handle(self) -> Any:
        """The actor; one that was lost is started anew."""
        if self._actor is None:
            policy, knobs = self.fleet.policy, self.fleet.fleet
            config = replace(policy.config, num_nextn_predict_layers=0)
            compute, dtype = (torch.bfloat16 if name == "bf16" else torch.float32 for name in self.fleet.dtypes)
            engine = EngineConfig(return_routed_experts=policy.return_routed_experts)
            given = config, compute, dtype, engine, knobs.num_cpus
            self._actor = self.cluster.actor(self.number, FleetEngine, given)
            if self.weights is not None:
                self._load(self.weights, self.newest)
        return self._actor

    def load(self, weights: Any, version: str) -> None:
        """Each time anew where it is lost meanwhile, as `answer`."""
        self.weights, self.newest = weights, version

        def load() -> None:
            if self._actor is None:
                self.handle()
            else:
                self._load(weights, version)

        self._repeated(load)

    def answer(self, prompt: TokenPrompt) -> TokenAnswer:
        return self._repeated(lambda: super(RayEngine, self).answer(prompt))

    def _repeated(self, work: Callable[[], T]) -> T:
        retries = self.fleet.retries
        for turn in range(1, retries.tries):
            try:
                return work()
            except RequestFailed as error:
                time.sleep(retries.wait(error, turn))
        return work()

    def _load(self, weights: Any, version: str) -> None:
        number = self.fleet.sent.get(version, 0)
        self._get(self._actor.load.remote(weights, number, self.drops), STARTING)

    def _answer(self, prompt: TokenPrompt) -> TokenAnswer:
        return next(answer for _, answer in self._answers([prompt]))

    def _answers(self, prompts: Sequence[TokenPrompt]) -> Iterator[tuple[int, TokenAnswer]]:
        first = prompts[0]
        sampling = SamplingParams(
            first.temperature,
            first.max_tokens,
            first.top_k,
            first.top_p,
            stop_token_ids=first.stop_token_ids,
            ignore_eos=first.ignore_eos,
            return_sampling_mask=self.model.return_sampling_mask,
        )
        asked = [list(prompt.token_ids) for prompt in prompts], sampling, [prompt.seed for prompt in prompts], SIGNS
        found = self.handle().answers.options(num_returns="streaming").remote(*asked)
        while (call := self._guarded(lambda: self.cluster.next(found, self.fleet.fleet.timeout))) is not None:
            news = self._get(call, STARTING)
            if news is not None:
                place, made = news
                spans = [(f"{self.fleet.token}-{version}", start, end) for version, start, end in made.versions]
                # copies: what lies in Ray's store cannot be written, and would stay there
                routes = None if made.routed_experts is None else made.routed_experts.copy()
                mask = None if made.sampling_mask is None else [ids.copy() for ids in made.sampling_mask]
                yield place, TokenAnswer(made.tokens, made.logprobs, made.finish_reason, routes, mask, spans)

    def _get(self, call: Any, seconds: float) -> Any:
        return self._guarded(lambda: self.cluster.get(call, seconds))

    def _guarded(self, work: Any) -> Any:
        """What `work` gives; an actor that does not answer is given up."""
        try:
            return work()
        except RequestFailed:
            actor, self._actor = self._actor, None
            self.cluster.end(actor)
            raise
