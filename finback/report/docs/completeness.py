"""What prevents publication of a run: missing facts, contradictions, and legal thresholds of compute.

Does not import torch.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from finback.report.docs import compute
from finback.report.docs.blocks import Block, display, missing
from finback.report.docs.facts import MISSING, RunFacts
from finback.report.docs.public import names_a_path
from finback.report.docs.questionnaire import Answers
from finback.report.docs.registries import day, is_open, month, parts_of

UNSAID = ("unstated", "unknown", "")
NONE = ("none", "no", "no limits", "n/a", "-", "nothing")  # ways to write "no limits"


@dataclass(frozen=True)
class Completeness:
    """The result; `holds` only if nothing is missing or contradictory."""

    unanswered: list[str]
    unrecorded: list[str]
    contradictions: list[str]
    verdicts: list[tuple[str, str]]

    @property
    def holds(self) -> bool:
        """Whether nothing is missing or contradictory."""
        return not (self.unanswered or self.unrecorded or self.contradictions)

    def as_text(self) -> str:
        """The result as text."""
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
    """Examines the answers, the documents made with them, and the licences."""
    asked = answers.unanswered(bool(run.base))
    return Completeness(
        [f"{q.key}: {q.text}" for q in asked],
        [*run.faults, *dict.fromkeys(hole for blocks in documents for hole in missing(blocks))],
        contradictions(run, answers),
        compute.verdicts(run, answers),
    )


def contradictions(run: RunFacts, answers: Answers) -> list[str]:
    """Contradictions between licence and limits of use, payment, and the licences of inputs."""
    licence = answers("model.licence")
    found = []
    limits = answers("model.use_limits")
    if licence is not MISSING and is_open(str(licence)):
        lost = f"model.licence {licence} is open, but {{}}: the exemption for open models is lost"
        if limits is not MISSING and str(limits).strip(" .").lower() not in NONE:
            found.append(lost.format("model.use_limits forbids uses"))
        if answers("model.monetised") is True:
            found.append(lost.format("access is paid for"))
    for key, answer in answers.given.items():
        if any(
            names_a_path(text) for text in (answer if isinstance(answer, list) else [answer]) if isinstance(text, str)
        ):
            found.append(f"{key} names a local file, which nobody else can read")
    found += _order(answers)
    given = [(f"data set {name}", record.get("licence", MISSING)) for _, name, record in run.sources]
    if run.base:
        given.append(("the base model", answers("base.licence")))
    for what, theirs in given:
        if theirs is MISSING or str(theirs).lower() in UNSAID:
            found.append(f"{what} has no licence on record: it is unknown whether {display(licence)} is allowed")
        elif licence is not MISSING and (why := forbids(str(theirs), str(licence))):
            found.append(f"{what} is under {theirs}, which {why}; the model is to be under {licence}")
    return found


def _order(answers: Answers) -> list[str]:
    """Reports data newer than the model."""
    released, latest = answers("model.released"), answers("data.latest")
    if MISSING in (released, latest) or not (released := day(str(released))) or not (latest := month(str(latest))):
        return []
    newer = (latest[3:], latest[:2]) > (released[:4], released[5:7])
    return [f"data.latest {latest} is after model.released {released}"] if newer else []


def family(licence: str) -> str:
    """gplv3 or later -> GPL-3.0: a licence without the suffix after its number."""
    (name, *_), *_ = parts_of(licence)
    return re.sub(r"-(only|or-later)$|\+$", "", name.partition(" ")[0])


def forbids(theirs: str, ours: str) -> str:
    """Why works under one licence may not be published under another; "" if nothing is known to forbid it.

    Whether a model is a derivative of its data is not settled; this is deliberately cautious.
    """
    whys = [next(filter(None, (_forbids(part, ours) for part in each)), "") for each in parts_of(theirs)]
    return "" if "" in whys else whys[0]


def _forbids(theirs: str, ours: str) -> str:
    """The same for a single licence; if ours offers a choice, each alternative must be allowed."""
    if len(parts_of(ours)) > 1 or len(parts_of(ours)[0]) > 1:
        return next((why for each in parts_of(ours) for part in each if (why := _forbids(theirs, part))), "")
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
