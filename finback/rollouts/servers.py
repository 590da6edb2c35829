"""Answers from servers: vLLM, SGLang or finback, which get the policy's weights before each step as files."""

import secrets
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from finback.client import Client, RequestFailed, Retries, check_url, read_key
from finback.config import UserError, check_fields, check_not_negative, check_positive
from finback.engine.request import Completion, FinishReason, SamplingParams
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.rollouts import server_checks
from finback.rollouts.dispatcher import Dispatcher
from finback.rollouts.generation import Backend, PolicyModel, Rollouts
from finback.rollouts.generation_server import GenerationServer, ServedModel, TokenAnswer, TokenPrompt
from finback.rollouts.server_kinds import VllmServer, find_server
from finback.rollouts.weight_files import WeightFiles

LONGEST_REPLY = 1 << 30  # bytes; the experts of a long answer alone are megabytes


@dataclass(frozen=True)
class Servers(Backend):
    """Servers generate: any number of vLLM, SGLang or `finback serve`, found out by asking them; they share the prompts.

    Before the first step their tokenizers and log-probabilities are compared with those of the model that is trained.
    """

    # such as http://127.0.0.1:8000
    urls: tuple[str, ...]
    # which this process and the servers see under the same path, for the weights; "": the stage's own
    folder: str = ""
    # of the weights that are sent; auto: that in which the trainer computes
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    # largest distance from the trainer's log-probabilities before the first step, in nats; None: 1e-3 in fp32, 0.1 in bf16
    probe_gap: float | None = None
    # a file that holds the key, if the servers want one
    key_file: str | None = None
    # requests at a time, to each server
    concurrency: int = 64
    # seconds that a server may be silent
    timeout: float = 600.0
    # failures in a row after which a server is asked nothing more in this step
    tries: int = 6
    # seconds before a server that has failed is asked again, the first time; then twice that
    backoff: float = 1.0
    # of vLLM's workers, given weights_path
    reload_method: str = "reload_weights"

    def __post_init__(self) -> None:
        check_fields(self, "rollouts")
        check_positive(self, "rollouts", "probe_gap", "concurrency", "timeout", "tries")
        check_not_negative(self, "rollouts", "backoff")
        if not self.urls or len({*self.urls}) < len(self.urls):
            raise UserError("rollouts.urls", self.urls, "none, or one of them twice", "Name each server once.")
        for url in self.urls:
            check_url(url, "rollouts.urls", "http://127.0.0.1:8000")

    def open(self, policy: PolicyModel, sampling: SamplingParams) -> Rollouts:
        return ServerRollouts(self, policy, sampling)


