"""Chat requests that were translated from another form. Does not import torch."""

import re
from typing import Any

from pydantic import Field, ValidationError

from finback.config import UserError
from finback.serve.errors import ApiError, bad, from_pydantic
from finback.serve.protocol import ChatRequest


class TranslatedRequest(ChatRequest):
    """A chat request that was translated from another form.

    `max_tokens` is then an upper limit: if the window has less left, the answer is shorter.
    """

    # for each message, its location in the original request
    places: list[str] = Field(default_factory=list, exclude=True)
    # the original request's names of other fields
    names: dict[str, str] = Field(default_factory=dict, exclude=True)
    # what was left out, and why
    notes: list[str] = Field(default_factory=list, exclude=True)

    @classmethod
    def of(
        cls, request: dict[str, Any], places: list[str], names: dict[str, str], notes: list[str]
    ) -> "TranslatedRequest":
        """The translated request; ApiError 400 if the original exceeds what chat accepts."""
        try:
            return cls(**request, places=places, names=names, notes=notes)
        except ValidationError as error:
            where = cls.model_construct(places=places, names=names)
            raise where.blamed(from_pydantic(error, request)) from None

    def blamed(self, error: ApiError | UserError) -> ApiError:
        """An error about this request that names the field of the original request."""
        if isinstance(error, UserError):
            param = self._renamed(error.field)
            return bad(str(error).replace(error.field, param, 1), param)
        if error.param:
            own = self._renamed(error.param)
            error.param, error.message = own, error.message.replace(error.param, own, 1)
        return error

    def _renamed(self, param: str) -> str:
        met = re.match(r"messages\[(\d+)\]", param)
        if met and int(met[1]) < len(self.places):
            return self.places[int(met[1])]
        return next(
            (own + param.removeprefix(name) for name, own in self.names.items() if param.startswith(name)), param
        )
