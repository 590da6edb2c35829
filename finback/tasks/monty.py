"""Runs functions with pydantic-monty, an interpreter of a subset of Python without system calls. Does not import torch.

It takes a hundredth of the time of a process, but supports few kinds of classes and few modules, so a correct answer
may fail.
"""

import atexit
import time
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from finback.tasks.child_process import read_json

if TYPE_CHECKING:
    from finback.tasks.sandbox import Limits

_CALLS = "import json\n[json.dumps({entry}(*values), allow_nan=False) for values in _arguments]"
_REASONS: dict[type[BaseException], str] = {TimeoutError: "timeout", MemoryError: "memory"}


def call(source: str, entry: str, arguments: list[list[Any]], limits: "Limits") -> dict[str, Any]:
    """The fields of an Outcome. The wall limit applies to the module's code, and to each call."""
    import pydantic_monty as monty

    output, texts, compiled = monty.CollectStreams(max_bytes=limits.output), list[Any](), False
    reason, error, start = "ok", "", time.monotonic()
    allowed: monty.ResourceLimits = {"max_feed_duration_secs": limits.wall, "max_memory": limits.memory}
    try:
        with _pool().checkout(limits=allowed, os_policy={"sleep": "zero"}) as session:
            session.feed_run(source, print_callback=output)
            compiled = True
            calls, inputs = _CALLS.format(entry=entry), {"_arguments": arguments}
            texts = session.feed_run(calls, inputs=inputs, print_callback=output)
    except monty.MontyError as raised:
        error = str(raised)
        compiled = compiled or not isinstance(raised, (monty.MontySyntaxError, monty.MontyCrashedError))
        reason = _REASONS.get(type(raised.exception()), "error")
        if isinstance(raised, monty.MontyCrashedError):
            reason = "timeout" if raised.timed_out else "killed"
    return {
        "stdout": "".join(text for stream, text in output.output if stream == "stdout"),
        "stderr": "".join(text for stream, text in output.output if stream == "stderr") + error,
        "exit_code": int(reason != "ok"),
        "reason": reason,
        "compiled": compiled,
        "values": _values(texts),
        "seconds": time.monotonic() - start,
    }


def _values(texts: Any) -> tuple[Any, ...]:
    """Results leave the interpreter as text only, and are parsed as JSON here."""
    is_list = type(texts) is list and all(type(text) is str for text in texts)
    return tuple(read_json(text) for text in texts) if is_list else ()


@lru_cache
def _pool() -> Any:
    import pydantic_monty as monty

    pool = monty.Monty()
    pool.__enter__()
    atexit.register(pool.__exit__, None, None, None)
    return pool
