"""Who may ask: API keys, kept as digests, and what one key may ask for at a time. No torch here."""

import hashlib
import hmac
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from finback.config import UserError
from finback.serve.errors import ApiError
from finback.serve.options import LOOPBACK, ListenOptions

Listen = TypeVar("Listen", bound=ListenOptions)

SHORTEST = 16  # characters; 128 bits in hexadecimal are 32


def digests(keys: Iterable[str], file: Path | None = None) -> tuple[bytes, ...]:
    """SHA-256 of each key given and of each line of a file (# begins a comment); the keys themselves are not kept.

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
            raise UserError(
                "keys",
                f"{len(key)} characters",
                "too short to be safe",
                'Make one: python -c "import secrets; print(secrets.token_urlsafe(32))".',
            )
    return tuple(map(_digest, found))


def _digest(key: str) -> bytes:
    met = re.fullmatch("sha256:([0-9a-fA-F]{64})", key)
    return bytes.fromhex(met[1]) if met else hashlib.sha256(key.encode()).digest()


def secured(options: Listen) -> Listen:
    """The options with the digests of all keys; refuses to stand open on a network by mistake."""
    keys = (*options.keys, *digests([options.api_key] if options.api_key else [], options.key_file))
    if options.host not in LOOPBACK and not keys and not options.insecure:
        raise UserError(
            "host",
            options.host,
            "open to the network, with no API key",
            "Give --key-file or FINBACK_API_KEY, or --insecure if anybody may use it.",
        )
    return replace(options, keys=keys, api_key="", key_file=None)


def owner_of(headers: Iterable[tuple[bytes, bytes]], keys: tuple[bytes, ...]) -> bytes | None:
    """The digest of the key that a request carries, b"" where none is needed, None where it is missing or wrong."""
    if not keys:
        return b""
    given = b""
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            given = value[7:].strip()
        elif name == b"x-api-key" and not given:
            given = value.strip()
    digest, found = hashlib.sha256(given).digest(), None
    for key in keys:  # all of them, so that time tells nothing
        if hmac.compare_digest(digest, key):
            found = key
    return found


def salt(owner: bytes, user: str | None) -> bytes:
    """What keeps the cached prompts of one key, and of one end user of it, from the others'; b"" without either."""
    if not owner and not user:
        return b""
    return hashlib.sha256(owner + b"\0" + (user or "").encode()).digest()


class Quota:
    """How much each key asks for: `rate` requests a minute, `concurrent` at a time; 0 is no limit."""

    def __init__(self, rate: int, concurrent: int) -> None:
        self.rate, self.concurrent = rate, concurrent
        self._running: Counter[bytes] = Counter()
        self._bucket: dict[bytes, tuple[float, float]] = {}  # requests left, and when that was worked out

    @contextmanager
    def use(self, owner: bytes) -> Iterator[None]:
        """Count a request while it runs; ApiError 429 when it is one too many."""
        if self.concurrent and self._running[owner] >= self.concurrent:
            raise ApiError(429, f"more than {self.concurrent} requests at a time", code="concurrency_limit_exceeded")
        if self.rate:
            self._take(owner)
        self._running[owner] += 1
        try:
            yield
        finally:
            self._running[owner] -= 1

    def _take(self, owner: bytes) -> None:
        now = time.monotonic()
        left, then = self._bucket.get(owner, (float(self.rate), now))
        left = min(self.rate, left + (now - then) * self.rate / 60)
        if left < 1:
            wait = int((1 - left) * 60 / self.rate) + 1
            raise ApiError(429, f"more than {self.rate} requests a minute", retry_after=wait)
        self._bucket[owner] = (left - 1, now)
