"""The technical report: architecture, data, recipe, cost, training, evaluations, samples, limitations. Does not import torch."""

import dataclasses
import re
from pathlib import Path
from typing import Any

from finback.model.count import forward_flops, parameters, training_flops
from finback.report.docs import compute, curves, templates
from finback.report.docs.blocks import (
    Block,
    BulletList,
    CodeBlock,
    Heading,
    Paragraph,
    TableBlock,
    display,
    facts,
    records,
)
from finback.report.docs.facts import BEGUN, MISSING, RunFacts, StageFacts
from finback.report.docs.public import counted
from finback.report.docs.questionnaire import Answers
from finback.report.model_card import architecture
from finback.runs.ledger import FLOPS, cost

GENERATED = ("licence", "documents", "train_tokens", "tokens_read", "valid_tokens", "valid_bytes")
LABELS = {"train_tokens": "training tokens that were prepared", "tokens_read": "tokens read in training"}
READ = (*GENERATED[:1], "sha256", "bytes", *GENERATED[1:])
GIVEN = ("exam", "task", "temperature", "n")
MEASURED = ("accuracy", "interval", "mean_tokens", "truncated", "thinks", "accuracy_thinking", "accuracy_guessing")
SAMPLES = 3
HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


def report(run: RunFacts, answers: Answers) -> list[Block]:
    """The whole report as blocks."""
    values = {
        "stage": run.chosen.name,
        "recipe": run.recipe,
        "seed": run.seed,
        "base": base(run, answers) or "random weights",
        **_architecture(run),
        "data": _data(run),
        "stages": [block for stage in run.stages for block in _stage(stage)],
        **_cost(run),
        **_compute(run, answers),
        "curves": _training(run),
        "evaluations": _evaluations(run),
        "samples": _samples(run),
        "wrong": _wrong(run),
        "window": run.model.max_position_embeddings,
        "files": [files(run)],
    }
    return templates.blocks("report", values, answers)


def base(run: RunFacts, answers: Answers) -> Any:
    """The external model that training started from, by the name in the answers or the checkpoint's."""
    return run.base and (answers("base.name") or run.base)


def _architecture(run: RunFacts) -> dict[str, list[Block]]:
    c = run.model
    context = c.max_position_embeddings / 2
    counted = [
        ("all parameters, MTP included", parameters(c)),
        ("active parameters per token, without MTP", parameters(c, active=True, mtp=False)),
        ("FLOP to generate one token, half of the context before it", forward_flops(c, context)),
        ("FLOP to train on one token of a full row", training_flops(c, context)),
    ]
    config = ((f.name, getattr(c, f.name)) for f in dataclasses.fields(c))
    shown = ((k, str(v) if dataclasses.is_dataclass(v) else v) for k, v in config)
    return {"architecture": [facts([*architecture(c), *counted])], "configuration": [facts(shown, ("field", "value"))]}


def is_read(stage: StageFacts, name: str) -> bool:
    """Whether a data set was read from files; generated text was not."""
    made = [s for field in ("tasks", "text") for s in stage.config.get(field) or () if isinstance(s, dict)]
    return not any(s["name"] == name and s["type"] == "TaskText" for s in made)


def source_keys(stage: StageFacts, name: str) -> list[str]:
    """The keys that a data set's record should have."""
    keys = READ if is_read(stage, name) else GENERATED
    return [k for k in keys if stage.kind == "data" or not ("tokens" in k or "valid" in k)]


def link(record: dict[str, Any]) -> str:
    """The public address of a data set; "" for the provider's own files."""
    if package := record.get("package"):
        return "/".join(filter(None, ("https://pypi.org/project", str(package), record.get("version"))))
    hub = str(record.get("hub", ""))
    # `datasets` also reads local folders
    return f"https://huggingface.co/datasets/{hub}" if HUB.fullmatch(hub) and not Path(hub).exists() else ""


def origin(record: dict[str, Any]) -> str:
    """What may be published about a data set's origin."""
    files = record.get("files")
    number = counted({"files": files})["files"] if isinstance(files, list) else "a folder of the provider"
    return link(record) or str(number)


def _data(run: RunFacts) -> list[Block]:
    blocks: list[Block] = []
    for stage, name, record in run.sources:
        known = record | {"tokens_read": run.tokens_read(stage, name)}
        rows = [(LABELS.get(key, key.replace("_", " ")), known.get(key, MISSING)) for key in source_keys(stage, name)]
        extra: list[tuple[str, Any]] = [
            (key, record[key]) for key in ("package", "version", "hub", "split") if key in record
        ]
        extra += [("from", origin(record))] if is_read(stage, name) else []
        blocks += [Heading(f"{name} (stage {stage.name})", 3), facts([*rows, *extra])]
    lost = [s.name for s in run.lineage if s.kind == "data" and "sources" not in s.results]
    return blocks + [facts([(f"sources of {name}", MISSING)]) for name in lost]


def _stage(stage: StageFacts) -> list[Block]:
    """A stage's knobs and results, without those that have their own tables."""
    knobs = [(k, counted(v)) for k, v in stage.config.items() if k not in ("type", "name", "model")]
    keys = dict.fromkeys((*stage.declaration.results, *stage.results))
    files = stage.recorded("files")
    rows = [
        *((k, stage.result(k)) for k in keys if k not in ("sources", "evaluations") or k not in stage.results),
        ("stage by its manifest", stage.recorded("stage")),
        ("files", files if files is MISSING else f"{len(files)} by its manifest"),
    ]
    heading = Heading(f"{stage.name}: {stage.type}", 3)
    return [heading, facts(knobs, ("knob", "value")), facts(rows, ("result", "value"))]


