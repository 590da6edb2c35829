"""One chat completion from an OpenAI-compatible server: streamed or whole, in each of the forms that servers use.

A reply counts only when it is complete: a stream that ends without saying so, a chunk that is no JSON, or an error
behind a status of 200 is no answer. No torch here.
"""

import json
from dataclasses import dataclass
from typing import Any

from finback.client import DONE, Client, RequestFailed, parse_json

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
    # the server has announced that nothing more comes
    ended: bool = False

    def add(self, chunk: Any) -> None:
        """Take a whole completion or a chunk of one; RequestFailed if it is none."""
        if not isinstance(chunk, dict):
            raise RequestFailed(f"no chat completion but {str(chunk)[:100]}")
        if chunk.get("error"):
            error = chunk["error"]
            raise RequestFailed(f"error in the reply: {json.dumps(error)[:200]}")
        usage = chunk.get("usage")
        if isinstance(usage, dict):
            self.prompt_tokens, self.tokens = (_count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))
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

    def complete(self) -> "ChatCompletion":
        """Itself, if it is an answer; RequestFailed otherwise."""
        if self.finish in _BROKEN:
            raise RequestFailed(f"the server broke off with finish_reason {self.finish!r}")
        if not self.finish and not self.ended:
            raise RequestFailed("the stream ended without finish_reason or [DONE]")
        self.finish = _FINISH.get(self.finish, self.finish)
        return self


def complete(client: Client, body: dict[str, Any]) -> ChatCompletion:
    """Send one request and read its reply to the end; RequestFailed when there is no answer."""
    reply = ChatCompletion()
    for event in client.stream("/chat/completions", body):
        if event == DONE:
            reply.ended = True
            break
        reply.add(parse_json(event))
    return reply.complete()


def _count(usage: dict[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if isinstance(value, int) and value >= 0 else None


def _text(value: Any) -> str:
    """A text, or the texts of a list of parts; null, which stands where there is nothing, is none."""
    if isinstance(value, list):
        return "".join(_text(part.get("text")) for part in value if isinstance(part, dict))
    return value if isinstance(value, str) else ""
