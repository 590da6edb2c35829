"""What a request says, as one choice of a reply: the same parts whether they are streamed or sent as a whole."""

from bisect import bisect_left
from collections.abc import Iterable
from typing import Any

from finback.data.tokenizer import END_THINK, THINK
from finback.engine.request import Request, TokenLogprobs
from finback.serve.logprobs import TokenTexts, finite
from finback.serve.parse import Delta, Parser
from finback.serve.worker import OutputDelta

REASONING = {
    "both": ("reasoning_content", "reasoning"),
    "deepseek": ("reasoning_content",),
    "openrouter": ("reasoning",),
}
FIELDS = (*REASONING, "inline", "none")


class ChatChoice:
    """One choice of a chat. `field` is how the chain is shown: one of FIELDS."""

    def __init__(self, index: int, request: Request, parser: Parser, field: str, spelling: TokenTexts | None) -> None:
        self.index, self.request, self.parser, self.field, self.spelling = (index, request, parser, field, spelling)
        self.finish: str | None = None
        self._deltas: list[dict[str, Any]] = []  # all of them; the message is their sum
        self._told = 0  # tokens whose log-probabilities are out
        self._spelt: dict[str, list[Any]] = {"content": [], "reasoning_content": []}
        self._inline = False  # inside <think> in the content

    def start(self) -> dict[str, Any]:
        """The choice in the first chunk."""
        return self._choice({"role": "assistant", "content": ""}, None)

    def take(self, news: OutputDelta) -> list[dict[str, Any]]:
        """The choices of the chunks that this news makes."""
        parts = self.parser.push(news.text) if news.text else []
        if news.finish is not None:
            parts += self.parser.end()
        deltas = [delta for part in parts if (delta := self._delta(part))]
        self._deltas += deltas
        logprobs = self._logprobs(news) if self.spelling and (deltas or news.finish) else None
        if news.finish is None:
            return [self._choice(d, logprobs if i == 0 else None) for i, d in enumerate(deltas)]
        called = self.parser.called and news.finish == "stop"
        self.finish = "tool_calls" if called else news.finish
        return [*(self._choice(d, None) for d in deltas), self._choice({}, logprobs, self.finish)]

    def whole(self) -> dict[str, Any]:
        """The choice of a reply that is not streamed."""
        message: dict[str, Any] = {"role": "assistant", "content": self._sum("content")}
        names = REASONING.get(self.field, ())
        if chain := self._sum("reasoning_content") or self._sum("reasoning"):
            message |= dict.fromkeys(names, chain)
        if self.parser.calls:
            message["content"] = message["content"] or None
            message["tool_calls"] = [_call(c.id, c.name, c.arguments) for c in self.parser.calls]
        logprobs = {k: v or None for k, v in self._spelt.items()} if self.spelling else None
        return {"index": self.index, "message": message, "logprobs": logprobs, "finish_reason": self.finish}

    def _sum(self, name: str) -> str:
        return "".join(delta.get(name) or "" for delta in self._deltas)

    def _delta(self, part: Delta) -> dict[str, Any] | None:
        if part.kind == "reasoning":
            if self.field == "inline":
                mark, self._inline = "" if self._inline else THINK, True
                return {"content": mark + part.text}
            return dict.fromkeys(REASONING.get(self.field, ()), part.text) or None
        mark, self._inline = END_THINK if self._inline else "", False
        if part.kind == "content":
            return {"content": mark + part.text}
        first = _call(part.call_id, part.name, part.text) if part.name else {"function": {"arguments": part.text}}
        return {"tool_calls": [{"index": part.index, **first}]} | ({"content": mark} if mark else {})

    def _logprobs(self, news: OutputDelta) -> dict[str, Any]:
        """Those of the tokens made since the last time, the chain's apart from the answer's; `drafted` marks MTP's."""
        assert self.spelling is not None
        new: dict[str, list[Any]] = {"content": [], "reasoning_content": []}
        guessed = self.request.accepted_at
        drafted = set(guessed[bisect_left(guessed, self._told) :])
        for place in range(self._told, news.made):
            name = "reasoning_content" if place < news.thought else "content"
            entry = self.spelling.entry(self.request.top_logprobs[place])
            new[name].append(entry | {"drafted": True} if place in drafted else entry)
        self._told = news.made
        for name, entries in new.items():
            self._spelt[name] += entries
        return {name: entries or None for name, entries in new.items()}

    def _choice(
        self, delta: dict[str, Any], logprobs: dict[str, Any] | None, finish: str | None = None
    ) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


class TextChoice:
    """One choice of a text completion; `echo` is the prompt's text where the answer begins with it."""

    def __init__(self, index: int, request: Request, echo: str | None, spelling: TokenTexts | None) -> None:
        self.index, self.request, self.echo, self.spelling = index, request, echo, spelling
        self.finish: str | None = None
        self._parts: list[dict[str, Any]] = []
        self._told = 0
        self._place = 0  # in the text, of the next token

    def start(self) -> dict[str, Any] | None:
        """Nothing: a completion has no role to announce."""
        return None

    def take(self, news: OutputDelta) -> list[dict[str, Any]]:
        """The choices of the chunks that this news makes."""
        text, logprobs = news.text, None
        if not self._parts and self.echo is not None:
            text = self.echo + text
        if not text and news.finish is None:
            return []
        if self.spelling is not None:
            tokens, found = self._new_tokens(news)
            logprobs = self._table(tokens, found)
        self.finish = news.finish
        part = {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": news.finish}
        self._parts.append(part)
        return [part]

    def whole(self) -> dict[str, Any]:
        """The choice of a reply that is not streamed."""
        tables = [part["logprobs"] for part in self._parts if part["logprobs"]]
        logprobs = {name: [x for t in tables for x in t[name]] for name in tables[0]} if tables else None
        text = "".join(part["text"] for part in self._parts)
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": self.finish}

    def _new_tokens(self, news: OutputDelta) -> tuple[list[int], list[TokenLogprobs | None]]:
        s, tokens = self.request, list(self.request.tokens[self._told : news.made])
        found: list[TokenLogprobs | None] = list(s.top_logprobs[self._told : news.made])
        self._told = news.made
        if not self._parts and self.echo is not None:  # nothing comes before the first token to foretell it
            return [*s.prompt, *tokens], [None, *s.prompt_logprobs, *found]
        return tokens, found

    def _table(self, tokens: Iterable[int], found: Iterable[TokenLogprobs | None]) -> dict[str, list[Any]]:
        """OpenAI's older shape: lists that run side by side."""
        assert self.spelling is not None
        table: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, line in zip(tokens, found, strict=True):
            table["tokens"].append(self.spelling.label(token))
            table["token_logprobs"].append(None if line is None else finite(line[0][1]))
            best = line[1:] if line else []
            # the token's own stands among the likeliest, as OpenAI has it
            table["top_logprobs"].append({self.spelling.label(t): finite(p) for t, p in (line or [])} if best else None)
            table["text_offset"].append(self._place)
            self._place += len(self.spelling.tokenizer.decode([token]))
        return table


def _call(ident: str | None, name: str, arguments: str) -> dict[str, Any]:
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}
