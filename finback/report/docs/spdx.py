"""The model and its data as SPDX 3.0.1 with the AI and dataset profiles, as JSON-LD. Does not import torch."""

import json
import re
import uuid
from collections.abc import Iterable
from typing import Any

from finback.report.docs import registries, templates
from finback.report.docs.blocks import display, words
from finback.report.docs.facts import MISSING, NOT_PROVIDED, RunFacts, StageFacts
from finback.report.docs.questionnaire import Answers
from finback.report.model_card import architecture

CONTEXT = "https://spdx.org/rdf/3.0.1/spdx-context.jsonld"
SPACE = uuid.UUID("b1c0a2de-2f0a-4a43-9f6a-6d6c7a1a5f0e")
LOCAL = "urn:within-this-document:"
Element = dict[str, Any]


def document(run: RunFacts, answers: Answers, moment: str) -> dict[str, Any]:
    """The whole document; values that a profile requires but nobody has answered are omitted and named in a comment."""
    made = {
        "type": "CreationInfo",
        "@id": "_:made",
        "specVersion": "3.0.1",
        "created": moment,
        "createdBy": [_id("provider")],
        "comment": "Written by finback from the records of a run.",
    }
    provider = _element("Organization", "provider", name=words(answers("provider.name")))
    package = _package(run, answers)
    data = [_data_set(stage, name, record, answers) for stage, name, record in run.sources]
    graph = [made, provider, package, *data]
    if data:
        graph.append(_relation("trained", "model", "trainedOn", [d["spdxId"] for d in data]))
    graph += _licensed("model", answers("model.licence"))
    for stage, name, record in run.sources:
        graph += _licensed(f"data/{stage.name}/{name}", record.get("licence", MISSING))
    named = [e["spdxId"] for e in graph if "spdxId" in e]
    profiles = ["core", "simpleLicensing", "software", *(["ai"] if "comment" not in package else [])]
    graph.append(
        _element("SpdxDocument", "document", rootElement=[_id("model")], element=named, profileConformance=profiles)
    )
    return {"@context": CONTEXT, "@graph": _named(graph)}


def _named(graph: list[Element]) -> list[Element]:
    """The graph with globally unique identifiers, which stay the same if only the time changes."""
    made, *others = graph
    text = json.dumps([made | {"created": ""}, *others], sort_keys=True)
    space = uuid.uuid5(SPACE, text)

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: renamed(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return list(map(renamed, value))
        return f"urn:uuid:{uuid.uuid5(space, value)}" if str(value).startswith(LOCAL) else value

    return [renamed(element) for element in graph]


def _id(name: str) -> str:
    """A temporary identifier within the document, until all of it is known."""
    return f"{LOCAL}{name}"


def _element(kind: str, key: str, **fields: Any) -> Element:
    return {"type": kind, "spdxId": _id(key), "creationInfo": "_:made", **fields}


def _relation(name: str, source: str, kind: str, to: list[str]) -> Element:
    return _element("Relationship", name, **{"from": _id(source), "relationshipType": kind, "to": to})


def _pairs(values: Iterable[tuple[str, Any]]) -> list[Element]:
    return [{"type": "DictionaryEntry", "key": key, "value": display(value)} for key, value in values]


def _hashes(*digests: str) -> list[Element]:
    return [{"type": "Hash", "algorithm": "sha256", "hashValue": digest} for digest in digests]


def _package(run: RunFacts, answers: Answers) -> Element:
    """The AIPackage. Release, location and version are required; a comment names missing ones."""
    demanded = {
        "releaseTime": _moment(answers("model.released")),
        "software_downloadLocation": _address(answers("model.download")),
        "software_packageVersion": answers("model.version"),
        "suppliedBy": MISSING if answers("provider.name") is MISSING else _id("provider"),
    }
    holes = ", ".join(name for name, value in demanded.items() if value is MISSING)
    energy = [_energy(s) for s in run.lineage if s.watt_hours is not MISSING]
    knobs = ((f"{s.name}.{k}", v) for s in run.chain for k, v in s.config.items() if k != "name")
    accuracies = ((f"accuracy: {e.get('exam', NOT_PROVIDED)}", e.get("accuracy", MISSING)) for _, e in run.exams)
    values = demanded | {
        "id": _id("model"),
        "hashes": _hashes(*(digest for _, digest in run.files)),
        "family": dict(architecture(run.model))["family"],
        "knobs": _pairs((name, value) for name, value in knobs if not isinstance(value, (dict, list))),
        "metrics": _pairs(accuracies),
        "stages": "; ".join(f"{s.name} ({s.type})" for s in run.lineage),
        "cleaning": [f"{n}: {display(r.get('documents', MISSING))}" for _, n, r in run.sources],
        "energy": {"type": "ai_EnergyConsumption", "ai_trainingEnergyConsumption": energy} if energy else MISSING,
        "comment": f"{NOT_PROVIDED}: {holes}" if holes else MISSING,
    }
    package = templates.json_values("spdx_model", values, answers)
    return {key: value for key, value in package.items() if value != []}


def _energy(stage: StageFacts) -> Element:
    return {
        "type": "ai_EnergyConsumptionDescription",
        "ai_energyQuantity": stage.watt_hours / 1000,
        "ai_energyUnit": "kilowattHour",
    }


def _data_set(stage: StageFacts, name: str, record: dict[str, Any], answers: Answers) -> Element:
    digest, documents = record.get("sha256"), (record.get("documents") or {}).get("kept")
    values = {
        "id": _id(f"data/{stage.name}/{name}"),
        "name": name,
        "documents": display(record.get("documents", MISSING)),
        "hashes": _hashes(digest) if digest else MISSING,
    }
    size = {"dataset_datasetSize": documents} if isinstance(documents, int) else {}
    return dict(templates.json_values("spdx_data_set", values, answers)) | size


def _licensed(name: str, licence: Any) -> list[Element]:
    """A declared licence as an expression if it can be parsed; else the record's words, or nothing."""
    if licence is MISSING:
        return []
    words = str(licence)
    if expression := registries.licence(words):
        made = _element(
            "simplelicensing_LicenseExpression", f"licence/{name}", simplelicensing_licenseExpression=expression
        )
    else:
        made = _element("simplelicensing_SimpleLicensingText", f"licence/{name}", simplelicensing_licenseText=words)
    return [made, _relation(f"licensed/{name}", name, "hasDeclaredLicense", [made["spdxId"]])]


def _moment(date: Any) -> Any:
    found = re.fullmatch(r"\d{4}-\d{2}-\d{2}", str(date))
    return f"{date}T00:00:00Z" if found else MISSING


def _address(text: Any) -> Any:
    return text if re.match(r"[a-z][a-z0-9+.-]*:\S+$", str(text)) else MISSING
