"""State shared by the routes: each served model with its worker, its running requests, and its readiness."""

import asyncio
import time

from starlette.types import Scope

from finback.config import did_you_mean
from finback.data.tokenizer import Tokenizer
from finback.engine.open import stops_of
from finback.serve.errors import ApiError
from finback.serve.logprobs import TokenTexts
from finback.serve.metrics import Metrics
from finback.serve.middleware import Admission, Quota
from finback.serve.models_folder import ModelsFolder
from finback.serve.options import ServeOptions
from finback.serve.prepare import RequestPreparer
from finback.serve.responses_store import ResponseStore
from finback.serve.resumable import ResumableStream
from finback.serve.schema_check import SchemaChecker
from finback.serve.upstream import ServedEngine
from finback.serve.worker import OutputStream, Worker


class Service:
    """One served model. Used on the event loop, except for the engine, which the worker's thread owns.

    With `first`, it joins that service's server: both share metrics and quotas. With `adapter`, it is that service's model with
    an adapter, in the same engine; its tokenizer may differ in everything but the vocabulary.
    """

    def __init__(
        self,
        engine: ServedEngine,
        tokenizer: Tokenizer,
        options: ServeOptions,
        first: "Service | None" = None,
        adapter: str = "",
    ) -> None:
        self.engine, self.tokenizer, self.options, self.adapter = engine, tokenizer, options, adapter
        base = first if adapter else None
        self.created = int(time.time())
        self.all: list[Service] = first.all if first else []  # all models of this server
        self.all.append(self)
        self.metrics: Metrics = first.metrics if first else Metrics()
        self.worker: Worker = base.worker if base else Worker(engine, self.metrics)
        self.token_texts: TokenTexts = base.token_texts if base else TokenTexts(tokenizer)
        longest, chains = self.token_texts.longest, options.reasoning_parser
        stops = sorted(stops_of(tokenizer) - engine.stops) if adapter else ()
        self.preparer = RequestPreparer(tokenizer, engine.capacity, longest, chains, adapter, stops)
        self.schemas: SchemaChecker = base.schemas if base else SchemaChecker()
        # serializes weight updates
        self.updating: asyncio.Lock = base.updating if base else asyncio.Lock()
        quota: Quota = first.admission.quota if first else Quota(options.rate, options.concurrent)
        self.admission: Admission = base.admission if base else Admission(engine, options, quota)
        # further models, owned by the server's first
        self.folder = ModelsFolder(options, self, Service) if first is None and options.models_dir is not None else None
        self.used = time.monotonic()
        self.responses: ResponseStore = first.responses if first else ResponseStore()
        # requests that can still be controlled, by response id
        self.active: dict[str, OutputStream] = base.active if base else {}
        # finished streams stay for a while
        self.streams: dict[str, ResumableStream] = first.streams if first else {}

    @property
    def engines(self) -> "list[Service]":
        """The models of this server that have their own engine."""
        return [service for service in self.all if not service.adapter]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the model."""
        return (self.options.name, *self.options.aliases)

    def store(self, ident: str, stream: ResumableStream, outputs: OutputStream) -> None:
        """Makes a stream available by its id; the oldest finished ones are dropped if necessary."""
        stream.place = lambda: self._place(outputs)
        stream.forget = lambda: self.streams.pop(ident, None)
        self.streams[ident] = stream
        ended = [each for each in self.streams.values() if each.is_finished]
        for each in ended[: max(0, len(self.streams) - self.admission.most_choices)]:
            each.forget()

    def _place(self, outputs: OutputStream) -> int:
        """Position among the requests that have not started, from 1; 0 if it has started."""
        waiting = [each for each in self.active.values() if not each.started]
        return waiting.index(outputs) + 1 if outputs in waiting else 0

    def named(self, name: str | None) -> "Service":
        """The served model of this name, this one if no name is given; ApiError 404."""
        if name is None:
            return self
        for service in self.all:
            if name in service.names:
                return service
        known = [n for service in self.all for n in service.names]
        raise ApiError(404, f"no model {name!r} here. {did_you_mean(name, known)}", "model", "model_not_found")

    async def reach(self, name: str | None) -> "Service":
        """As `named`, but loads a model of the folder first if necessary."""
        folder = self.all[0].folder
        is_here = name is None or any(name in service.names for service in self.all)
        found = None if is_here or folder is None or name is None else await folder.load(name)
        found = found or self.named(name)
        found.used = time.monotonic()
        return found

    def refuse_if_all_busy(self) -> None:
        """ApiError 503 if no model accepts requests, before the request is read."""
        if self.admission.draining is not None or all(service.admission.is_full() for service in self.all):
            self.admission.refuse_if_busy()

    def why_not_ready(self) -> str | None:
        """Why the server cannot answer, None if it can."""
        return next((problem for service in self.all if (problem := service.problem())), None)

    def problem(self) -> str | None:
        """Why this model cannot answer, None if it can."""
        if self.admission.draining is not None:
            return "shutting down"
        if not self.worker.alive:
            return "the engine has stopped"
        if self.worker.failure is not None:
            return f"the last step failed ({self.worker.failure})"
        if self.worker.stalled(self.options.stalled):
            return f"no step has ended for {self.options.stalled:g} s"
        return None

    def drain(self) -> None:
        """Accepts no more requests; running ones have `options.drain` seconds."""
        for service in self.all:
            service.admission.draining = service.admission.draining or time.monotonic()

    def is_drained(self) -> bool:
        """Whether a draining server may exit: no requests are left, or their time is over and they get an error."""
        since = self.admission.draining
        if since is None:
            return False
        if any(service.admission.requests for service in self.all) and time.monotonic() - since < self.options.drain:
            return False
        for outputs in (each for service in self.all for each in service.active.values()):
            outputs.fail(ApiError(503, "the server is shutting down", code="shutting_down", retry_after=5))
        return True

    def vllm_gauges(self) -> dict[str, float]:
        """The gauges of this model, under vLLM's names."""
        pages = self.engine.pages
        return {
            "num_requests_running": self.engine.running,
            "num_requests_waiting": self.admission.queued,
            "kv_cache_usage_perc": 1 - pages.free / pages.count if pages.count else 0.0,
        }

    def gauges(self) -> dict[str, tuple[str, float]]:
        """Gauges for /metrics."""
        pages = [service.engine.pages for service in self.engines]
        return {
            "running": ("Choices being generated.", sum(s.engine.running for s in self.engines)),
            "queued": ("Choices waiting.", sum(s.admission.queued for s in self.engines)),
            "pages": ("Pages of the cache.", sum(p.count for p in pages)),
            "pages_used": ("Pages held by running choices.", sum(p.count - p.free for p in pages)),
            "ready": ("1 if requests are being answered.", float(self.why_not_ready() is None)),
        }


def service_of(scope: Scope) -> Service:
    """The service of the application that received a request."""
    found: Service = scope["app"].state.service
    return found
