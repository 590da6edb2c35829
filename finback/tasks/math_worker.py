"""Whether two mathematical answers are equal: a program of its own, which `finback.tasks.math_process` starts and ends.

math-verify parses with sympy, so what a model wrote is read here, in a process that can be killed, has little memory
and may neither write a file, nor start a program, nor open a connection. It knows nothing of finback. A line of stdin
is {"gold": ..., "answer": ...}, a line of stdout {"same": ..., "read": ...}.
"""

import json
import logging
import math
import os
import queue
import resource
import sys
import threading
from functools import lru_cache
from typing import Any, TextIO

_READS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv")  # what an import may ask for
_REFUSED = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "signal.", "tempfile.", "urllib.")
_CLOSE = 1e-6  # relative; for an answer in decimals, such as 1.414214 for the root of 2


def main() -> None:
    seconds, megabytes = int(sys.argv[1]), int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not look like a reply
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    logging.disable(logging.CRITICAL)
    for text in ("1", r"\frac{x}{2}", r"\{1, 2.5\}", "(1,2]", "x=3"):  # loads what is loaded late
        compare(text, text + " ")
    confine(megabytes)
    _reply(replies, {"ready": True})
    while True:
        request = json.loads(requests.get())
        _allow(seconds)
        _reply(replies, compare(request["gold"], request["answer"]))


def compare(gold: str, answer: str) -> dict[str, bool]:
    """`read` says whether the answer is mathematics at all."""
    try:
        given = _parse(answer)
        wanted = _gold(gold)
        same = given is not None and wanted is not None and _is_same(wanted, given)
    except Exception:  # sympy raises anything, RecursionError and MemoryError included
        return {"same": False, "read": False}
    return {"same": same, "read": given is not None}


@lru_cache(maxsize=10_000)
def _gold(text: str) -> Any:
    return _parse(text)


def _parse(text: str) -> Any:
    """The one expression that a text consists of, or None."""
    from math_verify import LatexExtractionConfig, parse

    found = parse(
        "\\boxed{" + text + "}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # type: ignore[arg-type]
    )
    return found[0] if len(found) == 1 else None


def _is_same(gold: Any, answer: Any) -> bool:
    from math_verify import verify

    return _is_comparable(gold, answer) and verify(gold, answer, timeout_seconds=None)


def _is_comparable(gold: Any, answer: Any) -> bool:
    """Without what math-verify lets pass: 2 = 3 for 3, the pair (1, 2) for the set {1, 2}, 2e-7 for 1e-7."""
    from sympy import And, Eq, FiniteSet, Float, Or, Set, Symbol, Tuple
    from sympy.core.function import AppliedUndef
    from sympy.core.relational import Relational

    relations, sets = (Relational, And, Or), (Set, Tuple)
    if isinstance(answer, relations) and not isinstance(gold, (*relations, *sets)):
        return isinstance(answer, Eq) and isinstance(answer.lhs, (Symbol, AppliedUndef))
    if isinstance(gold, sets) and isinstance(answer, sets):
        return isinstance(gold, FiniteSet) == isinstance(answer, FiniteSet)
    numbers = getattr(gold, "is_number", False) and getattr(answer, "is_number", False)
    if numbers and answer.atoms(Float):
        return math.isclose(complex(gold).real, complex(answer).real, rel_tol=_CLOSE)
    return True


def _listen(requests: "queue.SimpleQueue[str]") -> None:
    """Ends the process with its parent, however that ended: then stdin is closed."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def confine(megabytes: int) -> None:
    for kind, limit in ((resource.RLIMIT_AS, megabytes << 20), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (limit, limit))
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """The end of a process that does what no comparison needs."""
    writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or (event.startswith(_REFUSED) and event not in _READS):
        os._exit(3)


def _allow(seconds: int) -> None:
    """So much computing time for the next comparison, which also ends one that outlives the parent."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _reply(replies: TextIO, value: dict[str, bool]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
