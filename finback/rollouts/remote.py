"""Rollouts from external engines, however they are started: they receive the policy's weights before each step and share the prompts."""

import secrets
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal, Protocol

from finback.client import RequestFailed, Retries
from finback.config import UserError
from finback.engine.request import Completion, FinishReason, SamplingParams
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.rollouts import server_checks
from finback.rollouts.dispatcher import Dispatcher
from finback.rollouts.generation import PolicyModel, Rollouts
from finback.rollouts.generation_server import GenerationServer, ServedModel, TokenAnswer, TokenPrompt
from finback.runs.external import EnginePrice, ExternalEngines


class Remote(Protocol):
    """Knobs that all external engines have."""

    @property
    def dtype(self) -> Literal["auto", "fp32", "bf16"]:
        """Precision of the weights that engines receive."""
        ...

    @property
    def probe_gap(self) -> float | None:
        """Largest difference of log-probabilities, in nats, that a probe accepts; None: the default of the precision."""
        ...

    @property
    def tries(self) -> int:
        """Consecutive failures after which an engine is left alone."""
        ...

    @property
    def backoff(self) -> float:
        """Seconds for which an engine is left alone after its first failure."""
        ...


class RemoteRollouts(Rollouts):
    """External engines of one stage. Each rank asks for its own prompts; rank 0 sends weights."""

    # concurrent prompts per engine; None: each engine gets its whole share at once
    concurrency: int | None = None
    # whether engines only ever have our weights, so that they also need those of a model that does not learn
    is_owner = False

    def __init__(self, knobs: Remote, policy: PolicyModel, sampling: SamplingParams) -> None:
        super().__init__(policy.config)
        self.knobs, self.policy, self.sampling, self.world = knobs, policy, sampling, World.of(policy.run)
        self.field = f"{policy.run.name}.rollouts"
        # prefix of version names, so that another run's weights are never mistaken for ours
        self.token = self.world.gather(secrets.token_hex(4))[0]
        # version names sent so far, with their numbers
        self.sent: dict[str, int] = {}
        self.retries = Retries(knobs.tries, backoff=knobs.backoff)
        # engines that have the current weights
        self.ready: list[GenerationServer] = []
        self.servers: list[GenerationServer] = []
        # how the ledger counts them, once they are hired
        self.hired: ExternalEngines | None = None
        # remaining checks of log-probabilities: at the first weights, and after the first update
        self.probes = 2 if policy.learns else 1

    @property
    def served(self) -> ServedModel:
        """What answers must match."""
        config, policy, narrowed = self.policy.config, self.policy, self.sampling.return_sampling_mask
        return ServedModel(
            config.vocab_size,
            config.num_hidden_layers,
            config.num_experts_per_tok,
            policy.return_routed_experts,
            narrowed,
        )

    @property
    def sends(self) -> bool:
        """Whether weights are sent to engines."""
        return self.policy.learns or self.is_owner

    def hire(self, price: EnginePrice) -> None:
        """Counts `servers` in the stage's ledger from now until `leave`."""
        # the stage counts FLOPs of generation itself, from the model in training
        self.hired = self.policy.run.hire(self.field, price, [each.count for each in self.servers], knows_flops=True)

    def leave(self) -> None:
        """The servers are no longer used."""
        if self.hired is not None:
            self.hired.leave()

    @abstractmethod
    def _write(self, model: Transformer, label: str) -> tuple[Any, int]:
        """Stores weights where engines find them. Returns the argument of `load`, and the number of bytes."""

    # ---- weights ---------------------------------------------------------------------------------------------------

    def _take_weights(self, version: int) -> int:
        """Sends the weights to every server, and checks its log-probabilities the first two times.

        Later, a server that fails to take weights is skipped in this step and gets the next ones.
        """
        model, is_early = self.policy.weights(), self.probes > 0
        if self.sends:
            self.sent[self._label(version)] = version
        found: tuple[list[str], int] = [], 0
        if self.policy.run.is_writer:
            found = self._send(model, version, is_early)
        self.probes -= is_early
        ready, sent = self.world.gather(found)[0]
        self.ready = [server for server in self.servers if server.url in ready]
        for server in self.ready:
            server.expected = self._label(version) if self.sends else None
        return sent if self.policy.run.is_writer else 0

    def _send(self, model: Transformer, version: int, is_early: bool) -> tuple[list[str], int]:
        """Addresses of the servers that now have the weights, and the bytes that they have read."""
        weights, size = self._write(model, self._label(version)) if self.sends else (None, 0)

        def load(server: GenerationServer) -> str:
            if not self.sends:
                return ""
            try:
                server.expected = None
                server.load(weights, self._label(version))
                server.expected = self._label(version)
            except RequestFailed as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(len(self.servers)) as pool:
            problems = list(pool.map(load, self.servers))
        if is_early:
            self._look(model, version, problems)
        lost = {server.url: problem for server, problem in zip(self.servers, problems, strict=True) if problem}
        for url, problem in lost.items():
            self.policy.run.say(f"{self.policy.run.name:10} warning: {url} has missed new weights: {problem}")
        if len(lost) == len(self.servers):
            said = "; ".join(f"{url}: {problem}" for url, problem in lost.items())
            remedy = "Start them again, then run the same command: the run continues where it stopped."
            raise UserError(self.field, ", ".join(lost), f"no server accepts the weights: {said}", remedy)
        ready = [server.url for server in self.servers if server.url not in lost]
        return ready, size * len(ready)

    def _look(self, model: Transformer, version: int, problems: Sequence[str]) -> None:
        """Compares each server's log-probabilities with the model's; UserError if one cannot load the weights at all."""
        for server, problem in zip(self.servers, problems, strict=True):
            try:
                if problem:
                    raise RequestFailed(problem)
                server_checks.check_logprobs(server, self._probe(version), model, self._probe_gap)
            except RequestFailed as error:
                raise server.unfit(f"failed: {error}", "See its log; fix it and start it again.") from None

    def _label(self, version: int) -> str:
        return f"{self.token}-{version}"

    @property
    def _dtype(self) -> Literal["fp32", "bf16"]:
        asked = self.knobs.dtype
        return asked if asked != "auto" else "fp32" if self.policy.compute == "fp32" else "bf16"

    @property
    def dtypes(self) -> tuple[str, str]:
        """Precision of the trainer's products, and of the matrices sent."""
        return self.policy.compute, self._dtype

    @property
    def _probe_gap(self) -> float:
        exact = self._dtype == "fp32" and self.policy.compute == "fp32"
        return self.knobs.probe_gap or (1e-3 if exact else 0.1)

    # ---- answers ---------------------------------------------------------------------------------------------------

    def _answers(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Completion]]:
        def ask(server: GenerationServer, places: Sequence[int]) -> Iterator[tuple[int, TokenAnswer]]:
            asked = [self._prompt(prompts[place], sampling, seeds[place], self.version) for place in places]
            # in flight: accept the previous version, the newest, and all that arrive while the engine answers
            flying, first = self.policy.in_flight != "none", max(0, len(self.sent) - 2)
            for number, answer in server.answers(asked):
                server_checks.check_version(server, answer, list(self.sent)[first:] if flying else ())
                yield places[number], answer

        dispatcher = Dispatcher(self.ready, ask, len(prompts), self.concurrency, self.retries)
        for place, answer in dispatcher.results():
            yield place, self._completion(answer)

    def _probe(self, version: int) -> TokenPrompt:
        """The prompt for checking servers, with the stage's own sampling, so that its log-probabilities are comparable."""
        ids, room = server_checks.probe_ids(self.policy)
        warm = self.sampling.temperature or 1.0
        sampling = replace(self.sampling, temperature=warm, max_tokens=room, ignore_eos=True)
        return self._prompt(ids, sampling, 0, version)

    def _prompt(self, ids: Sequence[int], sampling: SamplingParams, seed: int, version: int) -> TokenPrompt:
        stops = () if sampling.ignore_eos else (*self.policy.tokenizer.stops, *sampling.stop_token_ids)
        s, salt = sampling, self._label(version)
        return TokenPrompt(ids, seed, s.max_tokens, s.temperature, s.top_k, s.top_p, tuple(stops), s.ignore_eos, salt)

    def _completion(self, answer: TokenAnswer) -> Completion:
        finish: FinishReason = "stop" if answer.finish_reason == "stop" else "length"
        known = [(self.sent.get(label), first, end) for label, first, end in answer.versions or ()]
        versions = tuple((version, first, end) for version, first, end in known if version is not None)
        routes, mask = answer.routed_experts, answer.sampling_mask
        return Completion(answer.tokens, answer.logprobs, finish, routes, mask, versions)
