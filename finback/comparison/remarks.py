"""Remarks that qualify a score: failed, empty, filtered, constant and misrouted answers, counted. Does not import torch."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from finback.comparison.endings import Ending, ending
from finback.comparison.judging import JudgedAnswer
from finback.suites.suite import Suite

SAME = 0.95  # a contestant whose answers agree in at least this share is flagged as always giving that answer
_FEWEST = 5  # fewest questions for that flag
_NAMED = 3  # most names that a remark lists
_LONGEST = 60  # most characters of a listed name
_SAYS: dict[Ending, str] = {
    "filtered": "withheld by the server",
    "refused": "refused",
    "tools": "called tools",
    "broken": "aborted by the server",
    "unknown": "with an unknown finish reason, judged as complete",
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
    """Remarks on one contestant's answers to one suite.

    `failed` are the problems of failed requests, `model` is the requested model.
    """
    found = [f"{len(failed)} answers failed: the score covers the rest ({_counted(failed)})"] if failed else []
    if not judged:
        return [*found, "no answers"]
    n_empty = sum(j.is_empty for j in judged)
    if n_empty >= SAME * len(judged):
        found.append("all answers empty")
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
    """Whether the model that a server names differs from the one asked for in more than owner, case or an added date."""
    name, wanted = (text.lower().rpartition("/")[2] for text in (named, asked))
    alias = _ALIAS.sub("", wanted)
    # only an alias without a date may be answered by a dated version: another date is another model
    return name not in (wanted, alias) and _VERSION.sub("", name) != alias


def _endings(judged: Sequence[JudgedAnswer]) -> list[str]:
    """Remarks on finish reasons other than a normal stop and the token limit, with the server's own words."""
    words = [j.answer.finish for j in judged]
    found = []
    for kind, remark in _SAYS.items():
        if those := [word for word in words if ending(word) == kind]:
            found.append(f"{len(those)} {remark} ({_counted(those)})")
    if n := sum(not word for word in words):
        found.append(f"{n} without a finish reason, judged as complete")
    return found


def _counted(names: Iterable[str]) -> str:
    """The most frequent names, each with its count if there are several."""
    counts = Counter(names)
    named = [
        f"{name[:_LONGEST]} x {n}" if len(counts) > 1 else name[:_LONGEST] for name, n in counts.most_common(_NAMED)
    ]
    return ", ".join(named) + (f", {len(counts) - _NAMED} more" if len(counts) > _NAMED else "")


def _always(suite: Suite, judged: Sequence[JudgedAnswer]) -> str | None:
    """A remark if nearly all answers are the same text, right or not; None if there is nothing to compare, as with programs."""
    gold = Counter(suite.problems[place].answer for place in {j.place for j in judged})
    (usual, most), asked = gold.most_common(1)[0], gold.total()
    text, times = Counter(j.shown for j in judged).most_common(1)[0]
    if asked < _FEWEST or not text or times < SAME * len(judged) or (most == asked and not usual):
        return None
    alike = (
        f", as do {most / asked:.0%} of the gold answers: the suite cannot tell models apart"
        if most >= SAME * asked
        else ""
    )
    return f"always says {text[:30]!r}{alike}"
