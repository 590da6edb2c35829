"""The model card for Hugging Face: YAML, then the most important facts. Does not import torch."""

import json
from typing import Any

from finback.checkpoint.hf_export_as import family_of
from finback.report import model_card as card
from finback.report.docs import compute, registries, technical, templates
from finback.report.docs.blocks import Block, Paragraph, facts, markdown, records
from finback.report.docs.facts import MISSING, RunFacts
from finback.report.docs.questionnaire import Answers
from finback.report.docs.registries import hub_licence


def model_card(run: RunFacts, answers: Answers) -> str:
    """Markdown with a header; hub fields without an answer are omitted there and marked below."""
    lines = [*card.front_matter(family_of(run.model)), *_header(run, answers)]
    return "\n".join(["---", *lines, "---", "", markdown(blocks(run, answers))])


def _header(run: RunFacts, answers: Answers) -> list[str]:
    """YAML from people's answers and records; strings and lists are written as JSON, which is valid YAML."""
    sets = [str(record["hub"]) for _, _, record in run.sources if "hub" in record and technical.link(record)]
    licence = answers("model.licence")
    word = MISSING if licence is MISSING else hub_licence(registries.licence(str(licence)) or str(licence))
    pairs: list[tuple[str, Any]] = [
        ("language", answers("model.languages")),
        ("license", word),
        ("license_name", licence if word == "other" else MISSING),
        ("license_link", answers("model.licence_link")),
        ("datasets", sets or MISSING),
        ("base_model", answers("base.name") if run.base else MISSING),
        ("metrics", ["accuracy"] if run.exams else MISSING),
    ]
    return [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in pairs if value is not MISSING]


def blocks(run: RunFacts, answers: Answers) -> list[Block]:
    """The part below the header."""
    exams = [(str(exam.get("task", MISSING)), exam) for _, exam in run.exams]
    sources = [
        (n, r if technical.is_read(s, n) else {"sha256": "none: written by a program", **r}) for s, n, r in run.sources
    ]
    data = records(("licence", "sha256", "documents"), sources, "data set")
    evaluation = records(("exam", "n", "accuracy", "interval"), exams, "task")
    values = {
        "architecture": [facts(card.architecture(run.model))],
        "data": [data if sources else Paragraph("No record of its data: NOT PROVIDED")],
        "evaluation": [evaluation if exams else Paragraph("No evaluation of this model was made: NOT PROVIDED")],
        "compute": compute.of(run, answers).training,
        "hours": sum(s.device_hours for s in run.lineage),
        "energy": sum(s.watt_hours for s in run.lineage),
        "hardware": run.chosen.begun("machine"),
        "files": [technical.files(run)],
    }
    return templates.blocks("model_card", values, answers)
