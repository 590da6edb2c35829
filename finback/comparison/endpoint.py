"""A model behind an OpenAI-compatible server: several requests at a time, each tried again until there is an answer.

A reply, streamed or whole, counts only when it is complete: a stream that ends without saying so, a chunk that is no
JSON, or an error behind a status of 200 is no answer. What comes to nothing in the end is a failure of the server, never a
wrong answer of the model. No torch here.
"""

import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from finback.client import DONE, Client, RateLimit, RequestFailed, Retries, check_url, parse_json
from finback.comparison.contestant import Answer, Failure, Price, parse_answer
from finback.comparison.protocol import EvalRequest, SamplingProtocol
from finback.config import UserError, check_positive

HOPELESS = 8  # failures without one answer after which the rest is not tried
# what a server calls its own failure, rather than an end of the answer
_BROKEN = frozenset({"error", "abort", "cancelled", "insufficient_system_resource"})
_FINISH = {"": "stop", "end_turn": "stop", "eos": "stop", "max_tokens": "length"}


@dataclass
class ChatCompletion:
    """What came back; counts are None where the server gives none."""

    content: str = ""
    reasoning: str = ""
    finish: str = ""
    prompt_tokens: int | None = None
    tokens: int | None = None
    model: str = ""

    def add(self, chunk: Any) -> None:
        """Take a whole completion or a chunk of one; RequestFailed if it is none."""
        if not isinstance(chunk, dict):
            raise RequestFailed(f"no chat completion but {str(chunk)[:100]}")
        if error := chunk.get("error"):
            raise RequestFailed(f"error in the reply: {json.dumps(error)[:200]}")
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens, self.tokens = _count(usage, "prompt_tokens"), _count(usage, "completion_tokens")
        self.model = str(chunk.get("model") or self.model)
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise RequestFailed(f"no choices in {json.dumps(chunk)[:100]}")
        for choice in choices[:1]:
            self._take(choice)

    def _take(self, choice: Any) -> None:
        message = (choice.get("delta") or choice.get("message")) if isinstance(choice, dict) else None
        if not isinstance(message, dict) and not (isinstance(choice, dict) and choice.get("finish_reason")):
            raise RequestFailed(f"no message in {json.dumps(choice)[:100]}")
        message = message if isinstance(message, dict) else {}
        self.content += _text(message.get("content"))
        # both names may be there with the same text
        reasoning = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
        self.reasoning += reasoning or _text(message.get("reasoning_details"))
        self.finish = str(choice.get("finish_reason") or self.finish)


def complete(client: Client, body: dict[str, Any]) -> ChatCompletion:
    """Send one request and read its reply to the end; RequestFailed when there is no answer."""
    reply = ChatCompletion()
    for event in client.stream("/chat/completions", body):
        if event == DONE:
            break
        reply.add(parse_json(event))
    else:
        if not reply.finish:
            raise RequestFailed("the stream ended without finish_reason or [DONE]")
    if reply.finish in _BROKEN:
        raise RequestFailed(f"the server broke off with finish_reason {reply.finish!r}")
    reply.finish = _FINISH.get(reply.finish, reply.finish)
    return reply


def _count(usage: dict[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) and value >= 0 else None


def _text(value: Any) -> str:
    """A text, or the texts of a list of parts; null, which stands where there is nothing, is none."""
    if isinstance(value, list):
        return "".join(_text(part.get("text")) for part in value if isinstance(part, dict))
    return value if isinstance(value, str) else ""


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
    retries: Retries = Retries()

    def __post_init__(self) -> None:
        check_url(self.url, "--endpoint", "http://127.0.0.1:8000/v1#MODEL", query=True)
        check_positive(self, "endpoint", "concurrency", "timeout")
        self.name = self.name or self.model

    @classmethod
    def parse(cls, text: str, **more: Any) -> "Endpoint":
        """From URL#MODEL."""
        url, mark, model = text.partition("#")
        if not mark or not model:
            remedy = "Write URL#MODEL, as in http://127.0.0.1:8000/v1#tiny."
            raise UserError("--endpoint", text, "names no model", remedy)
        return cls(url, model, **more)

    @property
    def identity(self) -> dict[str, Any]:
        """The address and the name; what stands behind them, only its owner knows."""
        return {"url": self.url, "model": self.model, "extra": self.extra}

    def answers(self, asks: Sequence[EvalRequest], rules: SamplingProtocol) -> Iterator[Answer | Failure]:
        """As they come; leaving the iterator stops asking."""
        left, found = iter(asks), queue.SimpleQueue[Answer | Failure | BaseException]()
        lock, limit = threading.Lock(), RateLimit(threading.Event(), self.rate)
        first: list[Answer | Failure] = []  # outcomes, HOPELESS at most

        def work(client: Client) -> None:
            while not limit.stop.is_set():
                with lock:
                    ask = next(left, None)
                    failures = [each.problem for each in first if isinstance(each, Failure)]
                if ask is None:
                    return
                try:
                    if len(failures) == HOPELESS:
                        found.put(Failure(ask, f"not asked, for {HOPELESS} before it failed: {failures[-1]}"))
                        continue
                    each = self._answer(ask, rules, client, limit)
                    with lock:
                        first.extend([each] if len(first) < HOPELESS else [])
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
            reply, tries = self.retries.send(request, limit)
        except RequestFailed as error:
            return Failure(ask, client.without_key(str(error)))
        same = {name: getattr(reply, name) for name in ("finish", "prompt_tokens", "tokens", "model")}
        spent = time.monotonic() - began
        return parse_answer(ask, reply.content, reply.reasoning, seconds=spent, tries=tries, **same)

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
