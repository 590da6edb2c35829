"""What the EU's AI Act asks of whoever publishes a general-purpose model: form, public summary, copyright policy.

The form follows the Code of Practice's Model Documentation Form (Annexes XI and XII of the Act), the summary the
Commission's template C(2025) 5235, the policy the Code's copyright chapter. No torch here.
"""

import math
from typing import Any

from finback.model.count import parameters
from finback.report.docs import compute, technical
from finback.report.docs.blocks import Block, BulletList, Heading, Paragraph, TableBlock, display, facts
from finback.report.docs.facts import MISSING, RunFacts
from finback.report.docs.questionnaire import Answers
from finback.report.model_card import architecture

DUTY = (
    "Who publishes a general-purpose model in the EU in the course of a commercial activity, even for free, has duties "
    "under the AI Act; using finback alone brings none. This draft is filled from a run's records and is no legal advice."
)
ALL = "AI Office, authorities, downstream"
OFFICE = "AI Office, authorities"


def form(run: RunFacts, answers: Answers, date: str) -> list[Block]:
    """The Model Documentation Form: each entry with who may see it."""
    return [
        Heading("Model documentation form", 1),
        Paragraph(DUTY),
        _entries(_general(run, answers, date)),
        Heading("Model properties"),
        _entries(_properties(run)),
        Heading("Distribution and licence"),
        _entries(_distribution(answers)),
        Heading("Use"),
        _entries(_use(run, answers)),
        Heading("Training process"),
        _entries(_process(run, answers)),
        Heading("Training data"),
        _entries(_data(run, answers)),
        Heading("Compute and energy"),
        _entries(_resources(run, answers)),
        Heading("Tests of the guidelines on compute"),
        facts(compute.verdicts(run, answers), ("test", "verdict")),
    ]


Entry = tuple[str, Any, str]


def _entries(rows: list[Entry]) -> TableBlock:
    return TableBlock(("entry", "value", "for"), tuple((name, display(value), whom) for name, value, whom in rows))


def _general(run: RunFacts, answers: Answers, date: str) -> list[Entry]:
    digests = dict(run.files) or MISSING
    return [
        ("date of this document", date, ALL),
        ("legal name of the provider", answers("provider.name"), ALL),
        ("model name", answers("model.name"), ALL),
        ("version", answers("model.version"), ALL),
        ("authenticity: SHA-256 of its files", digests, ALL),
        ("date of release", answers("model.released"), ALL),
        ("date of placing on the EU's market", answers("model.eu_date"), ALL),
        ("depends on the model", answers("base.name") if run.base else "none: it began with random weights", ALL),
    ]


def _properties(run: RunFacts) -> list[Entry]:
    c = run.model
    parts = dict(architecture(c))
    size = f"text, {c.max_position_embeddings:,} tokens together with the other"
    return [
        ("architecture", parts["family"] + "; " + parts["layers"], ALL),
        ("design specification", "Configuration and recipe in report.md of this folder", OFFICE),
        ("input: modality and largest size", size, ALL),
        ("output: modality and largest size", size, ALL),
        ("total parameters", parameters(c), ALL),
        ("parameters that a token meets", parameters(c, active=True, mtp=False), OFFICE),
    ]


def _distribution(answers: Answers) -> list[Entry]:
    return [
        ("channels and level of access", answers("model.distribution"), ALL),
        ("where", answers("model.download"), ALL),
        ("licence", answers("model.licence"), ALL),
        ("text of the licence", answers("model.licence_link"), ALL),
        ("category of the licence, further assets", answers("model.category"), ALL),
    ]


def _use(run: RunFacts, answers: Answers) -> list[Entry]:
    return [
        ("acceptable-use policy", answers("use.policy"), ALL),
        ("intended uses, systems it fits", answers("use.intended"), ALL),
        ("uses and systems it does not fit", answers("use.excluded"), ALL),
        ("technical means, hardware and software to integrate it", answers("use.integration"), ALL),
        ("software it was made with", run.chosen.begun("software"), ALL),
    ]


