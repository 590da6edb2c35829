"""A model's bill of materials: CycloneDX 1.7 with a model card (ML-BOM). Does not import torch."""

import json
import uuid
from typing import Any

from finback.model.count import parameters
from finback.report.docs import registries, technical, templates
from finback.report.docs.blocks import display
from finback.report.docs.facts import MISSING, NOT_PROVIDED, RunFacts, StageFacts
from finback.report.docs.questionnaire import Answers
from finback.report.model_card import architecture

LEARNING = {"reinforcement learning": "reinforcement-learning", "fine-tuning": "supervised"}
ACTIVITIES = {"data": "data-preparation", "pre-training": "training", "evaluation": "validation"}
SPACE = uuid.UUID(
    "2b1f4f5e-5a0e-4f7e-9a55-0f6d9a5c3c11"
)  # namespace of serial numbers, which follow from a model's digests


def cyclonedx(run: RunFacts, answers: Answers, moment: str) -> dict[str, Any]:
    """The document as JSON values; `moment` is its time, ISO 8601."""
    data = [_data(run, stage, name, record) for stage, name, record in run.sources]
    software = run.chosen.begun("software")
    components = data + [_library(name, version) for name, version in (software or {}).items()]
    values = {
        "serial": "",
        "moment": "",
        "licences": _licences(answers("model.licence")),
        "files": [{"type": "file", "name": file, "hashes": _hashes(digest)} for file, digest in run.files],
        "approach": LEARNING.get(run.chosen.kind, "self-supervised"),
        **dict(architecture(run.model)),
        "data_sets": [{"ref": component["bom-ref"]} for component in data],
        "metrics": [_metric(exam) for _, exam in run.exams],
        "energy": [_energy(s) for s in run.lineage if s.watt_hours is not MISSING],
        "recipe": display(run.recipe),
        "seed": display(run.seed),
        "stage": run.chosen.name,
        "commit": display(run.chosen.begun("commit")),
        "parameters": parameters(run.model),
        "components": components,
        "dependencies": [component["bom-ref"] for component in components],
    }
    made = templates.json_values("bom", values, answers)
    # the number changes when anything but the time changes
    serial = uuid.uuid5(SPACE, json.dumps(made, sort_keys=True))
    return made | {"serialNumber": f"urn:uuid:{serial}", "metadata": made["metadata"] | {"timestamp": moment}}


def _licences(licence: Any) -> list[dict[str, Any]]:
    """A licence by its identifier, as an expression, or as free text."""
    known = registries.licence(str(licence)) if licence is not MISSING else ""
    if " " in known:
        return [{"expression": known}]
    if known and not known.startswith(("LicenseRef-", "DocumentRef-")):
        return [{"license": {"id": known}}]
    return [{"license": {"name": display(licence)}}]  # readers must interpret it


def _hashes(digest: str) -> list[dict[str, str]]:
    return [{"alg": "SHA-256", "content": digest}]


def _metric(exam: dict[str, Any]) -> dict[str, Any]:
    metric: dict[str, Any] = {
        "type": "accuracy",
        "value": display(exam.get("accuracy", MISSING)),
        "slice": f"{display(exam.get('task', MISSING))}, exam {display(exam.get('exam', MISSING))}, n = {display(exam.get('n', MISSING))}",
    }
    interval = exam.get("interval")
    if isinstance(interval, list) and len(interval) == 2:
        low, high = map(display, interval)
        metric["confidenceInterval"] = {"lowerBound": low, "upperBound": high}
    return metric


def _energy(stage: StageFacts) -> dict[str, Any]:
    """One stage's energy. The schema requires an energy provider, but none was given."""
    kwh = {"value": stage.watt_hours / 1000, "unit": "kWh"}
    return {
        "activity": ACTIVITIES.get(stage.kind, "fine-tuning"),
        "activityEnergyCost": kwh,
        "energyProviders": [{"organization": {"name": NOT_PROVIDED}, "energySource": "unknown", "energyProvided": kwh}],
        "properties": [
            {"name": "finback:stage", "value": stage.name},
            {"name": "finback:metered", "value": display(stage.begun("metered"))},
        ],
    }


def _data(run: RunFacts, stage: StageFacts, name: str, record: dict[str, Any]) -> dict[str, Any]:
    """A data set that was read or written, with its digest if known."""
    digest = record.get("sha256")
    known = record | {"tokens_read": run.tokens_read(stage, name)}
    facts = [(k, known.get(k, MISSING)) for k in technical.source_keys(stage, name) if k != "licence"]
    component: dict[str, Any] = {
        "type": "data",
        "bom-ref": f"data:{stage.name}/{name}",
        "name": name,
        "licenses": _licences(record.get("licence", MISSING)),
        "data": [
            {
                "type": "dataset",
                "name": name,
                "contents": {"properties": [{"name": f"finback:{k}", "value": display(v)} for k, v in facts]},
            }
        ],
    }
    found = {"externalReferences": [{"type": "distribution", "url": url}]} if (url := technical.link(record)) else {}
    return component | ({"hashes": _hashes(digest)} if digest else {}) | found


def _library(name: str, version: str) -> dict[str, Any]:
    component = {"type": "library", "bom-ref": f"software:{name}", "name": name, "version": version}
    return component | ({} if name == "python" else {"purl": f"pkg:pypi/{name}@{version.replace('+', '%2B')}"})
