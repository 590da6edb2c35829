"""Decides whether two mathematical answers are equal. A separate program, started and ended by `finback.tasks.math_process`.

math-verify parses with sympy. A model's text is therefore parsed in a process that can be killed, has little memory, and
may not write files, start programs or open connections. It does not import finback. A line of stdin is
{"gold": ..., "answer": ...}, a line of stdout {"same": ..., "read": ...}.
"""

import json
import logging
import math
import os
import queue
import re
import resource
import sys
import threading
from functools import lru_cache
from typing import Any, TextIO

_READS = ("os.listdir", "os.scandir", "os.walk", "os.fwalk", "os.putenv")  # needed by imports
_REFUSED = ("os.", "subprocess.", "socket.", "shutil.", "ctypes.", "pty.", "signal.", "tempfile.", "urllib.")
_NUMBER = re.compile(r"([+-]?\d{1,400})|([+-]?\d{0,100}\.\d{1,100})|\\frac\{([+-]?\d{1,400})\}\{(\d{1,400})\}")
_DIGITS = 320  # digits for comparing irrational numbers
_EXACT = 1e-300  # relative difference below which numbers are equal
_CLOSE = 1e-6  # relative; for decimal answers, such as 1.414214 for the root of 2


def main() -> None:
    """Reads one JSON request per line from stdin and writes one reply per line to stdout."""
    seconds, megabytes = int(sys.argv[1]), int(sys.argv[2])
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of a library must not look like a reply
    requests: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(requests,), daemon=True).start()
    logging.disable(logging.CRITICAL)
    for text in ("1", r"\frac{x}{2}", r"\{1, 2.5\}", "(1,2]", "x=3"):  # triggers lazy imports
        compare(text, text + " ")
    confine(megabytes)
    _reply(replies, {"ready": True})
    while True:
        request = json.loads(requests.get())
        _allow(seconds)
        _reply(replies, compare(request["gold"], request["answer"]))


def compare(gold: str, answer: str) -> dict[str, bool]:
    """`read`: whether the answer is mathematics at all."""
    try:
        given = _parse(answer)
        wanted = _gold(gold)
        same = given is not None and wanted is not None and _is_same(wanted, given)
    except Exception:  # sympy may raise anything, even RecursionError and MemoryError
        return {"same": False, "read": False}
    return {"same": same, "read": given is not None}


@lru_cache(maxsize=10_000)
def _gold(text: str) -> Any:
    return _parse(text)


def _parse(text: str) -> Any:
    """The single expression that a text consists of, or None."""
    from math_verify import LatexExtractionConfig, parse
    from sympy import Float, Integer, Rational

    if plain := _NUMBER.fullmatch(text.strip()):  # skips the parser, which is a hundred times slower
        whole, decimal, top, bottom = plain.groups()
        if bottom:
            return Rational(int(top), int(bottom)) if int(bottom) else None
        return Float(decimal) if decimal else Integer(whole)
    found = parse(
        "\\boxed{" + text + "}",
        [LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,  # type: ignore[arg-type]
    )
    return found[0] if len(found) == 1 else None


def _is_same(gold: Any, answer: Any) -> bool:
    """Whether two expressions are equal: numbers and containers of numbers exactly, everything else by math-verify."""
    from math_verify import verify
    from sympy import Eq, Expr, FiniteSet, Interval, MatrixBase, Symbol, Tuple
    from sympy.core.function import AppliedUndef

    if isinstance(answer, Eq) and isinstance(answer.lhs, (Symbol, AppliedUndef)) and _is_number(gold):
        answer = answer.rhs
    if isinstance(gold, Eq) and isinstance(gold.lhs, (Symbol, AppliedUndef)) and _is_number(answer):
        gold = gold.rhs
    if isinstance(gold, Eq) and isinstance(gold.lhs, Symbol) and isinstance(answer, Expr) and not gold.rhs.is_number:
        # the gold answer is y = 2x + 1, the answer 2x + 1
        return gold.lhs not in gold.rhs.free_symbols | answer.free_symbols and _is_same(gold.rhs, answer)
    if _is_number(gold) and _is_number(answer):
        return _is_number_same(gold, answer)
    if not _is_comparable(gold, answer):
        return False
    if isinstance(gold, FiniteSet) and isinstance(answer, FiniteSet):
        return _is_set_same(list(gold.args), list(answer.args))
    if isinstance(gold, Interval) and isinstance(answer, Interval):
        is_open = (gold.left_open, gold.right_open) == (answer.left_open, answer.right_open)
        return is_open and _is_same(gold.start, answer.start) and _is_same(gold.end, answer.end)
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase):
        return gold.shape == answer.shape and all(map(_is_same, gold, answer))
    if isinstance(gold, Tuple) and isinstance(answer, Tuple):
        return len(gold) == len(answer) and all(map(_is_same, gold, answer))
    return _is_numerically_same(gold, answer) and bool(verify(gold, answer, timeout_seconds=None))


