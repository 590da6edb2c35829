"""Answers to chat and text completions, in OpenAI's format."""

import secrets
from collections.abc import Sequence
from typing import Any

from finback.engine.request import Request as EngineRequest
from finback.engine.request import TokenLogprobs
from finback.serve.chat_output import ChatChoice
from finback.serve.logprobs import TokenTexts, finite
from finback.serve.metrics import timings, usage
from finback.serve.prepare import PreparedRequest
from finback.serve.protocol import ChatRequest, CompletionRequest
from finback.serve.reply import Dialect, Reply, event
from finback.serve.service import Service
from finback.serve.worker import OutputDelta, OutputStream

DONE = b"data: [DONE]\n\n"


class CompletionReply(Reply):
    """The answer to one request of either kind."""

    def __init__(
        self, body: ChatRequest | CompletionRequest, service: Service, prepared: PreparedRequest, outputs: OutputStream
    ) -> None:
        self.is_chat = isinstance(body, ChatRequest)
        super().__init__(service, prepared, outputs, ("chatcmpl-" if self.is_chat else "cmpl-") + secrets.token_hex(12))
        self.include_usage = bool(body.stream_options and body.stream_options.include_usage)
        texts = service.token_texts if prepared.logprobs else None
        scored = isinstance(body, CompletionRequest) and body.prompt_logprobs is not None
        self.choices: list[ChatChoice | TextChoice] = [
            ChatChoice(i, request, prepared.parser(), service.options.reasoning, texts)
            if self.is_chat
            else TextChoice(i, request, prepared.echo[i] if prepared.echo else None, texts, scored)
            for i, request in enumerate(outputs.requests)
        ]

    @property
    def is_finished(self) -> bool:
        return all(choice.finish is not None for choice in self.choices)

    def begin(self) -> bytes:
        starts = [choice.start() for choice in self.choices if isinstance(choice, ChatChoice)]
        return b"".join(self._chunk([delta]) for delta in starts)

    def take(self, deltas: Sequence[tuple[int, OutputDelta]]) -> bytes:
        found = [choice for index, delta in deltas for choice in self.choices[index].take(delta)]
        return b"".join(self._chunk([choice], choice is found[-1]) for choice in found)

    def end(self) -> bytes:
        if not self.include_usage:
            return DONE
        final = {"choices": [], "usage": usage(self.outputs.requests)}
        return event(self._envelope("chat.completion.chunk") | final) + DONE

    def content(self) -> dict[str, Any]:
        cost = {"usage": usage(self.outputs.requests), "timings": timings(self.outputs.requests)}
        choices = [choice.whole() for choice in self.choices]
        return self._envelope("chat.completion") | {"choices": choices} | cost

    def _envelope(self, kind: str) -> dict[str, Any]:
        notes = {"notes": list(self.prepared.notes)} if self.prepared.notes else {}
        return {
            "id": self.id,
            "object": kind if self.is_chat else "text_completion",
            "created": self.created,
            "model": self.service.options.name,
            "system_fingerprint": f"finback-{self.service.created}",
            **notes,
        }

    def _chunk(self, choices: list[dict[str, Any]], newest: bool = False) -> bytes:
        """One event; `newest`: it has the newest choice, so it may be the last event."""
        chunk = self._envelope("chat.completion.chunk") | {"choices": choices}
        if self.include_usage:
            chunk["usage"] = None
        if newest and self.is_finished:
            chunk["timings"] = timings(self.outputs.requests)
        return event(chunk)


class TextChoice:
    """One choice of a text completion; `echo` is the prompt text that it starts with.

    `scored`: it includes the log-probabilities of the prompt's tokens.
    """

    def __init__(
        self, index: int, request: EngineRequest, echo: str | None, texts: TokenTexts | None, scored: bool = False
    ) -> None:
        self.index, self.request, self.echo, self.texts, self.scored = index, request, echo, texts, scored
        self.finish: str | None = None
        self._chunks: list[dict[str, Any]] = []
        self._tokens = 0  # tokens whose log-probabilities have been sent
        self._characters = 0  # offset of the next token in the text

    def take(self, delta: OutputDelta) -> list[dict[str, Any]]:
        """The choices for the chunks of this output."""
        text, logprobs = delta.text, None
        is_echo = not self._chunks and self.echo is not None
        if is_echo:
            text = f"{self.echo}{text}"
        if not text and delta.finish is None:
            return []
        if self.texts is not None:
            tokens = self.request.tokens[self._tokens : delta.tokens]
            found: list[TokenLogprobs | None] = [*self.request.top_logprobs[self._tokens : delta.tokens]]
            if is_echo:  # nothing predicts the first token
                tokens, found = [*self.request.prompt, *tokens], [None, *self.request.prompt_logprobs, *found]
            logprobs, self._characters = self.texts.table(tokens, found, self._characters)
            self._tokens = delta.tokens
        self.finish = delta.finish
        self._chunks.append({"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish})
        return self._chunks[-1:]

    def whole(self) -> dict[str, Any]:
        """The choice of a response that is not streamed."""
        tables = [chunk["logprobs"] for chunk in self._chunks if chunk["logprobs"]]
        logprobs = {name: [x for t in tables for x in t[name]] for name in tables[0]} if tables else None
        text = "".join(chunk["text"] for chunk in self._chunks)
        choice = {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self.finish}
        if not self.scored:
            return choice
        places = ({str(t): {"logprob": finite(p)} for t, p in line} for line in self.request.prompt_logprobs)
        return choice | {"prompt_logprobs": [None, *places]}


def _unchanged(
    body: ChatRequest | CompletionRequest, service: Service, owner: bytes
) -> ChatRequest | CompletionRequest:
    return body


CHAT, TEXT = (Dialect(form, _unchanged, CompletionReply) for form in (ChatRequest, CompletionRequest))