def _process(run: RunFacts, answers: Answers) -> list[Entry]:
    stages = [f"{s.name} ({s.type})" for s in run.lineage]
    return [
        ("stages", stages, OFFICE),
        (
            "what is optimised",
            {s.name: s.declaration.objective or s.type for s in run.lineage if s in run.chain},
            OFFICE,
        ),
        ("key decisions and their rationale", answers("training.rationale"), OFFICE),
    ]


def _data(run: RunFacts, answers: Answers) -> list[Entry]:
    rows: list[Entry] = [("modality", "text", ALL), ("provenance", _kinds(run), ALL)]
    for _, name, record in run.sources:
        number = (record.get("documents") or {}).get("kept")
        points = MISSING if number is None else f"{_two_digits(number):,} documents (to two digits)"
        rows.append((f"{name}: number of data points", points, OFFICE))
        cleaned = record.get("documents", MISSING)
        rows.append((f"{name}: what cleaning counted", cleaned, OFFICE))
    return [
        *rows,
        ("how obtained and chosen", answers("data.collection"), ALL),
        ("measures against unsuitable sources", answers("data.unsuitable"), OFFICE),
        ("measures against bias", answers("data.bias"), OFFICE),
    ]


def _two_digits(number: float) -> int:
    """1234 -> 1200."""
    return int(round(number, 1 - math.floor(math.log10(number)))) if number > 0 else 0


def _kinds(run: RunFacts) -> str:
    """Kinds of provenance that the records show; what else there is, people must say."""
    made = [name for stage, name, _ in run.sources if technical.source_keys(stage, name)[1] != "sha256"]
    read = [name for _, name, _ in run.sources if name not in made]
    sampled = [s.name for s in run.lineage if s.declaration.samples]
    parts = [
        ("data sets that were read", read),
        ("synthetic, written by programs", made),
        ("synthetic, sampled from models of this run", sampled),
    ]
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in parts if names) or display(MISSING)


def _resources(run: RunFacts, answers: Answers) -> list[Entry]:
    c = compute.of(run, answers)
    order = f"10^{math.floor(math.log10(c.training))} FLOP" if c.training else MISSING
    metered = any(s.begun("metered") for s in run.lineage)
    how = "metered as far as the machine could be asked, estimated otherwise" if metered else "estimated, not metered"
    return [
        ("training time (wall clock, hours)", sum(s.spent("seconds") for s in run.lineage) / 3600, ALL),
        ("training compute, order of magnitude", order, ALL),
        ("training compute", c.training, OFFICE),
        ("how it was counted", compute.METHOD, OFFICE),
        ("compute of other experiments (FLOP)", answers("training.experiments"), OFFICE),
        ("energy of training (MWh)", sum(s.watt_hours for s in run.lineage) / 1e6, OFFICE),
        ("how energy is known", how, OFFICE),
        ("hardware", run.chosen.begun("machine"), OFFICE),
    ]


