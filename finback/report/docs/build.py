"""Builds all documents of a run in one folder, which appears when it is complete. Does not import torch."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from finback.config import UserError
from finback.report.docs import bom, completeness, croissant, eu, hub, spdx, technical
from finback.report.docs.blocks import Block, Figure, as_json, markdown, page
from finback.report.docs.completeness import Completeness
from finback.report.docs.facts import RunFacts
from finback.report.docs.questionnaire import QUESTIONS, Answers
from finback.runs.provenance import sha256

INDEX = "documents.json"  # marks a folder that finback may replace
FORMAT = "finback-documents-1"


def drafts(run: RunFacts, answers: Answers, date: str) -> dict[str, Sequence[Block]]:
    """The documents for people as blocks, by file name."""
    return {
        "report.md": technical.report(run, answers),
        "MODEL_CARD.md": hub.blocks(run, answers),
        "eu/model_documentation_form.md": eu.form(run, answers, date),
        "eu/training_content_summary.md": eu.summary(run, answers, date),
        "eu/copyright_policy.md": eu.policy(answers, date),
    }


def documents(run: RunFacts, answers: Answers, now: datetime) -> dict[str, str]:
    """Every file's text by its name."""
    date, moment = now.date().isoformat(), now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    made = drafts(run, answers, date)
    texts = {name: markdown(blocks) for name, blocks in made.items()}
    texts["MODEL_CARD.md"] = hub.model_card(run, answers)
    texts["report.html"] = page(f"Technical report: {run.chosen.name}", made["report.md"])
    texts |= {f"curves/{b.name}.svg": b.svg + "\n" for b in made["report.md"] if isinstance(b, Figure)}
    texts["bom.cdx.json"] = as_json(bom.cyclonedx(run, answers, moment))
    texts["model.spdx3.json"] = as_json(spdx.document(run, answers, moment))
    sets = croissant.documents(run, answers, date)
    return texts | {f"croissant/{name}": as_json(value) for name, value in sets.items()}


def examine(run: RunFacts, answers: Answers, now: datetime) -> Completeness:
    """What the documents lack. Gaps that an answer would fill are reported only by their question."""
    date = now.date().isoformat()
    stand_in = {"text": "-", "list": ["-"], "yes or no": True, "number": 1.0}
    filled = Answers({q.key: stand_in[q.kind] for q in QUESTIONS} | answers.given)
    found = completeness.check(run, answers, drafts(run, filled, date).values())
    return dataclasses.replace(found, contradictions=completeness.contradictions(run, answers))


def write(run: RunFacts, answers: Answers, out: Path, now: datetime) -> list[Path]:
    """Writes all documents; a folder of older documents is replaced as a whole, any other folder is refused."""
    if out.exists() and not _is_ours(out):
        raise UserError("--out", str(out), "exists and has other contents", "Give a folder that does not exist.")
    texts = documents(run, answers, now)
    part, old = out.with_name(f"{out.name}.part"), out.with_name(f"{out.name}.old")
    shutil.rmtree(part, ignore_errors=True)
    try:
        _fill(part, texts, run, now)
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return [out / name for name in sorted([*texts, INDEX])]


def _fill(folder: Path, texts: dict[str, str], run: RunFacts, now: datetime) -> None:
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    index = {
        "format": FORMAT,
        "recipe": str(run.recipe),
        "model": run.chosen.name,
        "made": now.isoformat(timespec="seconds"),
        "files": {name: sha256(folder / name) for name in sorted(texts)},
    }
    (folder / INDEX).write_text(as_json(index), encoding="utf-8")


def outcome(files: Sequence[Path], examined: Completeness) -> str:
    """A sentence on what was written and what is missing."""
    lacks = len(examined.unanswered) + len(examined.unrecorded) + len(examined.contradictions)
    end = "Complete." if examined.holds else f"{lacks} things are missing or contradict each other; --check lists them."
    notes = [f"contradiction: {text}" for text in examined.contradictions]
    return "\n".join([*map(str, files), *notes, end])


def _is_ours(folder: Path) -> bool:
    try:
        return bool(json.loads((folder / INDEX).read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False
