"""What stands between a run and its publication: what is missing, what contradicts itself, and the tests on compute.

No torch here.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finback.report.docs import compute
from finback.report.docs.blocks import Block, display, missing
from finback.report.docs.facts import MISSING, RunFacts
from finback.report.docs.questionnaire import Answers

# licences that let anybody use, change and pass on, for any purpose
PERMISSIVE = ("MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "0BSD", "Unlicense")
OPEN_WORKS = ("CC0-1.0", "CC-BY-4.0", "CC-BY-SA-4.0", "OpenMDW-1.0")
COPYLEFT = ("MPL-2.0", "GPL-2.0", "GPL-3.0", "AGPL-3.0", "LGPL-3.0")
UNSAID = ("unstated", "unknown", "")


@dataclass(frozen=True)
class Completeness:
    """The outcome; `holds` only when nothing is missing and nothing contradicts."""

    unanswered: list[str]
    unrecorded: list[str]
    contradictions: list[str]
    verdicts: list[tuple[str, str]]

    @property
    def holds(self) -> bool:
        return not (self.unanswered or self.unrecorded or self.contradictions)

    def as_text(self) -> str:
        """For people."""
        parts = [
            ("Questions without an answer", self.unanswered),
            ("Facts that no record holds", self.unrecorded),
            ("Contradictions", self.contradictions),
            ("Compute", [f"{name}: {verdict}" for name, verdict in self.verdicts]),
        ]
        lines = [
            line for title, found in parts for line in (f"{title}: {len(found) or 'none'}", *(f"  {x}" for x in found))
        ]
        return "\n".join([*lines, "Complete." if self.holds else "NOT COMPLETE."])


def check(run: RunFacts, answers: Answers, documents: Iterable[Sequence[Block]]) -> Completeness:
    """Look at the answers, at the documents made with them, and at the licences."""
    asked = answers.unanswered(bool(run.base))
    return Completeness(
        [f"{q.key}: {q.text}" for q in asked],
        list(dict.fromkeys(hole for blocks in documents for hole in missing(blocks))),
        contradictions(run, answers),
        compute.verdicts(run, answers),
    )


def contradictions(run: RunFacts, answers: Answers) -> list[str]:
    """Licences against limits of use, against money, and against the licences of what went in."""
    licence = answers("model.licence")
    found = []
    is_open = family(display(licence)) in (*PERMISSIVE, *OPEN_WORKS, *COPYLEFT)
    if is_open and answers("model.use_limits") is not MISSING:
        found.append(
            f"model.licence {licence} is open, but model.use_limits forbids uses: the exemption for open models is lost"
        )
    if is_open and answers("model.monetised") is True:
        found.append(f"model.licence {licence} is open, but access is paid for: the exemption for open models is lost")
    given = [(f"data set {name}", record.get("licence", MISSING)) for _, name, record in run.sources]
    if run.base:
        given.append(("the base model", answers("base.licence")))
    for what, theirs in given:
        if theirs is MISSING or str(theirs).lower() in UNSAID:
            found.append(f"{what} has no licence on record: it is unknown whether {display(licence)} is allowed")
        elif licence is not MISSING and (why := forbids(str(theirs), str(licence))):
            found.append(f"{what} is under {theirs}, which {why}; the model is to be under {licence}")
    return found


def family(licence: str) -> str:
    """GPL-3.0-or-later -> GPL-3.0: a licence without what follows its number."""
    return re.sub(r"-(only|or-later)$|\+$", "", licence.partition(" ")[0])


def forbids(theirs: str, ours: str) -> str:
    """Why what is under one licence may not go out under another; empty where nothing is known to forbid it.

    Whether a model is a derivative of its data is not settled: this errs on the side of asking.
    """
    name = family(theirs).upper()
    if family(theirs) == family(ours):
        return ""
    parts = set(name.split("-"))
    if "ND" in parts:
        return "forbids derivatives"
    if "NC" in parts and "NC" not in family(ours).upper().split("-"):
        return "forbids commercial use"
    if parts & {"SA", "GPL", "AGPL"}:
        return "asks for the same licence"
    if "PROPRIETARY" in name or "ALL RIGHTS" in theirs.upper():
        return "reserves all rights"
    return ""
