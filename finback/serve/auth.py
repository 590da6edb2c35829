"""API keys, as digests. No torch here."""

import hashlib
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from finback.config import UserError
from finback.serve.options import LOOPBACK, ListenOptions

Listen = TypeVar("Listen", bound=ListenOptions)

SHORTEST = 16  # characters; 128 bits in hexadecimal are 32


def digests(keys: Iterable[str], file: Path | None = None) -> tuple[bytes, ...]:
    """SHA-256 of each key given and of each line of a file (# begins a comment); the keys themselves are not stored.

    A line may also be `sha256:` and the digest in hexadecimal, so that the file need not hold the key.
    """
    found = [key.strip() for key in keys]
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("keys", str(file), f"cannot be read ({error})", "Name a text file, a key a line.") from None
        found += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for key in found:
        if len(key) < SHORTEST:
            remedy = 'Make one: python -c "import secrets; print(secrets.token_urlsafe(32))".'
            raise UserError("keys", f"{len(key)} characters", "too short to be safe", remedy)
    return tuple(map(_digest, found))


def _digest(key: str) -> bytes:
    met = re.fullmatch("sha256:([0-9a-fA-F]{64})", key)
    return bytes.fromhex(met[1]) if met else hashlib.sha256(key.encode()).digest()


def secured(options: Listen) -> Listen:
    """The options with the digests of all keys; refuses to stand open on a network by mistake."""
    keys = (*options.keys, *digests([options.api_key] if options.api_key else [], options.key_file))
    if options.host not in LOOPBACK and not keys and not options.insecure:
        remedy = "Give --key-file or FINBACK_API_KEY, or --insecure if anybody may use it."
        raise UserError("host", options.host, "open to the network, with no API key", remedy)
    return replace(options, keys=keys, api_key="", key_file=None)
