"""An engine elsewhere behind finback's front: requests as the built-in engine has them, with tokens that vLLM or SGLang makes.

Chains of thought, stop strings, budgets, tools and text are looked after here, token by token, as for the built-in engine.
"""

import json
import math
import queue
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from finback.client import RequestFailed
from finback.config import UserError
from finback.data.tokenizer import Tokenizer
from finback.engine.constrain import Constraint, Grammars
from finback.engine.detokenizer import Detokenizer
from finback.engine.engine import Engine
from finback.engine.pages import Pages
from finback.engine.request import FinishReason, Request, SamplingParams, check_length
from finback.engine.sampler import Sampler
from finback.model.transformer import Transformer
from finback.serve.replicas import Replica, ReplicaRouter, TokenPiece

IDLE = 0.02  # seconds that a step waits for news
TRIES = 3  # replicas that a request is given to, one after the other fails


@dataclass(frozen=True)
class UpstreamConfig:
    """What the front knows of engines elsewhere."""

    # requests that they are given at once
    rows: int


@dataclass(eq=False)
class _Stay:
    """A request's stay with one replica."""

    request: Request
    failures: int = 0
    # what ends it is the end of the chain of thought, before what a schema or a grammar describes
    chained: bool = False
    ended: bool = False


class UpstreamEngine:
    """Replicas of one model. Its methods belong to one thread, as the built-in engine's; each request has one more that reads."""

    def __init__(
        self,
        replicas: Sequence[Replica],
        tokenizer: Tokenizer,
        stops: Iterable[int],
        capacity: int,
        config: UpstreamConfig,
    ) -> None:
        """capacity: tokens of prompt and answer."""
        self.router, self.tokenizer, self.capacity, self.config = ReplicaRouter(replicas), tokenizer, capacity, config
        self.stops, self.vocab_size = frozenset(stops), tokenizer.vocab_size
        self.sampler, self.grammars = Sampler(self.stops, tokenizer), Grammars(tokenizer, self.vocab_size)
        # none of its own
        self.pages = Pages(0, 1)
        self._runs: dict[Request, _Stay] = {}
        self._news: queue.SimpleQueue[tuple[_Stay, TokenPiece | RequestFailed]] = queue.SimpleQueue()

    @property
    def running(self) -> int:
        """Requests under way."""
        return len(self._runs)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to wait for."""
        return bool(self._runs)

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        seed: int,
        *,
        salt: bytes = b"",
        leader: Request | None = None,
        thinking: bool = False,
        adapter: str = "",
    ) -> Request:
        """As Engine.submit; UserError for what engines elsewhere are not asked for."""
        check_length(len(prompt), sampling.max_tokens, self.capacity)
        if sampling.prompt_logprobs is not None:
            problem = "engines elsewhere do not do this behind finback"
            raise UserError("prompt_logprobs", "given", problem, "Leave it out, or serve with finback's own engine.")
        request = Request(list(prompt), sampling, seed, salt, leader, thinking=thinking)
        request.constraint = self._held_to(sampling)
        request.detokenizer = Detokenizer(self.tokenizer, sampling.stop)
        request.started = time.perf_counter()
        self.sampler.limit_thinking(request)
        self._begin(request)
        return request

    def use(self, model: Transformer) -> None:
        """Their weights are not changed from here."""
        raise UserError("weights", "", "engines elsewhere keep theirs", "Start them on others.")

    def cancel(self, request: Request) -> None:
        """End a request; nothing happens to one that has finished."""
        if request.finish_reason is None:
            self._finish(request, "cancelled")

    def close_thinking(self, request: Request) -> None:
        """Have a request close its chain of thought with the next token, if it is in one."""
        self.sampler.close_thinking(request)

    def step(self) -> list[Request]:
        """What has come since the last call, or comes in a moment; the requests with something new."""
        changed: dict[Request, None] = {}
        timeout: float | None = IDLE
        while True:
            try:
                run, news = self._news.get(timeout=timeout) if timeout else self._news.get_nowait()
            except queue.Empty:
                return list(changed)
            timeout = None
            if not run.ended:
                changed[run.request] = None
                self._take(run, news)

    def _held_to(self, sampling: SamplingParams) -> Constraint | None:
        """What the answer is checked against as it comes, with whatever spaces between its parts: programs differ in these."""
        if sampling.schema is None:
            return None if sampling.grammar is None else self.grammars.lark(sampling.grammar)
        schema = json.loads(sampling.schema)
        if isinstance(schema, dict):
            schema["x-guidance"] = {"whitespace_flexible": True, "coerce_one_of": True}
        return self.grammars.constraint(json.dumps(schema, ensure_ascii=False))

    # ---- one request -----------------------------------------------------------------------------------------------

    def _begin(self, request: Request, failures: int = 0, opens: bool = True) -> None:
        """Have a replica go on with it, behind the tokens that it is given without asking; opens: it may begin a chain of thought."""
        while request.forced and request.finish_reason is None:
            self._append(request, request.forced.popleft(), 0.0, free=False)
        if request.finish_reason is None:
            chained = request.constraint is not None and (
                request.thinking or (opens and self.sampler.may_open(request))
            )
            run = self._runs[request] = _Stay(request, failures, chained)
            ids, room = request.prompt + request.tokens, request.sampling.max_tokens - len(request.tokens)
            threading.Thread(target=self._read, args=(run, ids, room), name="upstream", daemon=True).start()

    def _read(self, run: _Stay, ids: list[int], room: int) -> None:
        """In a thread: pass on what a replica answers until nobody wants more of it."""
        request, failed = run.request, None
        replica, sampling = self.router.take(ids, request.salt), request.sampling
        if run.chained:  # an answer was promised, so the chain cannot be all
            bias = (*sampling.logit_bias, *((token, -math.inf) for token in self.stops))
            sampling = replace(sampling, schema=None, grammar=None, logit_bias=bias)
        salt = request.salt.hex() or "none"
        try:
            # another seed behind tokens that were made before, or the same numbers would come again
            seed = request.seed + len(request.tokens)
            finish = None
            for piece in replica.answer(ids, sampling, room, seed, salt):
                if run.ended:
                    return
                finish = piece.finish
                self._news.put((run, piece))
            if finish is None:
                raise RequestFailed("its stream ended before the answer")
        except RequestFailed as error:
            failed = error
            self._news.put((run, error))
        except (KeyError, TypeError, ValueError) as error:
            failed = RequestFailed(f"an answer in another form ({error!r})")
            self._news.put((run, failed))
        finally:
            self.router.give_back(replica, failed)

    def _take(self, run: _Stay, news: TokenPiece | RequestFailed) -> None:
        request = run.request
        if isinstance(news, RequestFailed):
            run.ended = True
            if news.final or run.failures + 1 >= TRIES:
                self._fail(request, f"fails: {news}")
            else:  # another one goes on behind what is there
                self._begin(request, run.failures + 1)
            return
        for place, (token, logprob) in enumerate(zip(news.tokens, news.logprobs, strict=True)):
            if request.forced or (run.chained and not self.sampler.chains(request, token)):
                # what it goes on with is not what it was told
                run.ended = True
                self._begin(request, opens=False)
                return
            asked = request.sampling.top_logprobs
            if asked is not None:
                others = [pair for pair in news.tops[place] if pair[0] != token] if place < len(news.tops) else []
                request.top_logprobs.append([(token, logprob), *others[:asked]])
            self._append(request, token, logprob)
            if request.finish_reason is not None:
                return
        if request.forced or (run.chained and not request.thinking):
            run.ended = True
            self._begin(request)
        elif news.finish is not None:
            held = request.constraint
            if news.finish == "length" or (news.finish == "stop" and held is not None and held.is_complete):
                self._finish(request, "length" if news.finish == "length" else "stop")
            else:
                self._fail(request, f"has ended the answer by {news.finish!r}")

    def _append(self, request: Request, token: int, logprob: float, free: bool = True) -> None:
        request.append(token, logprob, time.perf_counter())
        if not free and request.sampling.top_logprobs is not None:
            request.top_logprobs.append([(token, logprob)])
        reason = self.sampler.follow(request, token, free)
        held = request.constraint
        cut = reason == "stop" and token in self.stops and held is not None and not held.is_complete
        if cut or reason == "error":
            self._fail(request, "does not hold to the schema or grammar")
        elif reason:
            self._finish(request, reason)

    def _fail(self, request: Request, problem: str) -> None:
        request.problem = f"the engine behind this server {problem}"
        self._finish(request, "error")

    def _finish(self, request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        if (run := self._runs.pop(request, None)) is not None:
            run.ended = True
        if request.detokenizer is not None:
            request.detokenizer.end()


# what a server answers with
ServedEngine = Engine | UpstreamEngine
