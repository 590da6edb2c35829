"""One choice of a chat response: turns the parser's output into messages and deltas."""

from bisect import bisect_left
from typing import Any

from finback.data.tokenizer import END_THINK, THINK
from finback.engine.request import Request
from finback.serve.deltas import Delta
from finback.serve.logprobs import TokenTexts
from finback.serve.options import ReasoningField
from finback.serve.parser import Parser
from finback.serve.worker import OutputDelta

REASONING = {
    "both": ("reasoning_content", "reasoning"),
    "deepseek": ("reasoning_content",),
    "openrouter": ("reasoning",),
}


class ChatChoice:
    """One choice of a chat response; `field` selects where the chain of thought goes."""

    def __init__(
        self, index: int, request: Request, parser: Parser, field: ReasoningField, texts: TokenTexts | None
    ) -> None:
        self.index, self.request, self.parser, self.field, self.texts = index, request, parser, field, texts
        self.finish: str | None = None
        self._tokens = 0  # tokens whose log-probabilities have been sent
        self._logprobs: dict[str, list[Any]] = {"content": [], "reasoning_content": []}
        self._is_inline = False  # whether the content is inside <think>

    def start(self) -> dict[str, Any]:
        """The first chunk of a choice, with its role."""
        return self._choice({"role": "assistant", "content": ""}, None)

    def take(self, delta: OutputDelta) -> list[dict[str, Any]]:
        """The choices for the chunks of this output."""
        parts = self.parser.push(delta.text) if delta.text else []
        if delta.finish is not None:
            parts += self.parser.end()
        messages = [message for part in parts if (message := self._message(part))]
        logprobs = self._new_logprobs(delta) if self.texts and (messages or delta.finish) else None
        if delta.finish is None:
            return [self._choice(m, logprobs if i == 0 else None) for i, m in enumerate(messages)]
        self.finish = "tool_calls" if self.parser.called and delta.finish == "stop" else delta.finish
        return [*(self._choice(m, None) for m in messages), self._choice({}, logprobs, self.finish)]

    def whole(self) -> dict[str, Any]:
        """The choice of a response that is not streamed."""
        content, reasoning, calls = self.parser.content, self.parser.reasoning, self.parser.calls
        if reasoning and self.field == "inline":
            content = THINK + reasoning + (END_THINK if content or calls else "") + content
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reasoning:
            message |= dict.fromkeys(REASONING.get(self.field, ()), reasoning)
        if calls:
            message["content"] = content or None
            message["tool_calls"] = [_call(c.id, c.name, c.arguments) for c in calls]
        logprobs = {k: v or None for k, v in self._logprobs.items()} if self.texts else None
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish}

    def _message(self, part: Delta) -> dict[str, Any] | None:
        """What a part adds to the message."""
        if part.kind == "reasoning":
            if self.field == "inline":
                mark, self._is_inline = "" if self._is_inline else THINK, True
                return {"content": mark + part.text}
            return dict.fromkeys(REASONING.get(self.field, ()), part.text) or None
        mark, self._is_inline = END_THINK if self._is_inline else "", False
        if part.kind == "content":
            return {"content": mark + part.text}
        first = _call(part.call_id, part.name, part.text) if part.name else {"function": {"arguments": part.text}}
        return {"tool_calls": [{"index": part.index, **first}]} | ({"content": mark} if mark else {})

    def _new_logprobs(self, delta: OutputDelta) -> dict[str, Any]:
        """Log-probabilities of the tokens since the last call, separately for chain and answer; `drafted` marks MTP drafts."""
        assert self.texts is not None
        new: dict[str, list[Any]] = {"content": [], "reasoning_content": []}
        accepted = self.request.accepted_at
        drafted = set(accepted[bisect_left(accepted, self._tokens) :])
        for place in range(self._tokens, delta.tokens):
            name = "reasoning_content" if place < delta.thinking_tokens else "content"
            entry = self.texts.entry(self.request.top_logprobs[place])
            new[name].append(entry | {"drafted": True} if place in drafted else entry)
        self._tokens = delta.tokens
        for name, entries in new.items():
            self._logprobs[name] += entries
        return {name: entries or None for name, entries in new.items()}

    def _choice(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None, finish: str | None = None
    ) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _call(ident: str | None, name: str, arguments: str) -> dict[str, Any]:
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}
