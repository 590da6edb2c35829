"""The bill of materials of a model: CycloneDX 1.7 with a model card (ML-BOM). No torch here."""

import uuid
from typing import Any

from finback.model.count import parameters
from finback.report.docs import technical
from finback.report.docs.blocks import display
from finback.report.docs.facts import MISSING, NOT_PROVIDED, RunFacts, StageFacts
from finback.report.docs.questionnaire import Answers
from finback.report.model_card import architecture

LEARNING = {"reinforcement learning": "reinforcement-learning", "fine-tuning": "supervised"}
ACTIVITIES = {"data": "data-preparation", "pre-training": "training", "evaluation": "validation"}
SPACE = uuid.UUID("2b1f4f5e-5a0e-4f7e-9a55-0f6d9a5c3c11")  # of serial numbers that follow from a model's digests
Properties = list[dict[str, str]]


def cyclonedx(run: RunFacts, answers: Answers, moment: str) -> dict[str, Any]:
    """The document as JSON values; `moment` is its time, ISO 8601."""
    data = [_data(stage, name, record) for stage, name, record in run.sources]
    software = run.chosen.begun("software")
    libraries = [_library(name, version) for name, version in (software or {}).items()]
    model = _model(run, answers, [d["bom-ref"] for d in data])
    digests = " ".join(digest for _, digest in run.files)
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.7.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "version": 1,
        "serialNumber": f"urn:uuid:{uuid.uuid5(SPACE, digests)}",
        "metadata": {"timestamp": moment, "component": model},
        "components": [*data, *libraries],
        "dependencies": [{"ref": "model", "dependsOn": [c["bom-ref"] for c in (*data, *libraries)]}],
    }


def _model(run: RunFacts, answers: Answers, data: list[str]) -> dict[str, Any]:
    name, provider = answers("model.name"), answers("provider.name")
    files = [
        {"type": "file", "name": file, "hashes": [{"alg": "SHA-256", "content": digest}]} for file, digest in run.files
    ]
    return {
        "type": "machine-learning-model",
        "bom-ref": "model",
        "name": display(name),
        "version": display(answers("model.version")),
        "supplier": {"name": display(provider)},
        "licenses": licences(answers("model.licence")),
        "components": files,
        "modelCard": _card(run, answers, data),
        "properties": _properties(run),
    }


def licences(licence: Any) -> list[dict[str, Any]]:
    """A licence by its name: whether it is an SPDX identifier, readers look up."""
    return [{"license": {"name": display(licence)}}]


def _card(run: RunFacts, answers: Answers, data: list[str]) -> dict[str, Any]:
    c = run.model
    return {
        "modelParameters": {
            "approach": {"type": LEARNING.get(run.chosen.kind, "self-supervised")},
            "task": "text-generation",
            "architectureFamily": dict(architecture(c))["family"],
            "modelArchitecture": dict(architecture(c))["layers"],
            "datasets": [{"ref": ref} for ref in data],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": [_metric(exam) for _, exam in run.exams]},
        "considerations": {
            "users": [display(answers("use.intended"))],
            "useCases": [display(answers("use.intended"))],
            "technicalLimitations": [
                display(answers("use.limits")),
                f"does not fit: {display(answers('use.excluded'))}",
            ],
            "ethicalConsiderations": [
                {"name": "safety", "mitigationStrategy": display(answers("use.risks"))},
                {"name": "bias", "mitigationStrategy": display(answers("data.bias"))},
            ],
            "environmentalConsiderations": {
                "energyConsumptions": [_energy(s) for s in run.lineage if s.watt_hours is not MISSING]
            },
        },
    }


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
    """What one stage took. The schema wants an energy provider, and nobody has named one."""
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


def _properties(run: RunFacts) -> Properties:
    pairs = [
        ("recipe", run.recipe),
        ("seed", run.seed),
        ("stage", run.chosen.name),
        ("commit", run.chosen.begun("commit")),
        ("parameters", parameters(run.model)),
    ]
    return [{"name": f"finback:{name}", "value": display(value)} for name, value in pairs]


def _data(stage: StageFacts, name: str, record: dict[str, Any]) -> dict[str, Any]:
    """A data set that was read or written, with its digest if it has one."""
    digest = record.get("sha256")
    facts = [(k, record.get(k, MISSING)) for k in technical.source_keys(stage, name) if k != "licence"]
    component: dict[str, Any] = {
        "type": "data",
        "bom-ref": f"data:{stage.name}/{name}",
        "name": name,
        "licenses": licences(record.get("licence", MISSING)),
        "data": [
            {
                "type": "dataset",
                "name": name,
                "contents": {"properties": [{"name": f"finback:{k}", "value": display(v)} for k, v in facts]},
            }
        ],
    }
    return component | ({"hashes": [{"alg": "SHA-256", "content": digest}]} if digest else {})


def _library(name: str, version: str) -> dict[str, Any]:
    component = {"type": "library", "bom-ref": f"software:{name}", "name": name, "version": version}
    return component | ({} if name == "python" else {"purl": f"pkg:pypi/{name}@{version.replace('+', '%2B')}"})
