"""The technical report: architecture, data, recipe, cost, training, evaluations, samples, limits. No torch here."""

import dataclasses
from typing import Any

from finback.model.count import forward_flops, parameters, training_flops
from finback.report.docs import compute, curves
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
from finback.report.docs.questionnaire import Answers
from finback.report.model_card import architecture
from finback.runs.ledger import DOLLARS_PER_CORE_HOUR, FLOPS, cost

REAL = ("licence", "sha256", "bytes", "documents", "train_tokens", "valid_tokens", "valid_bytes")
GENERATED = ("licence", "documents", "train_tokens", "valid_tokens", "valid_bytes")
EXAM = (
    "exam",
    "task",
    "temperature",
    "n",
    "accuracy",
    "interval",
    "mean_tokens",
    "truncated",
    "thinks",
    "accuracy_thinking",
    "accuracy_guessing",
)
SAMPLES = 3


def report(run: RunFacts, answers: Answers) -> list[Block]:
    """All of it, as blocks."""
    return [
        Heading(f"Technical report: stage {run.chosen.name} of recipe {display(run.recipe)}", 1),
        Paragraph(
            "Written by finback from the records of a run; what neither a record nor an answer holds is marked as such."
        ),
        facts(
            [
                ("name", answers("model.name")),
                ("recipe", run.recipe),
                ("seed", run.seed),
                ("model of stage", run.chosen.name),
                ("version", answers("model.version")),
                ("provider", answers("provider.name")),
                ("licence", answers("model.licence")),
                ("began as", run.base or "random weights"),
            ]
        ),
        *_architecture(run),
        *_data(run, answers),
        *_recipe(run, answers),
        *_cost(run, answers),
        *_training(run),
        *_evaluations(run),
        *_samples(run),
        *_limits(run, answers),
        *_files(run),
    ]


def _architecture(run: RunFacts) -> list[Block]:
    c = run.model
    config = [(f.name, getattr(c, f.name)) for f in dataclasses.fields(c)]
    context = c.max_position_embeddings / 2
    counted = [
        ("all parameters, MTP included", parameters(c)),
        ("parameters that a token meets, MTP left out", parameters(c, active=True, mtp=False)),
        ("FLOP to answer with one token, half the context behind it", forward_flops(c, context)),
        ("FLOP to train on one token of such a row", training_flops(c, context)),
    ]
    shown = [(k, str(v) if dataclasses.is_dataclass(v) else v) for k, v in config]
    return [
        Heading("Architecture"),
        facts([*architecture(c), *counted]),
        Heading("Configuration", 3),
        facts(shown, ("field", "value")),
    ]


def source_keys(stage: StageFacts, name: str) -> tuple[str, ...]:
    """What a data set's record should hold; text that a program writes has no files."""
    made = [s for field in ("tasks", "text") for s in stage.config.get(field) or () if isinstance(s, dict)]
    keys = GENERATED if any(s["name"] == name and s["type"] == "TaskText" for s in made) else REAL
    return keys if stage.kind == "data" else tuple(k for k in keys if "tokens" not in k and "valid" not in k)


def _data(run: RunFacts, answers: Answers) -> list[Block]:
    blocks: list[Block] = [Heading("Data")]
    for stage, name, record in run.sources:
        rows = [(key.replace("_", " "), record.get(key, MISSING)) for key in source_keys(stage, name)]
        extra = [(key, record[key]) for key in ("package", "version", "hub", "split") if key in record]
        blocks += [Heading(f"{name} (stage {stage.name})", 3), facts([*rows, *extra])]
    for stage in run.lineage:
        if stage.kind == "data" and "sources" not in stage.results:
            blocks.append(facts([(f"sources of {stage.name}", MISSING)]))
    topics = ("collection", "latest", "bias", "unsuitable", "personal")
    return [*blocks, Heading("What the provider says of the data", 3), facts((k, answers(f"data.{k}")) for k in topics)]


def _recipe(run: RunFacts, answers: Answers) -> list[Block]:
    blocks: list[Block] = [Heading("Recipe"), facts([("rationale", answers("training.rationale"))])]
    for stage in run.stages:
        knobs = [(k, v) for k, v in stage.config.items() if k not in ("type", "name", "model")]
        blocks += [Heading(f"{stage.name}: {stage.type}", 3), facts(knobs, ("knob", "value"))]
        keys = dict.fromkeys((*stage.declaration.results, *stage.results))
        files = stage.recorded("files")
        apart = ("sources", "evaluations")  # have tables of their own, if they are there
        results = [(k, stage.result(k)) for k in keys if k not in apart or k not in stage.results]
        rows = [
            *results,
            ("stage by its manifest", stage.recorded("stage")),
            ("files", files if files is MISSING else f"{len(files)} by its manifest"),
        ]
        blocks.append(facts(rows, ("result", "value")))
    return blocks


