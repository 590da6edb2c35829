"""What a reader must know of the answers before believing a score: each kind of flaw counted and named. Does not import torch."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from finback.comparison.endings import Ending, ending
from finback.comparison.judging import JudgedAnswer
from finback.suites.suite import Suite

SAME = 0.95  # share of alike answers from which on a contestant "always" gives them
_FEWEST = 5  # questions from which on it is flagged
_NAMED = 3  # names that a remark lists
_LONGEST = 60  # characters of one of them
_SAYS: dict[Ending, str] = {
    "filtered": "taken away by the server",
    "refused": "refused",
    "tools": "called tools",
    "broken": "broken off",
    "unknown": "ended in a way that is not known here, and judged as whole",
}
_VERSION = re.compile(r"[-@:](?:20\d{2}-?\d{2}-?\d{2}|\d{4})$")
_ALIAS = re.compile(r"[-:@](?:latest|free)$")


def of(
    suite: Suite,
    judged: Sequence[JudgedAnswer],
    failed: Sequence[str],
    interval: tuple[float, float] | None,
    model: str,
) -> list[str]:
    """Remarks on one contestant's answers to one suite, that which makes a score worthless included."""
    found = [f"{len(failed)} answers failed: the score is of the rest ({_counted(failed)})"] if failed else []
    if not judged:
        return [*found, "no answers"]
    n_empty = sum(j.is_empty for j in judged)
    if n_empty >= SAME * len(judged):
        found.append("answers nothing")
    elif n_empty:
        found.append(f"{n_empty} empty")
    if n := sum(j.is_reasoning_only for j in judged):
        found.append(f"{n} reasoning only, without an answer")
    found += _endings(judged)
    if tokens := [j.answer.stop_token for j in judged if j.answer.stop_token]:
        found.append(f"{len(tokens)} with a stop token in the text, judged up to it ({_counted(tokens)})")
    names = [j.answer.model for j in judged if model and j.answer.model not in ("", model)]
    if others := [name for name in names if is_another(name, model)]:
        found.append(f"{len(others)} answered by another model than {model} ({_counted(others)})")
    if versions := [name for name in names if not is_another(name, model)]:
        found.append(f"answered by {_counted(versions)}")
    same = _always(suite, judged)
    if same is not None:
        found.append(same)
    if suite.chance is not None and interval is not None and interval[0] <= suite.chance:
        found.append(f"not above chance ({suite.chance:.0%})")
    return found


def is_another(named: str, asked: str) -> bool:
    """Whether the model that a server names is none that the name asked for may stand for: owner, case and a date may differ."""
    name, wanted = (text.lower().rpartition("/")[2] for text in (named, asked))
    alias = _ALIAS.sub("", wanted)
    # of two dates one is another model
    return name not in (wanted, alias) and _VERSION.sub("", name) != alias


def _endings(judged: Sequence[JudgedAnswer]) -> list[str]:
    """Ends that are neither an end of the answer nor that of its tokens, by the server's words for them."""
    words = [j.answer.finish for j in judged]
    found = []
    for kind, remark in _SAYS.items():
        if those := [word for word in words if ending(word) == kind]:
            found.append(f"{len(those)} {remark} ({_counted(those)})")
    if n := sum(not word for word in words):
        found.append(f"{n} without a finish reason, judged as whole")
    return found


def _counted(names: Iterable[str]) -> str:
    """The most frequent of some names, and how often each occurs if they are several."""
    counts = Counter(names)
    named = [
        f"{name[:_LONGEST]} x {n}" if len(counts) > 1 else name[:_LONGEST] for name, n in counts.most_common(_NAMED)
    ]
    return ", ".join(named) + (f", {len(counts) - _NAMED} more" if len(counts) > _NAMED else "")


def _always(suite: Suite, judged: Sequence[JudgedAnswer]) -> str | None:
    """The one answer that nearly all questions get, right or not; programs have no final answers to compare."""
    gold = Counter(suite.problems[place].answer for place in {j.place for j in judged})
    (usual, most), asked = gold.most_common(1)[0], gold.total()
    text, times = Counter(j.shown for j in judged).most_common(1)[0]
    if asked < _FEWEST or not text or times < SAME * len(judged) or (most == asked and not usual):
        return None
    alike = (
        f", as {most / asked:.0%} of the gold answers do: such questions show nothing" if most >= SAME * asked else ""
    )
    return f"always says {text[:30]!r}{alike}"