def _is_number(value: Any) -> bool:
    return bool(getattr(value, "is_number", False))


def _is_number_same(gold: Any, answer: Any) -> bool:
    """Exact, or to 300 digits if roots are involved; to six digits if the answer is a decimal."""
    from sympy import Float, Rational, nan, nsimplify, zoo

    gold, answer = gold.doit(), answer.doit()
    if isinstance(gold, Rational) and isinstance(answer, Rational):
        return bool(gold == answer)
    if not (gold.is_finite and answer.is_finite):
        return bool(gold == answer and gold not in (nan, zoo))
    is_decimal = bool(answer.atoms(Float))
    one, two = (_parts(nsimplify(value, rational=True) if value.atoms(Float) else value) for value in (gold, answer))
    size = max(abs(part) for part in (*one, *two))
    return all(abs(a - b) <= size * (_CLOSE if is_decimal else _EXACT) for a, b in zip(one, two, strict=True))


def _parts(value: Any) -> Any:
    """Real and imaginary part to _DIGITS digits."""
    return value.evalf(_DIGITS, maxn=20 * _DIGITS).as_real_imag()


def _is_set_same(gold: list[Any], answer: list[Any]) -> bool:
    """Whether the elements of two sets match one to one, in any order."""
    if len(gold) != len(answer):
        return False
    rest = list(answer)
    for element in gold:
        found = next((i for i, other in enumerate(rest) if _is_same(element, other)), None)
        if found is None:
            return False
        del rest[found]
    return True


def _is_numerically_same(gold: Any, answer: Any) -> bool:
    """Whether two expressions agree at a point, relative to their size; math-verify rounds 10^{-20} x to 0."""
    from sympy import Expr, Rational

    if not (isinstance(gold, Expr) and isinstance(answer, Expr)):
        return True
    symbols = sorted(gold.free_symbols | answer.free_symbols, key=str)
    point = {symbol: Rational(37 + 11 * i, 29) for i, symbol in enumerate(symbols)}
    one, two = gold.subs(point), answer.subs(point)
    return not (_is_number(one) and _is_number(two)) or _is_number_same(one, two)


def _is_comparable(gold: Any, answer: Any) -> bool:
    """Rejects pairs that math-verify accepts wrongly: 2 = 3 for 3, or the pair (1, 2) for the set {1, 2}."""
    from sympy import And, Eq, FiniteSet, Or, Set, Symbol, Tuple
    from sympy.core.function import AppliedUndef
    from sympy.core.relational import Relational

    relations, sets = (Relational, And, Or), (Set, Tuple)
    if isinstance(answer, relations) and not isinstance(gold, (*relations, *sets)):
        return isinstance(answer, Eq) and isinstance(answer.lhs, (Symbol, AppliedUndef))
    if isinstance(gold, sets) and isinstance(answer, sets):
        return isinstance(gold, FiniteSet) == isinstance(answer, FiniteSet)
    return True


def _listen(requests: "queue.SimpleQueue[str]") -> None:
    """Ends the process when its parent ends, however that happens: stdin is then closed."""
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)


def confine(megabytes: int) -> None:
    """Limits memory, forbids files, and refuses what only an attack would do."""
    for kind, limit in ((resource.RLIMIT_AS, megabytes << 20), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_CORE, 0)):
        resource.setrlimit(kind, (limit, limit))
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: ends the process at an operation that no comparison needs."""
    writes = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or (event.startswith(_REFUSED) and event not in _READS):
        os._exit(3)


def _allow(seconds: int) -> None:
    """Sets the CPU time for the next comparison; this also ends a worker that outlives its parent."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime) + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _reply(replies: TextIO, value: dict[str, bool]) -> None:
    replies.write(json.dumps(value) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
