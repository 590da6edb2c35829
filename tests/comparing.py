"""What the tests of `finback compare` share: a suite of sums, and a server that answers or fails as scripted."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from finback.suites.suite import Suite, SuiteSource
from finback.tasks.task import Problem, Verdict


@dataclass(frozen=True)
class Sums:
    """Judges the last line of an answer only."""

    name: str = "sums"

    def draw(self, rng: Any) -> Problem:
        raise NotImplementedError

    def check(self, problem: Problem, answer: str) -> Verdict:
        said = answer.strip().splitlines()[-1] if answer.strip() else ""
        return Verdict(said == problem.answer, said.isdigit())


def sums(n: int = 12, name: str = "sums", **more: Any) -> Suite:
    """n questions `i+1=` for i below n."""
    problems = tuple(Problem(f"{i}+1=", str(i + 1), f"{name}:{i}") for i in range(n))
    return Suite(name, problems, Sums(), SuiteSource("the tests", "MIT", f"{n:064x}"), **more)


def right(body: dict[str, Any]) -> str:
    """The correct answer to a request."""
    return str(int(body["messages"][-1]["content"].partition("+")[0]) + 1)


@dataclass
class Reply:
    """What the server sends. `raw` bytes are sent unchanged, and then the connection is closed."""

    content: str | None = ""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    reasoning: dict[str, str] = field(default_factory=dict)  # by field name
    finish: str | None = "stop"
    usage: bool = True
    done: bool = True
    stream: bool = True
    cut: int | None = None  # number of bytes after which the connection breaks
    raw: bytes | None = None
    delay: float = 0.0
    rest: threading.Event | None = None  # what the second half of the bytes waits for
    error: str = ""

    def body(self) -> tuple[str, bytes]:
        """The content type and the bytes."""
        if self.raw is not None:
            return "text/event-stream" if self.stream else "application/json", self.raw
        usage = {"usage": {"prompt_tokens": 7, "completion_tokens": 5}} if self.usage else {}
        message = {"content": self.content, **self.reasoning}
        if not self.stream:
            whole = {"model": "m-2", "choices": [{"message": message, "finish_reason": self.finish}], **usage}
            return "application/json", json.dumps(whole).encode()
        events: list[Any] = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
        for name, text in message.items():
            pieces = [text[i : i + 3] for i in range(0, len(text or ""), 3)] if text else [text]
            events += [{"choices": [{"delta": {name: piece}, "finish_reason": None}]} for piece in pieces]
        if self.reasoning:  # servers with two names send both in every delta
            texts = set(self.reasoning.values())
            assert len(texts) == 1
            events = [e for e in events if not set(self.reasoning) & set(e["choices"][0]["delta"])]
            events.insert(1, {"choices": [{"delta": {name: texts.copy().pop() for name in self.reasoning}}]})
        if self.error:
            events.append({"error": {"message": self.error}})
        events += [{"model": "m-2", "choices": [{"delta": {}, "finish_reason": self.finish}]}] if self.finish else []
        events += [{"choices": [], **usage}] if usage else []
        lines = (
            [": still here\r\n\r\n"] + [f"data: {json.dumps(e)}\n\n" for e in events] + ["data: [DONE]\n\n"] * self.done
        )
        return "text/event-stream; charset=utf-8", "".join(lines).encode()


Behaviour = Callable[[int, dict[str, Any]], Reply]


class Fake:
    """A server on 127.0.0.1; `behave` gets the request's number and its body."""

    def __init__(self, behave: Behaviour | None = None) -> None:
        self.behave: Behaviour = behave or (lambda n, body: Reply(right(body)))
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.at_once = self.most_at_once = 0
        self.drip = 0.0  # seconds between the lines of a reply
        self.lock = threading.Lock()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    n = len(fake.bodies)
                    fake.bodies.append(body | {"path": self.path})
                    fake.headers.append(dict(self.headers))
                    fake.times.append(time.monotonic())
                    fake.at_once += 1
                    fake.most_at_once = max(fake.most_at_once, fake.at_once)
                try:
                    reply = fake.behave(n, body)
                    time.sleep(reply.delay)
                finally:
                    with fake.lock:  # before the reply: a client that has it may ask again at once
                        fake.at_once -= 1
                self.reply(reply)

            def reply(self, reply: Reply) -> None:
                kind, content = reply.body()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", kind)
                if not reply.stream:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                content = content[: reply.cut]
                if reply.rest is not None:
                    half = len(content) // 2
                    self.wfile.write(content[:half])
                    reply.rest.wait(60)
                    content = content[half:]
                for line in content.splitlines(keepends=True) if fake.drip else [content]:
                    self.wfile.write(line)
                    time.sleep(fake.drip)

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:  # a client that disconnected early
                pass

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def asked(self) -> list[str]:
        """The questions, in order of arrival."""
        return [body["messages"][-1]["content"] for body in self.bodies]


@contextmanager
def faking(behave: Behaviour | None = None) -> Iterator[Fake]:
    """Runs a fake server until the block ends."""
    fake = Fake(behave)
    try:
        yield fake
    finally:
        fake.http.shutdown()
        fake.http.server_close()
