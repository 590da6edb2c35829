"""Answers from servers: vLLM, SGLang or finback, which get the policy's weights before each step as files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from finback.client import Client, RequestFailed, check_url, read_key
from finback.config import UserError, check_fields, check_not_negative, check_positive
from finback.engine.request import SamplingParams
from finback.model.transformer import Transformer
from finback.rollouts import server_checks
from finback.rollouts.generation import Backend, PolicyModel, Rollouts
from finback.rollouts.generation_server import GenerationServer
from finback.rollouts.remote import RemoteRollouts
from finback.rollouts.server_kinds import FinbackServer, VllmServer, find_server
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


class ServerRollouts(RemoteRollouts):
    """Servers over HTTP, which read weights from files."""

    def __init__(self, knobs: Servers, policy: PolicyModel, sampling: SamplingParams) -> None:
        super().__init__(knobs, policy, sampling)
        self.concurrency = knobs.concurrency
        key = read_key(knobs.key_file, f"{self.field}.key_file")
        self.clients = {url: Client(_root(url), key, knobs.timeout, max_bytes=LONGEST_REPLY) for url in knobs.urls}
        folder = Path(knobs.folder).resolve() if knobs.folder else policy.run.folder / ".weights"
        self.files = WeightFiles(folder, self.field)
        try:
            self.servers = [self._find(url, client, knobs) for url, client in self.clients.items()]
            for server in self.servers if policy.run.is_writer else ():
                server_checks.check_tokenizer(server, policy)
        except BaseException:
            self.close()
            raise

    def _find(self, url: str, client: Client, knobs: Servers) -> GenerationServer:
        try:
            server = find_server(url, client, self.field, self.served)
        except RequestFailed as error:
            raise UserError(self.field, url, f"no server answers: {error}", "Start it, or correct the url.") from None
        if isinstance(server, VllmServer):
            server.reload_method = knobs.reload_method
        server.drops = self.policy.in_flight == "drop"
        if server.drops and isinstance(server, FinbackServer):
            raise server.unfit("goes on with answers under way when weights come", 'Use in_flight="continue".')
        return server

    def _write(self, model: Transformer, label: str) -> tuple[Path, int]:
        return self.files.write(model, label, self._dtype)

    def close(self) -> None:
        """Let go of connections, and of the files of weights."""
        for client in self.clients.values():
            client.close()
        if self.policy.run.is_writer:
            self.files.clear()


def _root(url: str) -> str:
    """The server's root, which its own routes are at; people write OpenAI's /v1 behind it."""
    return url.rstrip("/").removesuffix("/v1")
