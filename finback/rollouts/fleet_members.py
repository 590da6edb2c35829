"""The trainer's handle on an engine of a fleet: an actor that Ray places, replaced if it is lost."""

import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from finback.client import Client, RequestFailed
from finback.config import UserError
from finback.engine.engine import EngineConfig
from finback.engine.request import SamplingParams
from finback.rollouts.engine_process import HEALTH, training_flags
from finback.rollouts.engine_process import STARTING as PROGRAM_STARTING
from finback.rollouts.fleet_engine import FleetEngine
from finback.rollouts.generation_server import GenerationServer, ServedModel, TokenAnswer, TokenPrompt
from finback.rollouts.live_engine import SIGNS
from finback.rollouts.program_engine import ProgramEngine
from finback.rollouts.server_kinds import VllmServer, find_server

if TYPE_CHECKING:
    from finback.rollouts.fleet import FleetRollouts

T = TypeVar("T")
STARTING = 300.0  # time for a finback engine to start, in seconds
ASKING = 30.0  # timeout of calls that an actor answers at once, in seconds
LONGEST_REPLY = 1 << 30  # bytes; routed experts of a long answer take megabytes


class FleetMember(GenerationServer):
    """An actor that is restarted with the current weights when it is lost; rank 0 starts it, other ranks look it up."""

    kind = "Ray"

    def __init__(self, fleet: "FleetRollouts", number: int, model: ServedModel) -> None:
        # it has no HTTP address
        super().__init__(f"engine {number}", Client("http://ray"), "", fleet.field, model)
        self.fleet, self.number, self.cluster = fleet, number, fleet.cluster
        self.drops = fleet.policy.in_flight == "drop"
        # weights for a restarted engine, and their version
        self.weights: Any = None
        self.newest = ""
        self._actor: Any = None
        # held while starting or ending the actor
        self._lock = threading.RLock()

    def handle(self) -> Any:
        """The actor; starts a new one if it was lost."""
        with self._lock:
            if self._actor is None:
                self._actor = self._start()
                if self.weights is not None:
                    self._load(self._actor, self.weights, self.newest)
            return self._actor

    def begun(self) -> Any:
        """The actor, started or found, whether or not it has weights yet."""
        with self._lock:
            self._actor = self._actor or self._start()
            return self._actor

    def software(self) -> dict[str, str]:
        """The versions of its software; retries with a new actor if one is lost while it starts."""
        return self._repeated(lambda: self._get(actor := self.begun(), actor.software.remote(), STARTING))

    def load(self, weights: Any, version: str) -> None:
        """Retries with a new actor if it is lost meanwhile, as does `answer`."""
        self.weights, self.newest = weights, version

        def load() -> None:
            with self._lock:
                if self._actor is None:
                    self.handle()
                else:
                    self._load(self._actor, weights, version)

        self._repeated(load)
        self.asleep = False

    def answer(self, prompt: TokenPrompt) -> TokenAnswer:
        return self._repeated(lambda: super(FleetMember, self).answer(prompt))

    def sleep(self) -> None:
        """An engine that fails to release its memory is ended, which also frees it."""
        actor = self._actor
        try:
            self._sleep()
        except RequestFailed:
            self._give_up(actor)
        self.asleep = True

    @abstractmethod
    def _start(self) -> Any:
        """The actor, created or looked up."""

    @abstractmethod
    def _load(self, actor: Any, weights: Any, version: str) -> None:
        """Makes a running actor answer with these weights."""

    def _repeated(self, work: Callable[[], T]) -> T:
        retries = self.fleet.retries
        for turn in range(1, retries.tries):
            try:
                return work()
            except RequestFailed as error:
                if error.final:
                    raise
                time.sleep(retries.wait(error, turn))
        return work()

    def _get(self, actor: Any, call: Any, seconds: float) -> Any:
        return self._guarded(actor, lambda: self.cluster.get(call, seconds))

    def _guarded(self, actor: Any, work: Callable[[], T]) -> T:
        """Returns what `work` returns; an actor that does not respond is given up."""
        try:
            return work()
        except RequestFailed as error:
            if not error.final:
                self._give_up(actor)
            raise

    def _give_up(self, actor: Any) -> None:
        """Ends an actor, unless it has already been replaced."""
        with self._lock:
            if actor is None or actor is not self._actor:
                return
            self._actor = None
            self._lost()
        self.cluster.end(actor)

    def _lost(self) -> None:
        """Cleans up after an actor that was given up."""

    def close(self) -> None:
        """Stops asking it."""
        self.client.close()
        self._lost()


