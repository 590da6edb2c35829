"""Documents that the EU's AI Act requires from providers of general-purpose models: form, public summary, copyright policy.

The form follows the Code of Practice's Model Documentation Form (Annexes XI and XII of the Act), with the recipients of each
entry; the summary the Commission's template C(2025) 5235; the policy the Code's copyright chapter: five measures, each with
the provider's statement. Does not import torch.
"""

import math
from typing import Any

from finback.model.count import parameters
from finback.report.docs import compute, technical, templates
from finback.report.docs.blocks import Block, Paragraph, TableBlock, display, facts
from finback.report.docs.facts import MISSING, RunFacts
from finback.report.docs.questionnaire import Answers
from finback.report.model_card import architecture

SHARED = {
    "duty": (
        "Who publishes a general-purpose model in the EU in the course of a commercial activity, even for free, has duties "
        "under the AI Act; using finback alone brings none. This draft is filled from a run's records and is no legal advice."
    ),
    "all": "AI Office, authorities, downstream",
    "office": "AI Office, authorities",
}


def form(run: RunFacts, answers: Answers, date: str) -> list[Block]:
    """The Model Documentation Form."""
    c, flop, lineage = run.model, compute.of(run, answers).training, run.lineage
    metered = any(s.begun("metered") for s in lineage)
    values = SHARED | {
        "date": date,
        "digests": dict(run.files) or MISSING,
        "base": answers("base.name") if run.base else "none: it began with random weights",
        **dict(architecture(c)),
        "window": c.max_position_embeddings,
        "parameters": parameters(c),
        "active": parameters(c, active=True, mtp=False),
        "software": run.chosen.begun("software"),
        "stages": [f"{s.name} ({s.type})" for s in lineage],
        "objectives": {s.name: s.declaration.objective or s.type for s in lineage if s in run.chain},
        "provenance": _kinds(run),
        "data_sets": _counted(run),
        "hours": sum(s.spent("seconds") for s in lineage) / 3600,
        "order": f"10^{math.floor(math.log10(flop))} FLOP" if flop else MISSING,
        "compute": flop,
        "method": compute.METHOD,
        "energy": sum(s.watt_hours for s in lineage) / 1e6,
        "metering": "metered as far as the machine could be asked, estimated otherwise"
        if metered
        else "estimated, not metered",
        "hardware": run.chosen.begun("machine"),
        "verdicts": [facts(compute.verdicts(run, answers), ("test", "verdict"))],
    }
    return templates.blocks("form", values, answers)


def _counted(run: RunFacts) -> list[tuple[str, str, str]]:
    """Rows with each data set's number of documents, and the counts of cleaning."""
    rows = []
    for stage, name, record in run.sources:
        number = (record.get("documents") or {}).get("kept")
        points = MISSING if number is None else f"{_two_digits(number):,} documents (to two digits)"
        rows.append((f"{name}: number of data points", display(points), SHARED["office"]))
        cleaned = display(record.get("documents", MISSING))
        rows.append((f"{name}: what cleaning counted", cleaned, SHARED["office"]))
        if stage.kind == "data":
            read = display(run.tokens_read(stage, name))
            rows.append((f"{name}: tokens read in training", read, SHARED["office"]))
    return rows


def _two_digits(number: float) -> int:
    """1234 -> 1200."""
    return int(round(number, 1 - math.floor(math.log10(number)))) if number > 0 else 0


def _kinds(run: RunFacts) -> str:
    """Kinds of provenance in the records; other kinds must come from people."""
    made = [name for stage, name, _ in run.sources if not technical.is_read(stage, name)]
    read = [name for _, name, _ in run.sources if name not in made]
    sampled = [s.name for s in run.lineage if s.declaration.samples]
    parts = [
        ("data sets that were read", read),
        ("synthetic, written by programs", made),
        ("synthetic, sampled from models of this run", sampled),
    ]
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names) or display(MISSING)


def summary(run: RunFacts, answers: Answers, date: str) -> list[Block]:
    """The public summary of training content, which open models need too."""
    read = [source for source in run.sources if technical.is_read(*source[:2])]
    values = SHARED | {
        "date": date,
        "base": answers("base.name") if run.base else "no other model",
        "size": _bin(run.all_tokens_read),
        "read": _listed(run, read),
        "made": _listed(run, [source for source in run.sources if source not in read]),
        "generating": _generating(run),
    }
    return templates.blocks("summary", values, answers)


def _bin(tokens: Any) -> Any:
    """The template's size classes of text."""
    if tokens is MISSING:
        return MISSING
    sizes = ("less than 1 billion", "1 billion to 10 trillion", "more than 10 trillion")
    return f"{sizes[(tokens >= 1e9) + (tokens > 1e13)]} tokens ({tokens:,})"


def _listed(run: RunFacts, sources: list[Any]) -> list[Block]:
    """A table of data sets."""
    rows = []
    for stage, name, record in sources:
        terms = [display(record.get(key, MISSING)) for key in ("licence", "documents")]
        own = not technical.is_read(stage, name)
        origin = "written by finback's own programs" if own else technical.origin(record)
        tokens = display(run.tokens_read(stage, name))
        learnt = tokens if stage.kind == "data" else f"learnt from in stage {stage.name}"
        rows.append((name, *terms, learnt, origin))
    head = ("data set", "licence", "documents", "tokens read in training", "from")
    return [TableBlock(head, tuple(rows)) if rows else Paragraph("None by the run's records.")]


def _generating(run: RunFacts) -> list[tuple[str, str]]:
    """Models of the run that generated training data or were teachers."""
    found = []
    for stage in run.lineage:
        if stage.declaration.samples:
            source, tokens = stage.config.get("start", MISSING), display(stage.spent("tokens_generated"))
            found.append((display(source), f"answers in stage {stage.name}: {tokens} tokens"))
        found += [(display(teacher), f"probabilities in stage {stage.name}") for teacher in stage.teachers]
    return found or [("none", "none in the records")]


def policy(answers: Answers, date: str) -> list[Block]:
    """A skeleton of the copyright policy."""
    return templates.blocks("policy", {"date": date}, answers)
