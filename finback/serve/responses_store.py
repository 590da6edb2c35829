"""Stores responses in memory for a while, so that they can be retrieved, referenced and continued. Does not import torch."""

import json
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from finback.serve.errors import ApiError
from finback.serve.responses_form import InputTokensRequest, Item

COUNT, BYTES, SECONDS = 1000, 64 << 20, 3600.0


@dataclass
class StoredResponse:
    """A response, and the dialogue that led to it, without instructions."""

    owner: bytes
    response: dict[str, Any]
    input: list[dict[str, Any]]
    size: int
    made: float = field(default_factory=time.monotonic)


class ResponseStore:
    """The latest responses, as many as fit; a key can only find its own."""

    def __init__(self, count: int = COUNT, size: int = BYTES, seconds: float = SECONDS) -> None:
        self.count, self.size, self.seconds = count, size, seconds
        self._responses: OrderedDict[str, StoredResponse] = OrderedDict()  # oldest first
        self._items: dict[str, tuple[str, dict[str, Any]]] = {}  # item id -> (response id, item)
        self._bytes = 0

    def put(self, owner: bytes, response: dict[str, Any], given: list[dict[str, Any]]) -> None:
        """Stores a response; the oldest are dropped if necessary."""
        size = len(json.dumps(response)) + len(json.dumps(given))
        ident = response["id"]
        self._responses[ident] = StoredResponse(owner, response, given, size)
        self._items |= {item["id"]: (ident, item) for item in response["output"]}
        self._bytes += size
        self._tidy()

    def get(self, owner: bytes, ident: str, param: str) -> StoredResponse:
        """A stored response; ApiError 404 if this key has none with this id, or no longer."""
        self._tidy()
        found = self._responses.get(ident)
        if found is None or found.owner != owner:
            problem = "responses are stored in memory for a limited time: send the whole input again, with store: false"
            raise ApiError(404, f"no response {ident[:64]!r} is stored; {problem}", param)
        return found

    def item(self, owner: bytes, ident: str, param: str) -> dict[str, Any]:
        """An output item of a stored response."""
        self._tidy()
        of, item = self._items.get(ident, ("", {}))
        if not of or self._responses[of].owner != owner:
            problem = "send the item itself, with store: false"
            raise ApiError(404, f"no item {ident[:64]!r} is stored; {problem}", param)
        return item

    def delete(self, owner: bytes, ident: str) -> None:
        """Deletes a response of this owner; ApiError 404 if it has none with this id."""
        self.get(owner, ident, "id")
        self._drop(ident)

    def dialogue(self, owner: bytes, body: InputTokensRequest) -> list[tuple[Item, str, dict[str, Any]]]:
        """All items that a request continues: each parsed, with its location in the request, and as sent."""
        return list(self._dialogue(owner, body))

    def _dialogue(self, owner: bytes, body: InputTokensRequest) -> Iterator[tuple[Item, str, dict[str, Any]]]:
        if body.previous_response_id is not None:
            place = "previous_response_id"
            before = self.get(owner, body.previous_response_id, place)
            for raw in (*before.input, *before.response["output"]):
                yield Item.model_validate(raw), place, raw
        for i, item in enumerate(body.items):
            raw = {"id": f"{item.type}_{secrets.token_hex(8)}"} | item.model_dump(exclude_none=True)
            if item.type == "item_reference":
                raw = self.item(owner, item.id or "", f"input[{i}].id")
            yield Item.model_validate(raw), f"input[{i}]", raw

    def _tidy(self) -> None:
        old = time.monotonic() - self.seconds
        while self._responses:
            ident, first = next(iter(self._responses.items()))
            if len(self._responses) <= self.count and self._bytes <= self.size and first.made > old:
                return
            self._drop(ident)

    def _drop(self, ident: str) -> None:
        gone = self._responses.pop(ident)
        self._bytes -= gone.size
        for item in gone.response["output"]:
            self._items.pop(item["id"], None)
