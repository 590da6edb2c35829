"""A model in files behind `finback serve`: processes that a comparison starts, and ends after the last answer.

They are external engines (vLLM, SGLang) behind finback's server, or several servers with finback's own engine. finback's server
writes the prompts, so these are the same as for a model in this process. Does not import torch.
"""

import importlib.metadata
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from finback.client import Client, RequestFailed
from finback.comparison.contestant import Answer, Contestant, Failure, Price
from finback.comparison.endpoint import Endpoint
from finback.comparison.options import CompareOptions
from finback.comparison.protocol import EvalRequest, SamplingProtocol, digest
from finback.config import UserError
from finback.parallel import launch

NAME = "finback"  # the name under which a model is served
# a server dies with its parent, so that it cannot outlive a comparison that was killed
START = "from finback.parallel import launch; launch.die_with_parent({parent}); from finback.cli import main; main()"
STARTING = 1800.0  # seconds to wait for a model to load; vLLM compiles a large one for minutes
ENDING = 30.0  # seconds to wait for a server to end its engines
VERSION = "import importlib.metadata as m; print(m.version('{engine}'))"


class ServeProcess:
    """`finback serve` for one model on a free loopback port, until it is closed."""

    def __init__(self, model: Path, name: str, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        """name: the model's, for errors. words: further arguments. Its output goes to `log`."""
        self.name, self.log, port = name, log, launch.free_port()
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-c", START.format(parent=os.getpid()), "serve", str(model)]
        command += ["--port", str(port), "--name", NAME, "--queue", "1024", "--no-page", "--drain", "1", *words]
        with log.open("w", encoding="utf-8") as output:
            # its own session: a second signal, such as the terminal's Ctrl-C, would end it without its engines
            self._process = subprocess.Popen(
                command, stdout=output, stderr=output, env=dict(environment), start_new_session=True
            )

    @property
    def has_ended(self) -> bool:
        """Whether it no longer runs."""
        return self._process.poll() is not None

    def wait(self, key: str = "") -> None:
        """Waits until it answers; UserError with the end of its log if it does not."""
        until = time.monotonic() + STARTING
        with Client(self.url, key, timeout=10) as client:
            while time.monotonic() < until and not self.has_ended:
                if client.has("/ready"):
                    return
                time.sleep(0.1)
        raise self.error("its server did not start")

    def error(self, problem: str) -> UserError:
        """The error for a server that cannot be used."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return UserError("MODEL", self.name, problem, f"See {self.log}; last line: {lines[-1:] or 'none'}.")

    def close(self) -> None:
        """Ends it, and with it the engines that it has started."""
        self._process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDING)
        finally:
            self._process.kill()
            self._process.wait()


@contextmanager
def serving(model: Path, name: str, words: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """The address of a server that needs no key, until the context ends; arguments as for ServeProcess."""
    server = ServeProcess(model, name, words, log, {k: v for k, v in environment.items() if k != "FINBACK_API_KEY"})
    try:
        server.wait()
        yield server.url
    finally:
        server.close()


@dataclass
class _Windowed(Endpoint):
    """An endpoint with a limit of tokens for each answer: `rooms`, by the keys of requests."""

    rooms: dict[str, int] = field(default_factory=dict)

    def _body(self, ask: EvalRequest, rules: SamplingProtocol) -> dict[str, Any]:
        return super()._body(ask, rules) | {"max_tokens": self.rooms[ask.key]}


@dataclass
class Served:
    """A model in files that other processes answer for; they run only while it answers."""

    # the model in this process, which is not loaded
    local: Contestant
    path: Path
    options: CompareOptions
    environment: Mapping[str, str]
    name: str = field(init=False)
    price: Price = field(init=False)

    def __post_init__(self) -> None:
        self.name, self.price = self.local.name, self.local.price

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The model's identity with the program, its version and settings; the number of replicas may change."""
        o, same = self.options, {"engine": self.options.engine, "version": self._version()}
        return self.local.identity | same | {"flags": list(o.engine_flags), "env": digest({"env": o.engine_env})}

    def _version(self) -> str:
        """The program's version; UserError if it is not installed."""
        engine, python = self.options.engine, self.options.engine_python
        if engine == "finback":
            return importlib.metadata.version("finback")
        try:
            command = [python, "-c", VERSION.format(engine=engine)]
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        except (OSError, subprocess.SubprocessError):
            problem = f"has no {engine}"
            raise UserError("--engine-python", python, problem, "Give the Python of its environment.") from None
        return done.stdout.strip()

    def answers(self, asks: Sequence[EvalRequest], rules: SamplingProtocol) -> Iterator[Answer | Failure]:
        """Yields answers in order of arrival; the processes end with the iterator. UserError if all of them end first."""
        if not asks:
            return
        with ExitStack() as stack:
            key = secrets.token_urlsafe()
            servers = [stack.enter_context(closing(self._start(number, key))) for number in range(self._processes)]
            for server in servers:
                server.wait(key)
            rooms = self._rooms(asks, rules, servers[0].url, key)
            wanted = [ask for ask in asks if rooms[ask.key] > 0]
            for ask in asks:
                if rooms[ask.key] <= 0:
                    yield Failure(ask, "the question is as long as the model's window, or longer")
            url = ",".join(f"{server.url}/v1" for server in servers)
            each_one = self.options.rows * self.options.replicas // len(servers)
            same: dict[str, Any] = {"key": key, "concurrency": each_one, "timeout": self.options.timeout}
            found = _Windowed(url, NAME, rooms=rooms, **same).answers(wanted, rules)
            last = time.monotonic()
            for each in found:
                if isinstance(each, Failure):
                    if all(server.has_ended for server in servers):
                        raise servers[0].error(f"its server has ended: {each.problem}")
                    yield each
                    continue
                # the seconds since the previous answer, so that they sum to the total
                now = time.monotonic()
                yield replace(each, busy=now - last)
                last = now

    @property
    def _processes(self) -> int:
        """Number of servers: one for all external engines, or one for each of finback's own."""
        return self.options.replicas if self.options.engine == "finback" else 1

    def _start(self, number: int, key: str) -> ServeProcess:
        o, logs = self.options, self.options.out / "servers"
        logs.mkdir(parents=True, exist_ok=True)
        words = ["--rows", str(o.rows)]
        more: dict[str, str] = {"FINBACK_API_KEY": key}
        if o.engine == "finback":
            words += ["--dtype", o.dtype]
            more |= launch.share(number, o.replicas)
        else:
            words += ["--engine", o.engine, "--replicas", str(o.replicas), "--engine-python", o.engine_python]
            words += [f"--engine-flag={flag}" for flag in o.engine_flags]
            words += [f"--engine-env={entry}" for entry in o.engine_env]
        log = logs / f"{digest(self.local.identity)[:8]}-{number}.log"
        return ServeProcess(self.path, self.name, words, log, {**self.environment, **more})

    def _rooms(self, asks: Sequence[EvalRequest], rules: SamplingProtocol, url: str, key: str) -> dict[str, int]:
        """The longest possible answer to each request, in tokens: what its prompt leaves of the window."""
        from finback.data.messages import encode_prompt
        from finback.data.openai_messages import read_messages
        from finback.data.tokenizer import Tokenizer

        try:
            with Client(url, key, timeout=60) as client:
                window = int(client.reply("/v1/models")["data"][0]["max_model_len"])
        except RequestFailed as error:
            raise UserError("MODEL", self.name, f"its server failed: {error}", "Run the same command again.") from None
        tokenizer = Tokenizer(self.path)
        lengths = {
            ask.key: len(encode_prompt(read_messages(ask.messages), tokenizer, think=rules.think)[0]) for ask in asks
        }
        return {key: min(rules.max_tokens, window - length) for key, length in lengths.items()}
