"""The dialogues of the packaged Chit Chat corpus as texts, cached. Does not import torch."""

import importlib.metadata
from functools import lru_cache

from finback.data.sources import Chitchat

LICENCE = "MIT"


def name() -> str:
    """The corpus's name and version, for a suite's source."""
    return f"chitchat-dataset {importlib.metadata.version('chitchat-dataset')}"


@lru_cache(maxsize=1)
def texts() -> tuple[str, ...]:
    """Each dialogue as a text with one turn per line."""
    return tuple(document.plain for document in Chitchat().documents())