class ServerRollouts(Rollouts):
    """Servers that generate for one stage; on many ranks each asks for its own prompts, and rank 0 sends weights."""

    def __init__(self, knobs: Servers, policy: PolicyModel, sampling: SamplingParams) -> None:
        super().__init__(policy.config)
        self.knobs, self.policy, self.sampling, self.world = knobs, policy, sampling, World.of(policy.run)
        self.field, config = f"{policy.run.name}.rollouts", policy.config
        narrowed = sampling.return_sampling_mask
        model = ServedModel(
            config.vocab_size,
            config.num_hidden_layers,
            config.num_experts_per_tok,
            policy.return_routed_experts,
            narrowed,
        )
        key = read_key(knobs.key_file, f"{self.field}.key_file")
        # names of versions begin with it, so that another run's weights are never taken for this one's
        self.token = self.world.gather(secrets.token_hex(4))[0]
        self.retries = Retries(knobs.tries, backoff=knobs.backoff)
        self.clients = {url: Client(_root(url), key, knobs.timeout, max_bytes=LONGEST_REPLY) for url in knobs.urls}
        folder = Path(knobs.folder).resolve() if knobs.folder else policy.run.folder / ".weights"
        self.files = WeightFiles(folder, self.field)
        # those that have the weights of this version
        self.ready: list[GenerationServer] = []
        self.servers: list[GenerationServer] = []
        # looks at log-probabilities that are still to come: at the first weights, and at the first that were learnt
        self.probes = 2 if policy.learns else 1
        try:
            self._meet(model)
        except BaseException:
            self.close()
            raise

    def _meet(self, model: ServedModel) -> None:
        """Find out what the servers are; UserError where one has another tokenizer."""
        self.servers = [self._find(url, client, model) for url, client in self.clients.items()]
        if self.policy.run.is_writer:
            for server in self.servers:
                server_checks.check_tokenizer(server, self.policy)

    def _find(self, url: str, client: Client, model: ServedModel) -> GenerationServer:
        try:
            server = find_server(url, client, self.field, model)
        except RequestFailed as error:
            raise UserError(self.field, url, f"no server answers: {error}", "Start it, or correct the url.") from None
        if isinstance(server, VllmServer):
            server.reload_method = self.knobs.reload_method
        return server

    # ---- weights ---------------------------------------------------------------------------------------------------

    def _take_weights(self, version: int) -> int:
        """Send the weights to every server, and look at what they make of them the first two times.

        Later a server that does not take them is left out of the step; it gets the next ones.
        """
        model, is_early = self.policy.weights(), self.probes > 0
        found: tuple[list[str], int] = [], 0
        if self.policy.run.is_writer:
            found = self._send(model, version, is_early)
        self.probes -= is_early
        ready, sent = self.world.gather(found)[0]
        self.ready = [server for server in self.servers if server.url in ready]
        for server in self.ready:
            server.expected = self._label(version) if self.policy.learns else None
        return sent if self.policy.run.is_writer else 0

    def _send(self, model: Transformer, version: int, is_early: bool) -> tuple[list[str], int]:
        """Addresses of the servers that have the weights now, and the bytes that they have read."""
        folder, size = Path(), 0
        if self.policy.learns:
            folder, size = self.files.write(model, self._label(version), self._dtype)

        def load(server: GenerationServer) -> str:
            try:
                if self.policy.learns:
                    server.expected = None
                    server.load(folder, self._label(version))
                    server.expected = self._label(version)
                if is_early:
                    server_checks.check_logprobs(server, self._probe(version), model, self._probe_gap)
            except RequestFailed as error:
                if is_early:
                    raise server.unfit(f"failed: {error}", "See its log; correct it and start it again.") from None
                return str(error)
            return ""

        if is_early:  # one after the other, for the trainer's model looks at itself
            problems = [load(server) for server in self.servers]
        else:
            with ThreadPoolExecutor(len(self.servers)) as pool:
                problems = list(pool.map(load, self.servers))
        lost = {server.url: problem for server, problem in zip(self.servers, problems, strict=True) if problem}
        for url, problem in lost.items():
            self.policy.run.say(f"{self.policy.run.name:10} warning: {url} has missed new weights: {problem}")
        if len(lost) == len(self.servers):
            said = "; ".join(f"{url}: {problem}" for url, problem in lost.items())
            remedy = "Start them again, then give the same command again: the run goes on where it was."
            raise UserError(self.field, ", ".join(lost), f"no server takes the weights: {said}", remedy)
        ready = [server.url for server in self.servers if server.url not in lost]
        return ready, size * len(ready)

    def _label(self, version: int) -> str:
        return f"{self.token}-{version}"

    @property
    def _dtype(self) -> Literal["fp32", "bf16"]:
        asked = self.knobs.dtype
        return asked if asked != "auto" else "fp32" if self.policy.compute == "fp32" else "bf16"

    @property
    def _probe_gap(self) -> float:
        exact = self._dtype == "fp32" and self.policy.compute == "fp32"
        return self.knobs.probe_gap or (1e-3 if exact else 0.1)

    # ---- answers ---------------------------------------------------------------------------------------------------

    def _answers(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Completion]]:
        def ask(server: GenerationServer, place: int) -> TokenAnswer:
            answer = server.answer(self._prompt(prompts[place], sampling, seeds[place], self.version))
            server_checks.check_version(server, answer)
            return answer

        dispatcher = Dispatcher(self.ready, ask, len(prompts), self.knobs.concurrency, self.retries)
        for place, answer in dispatcher.results():
            yield place, self._completion(answer)

    def _probe(self, version: int) -> TokenPrompt:
        """What servers are probed with: the stage's own sampling, so that its log-probabilities have to be the stage's."""
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
        return Completion(answer.tokens, answer.logprobs, finish, answer.routed_experts, answer.sampling_mask)

    def close(self) -> None:
        """Let go of connections, and of the files of weights."""
        for client in self.clients.values():
            client.close()
        if self.policy.run.is_writer:
            self.files.clear()


def _root(url: str) -> str:
    """The server's root, which its own routes are at; people write OpenAI's /v1 behind it."""
    return url.rstrip("/").removesuffix("/v1")
