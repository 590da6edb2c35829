"""Croissant 1.1 with its vocabulary for responsible AI: one document for each data set that a run prepared. No torch here.

Its files are the shards of token ids, which stay in the run folder.
"""

from typing import Any

from finback.report.docs import technical
from finback.report.docs.blocks import display
from finback.report.docs.facts import MISSING, RunFacts, StageFacts
from finback.report.docs.questionnaire import Answers
from finback.runs.provenance import sha256

SHARD = "application/octet-stream"
CONTEXT: dict[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "arrayShape": "cr:arrayShape",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "containedIn": "cr:containedIn",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isArray": "cr:isArray",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "name": {"@container": "@language"},
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def documents(run: RunFacts, answers: Answers, date: str) -> dict[str, dict[str, Any]]:
    """One for each prepared data set, by the name of its file."""
    return {
        f"{stage.name}-{name}.json": _data_set(stage, name, record, answers, date)
        for stage, name, record in run.sources
        if stage.kind == "data"
    }


def _data_set(stage: StageFacts, name: str, record: dict[str, Any], answers: Answers, date: str) -> dict[str, Any]:
    keys = [k for k in technical.source_keys(stage, name) if k != "licence"]
    facts = "; ".join(f"{k.replace('_', ' ')}: {display(record.get(k, MISSING))}" for k in keys)
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "@id": name,
        "name": name,
        "conformsTo": ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"],
        "description": f"Text for training a language model, as token ids, prepared by finback in stage {stage.name}. {facts}.",
        "license": display(record.get("licence", MISSING)),
        "datePublished": date,
        "version": "1.0.0",
        "inLanguage": _languages(answers),
        "url": display(answers("model.download")),
        "creator": {"@type": "sc:Organization", "name": display(answers("provider.name"))},
        "citeAs": f"{name}, prepared by finback",
        "distribution": _files(stage, name),
        "rai:dataCollection": display(answers("data.collection")),
        "rai:dataCollectionType": [display(answers("data.collection"))],
        "rai:dataBiases": [display(answers("data.bias"))],
        "rai:dataLimitations": [display(answers("use.limits"))],
        "rai:dataUseCases": ["training of language models"],
        "rai:personalSensitiveInformation": [display(answers("data.personal"))],
        "rai:dataPreprocessingProtocol": [display(record.get("documents", MISSING))],
    }


def _languages(answers: Answers) -> list[str]:
    languages = answers("model.languages")
    return [] if languages is MISSING else list(languages)


def _files(stage: StageFacts, name: str) -> list[dict[str, Any]]:
    """The shards with digests, as far as they are still there."""
    paths = sorted(p for side in ("train", "valid") for p in stage.folder.glob(f"{name}.{side}*.bin"))
    return [
        {
            "@type": "cr:FileObject",
            "@id": path.name,
            "name": path.name,
            "contentUrl": f"{stage.name}/{path.name}",
            "contentSize": f"{path.stat().st_size} B",
            "encodingFormat": SHARD,
            "sha256": sha256(path),
            "description": "Token ids of the stage's tokenizer.json, little-endian, one document after the other.",
        }
        for path in paths
    ]
