"""Rollouts from servers (vLLM, SGLang or finback) that load the policy's weights from files before each step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finback.client import Client, RequestFailed, check_url, read_key
from finback.config import UserError, check_fields, check_not_negative, check_positive
from finback.engine.request import SamplingParams
from finback.model.transformer import Transformer
from finback.rollouts import server_checks
from finback.rollouts.generation import Backend, PolicyModel, Rollouts
from finback.rollouts.generation_server import GenerationServer, ServedModel
from finback.rollouts.remote import RemoteRollouts
from finback.rollouts.server_kinds import FinbackServer, VllmServer, find_server
from finback.rollouts.weight_files import WeightFiles
from finback.runs.external import EnginePrice

SAME = "Serve the model that is trained, with its own tokenizer."
LONGEST_REPLY = 1 << 30  # bytes; routed experts of a long answer take megabytes


@dataclass(frozen=True)
class Servers(Backend):
    """Servers generate: any number of vLLM, SGLang or `finback serve`, detected by asking them; they share the prompts.

    Before the first step, their tokenizers and log-probabilities are compared with the model in training.
    """

    # servers, such as http://127.0.0.1:8000
    urls: tuple[str, ...]
    # folder for weights that this process and the servers see under the same path; "": the stage's own
    folder: str = ""
    # precision of the weights sent to servers; auto: the one in which the trainer computes
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    # largest allowed difference from the trainer's log-probabilities before the first step, in nats; None: 1e-3 in fp32, 0.1 in bf16
    probe_gap: float | None = None
    # file that holds the key, if the servers need one
    key_file: str | None = None
    # concurrent requests to each server
    concurrency: int = 64
    # seconds that a server may be silent
    timeout: float = 600.0
    # consecutive failures after which a server is not used for the rest of the step
    tries: int = 6
    # seconds before a failed server is asked again; doubles with each failure
    backoff: float = 1.0
    # dollars per million prompt tokens, if the servers charge for tokens
    price_in: float | None = None
    # dollars per million generated tokens; needed with price_in
    price_out: float | None = None
    # dollars per hour of each server, if they charge for time
    price_hour: float | None = None
    # CPU cores of each server, priced like this machine's if there is no other price
    num_cpus: int | None = None
    # name of vLLM's worker method that reloads weights, called with weights_path
    reload_method: str = "reload_weights"

    def __post_init__(self) -> None:
        check_fields(self, "rollouts")
        check_positive(self, "rollouts", "probe_gap", "concurrency", "timeout", "tries", "num_cpus")
        check_not_negative(self, "rollouts", "backoff", "price_in", "price_out", "price_hour")
        self.price.check("rollouts")
        if not self.urls or len({*self.urls}) < len(self.urls):
            raise UserError("rollouts.urls", self.urls, "empty, or one of them twice", "Name each server once.")
        for url in self.urls:
            check_url(url, "rollouts.urls", "http://127.0.0.1:8000")

    @property
    def price(self) -> EnginePrice:
        """What each server costs."""
        return EnginePrice(self.price_in, self.price_out, self.price_hour, self.num_cpus)

    def clients(self, field: str) -> dict[str, Client]:
        """A client for each server, by url; UserError about the stage's knob if the key cannot be read."""
        key = read_key(self.key_file, f"{field}.key_file")
        return {url: Client(_root(url), key, self.timeout, max_bytes=LONGEST_REPLY) for url in self.urls}

    def open(self, policy: PolicyModel, sampling: SamplingParams) -> Rollouts:
        return ServerRollouts(self, policy, sampling)


class ServerRollouts(RemoteRollouts):
    """Servers over HTTP, which read weights from files."""

    def __init__(self, knobs: Servers, policy: PolicyModel, sampling: SamplingParams) -> None:
        super().__init__(knobs, policy, sampling)
        self.concurrency = knobs.concurrency
        self.clients = knobs.clients(self.field)
        folder = Path(knobs.folder).resolve() if knobs.folder else policy.run.folder / ".weights"
        self.files = WeightFiles(folder, self.field)
        try:
            self.servers = connected(self.clients, self.field, self.served)
            self.hire(knobs.price)
            for server in self.servers:
                self._prepare(server, knobs)
            for server in self.servers if policy.run.is_writer else ():
                if not server_checks.has_tokenizer(server, policy.tokenizer, SAME):
                    said = f"{server.url} has no tokenizer; only its log-probabilities are compared"
                    policy.run.say(f"{policy.run.name:10} {said}")
        except BaseException:
            self.close()
            raise

    def _prepare(self, server: GenerationServer, knobs: Servers) -> None:
        if isinstance(server, VllmServer):
            server.reload_method = knobs.reload_method
        server.drops = self.policy.in_flight == "drop"
        if server.drops and isinstance(server, FinbackServer):
            raise server.unfit("continues answers in progress when weights arrive", 'Use in_flight="continue".')

    def _write(self, model: Transformer, label: str) -> tuple[Path, int]:
        return self.files.write(model, label, self._dtype)

    def close(self) -> None:
        """Releases connections and deletes the files of weights."""
        self.leave()
        for client in self.clients.values():
            client.close()
        if self.policy.run.is_writer:
            self.files.clear()


def connected(clients: dict[str, Client], field: str, model: ServedModel) -> list[GenerationServer]:
    """The servers at these addresses; UserError if one does not answer or finback does not know its program."""
    found = []
    for url, client in clients.items():
        try:
            found.append(find_server(url, client, field, model))
        except RequestFailed as error:
            raise UserError(field, url, f"no server answers: {error}", "Start it, or correct the url.") from None
    return found


def _root(url: str) -> str:
    """The server's root, where its own routes are; users often append OpenAI's /v1."""
    return url.rstrip("/").removesuffix("/v1")
