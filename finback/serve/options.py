"""The server's knobs and limits, in one place. No torch here."""

from dataclasses import dataclass
from pathlib import Path

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Options:
    """What a server allows, and to whom. Sizes are bytes, times are seconds."""

    name: str = "finback"  # what /v1/models calls the model
    aliases: tuple[str, ...] = ()  # other names that requests may use for it
    host: str = "127.0.0.1"
    port: int = 8000
    keys: tuple[bytes, ...] = ()  # SHA-256 of each API key (auth.digests); none: open to whoever reaches it
    hosts: tuple[str, ...] = ()  # names in the Host header beside localhost and `host`; "*" allows any
    origins: tuple[str, ...] = ()  # other sites whose pages may ask, such as https://chat.example.org
    reasoning_field: str = "both"  # deepseek: reasoning_content; openrouter: reasoning; inline: in content; none
    body: int = 4 << 20  # longest request
    headers: int = 16 << 10  # all header names and values together
    queue: int = 64  # choices that may wait beside those that run
    choices: int = 64  # prompts x n of one request
    rate: int = 0  # requests per key and minute; 0: any number
    concurrent: int = 0  # requests per key at a time; 0: any number
    keep_alive: float = 15.0  # silence in a stream after which a comment is sent
    held: float = 20.0  # how long a resumable answer waits for its reader to come back
    held_bytes: int = 8 << 20  # most that is kept of it
    stalled: float = 30.0  # work without a step for this long: not ready
    drain: float = 30.0  # after SIGTERM, time for running requests to end
    page: bool = False  # the web page at /, and its files, which need no key; everything that it asks does
    runs: Path = Path("runs")  # where the run folders are that the page shows; it need not be there
