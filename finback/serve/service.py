"""What the routes share: the model behind its worker, who is being served, and whether more can be."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from finback.config import UserError, did_you_mean
from finback.data.tokenizer import Tokenizer
from finback.engine.engine import Engine
from finback.serve.auth import Quota
from finback.serve.errors import ApiError, bad
from finback.serve.logprobs import TokenTexts
from finback.serve.metrics import Metrics
from finback.serve.options import ServeOptions
from finback.serve.prepare import RequestPreparer
from finback.serve.reply import FIELDS
from finback.serve.resumable import ResumableStream
from finback.serve.schema_check import SchemaChecker
from finback.serve.worker import OutputStream, Worker


@dataclass(frozen=True)
class ActiveRequest:
    """A request that can still be controlled, by whoever sent it."""

    owner: bytes
    ticket: OutputStream


class Service:
    """One model, served. All of it belongs to the event loop but the engine, which the worker's thread owns.

    With `first`, it stands beside that one, in the same server: both count into the same metrics and quotas.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, options: ServeOptions, first: "Service | None" = None
    ) -> None:
        if options.reasoning_field not in FIELDS:
            raise UserError(
                "reasoning_field",
                options.reasoning_field,
                "no such form",
                did_you_mean(options.reasoning_field, FIELDS),
            )
        self.engine, self.tokenizer, self.options = engine, tokenizer, options
        self.created = int(time.time())
        self.window = min(engine.model.config.max_position_embeddings, engine.pages.count * engine.pages.size)
        self.all: list[Service] = first.all if first else []  # the models of this server
        self.all.append(self)
        self.metrics: Metrics = first.metrics if first else Metrics()
        self.worker = Worker(engine, self.metrics)
        self.spelling = TokenTexts(tokenizer)
        self.jobs = RequestPreparer(tokenizer, self.window, self.spelling.longest)
        self.schemas = SchemaChecker()
        self.quota: Quota = first.quota if first else Quota(options.rate, options.concurrent)
        self.running: dict[str, ActiveRequest] = {}
        self.held: dict[str, ResumableStream] = (
            first.held if first else {}
        )  # by id; an answer that has ended stays for a while
        self.open = 0  # choices of admitted requests
        self.requests = 0  # admitted requests
        self.draining: float | None = None  # since when, in monotonic time
        # more than can run and may wait would only wait
        self.most_choices = min(options.choices, engine.config.rows + options.queue)

    @property
    def names(self) -> tuple[str, ...]:
        """What the model may be called."""
        return (self.options.name, *self.options.aliases)

    @property
    def queued(self) -> int:
        """Choices that wait."""
        return max(0, self.open - self.engine.running)

    def place(self, ticket: OutputStream) -> int:
        """Where a request stands among those that have not begun to be answered, from 1; 0 once it has."""
        waiting = [r.ticket for r in self.running.values() if not r.ticket.started]
        return waiting.index(ticket) + 1 if ticket in waiting else 0

    def hold(self, ident: str, held: ResumableStream, ticket: OutputStream) -> None:
        """Let an answer be found by its id, until it is forgotten; the oldest that have ended make room."""
        held.place = lambda: self.place(ticket)
        held.forget = lambda: self._forget(ident)
        self.held[ident] = held
        ended = [each for each in self.held.values() if each.over]
        for each in ended[: max(0, len(self.held) - self.most_choices)]:
            each.forget()

    def _forget(self, ident: str) -> None:
        self.held.pop(ident, None)

    def named(self, name: str | None) -> "Service":
        """The model of this name among those that are served, this one where none is named; ApiError 404."""
        if name is None:
            return self
        for service in self.all:
            if name in service.names:
                return service
        known = [n for service in self.all for n in service.names]
        raise ApiError(404, f"no model {name!r} here. {did_you_mean(name, known)}", "model", "model_not_found")

    def refuse_if_busy(self, choices: int = 1) -> None:
        """ApiError 503 when nothing more can be taken; costs nothing, so that overload is refused at once."""
        if self.draining is not None:
            raise ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5)
        if self.is_full(choices):
            raise ApiError(503, f"{self.queued} answers are waiting already", retry_after=2)

    def is_full(self, choices: int = 1) -> bool:
        """Whether so many choices more are too many."""
        return self.open + choices > self.engine.config.rows + self.options.queue

    @contextmanager
    def admitted(self, owner: bytes, choices: int) -> Iterator[None]:
        """Hold room for a request's choices; ApiError 429 or 503 when there is none."""
        if choices > self.most_choices:
            raise bad(f"{choices} choices (prompts x n), and {self.most_choices} is the most", "n")
        self.refuse_if_busy(choices)
        with self.quota.use(owner):
            self.open += choices
            self.requests += 1
            try:
                yield
            finally:
                self.open -= choices
                self.requests -= 1

    def why_not_ready(self) -> str | None:
        """What keeps the server from answering, if anything does."""
        return next((problem for service in self.all if (problem := service.problem())), None)

    def problem(self) -> str | None:
        """What keeps this model from answering, if anything does."""
        if self.draining is not None:
            return "shutting down"
        if not self.worker.alive:
            return "the engine has stopped"
        if self.worker.failure is not None:
            return f"the last step failed ({self.worker.failure})"
        if self.worker.stalled(self.options.stalled):
            return f"no step has ended for {self.options.stalled:g} s"
        return None

    def drain(self) -> None:
        """Take no more requests; those that run have `options.drain` seconds."""
        for service in self.all:
            service.draining = service.draining or time.monotonic()

    def drained(self) -> bool:
        """Whether a draining server may go: nobody is left, or their time is over and they have been told."""
        if self.draining is None:
            return False
        if any(service.requests for service in self.all) and time.monotonic() - self.draining < self.options.drain:
            return False
        for running in (r for service in self.all for r in service.running.values()):
            running.ticket.fail(ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5))
        return True

    def gauges(self) -> dict[str, tuple[str, float]]:
        """What /metrics shows beside the counters."""
        pages = [service.engine.pages for service in self.all]
        return {
            "running": ("Choices that are being made.", sum(s.engine.running for s in self.all)),
            "queued": ("Choices that wait.", sum(s.queued for s in self.all)),
            "pages": ("Pages of the cache.", sum(p.count for p in pages)),
            "pages_used": ("Pages that running choices hold.", sum(p.count - p.free for p in pages)),
            "ready": ("1 if requests are being answered.", float(self.why_not_ready() is None)),
        }