def summary(run: RunFacts, answers: Answers, date: str) -> list[Block]:
    """The public summary of training content: owed by open models too."""
    tokens = [record.get("train_tokens", MISSING) for stage, _, record in run.sources if stage.kind == "data"]
    from_files = [(s, n, r) for s, n, r in run.sources if technical.source_keys(s, n)[1] == "sha256"]
    made = [(s, n, r) for s, n, r in run.sources if (s, n, r) not in from_files]
    return [
        Heading("Public summary of training content", 1),
        Paragraph(DUTY),
        facts([("version of this summary", answers("model.version")), ("date", date)]),
        Heading("1 General information"),
        facts(
            [
                ("provider", answers("provider.name")),
                ("contact", answers("provider.contact")),
                ("authorised representative", answers("provider.representative")),
                ("model", answers("model.name")),
                ("version", answers("model.version")),
                ("depends on", answers("base.name") if run.base else "no other model"),
                ("placed on the EU's market", answers("model.eu_date")),
                ("modalities", "text alone"),
                ("size of the text", _bin(sum(tokens) if tokens else MISSING)),
                ("latest acquisition (MM/YYYY)", answers("data.latest")),
                ("training goes on after release", answers("data.continuous")),
                ("languages", answers("model.languages")),
            ]
        ),
        Heading("2 List of data sources"),
        Heading("2.1 Public data sets, and others that were read from files", 3),
        _listed(from_files),
        Heading("2.2 Private data sets", 3),
        facts([("licensed by rightsholders, or bought", answers("data.licensed"))]),
        Heading("2.3 Crawled data", 3),
        facts([("crawlers, purpose, period, sites", answers("data.crawled"))]),
        Heading("2.4 Users' data", 3),
        facts([("from services", answers("data.user_data"))]),
        Heading("2.5 Synthetic data", 3),
        _listed(made),
        facts(_generating(run), ("model", "what it generated")),
        Heading("3 Processing"),
        facts(
            [
                ("signatory of the Code of Practice", answers("copyright.signatory")),
                ("reservations of text and data mining", answers("copyright.reservations")),
                ("removal of illegal content", answers("data.unsuitable")),
            ]
        ),
    ]


def _bin(tokens: Any) -> Any:
    """The template's size bins of text."""
    if tokens is MISSING:
        return MISSING
    name = (
        "less than 1 billion"
        if tokens < 1e9
        else "1 billion to 10 trillion"
        if tokens <= 1e13
        else "more than 10 trillion"
    )
    return f"{name} tokens ({tokens:,})"


def _listed(sources: list[Any]) -> Block:
    if not sources:
        return Paragraph("None by the run's records.")
    rows = tuple(
        (
            name,
            *(display(record.get(key, MISSING)) for key in ("licence", "documents")),
            display(record.get("train_tokens", MISSING))
            if stage.kind == "data"
            else f"learnt from in stage {stage.name}",
            display(
                record.get("package") or record.get("hub") or record.get("files") or "written by finback's own programs"
            ),
        )
        for stage, name, record in sources
    )
    return TableBlock(("data set", "licence", "documents", "tokens", "from"), rows)


def _generating(run: RunFacts) -> list[tuple[str, Any]]:
    """Which models of the run wrote what it learnt from, or were its teachers."""
    found: list[tuple[str, Any]] = []
    for stage in run.lineage:
        if stage.declaration.samples:
            source = stage.config.get("start", MISSING)
            found.append(
                (display(source), f"answers in stage {stage.name}: {display(stage.spent('tokens_generated'))} tokens")
            )
        if "teacher" in stage.config:
            found.append((display(stage.config["teacher"]), f"probabilities in stage {stage.name}"))
    return found or [("none", "nothing that the records know of")]


def policy(answers: Answers, date: str) -> list[Block]:
    """A skeleton: five measures, each with what the provider says of it."""
    return [
        Heading("Copyright policy", 1),
        Paragraph(
            "A skeleton after the copyright chapter of the Code of Practice; its sentences are the provider's to confirm."
        ),
        facts(
            [("provider", answers("provider.name")), ("who answers for it", answers("copyright.owner")), ("date", date)]
        ),
        Heading("1 A policy that is written, maintained and applied"),
        Paragraph("This document, kept up to date by the one named above."),
        Heading("2 Only content to which access is lawful"),
        facts(
            [("how the data were obtained", answers("data.collection")), ("what was crawled", answers("data.crawled"))]
        ),
        Heading("3 Reservations of rights are respected"),
        facts([("robots.txt (RFC 9309) and other machine-readable reservations", answers("copyright.reservations"))]),
        Heading("4 Less risk that the model gives back protected works"),
        facts(
            [("technical measures", answers("copyright.infringing")), ("acceptable-use policy", answers("use.policy"))]
        ),
        Heading("5 Contact and complaints"),
        facts([("contact", answers("provider.contact")), ("complaints", answers("copyright.complaints"))]),
        Heading("What must be archived"),
        BulletList(("each version of this policy", "complaints and what became of them")),
    ]
