"""A model behind an OpenAI-compatible server: several requests at a time, each tried again until there is an answer.

What comes to nothing in the end is a failure of the server, never a wrong answer of the model. No torch here.
"""

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from finback.client import Client, RateLimit, RequestFailed, Retries, check_url
from finback.comparison.answer_store import Answer, Failure, parse_answer
from finback.comparison.chat_completion import ChatCompletion, complete
from finback.comparison.contestant import Price
from finback.comparison.protocol import EvalRequest, SamplingProtocol
from finback.config import UserError, check_positive

HOPELESS = 8  # failures without one answer after which the rest is not tried


@dataclass
class Endpoint:
    """A server's address and what it calls the model; the key is sent to it and shown nowhere."""

    url: str
    model: str
    name: str = ""
    key: str = field(default="", repr=False)
    # goes into every request; null takes a field out
    extra: dict[str, Any] = field(default_factory=dict)
    price: Price = field(default_factory=Price)
    concurrency: int = 8
    # requests a minute; 0 is any number
    rate: float = 0.0
    # seconds that the server may be silent
    timeout: float = 300.0
    tries: int = 6
    # after 429 and 503, which say "later"
    busy_tries: int = 40
    # seconds before the second try, doubled each time
    backoff: float = 1.0

    def __post_init__(self) -> None:
        check_url(self.url, "--endpoint", "http://127.0.0.1:8000/v1#MODEL", query=True)
        check_positive(self, "endpoint", "concurrency", "timeout", "tries", "busy_tries", "backoff")
        self.name = self.name or self.model

    @classmethod
    def parse(cls, text: str, **more: Any) -> "Endpoint":
        """From URL#MODEL."""
        url, mark, model = text.partition("#")
        if not mark or not model:
            raise UserError(
                "--endpoint", text, "names no model", "Write URL#MODEL, as in http://127.0.0.1:8000/v1#tiny."
            )
        return cls(url, model, **more)

    @property
    def identity(self) -> dict[str, Any]:
        """The address and the name; what stands behind them, only its owner knows."""
        return {"url": self.url, "model": self.model, "extra": self.extra}

    def answers(self, asks: Sequence[EvalRequest], rules: SamplingProtocol) -> Iterator[Answer | Failure]:
        """As they come; leaving the iterator stops asking."""
        left, found = iter(asks), queue.SimpleQueue[Answer | Failure | BaseException]()
        lock, tally, limit = threading.Lock(), _Tally(), RateLimit(threading.Event(), self.rate)

        def work(client: Client) -> None:
            while not limit.stop.is_set():
                with lock:
                    ask = next(left, None)
                    hopeless = tally.hopeless
                if ask is None:
                    return
                try:
                    each = Failure(ask, hopeless) if hopeless else self._answer(ask, rules, client, limit)
                    with lock:
                        tally.note(each)
                    found.put(each)
                except BaseException as error:  # a defect of ours, to be raised where somebody sees it
                    found.put(error)

        with Client(self.url, self.key, self.timeout) as client:
            for _ in range(min(self.concurrency, len(asks))):
                # not joined at the end: after Ctrl-C nobody waits for what a server still has to say
                threading.Thread(target=work, args=(client,), daemon=True).start()
            try:
                for _ in asks:
                    each = found.get()
                    if isinstance(each, BaseException):
                        raise each
                    yield each
            finally:
                limit.stop.set()

    def _answer(self, ask: EvalRequest, rules: SamplingProtocol, client: Client, limit: RateLimit) -> Answer | Failure:
        body, began = self._body(ask, rules), 0.0

        def request() -> ChatCompletion:
            nonlocal began
            began = time.monotonic()
            return complete(client, body)

        try:
            reply, tries = Retries(self.tries, self.busy_tries, self.backoff).send(request, limit)
        except RequestFailed as error:
            return Failure(ask, client.without_key(str(error)))
        return parse_answer(
            ask,
            reply.content,
            reply.reasoning,
            finish=reply.finish,
            prompt_tokens=reply.prompt_tokens,
            tokens=reply.tokens,
            seconds=time.monotonic() - began,
            tries=tries,
            model=reply.model,
        )

    def _body(self, ask: EvalRequest, rules: SamplingProtocol) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(ask.messages),
            "temperature": rules.temperature,
            "top_p": rules.top_p,
            "max_tokens": rules.max_tokens,
            "seed": ask.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if ask.suite.stop:
            body["stop"] = list(ask.suite.stop)
        if rules.think is not None:  # DeepSeek's switch, and that of vLLM and SGLang
            body["thinking"] = {"type": "enabled" if rules.think else "disabled"}
            body["chat_template_kwargs"] = {"thinking": rules.think, "enable_thinking": rules.think}
        return {name: value for name, value in (body | self.extra).items() if value is not None}


@dataclass
class _Tally:
    """How an endpoint has done so far; `hopeless` says why the rest need not be tried, if that is so."""

    answered: bool = False
    failed: int = 0
    hopeless: str = ""

    def note(self, each: Answer | Failure) -> None:
        """One more answer, or failure."""
        self.answered = self.answered or isinstance(each, Answer)
        if isinstance(each, Failure):
            self.failed += 1
            if self.failed >= HOPELESS and not self.answered and not self.hopeless:
                self.hopeless = f"not asked, for {HOPELESS} before it failed: {each.problem}"
