"""Croissant 1.1 with the responsible-AI vocabulary: one document per data set that a run prepared. Does not import torch.

Its files are the shards of token ids, which stay in the run folder.
"""

from typing import Any

from finback.report.docs import technical, templates
from finback.report.docs.blocks import display
from finback.report.docs.facts import MISSING, RunFacts, StageFacts
from finback.report.docs.questionnaire import Answers
from finback.runs.provenance import sha256


def documents(run: RunFacts, answers: Answers, date: str) -> dict[str, dict[str, Any]]:
    """One document per prepared data set, by file name."""
    return {
        f"{stage.name}-{name}.json": _data_set(stage, name, record, answers, date)
        for stage, name, record in run.sources
        if stage.kind == "data"
    }


def _data_set(stage: StageFacts, name: str, record: dict[str, Any], answers: Answers, date: str) -> dict[str, Any]:
    keys = [k for k in technical.source_keys(stage, name) if k not in ("licence", "tokens_read")]
    values = {
        "name": name,
        "stage": stage.name,
        "date": date,
        "facts": "; ".join(f"{k.replace('_', ' ')}: {display(record.get(k, MISSING))}" for k in keys),
        "licence": display(record.get("licence", MISSING)),
        "documents": display(record.get("documents", MISSING)),
        "languages": answers("model.languages") or [],
        "files": _files(stage, name),
    }
    return dict(templates.json_values("croissant", values, answers))


def _files(stage: StageFacts, name: str) -> list[dict[str, Any]]:
    """The shards that still exist, with digests."""
    paths = sorted(p for side in ("train", "valid") for p in stage.folder.glob(f"{name}.{side}*.bin"))
    return [
        {
            "@type": "cr:FileObject",
            "@id": path.name,
            "name": path.name,
            "contentUrl": f"{stage.name}/{path.name}",
            "contentSize": f"{path.stat().st_size} B",
            "encodingFormat": "application/octet-stream",
            "sha256": sha256(path),
            "description": "Token ids of the stage's tokenizer.json, little-endian, one document after the other.",
        }
        for path in paths
    ]