def _cost(run: RunFacts, answers: Answers) -> list[Block]:
    head = (
        "stage",
        "kind",
        "seconds",
        "device-hours",
        "energy (Wh)",
        "money ($)",
        "tokens trained",
        "tokens generated",
        "FLOP on them",
        "MFU",
    )
    rows = tuple(_cost_row(stage) for stage in run.stages)
    purposes = [f"flops_{name}" for name in FLOPS]
    flops = TableBlock(("stage", *FLOPS), tuple((s.name, *(_due(s, key) for key in purposes)) for s in run.stages))
    made = []
    for stage in run.stages:
        words = [(f"{stage.name}: {key}", stage.begun(key)) for key in (*BEGUN, "commit", "dirty")]
        made += words
    c = compute.of(run, answers)
    counted = [
        ("training compute", c.training),
        ("answers sampled to learn from", c.generation),
        ("inside the weights it began as", c.base),
        ("cumulative", c.cumulative),
    ]
    basis = dict.fromkeys(cost(stage.folder)["basis"] for stage in run.stages)
    return [
        Heading("Cost"),
        TableBlock(head, rows),
        BulletList(tuple(f"Energy and money: {text}" for text in basis)),
        Heading("FLOP by purpose", 3),
        flops,
        BulletList(tuple(f"{name}: {text}" for name, text in FLOPS.items())),
        Heading("Compute of this model, as the EU counts", 3),
        facts(counted),
        Paragraph(compute.METHOD),
        facts(compute.verdicts(run, answers), ("test", "verdict")),
        Heading("Machines and software", 3),
        facts(made),
    ]


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
        display(hours),
        display(stage.watt_hours),
        display(hours * DOLLARS_PER_CORE_HOUR),
        _due(stage, "tokens_trained"),
        _due(stage, "tokens_generated"),
        _due(stage, "flops"),
        mfu,
    )


def _due(stage: StageFacts, key: str) -> str:
    """A sum of the ledger; "none" where this kind of stage spends nothing of the sort."""
    value = stage.spent(key)
    if value is MISSING and stage.kind != "other" and key not in stage.declaration.ledger:
        return "none"
    return display(value if value is MISSING or isinstance(value, int) else float(value))


def _training(run: RunFacts) -> list[Block]:
    drawn = [curve for stage in run.lineage for curve in curves.of_stage(stage)]
    blocks: list[Block] = [Heading("Training curves, router health and RL"), *drawn]
    for stage in run.lineage:
        lines = stage.routers()
        if lines:
            last = lines[-1]
            keys = ("step", "tokens", "max_violation", "idle", "bias_spread", "load")
            blocks += [
                Heading(f"Routers of {stage.name} at the end, by layer", 3),
                facts((k.replace("_", " "), last.get(k, MISSING)) for k in keys),
            ]
    return blocks


def exams(run: RunFacts) -> list[tuple[str, dict[str, Any]]]:
    """Every evaluation of every model of the run, with the stage and the model in its name."""
    return [
        (f"{display(stage.result('model'))} ({stage.name})", exam)
        for stage in run.stages
        if stage.kind == "evaluation"
        for exam in stage.results.get("evaluations") or ()
    ]


def _evaluations(run: RunFacts) -> list[Block]:
    found = exams(run)
    keys = (*EXAM, *(k for k in ("language", "mtp_acceptance") if any(k in e for _, e in found)))
    method = [Paragraph("Shares of correct answers with their 95 % intervals (Wilson), on held-out problems.")]
    compressed = [
        (f"bits per byte of unseen {name}, {display(s.result('model'))}", value)
        for s in run.stages
        if s.kind == "evaluation"
        for name, value in (s.results.get("bits_per_byte") or {}).items()
    ]
    return [
        Heading("Evaluations"),
        *(method if found else [Paragraph("No evaluation was made: NOT PROVIDED")]),
        *([records(keys, found, "model")] if found else []),
        *([facts(compressed)] if compressed else []),
    ]


def _samples(run: RunFacts) -> list[Block]:
    blocks: list[Block] = [Heading("Samples")]
    for stage, exam in run.exams:
        lines = stage.answers(str(exam.get("exam")))[:SAMPLES]
        blocks += [Heading(f"First answers to the exam {display(exam.get('exam', MISSING))}", 3)] if lines else []
        for r in lines:
            verdict = "correct" if r.get("correct") else "wrong"
            thinking = f"<think>{r['thinking']}</think>\n" if r.get("thinks") else ""
            blocks.append(
                CodeBlock(
                    f"{r.get('question')}\n\n{thinking}{r.get('answer')}\n\n({verdict}; expected {r.get('gold')})"
                )
            )
    return (
        blocks if len(blocks) > 1 else [*blocks, Paragraph("No evaluation holds answers of this model: NOT PROVIDED")]
    )


def _limits(run: RunFacts, answers: Answers) -> list[Block]:
    shown = [
        (
            f"{exam.get('exam')}: wrong answers",
            MISSING if exam.get("accuracy") is None else f"{1 - exam['accuracy']:.1%}",
        )
        for _, exam in run.exams
    ]
    answered = [
        ("limits that the provider knows", answers("use.limits")),
        ("uses that it does not fit", answers("use.excluded")),
        ("risks, and what was done", answers("use.risks")),
        ("longest text, in tokens", run.model.max_position_embeddings),
    ]
    return [
        Heading("Limits"),
        facts([*shown, *answered]),
        Paragraph("Nothing here tests for safety, bias or facts unless an evaluation above says so."),
    ]


def _files(run: RunFacts) -> list[Block]:
    return [Heading("Files of the model"), facts(run.files or [("weights", MISSING)], ("file", "SHA-256"))]
