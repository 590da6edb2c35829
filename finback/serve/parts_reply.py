"""Shared by answers in the Messages and Responses formats: thinking, text and calls are consecutive parts."""

import json
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from finback.serve.deltas import Delta
from finback.serve.prepare import PreparedRequest
from finback.serve.reply import Reply
from finback.serve.service import Service
from finback.serve.worker import OutputDelta, OutputStream


class PartsReply(Reply):
    """The answer to a request with one choice."""

    def __init__(self, service: Service, prepared: PreparedRequest, outputs: OutputStream, ident: str) -> None:
        super().__init__(service, prepared, outputs, ident)
        self.parser, self.request = prepared.parser(), outputs.requests[0]
        self.finish: str | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish is not None

    def take(self, deltas: Sequence[tuple[int, OutputDelta]]) -> bytes:
        found = b""
        for _, delta in deltas:
            parts = self.parser.push(delta.text) if delta.text else []
            parts += self.parser.end() if delta.finish is not None else []
            found += b"".join(self._part(part) for part in parts)
            if delta.finish is not None:
                self.finish = delta.finish
                found += self._finished()
        return found

    @abstractmethod
    def _part(self, part: Delta) -> bytes:
        """The events of one delta, which continues the open part or starts the next."""

    @abstractmethod
    def _finished(self) -> bytes:
        """The events that end the last part; at least one part exists, since clients look at the first."""


def json_object(text: str) -> dict[str, Any] | None:
    """The object that a JSON text encodes; None if it does not encode one."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