def _cost(run: RunFacts) -> dict[str, list[Block]]:
    spent = ("seconds", "CPU seconds", "device-hours", "energy (Wh)", "money ($)")
    head = ("stage", "kind", *spent, "tokens trained", "tokens generated", "FLOP on them", "MFU")
    flops = tuple((s.name, *(_due(s, f"flops_{name}") for name in FLOPS)) for s in run.stages)
    basis = dict.fromkeys(cost(stage.folder)["basis"] for stage in run.stages)
    made = [(f"{s.name}: {key}", s.begun(key)) for s in run.stages for key in (*BEGUN, "commit", "dirty")]
    return {
        "costs": [TableBlock(head, tuple(map(_cost_row, run.stages)))],
        "basis": [BulletList(tuple(f"Energy and money: {text}" for text in basis))],
        "flops": [TableBlock(("stage", *FLOPS), flops)],
        "purposes": [BulletList(tuple(f"{name}: {text}" for name, text in FLOPS.items()))],
        "machines": [facts(made)],
    }


def _compute(run: RunFacts, answers: Answers) -> dict[str, Any]:
    c = compute.of(run, answers)
    return {
        "training": c.training,
        "generation": c.generation,
        "inside": c.base,
        "cumulative": c.cumulative,
        "method": compute.METHOD,
        "verdicts": [facts(compute.verdicts(run, answers), ("test", "verdict"))],
    }


def _cost_row(stage: StageFacts) -> tuple[str, ...]:
    seconds, hours = stage.spent("seconds"), stage.device_hours
    flops, peak = stage.spent("flops"), stage.spent("peak_flops")
    mfu = "not counted"
    if stage.declaration.trains:
        mfu = display(MISSING if MISSING in (flops, peak) or not peak else f"{flops / peak:.1%}")
    return (
        stage.name,
        stage.type,
        display(seconds),
        display(stage.spent("cpu_seconds")),
        display(hours),
        display(stage.watt_hours),
        display(stage.dollars),
        _due(stage, "tokens_trained"),
        _due(stage, "tokens_generated"),
        _due(stage, "flops"),
        mfu,
    )


def _due(stage: StageFacts, key: str) -> str:
    """A sum of the ledger; "none" if this kind of stage does not spend it."""
    value = stage.spent(key)
    if value is MISSING and stage.kind != "other" and key not in stage.declaration.ledger:
        return "none"
    counts = value is not MISSING and key.startswith("tokens_")
    return display(int(value) if counts else value if value is MISSING or isinstance(value, int) else float(value))


def _training(run: RunFacts) -> list[Block]:
    blocks: list[Block] = [curve for stage in run.lineage for curve in curves.of_stage(stage)]
    keys = ("step", "tokens", "max_violation", "idle", "bias_spread", "load")
    for stage in run.lineage:
        if lines := stage.routers():
            last = [(k.replace("_", " "), lines[-1].get(k, MISSING)) for k in keys]
            blocks += [Heading(f"Routers of {stage.name} at the end, by layer", 3), facts(last)]
    return blocks


def exams(run: RunFacts) -> list[tuple[str, dict[str, Any]]]:
    """Every evaluation of every model of the run, labeled with stage and model."""
    return [
        (f"{display(stage.result('model'))} ({stage.name})", exam)
        for stage in run.stages
        if stage.kind == "evaluation"
        for exam in stage.results.get("evaluations") or ()
    ]


def _evaluations(run: RunFacts) -> list[Block]:
    found = exams(run)
    more = [k for k in ("language", "mtp_acceptance") if any(k in e for _, e in found)]
    compressed = [
        (f"bits per byte of unseen {name}, {display(s.result('model'))}", value)
        for s in run.stages
        if s.kind == "evaluation"
        for name, value in (s.results.get("bits_per_byte") or {}).items()
    ]
    blocks: list[Block] = [Paragraph("No evaluation was made: NOT PROVIDED")]
    if found:
        method = Paragraph("Shares of correct answers with their 95 % intervals (mid-P), on held-out problems.")
        blocks = [method, records((*GIVEN, *MEASURED, *more), found, "model")]
    return blocks + ([facts(compressed)] if compressed else [])


def _samples(run: RunFacts) -> list[Block]:
    blocks: list[Block] = []
    for stage, exam in run.exams:
        lines = stage.answers(str(exam.get("exam")))[:SAMPLES]
        blocks += [Heading(f"First answers to the exam {display(exam.get('exam', MISSING))}", 3)] if lines else []
        for r in lines:
            verdict = "correct" if r.get("correct") else "wrong"
            thinking = f"<think>{r['thinking']}</think>\n" if r.get("thinks") else ""
            answer = f"{thinking}{r.get('answer')}\n\n({verdict}; expected {r.get('gold')})"
            blocks.append(CodeBlock(f"{r.get('question')}\n\n{answer}"))
    return blocks or [Paragraph("No evaluation has answers of this model: NOT PROVIDED")]


def _wrong(run: RunFacts) -> list[tuple[str, str]]:
    """Rows with the share of wrong answers per exam."""
    shares = [(exam.get("exam"), exam.get("accuracy")) for _, exam in run.exams]
    return [(f"{name}: wrong answers", display(MISSING if x is None else f"{1 - x:.1%}")) for name, x in shares]


def files(run: RunFacts) -> TableBlock:
    """The model's files."""
    return facts(run.files or [("weights", MISSING)], ("file", "SHA-256"))