class RayEngine(FleetMember):
    """finback's own engine, which receives weights and sends answers through Ray."""

    def _start(self) -> Any:
        policy, knobs = self.fleet.policy, self.fleet.fleet
        config = replace(policy.config, num_nextn_predict_layers=0)
        compute, dtype = (torch.bfloat16 if name == "bf16" else torch.float32 for name in self.fleet.dtypes)
        engine = EngineConfig(return_routed_experts=policy.return_routed_experts)
        return self.cluster.actor(self.number, FleetEngine, (config, compute, dtype, engine, knobs.num_cpus))

    def _load(self, actor: Any, weights: Any, version: str) -> None:
        number = self.fleet.sent.get(version, 0)
        self._get(actor, actor.load.remote(weights, number, self.drops), STARTING)

    def _sleep(self) -> None:
        if (actor := self._actor) is not None:
            self.cluster.get(actor.sleep.remote(), ASKING)

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
        actor, patience = self.handle(), self.fleet.fleet.patience
        asked = [list(prompt.token_ids) for prompt in prompts], sampling, [prompt.seed for prompt in prompts], SIGNS
        found = actor.answers.options(num_returns="streaming").remote(*asked)
        while (call := self._guarded(actor, lambda: self.cluster.next(found, patience))) is not None:
            answered = self._get(actor, call, STARTING)
            if answered is not None:
                place, made = answered
                spans = [(f"{self.fleet.token}-{version}", start, end) for version, start, end in made.versions]
                # copies: arrays in Ray's store are read-only and would be kept there
                routes = None if made.routed_experts is None else made.routed_experts.copy()
                mask = None if made.sampling_mask is None else [ids.copy() for ids in made.sampling_mask]
                yield place, TokenAnswer(made.tokens, made.logprobs, made.finish_reason, routes, mask, spans)


class ProgramMember(FleetMember):
    """vLLM or SGLang, which an actor starts on a folder of weights; requests go over HTTP, as to any server."""

    def __init__(self, fleet: "FleetRollouts", number: int, model: ServedModel) -> None:
        super().__init__(fleet, number, model)
        # server of the current actor, None if there is none
        self._server: GenerationServer | None = None
        self._starter: threading.Thread | None = None
        # held while a background thread starts the program
        self._beginning = threading.Lock()
        self._problem: RequestFailed | None = None

    def handle(self) -> Any:
        """The actor, with a server that answers."""
        with self._lock:
            actor = super().handle()
            if self._server is None:  # started by another rank
                url = self._get(actor, actor.url.remote(), ASKING)
                if not url:
                    raise RequestFailed("is being started", busy=True)
                self._server = self._connect(actor, url)
            return actor

    def version(self) -> str | None:
        return None if self._server is None else self._server.version()

    def unfit(self, problem: str, remedy: str) -> UserError:
        return super().unfit(problem, remedy) if self._server is None else self._server.unfit(problem, remedy)

    def _start(self) -> Any:
        knobs = self.fleet.fleet
        program = knobs.program
        flags = training_flags(program.engine, self.fleet.dtypes[1], self.model, knobs.colocated)
        return self.cluster.actor(self.number, ProgramEngine, (program, flags, knobs.num_cpus))

    def _connect(self, actor: Any, url: str) -> GenerationServer:
        knobs = self.fleet.fleet
        client = Client(url, timeout=knobs.patience, max_bytes=LONGEST_REPLY)
        try:
            server = self._watched(actor, lambda: find_server(url, client, self.field, self.model))
        except BaseException:
            client.close()
            raise
        server.drops = self.drops
        if isinstance(server, VllmServer):
            server.reload_method = knobs.reload_method
        self.kind, self.without_logprobs = server.kind, server.without_logprobs
        self.without_masks = server.without_masks
        return server

    def _load(self, actor: Any, weights: Any, version: str) -> None:
        if self._server is not None:
            server = self._server
            self._watched(actor, lambda: server.load(weights, version))
            return
        new = self._connect(actor, self._get(actor, actor.start.remote(str(weights)), PROGRAM_STARTING))
        try:
            self._watched(actor, lambda: new.load(weights, version))
            self._get(actor, actor.announce.remote(), ASKING)
        except BaseException:
            new.client.close()
            raise
        self._server = new  # set last: requests must not reach it before it has its weights

    def _sleep(self) -> None:
        if self._server is not None:
            self._server.sleep()

    def _answer(self, prompt: TokenPrompt) -> TokenAnswer:
        server, actor = self._server, self._actor
        if server is None or actor is None:
            problem, self._problem = self._problem, None
            self._begin()
            raise problem or RequestFailed("is being started", busy=True)
        return self._watched(actor, lambda: server._answer(prompt))

    def _begin(self) -> None:
        """Restarts it in the background, so that other engines can answer meanwhile."""

        def start() -> None:
            try:
                self.handle()
            except RequestFailed as error:
                self._problem = error

        with self._beginning:
            if self._starter is None or not self._starter.is_alive():
                self._starter = threading.Thread(target=start, name=f"starting {self.url}", daemon=True)
                self._starter.start()

    def _watched(self, actor: Any, work: Callable[[], T]) -> T:
        """Returns what `work` returns; a program that is silent, or unhealthy when it fails, is given up with its actor."""
        try:
            return work()
        except RequestFailed as error:
            if not (error.final or error.busy) and (error.silent or not self._is_well(actor)):
                self._give_up(actor)
                self._begin()
            raise

    def _is_well(self, actor: Any) -> bool:
        try:
            return bool(self.cluster.get(actor.is_well.remote(), 2 * HEALTH))
        except RequestFailed:
            return False

    def _lost(self) -> None:
        if (server := self._server) is not None:
            self._server = None
            server.client.close()
