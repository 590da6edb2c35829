"""A model's text, as it streams, into reasoning, content and tool calls, and these into one choice of a chat response.

The rules of the parser, which depend on the text alone and never on how it was cut into pieces:

- A chain of thought is there if the prompt opened it or if the text begins with `<think>`; repeated at its start the tag
  is dropped. The newline after `<think>` and the whitespace at the chain's end are no part of it. A chain that is never
  closed leaves the content empty.
- In the chain, `</think>` closes unless it is quoted in code: within an open code fence and between two quotation marks
  (" ' or `) of the same line. So a fence that the model forgot to close hides nothing.
- Newlines and further `</think>` where the answer begins are dropped. Later on, think tags are text.
- Tool calls are looked for in the answer only, outside code fences, if the request has tools. The first mark that is
  seen decides the form. Whitespace around calls belongs to the tool_calls.
"""

from bisect import bisect_left
from collections.abc import Callable
from typing import Any

from finback.data.tokenizer import END_THINK, THINK
from finback.engine.request import Request
from finback.serve import tool_calls
from finback.serve.incremental import Delta, DeltaCollector, Fence, IncrementalReader, ParsedCall, Wait, fresh_id
from finback.serve.logprobs import TokenTexts
from finback.serve.options import ReasoningField
from finback.serve.tool_calls import OPENERS, ToolForm
from finback.serve.worker import OutputDelta

REASONING = {
    "both": ("reasoning_content", "reasoning"),
    "deepseek": ("reasoning_content",),
    "openrouter": ("reasoning",),
}


class ChatChoice:
    """One choice of a chat response; `field` says where the chain of thought is shown."""

    def __init__(
        self, index: int, request: Request, parser: "Parser", field: ReasoningField, texts: TokenTexts | None
    ) -> None:
        self.index, self.request, self.parser, self.field, self.texts = index, request, parser, field, texts
        self.finish: str | None = None
        self._tokens = 0  # whose log-probabilities are sent
        self._logprobs: dict[str, list[Any]] = {"content": [], "reasoning_content": []}
        self._is_inline = False  # inside <think> in the content

    def start(self) -> dict[str, Any]:
        return self._choice({"role": "assistant", "content": ""}, None)

    def take(self, delta: OutputDelta) -> list[dict[str, Any]]:
        """The choices of the chunks that this output makes."""
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
        """What the part adds to the message."""
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
        """Those of the tokens since the last call, the chain's apart from the answer's; `drafted` marks MTP's."""
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


class Parser:
    """Takes the text piece by piece and returns what each adds; any text is taken without an error.

    `opened`: the prompt ends inside a chain of thought. `tools`: the request has tools, so that calls are looked for.
    `form`: the only form of calls to look for, None for all. `new_id` makes the calls' ids. `constrained`: the answer
    follows a grammar, so that the first `</think>` ends the chain and marks in a call's strings are text. `single_call`:
    calls behind the first are left out.
    """

    def __init__(
        self,
        opened: bool,
        tools: bool,
        form: ToolForm | None = None,
        new_id: Callable[[], str] = fresh_id,
        *,
        constrained: bool = False,
        single_call: bool = False,
    ) -> None:
        self._reader, self._constrained = IncrementalReader(), constrained
        self._output = DeltaCollector(tools, new_id, single_call)
        self._parsing = self._parse(opened, tools, form)

    @property
    def reasoning(self) -> str:
        """The chain so far, or the whole of it after `end`."""
        return "".join(self._output.reasoning)

    @property
    def content(self) -> str:
        """The answer so far, or the whole of it after `end`."""
        return "".join(self._output.content)

    @property
    def calls(self) -> list[ParsedCall]:
        """The calls so far, or all of them after `end`."""
        return [ParsedCall(call_id, name, "".join(pieces)) for call_id, name, pieces in self._output.calls]

    @property
    def called(self) -> bool:
        """Whether there is a call to answer; one that a grammar should have completed must have been."""
        calls = self.calls
        return bool(calls) and not (self._constrained and not tool_calls.is_whole(calls[-1].arguments))

    def push(self, piece: str) -> list[Delta]:
        """Add text; what it makes certain, neighbours of one kind as one delta."""
        assert not self._reader.ended, "text after the end"
        self._reader.push(piece)
        next(self._parsing)  # the generator never returns before end()
        return self._output.take()

    def end(self) -> list[Delta]:
        """What was still undecided: no more text comes. A second call returns nothing."""
        if not self._reader.ended:
            self._reader.ended = True
            next(self._parsing, None)
            self._output.end()
        return self._output.take()

    def _parse(self, opened: bool, tools: bool, form: ToolForm | None) -> Wait[None]:
        self._reader.mark(0)
        blank = yield from self._reader.blank()
        tag = yield from self._reader.match((THINK, END_THINK))
        self._reader.marked()
        if tag == THINK or (opened and not tag):
            if not tag:
                self._reader.back(len(blank))
            yield from self._chain()
        elif not tag:
            self._output.text(blank)
            yield from self._answer(tools, form)
            return
        while True:
            yield from self._reader.blank("\r\n")
            if not (yield from self._reader.match((END_THINK,))):
                break
        yield from self._answer(tools, form)

    def _chain(self) -> Wait[None]:
        fence = Fence()
        yield from self._reader.match(("\n", "\r\n"))
        while True:
            text, tag = yield from self._reader.until((END_THINK,))
            if tag and self._constrained:
                break
            if tag:
                quote = fence.quote() if fence.is_open else ""
                if not quote or not (yield from self._reader.comes_first(quote, "\n")):
                    break
            if not (text := text or tag):
                break
            fence.push(text)
            self._output.think(text)
        self._output.end_chain()

    def _answer(self, tools: bool, form: ToolForm | None) -> Wait[None]:
        openers = () if not tools else OPENERS if form is None else (form.opener,)
        while True:
            text, tag = yield from self._reader.until(openers)
            if tag and not self._output.fence.is_open:
                yield from tool_calls.read(self._reader, tag, form, self._output, self._constrained)
                openers = (tag,) if self._output.calls else openers
            elif text or tag:
                self._output.text(text or tag)
            else:
                return


def _call(ident: str | None, name: str, arguments: str) -> dict[str, Any]:
    return {"id": ident, "type": "function", "function": {"name": name, "arguments": arguments}}
