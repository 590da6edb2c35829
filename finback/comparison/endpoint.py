"""A model behind an OpenAI-compatible server: concurrent requests, each retried until it is answered or hopeless.

A reply, streamed or whole, counts only if it is complete: a stream without finish_reason or [DONE], a chunk that is not
JSON and an error under status 200 are all retried. A request that fails in the end counts as a failure of the server,
never as a wrong answer of the model. Does not import torch.
"""

import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from finback.client import DONE, Client, RateLimit, RequestFailed, Retries, check_url, parse_json
from finback.comparison.contestant import Answer, Failure, Price, parse_answer
from finback.comparison.endings import ending
from finback.comparison.protocol import EvalRequest, SamplingProtocol
from finback.config import UserError, check_positive

HOPELESS = 8  # if the first 8 requests all fail, the rest are not sent


@dataclass
class ChatCompletion:
    """A chat completion, assembled from one body or from chunks; counts are None if the server sends none."""

    content: str = ""
    reasoning: str = ""
    # the server's own word
    finish: str = ""
    # OpenAI's field for the text of a refusal, which is not in `content`
    refusal: str = ""
    calls_tools: bool = False
    # the index of the choice that is read; other choices are ignored
    index: Any = None
    has_choice: bool = False
    prompt_tokens: int | None = None
    tokens: int | None = None
    model: str = ""

    def add(self, chunk: Any) -> None:
        """Adds a whole completion or a chunk of one; RequestFailed if it is malformed or reports an error."""
        if not isinstance(chunk, dict):
            raise RequestFailed(f"not a chat completion: {str(chunk)[:100]}")
        if error := chunk.get("error"):
            raise RequestFailed(f"error in the reply: {json.dumps(error)[:200]}")
        usage = chunk.get("usage")
        if isinstance(usage, dict) and usage:
            self.prompt_tokens, self.tokens = billed(usage)
        self.model = str(chunk.get("model") or self.model)
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise RequestFailed(f"no choices in {json.dumps(chunk)[:100]}")
        for choice in choices:
            index = choice.get("index") if isinstance(choice, dict) else None
            if not self.has_choice or index == self.index:
                self.index = index
                self._take(choice)

    def _take(self, choice: Any) -> None:
        message = (choice.get("delta") or choice.get("message")) if isinstance(choice, dict) else None
        if not isinstance(message, dict) and not (isinstance(choice, dict) and choice.get("finish_reason")):
            raise RequestFailed(f"no message in {json.dumps(choice)[:100]}")
        self.has_choice = True
        message = message if isinstance(message, dict) else {}
        self.content += _text(message.get("content"))
        self.refusal += _text(message.get("refusal"))
        self.calls_tools |= bool(message.get("tool_calls") or message.get("function_call"))
        # a server may send the same text under several names, so only the first is read
        names = ("reasoning_content", "reasoning", "thinking", "reasoning_details")
        given = (_text(message.get(name)) for name in names)
        self.reasoning += next(filter(None, given), "") or _thoughts(message.get("content"))
        finish = choice.get("finish_reason")
        finish = finish.get("type") if isinstance(finish, dict) else finish
        self.finish = str(finish or self.finish)

    def end(self, max_tokens: int | None) -> None:
        """Checks a complete reply: RequestFailed if it holds no answer; infers a finish reason that the server left out."""
        if not self.has_choice:
            raise RequestFailed("the reply has no choices and so no answer")
        if ending(self.finish) == "broken":
            raise RequestFailed(f"the server aborted the answer with finish_reason {self.finish!r}")
        if not self.content.strip() and ending(self.finish) == "stop":
            self.finish = "refusal" if self.refusal else "tool_calls" if self.calls_tools else self.finish
        self.content = self.content or self.refusal
        if not self.finish and max_tokens is not None and (self.tokens or 0) >= max_tokens:
            self.finish = "length"


def complete(client: Client, body: dict[str, Any]) -> ChatCompletion:
    """Sends one request and reads its reply to the end; RequestFailed when there is no answer."""
    reply = ChatCompletion()
    for event in client.stream("/chat/completions", body):
        if event == DONE:
            break
        reply.add(parse_json(event))
    else:
        if not reply.finish:
            raise RequestFailed("the stream ended without finish_reason or [DONE]")
    longest = body.get("max_completion_tokens", body.get("max_tokens"))
    reply.end(longest if isinstance(longest, int) else None)
    return reply


def billed(usage: dict[str, Any]) -> tuple[int | None, int | None]:
    """Billed prompt tokens, and billed tokens of chain of thought and answer; None for what the server does not report.

    Some servers count the chain only in `total_tokens` or in `completion_tokens_details`, not in `completion_tokens`. The
    excess of the total over prompt and completion is the chain, unless it equals the number of cached prompt tokens.
    """
    prompt, made = _count(usage, "prompt_tokens", "input_tokens"), _count(usage, "completion_tokens", "output_tokens")
    total = _count(usage, "total_tokens")
    thought = (
        _count(usage.get("completion_tokens_details"), "reasoning_tokens") or _count(usage, "reasoning_tokens") or 0
    )
    details = usage.get("prompt_tokens_details")
    cached = _count(details, "cached_tokens") or _count(usage, "cache_read_input_tokens") or 0
    cached += _count(usage, "cache_creation_input_tokens") or 0
    if total is not None and prompt is not None:
        rest = total - prompt - (made or 0)
        if made is not None and cached and rest == cached != thought:
            prompt, rest = total - made, 0
        made = (made or 0) + max(0, rest)
    elif total is not None and made is not None:
        prompt = max(0, total - made)
    if made is not None and thought > made:  # neither sum includes the chain
        made += thought
    return prompt, made


