"""The model card as Hugging Face reads it: YAML, then what people want to know first. No torch here."""

import json
from typing import Any

from finback.checkpoint.hf_config import family_of
from finback.report import model_card as card
from finback.report.docs import compute, technical
from finback.report.docs.blocks import Block, Heading, Paragraph, display, facts, markdown, records
from finback.report.docs.facts import MISSING, RunFacts
from finback.report.docs.questionnaire import Answers


def model_card(run: RunFacts, answers: Answers) -> str:
    """Markdown with a header; the hub's fields that have no answer are left out of it and marked below it."""
    lines = [*card.front_matter(family_of(run.model)), *_header(run, answers)]
    return "\n".join(["---", *lines, "---", "", markdown(blocks(run, answers))])


def _header(run: RunFacts, answers: Answers) -> list[str]:
    """YAML of what people answered and records name; JSON's strings and lists are YAML's as well."""
    sets = [str(record["hub"]) for _, _, record in run.sources if "hub" in record]
    licence = answers("model.licence")
    pairs: list[tuple[str, Any]] = [
        ("language", answers("model.languages")),
        ("license", MISSING if licence is MISSING else str(licence).lower()),
        ("license_link", answers("model.licence_link")),
        ("datasets", sets or MISSING),
        ("base_model", answers("base.name") if run.base else MISSING),
        ("metrics", ["accuracy"] if run.exams else MISSING),
    ]
    return [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in pairs if value is not MISSING]


def blocks(run: RunFacts, answers: Answers) -> list[Block]:
    """What stands below the header."""
    exams = [(str(exam.get("task", MISSING)), exam) for _, exam in run.exams]
    keys = ("exam", "n", "accuracy", "interval")
    sources = [
        (n, {"sha256": "none: written by a program", **r} if "sha256" not in technical.source_keys(s, n) else r)
        for s, n, r in run.sources
    ]
    return [
        Heading(display(answers("model.name")), 1),
        facts(
            [
                ("provider", answers("provider.name")),
                ("contact", answers("provider.contact")),
                ("version", answers("model.version")),
                ("licence", answers("model.licence")),
                ("limits of use", answers("model.use_limits")),
                ("languages", answers("model.languages")),
            ]
        ),
        Heading("Uses"),
        facts(
            [
                ("intended", answers("use.intended")),
                ("not fit for", answers("use.excluded")),
                ("acceptable use", answers("use.policy")),
                ("integration", answers("use.integration")),
            ]
        ),
        Heading("Architecture"),
        facts(card.architecture(run.model)),
        Heading("Training data"),
        records(("licence", "sha256", "documents"), sources, "data set")
        if sources
        else Paragraph("No record of its data: NOT PROVIDED"),
        Heading("Evaluation"),
        records(keys, exams, "task") if exams else Paragraph("No evaluation of this model was made: NOT PROVIDED"),
        Paragraph("Shares of correct answers with 95 % intervals (Wilson), on held-out problems."),
        Heading("Compute and energy"),
        _resources(run, answers),
        Heading("Limits"),
        facts(
            [("known limits", answers("use.limits")), ("bias", answers("data.bias")), ("risks", answers("use.risks"))]
        ),
        Heading("Files"),
        facts(run.files or [("weights", MISSING)], ("file", "SHA-256")),
    ]


def _resources(run: RunFacts, answers: Answers) -> Block:
    return facts(
        [
            ("training compute (FLOP)", compute.of(run, answers).training),
            ("device-hours", sum(s.device_hours for s in run.lineage)),
            ("energy (Wh)", sum(s.watt_hours for s in run.lineage)),
            ("hardware", run.chosen.begun("machine")),
        ]
    )
