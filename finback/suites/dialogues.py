"""The dialogues of the packaged Chit Chat corpus as texts, read once. Does not import torch."""

import importlib.metadata
from functools import lru_cache

from finback.data.sources import Chitchat

LICENCE = "MIT"


def name() -> str:
    """What a suite says of its source."""
    return f"chitchat-dataset {importlib.metadata.version('chitchat-dataset')}"


@lru_cache(maxsize=1)
def texts() -> tuple[str, ...]:
    """Each dialogue, a turn on a line."""
    return tuple(document.plain for document in Chitchat().documents())