def _count(usage: Any, *names: str) -> int | None:
    """The first of these fields that holds a whole number of at least 0."""
    values = [usage.get(name) for name in names] if isinstance(usage, dict) else []
    found = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v >= 0 and v == v // 1]
    return int(found[0]) if found else None


def _text(value: Any) -> str:
    """A text, or the joined texts of a list of parts; "" for null or anything else."""
    if isinstance(value, list):
        return "".join(_text(part.get("text")) for part in value if isinstance(part, dict))
    return value if isinstance(value, str) else ""


def _thoughts(content: Any) -> str:
    """The chain of thought in a content that is a list of parts."""
    parts = content if isinstance(content, list) else []
    return "".join(_text(part.get("thinking")) for part in parts if isinstance(part, dict))


@dataclass
class Endpoint:
    """One model on one server, or on several that share the questions. The key never appears in output."""

    # comma-separated if there are several servers
    url: str
    # the model's name on the server
    model: str
    name: str = ""
    key: str = field(default="", repr=False)
    # fields added to every request; null removes a field
    extra: dict[str, Any] = field(default_factory=dict)
    price: Price = field(default_factory=Price)
    # concurrent requests to each server
    concurrency: int = 8
    # requests per minute; 0 is no limit
    rate: float = 0.0
    # seconds without a byte from the server before a request fails
    timeout: float = 300.0
    retries: Retries = Retries()

    def __post_init__(self) -> None:
        for url in self.urls:
            check_url(url, "--endpoint", "http://127.0.0.1:8000/v1#MODEL", query=True)
        check_positive(self, "endpoint", "concurrency", "timeout")
        self.name = self.name or self.model

    @classmethod
    def parse(cls, text: str, **more: Any) -> "Endpoint":
        """Parses URL#MODEL; UserError if the model is missing."""
        url, mark, model = text.partition("#")
        if not mark or not model:
            remedy = "Write URL#MODEL, for example http://127.0.0.1:8000/v1#tiny."
            raise UserError("--endpoint", text, "names no model", remedy)
        return cls(url, model, **more)

    @property
    def urls(self) -> list[str]:
        """One address per server."""
        return self.url.split(",")

    @property
    def identity(self) -> dict[str, Any]:
        """The address and the name. The model behind them may change unnoticed: an endpoint shows no digest of its weights."""
        return {"url": self.url, "model": self.model, "extra": self.extra}

    def answers(self, asks: Sequence[EvalRequest], rules: SamplingProtocol) -> Iterator[Answer | Failure]:
        """Yields answers in order of arrival; closing the iterator stops the sending of requests."""
        left, found = iter(asks), queue.SimpleQueue[Answer | Failure | BaseException]()
        lock, limit = threading.Lock(), RateLimit(threading.Event(), self.rate)
        first: list[Answer | Failure] = []  # the first outcomes, at most HOPELESS

        def work(clients: list[Client]) -> None:
            """Sends requests to the first client; when it fails, rotates to the next and stays there."""
            while not limit.stop.is_set():
                with lock:
                    ask = next(left, None)
                    failures = [each.problem for each in first if isinstance(each, Failure)]
                if ask is None:
                    return
                try:
                    if len(failures) == HOPELESS:
                        found.put(Failure(ask, f"not sent, because the first {HOPELESS} failed: {failures[-1]}"))
                        continue
                    each = self._answer(ask, rules, clients, limit)
                    with lock:
                        first.extend([each] if len(first) < HOPELESS else [])
                    found.put(each)
                except BaseException as error:  # a bug; re-raised in the caller's thread, where it is seen
                    found.put(error)

        with ExitStack() as stack:
            clients = [stack.enter_context(Client(url, self.key, self.timeout)) for url in self.urls]
            for number in range(min(self.concurrency * len(clients), len(asks))):
                mine = number % len(clients)
                # not joined at the end: Ctrl-C must not wait for replies that are still being generated
                threading.Thread(target=work, args=(clients[mine:] + clients[:mine],), daemon=True).start()
            try:
                for _ in asks:
                    each = found.get()
                    if isinstance(each, BaseException):
                        raise each
                    yield each
            finally:
                limit.stop.set()

    def _answer(
        self, ask: EvalRequest, rules: SamplingProtocol, clients: list[Client], limit: RateLimit
    ) -> Answer | Failure:
        body, began = self._body(ask, rules), 0.0

        def request() -> ChatCompletion:
            nonlocal began
            began = time.monotonic()
            try:
                return complete(clients[0], body)
            except RequestFailed as error:
                if not error.final:
                    clients.append(clients.pop(0))
                raise

        try:
            reply, tries = self.retries.send(request, limit)
        except RequestFailed as error:
            return Failure(ask, clients[0].without_key(str(error)))
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
        if rules.think is not None:  # DeepSeek's field, then the one of vLLM and SGLang
            body["thinking"] = {"type": "enabled" if rules.think else "disabled"}
            body["chat_template_kwargs"] = {"thinking": rules.think, "enable_thinking": rules.think}
        return {name: value for name, value in (body | self.extra).items() if value is not None}
