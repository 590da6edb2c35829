"""Reads SFT's sources as lessons, and reports what could not be used, by name."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from finback import readers
from finback.config import UserError
from finback.data.dialogues import FIELDS, Dialogue, read_dialogue
from finback.data.messages import Lesson, lessons
from finback.data.sources import Chitchat, Document, Files, Hub
from finback.data.tokenizer import Tokenizer
from finback.runs.files import write_lines
from finback.runs.folder import StageRun
from finback.stages.exam_questions import ExamQuestions
from finback.stages.prepare import TaskText, origin
from finback.tasks.task import canonical, is_listed

if TYPE_CHECKING:
    from finback.stages.sft import SFT

SHOWN = 5  # unusable records that a warning shows; unusable.jsonl in the stage's folder lists all
Source = Chitchat | Files | Hub | TaskText


@dataclass
class _Reading:
    """The content of one source: dialogues with their locations, and unusable records with locations and reasons."""

    name: str
    dialogues: list[tuple[str, Dialogue]] = field(default_factory=list)
    unusable: list[dict[str, str]] = field(default_factory=list)
    # number of dialogues with an exam question, by exam
    contaminated: Counter[str] = field(default_factory=Counter)
    empty: int = 0

    def refuse(self, where: str, error: UserError) -> None:
        """Records that a record cannot be used, and why."""
        self.unusable.append({"source": self.name, "where": where, "why": f"{error.field}: {error.problem}"})


class LessonReader:
    """Reads a stage's sources; `results` holds counts of what was found."""

    def __init__(self, stage: "SFT", run: StageRun, tokenizer: Tokenizer) -> None:
        self.stage, self.run, self.tokenizer = stage, run, tokenizer
        self.results: dict[str, Any] = {"unusable": {}, "contaminated": {}, "empty_answers": 0}
        self.exams = ExamQuestions(run)
        self.validation = frozenset() if stage.validation is None else stage.validation.keys(run)

    def read(self) -> dict[str, list[Lesson]]:
        """The lessons of each source."""
        found: dict[str, list[Lesson]] = {}
        unusable: list[dict[str, str]] = []
        traces = [Files((str(self.run.input(s) / "traces.jsonl"),), name=s) for s in self.stage.traces]
        for source in (*traces, *self.stage.text):
            reading = self._read(source)
            kept, limit = len(reading.dialogues), self.stage.limits.get(source.name)
            if limit is not None:
                random.Random(self.run.seed("limit", source.name)).shuffle(reading.dialogues)
                del reading.dialogues[limit:]
            before = len(reading.unusable)
            found[source.name] = self._taught(reading)
            kept -= len(reading.unusable) - before
            self._report(reading, source, kept, len(found[source.name]))
            unusable += reading.unusable
        if self.run.is_writer and unusable:
            write_lines(self.run.folder / "unusable.jsonl", unusable)
        return found

    def _read(self, source: Source) -> _Reading:
        reading = _Reading(source.name)
        is_looked_at = isinstance(source, Files | Hub)
        if isinstance(source, TaskText):
            is_looked_at = any(map(is_listed, source.tasks))
        # made from training questions
        is_made = isinstance(source, TaskText) or source.name in self.stage.traces
        for where, record in self._records(source):
            try:
                if isinstance(record, UserError):
                    raise record
                dialogue = record if isinstance(record, Dialogue) else read_dialogue(record)
            except UserError as error:
                reading.refuse(where, error)
                continue
            exam = self.exams.find(dialogue.messages, is_made) if is_looked_at else None
            if exam is None and any(canonical(m.content) in self.validation for m in dialogue.messages):
                exam = "validation"
            if exam is not None:
                reading.contaminated[exam] += 1
            else:
                reading.dialogues.append((where, dialogue))
        return reading

    def _taught(self, reading: _Reading) -> list[Lesson]:
        found: list[Lesson] = []
        for where, dialogue in reading.dialogues:
            messages = [m if self.stage.chains else replace(m, reasoning="") for m in dialogue.messages]
            try:
                found += lessons(messages, self.tokenizer, dialogue.tools)
                reading.empty += dialogue.empty
            except UserError as error:  # the model's template cannot render it
                reading.refuse(where, error)
        return found

    def _records(self, source: Source) -> Iterator[tuple[str, Any]]:
        """Each record with its location."""
        if isinstance(source, Hub):
            yield from ((f"{source.path}[{i}]", dict(row)) for i, row in enumerate(source.rows()))
        elif isinstance(source, Files):
            for path in source.files():
                if readers.kind(path) in readers.RECORDS:
                    yield from readers.records(path, f"{source.name}.paths", fields=FIELDS)
                else:
                    self._refuse_text(next(source.read(path)))
        else:
            seed = self.run.seed("tasks", source.name)
            given = source.generate(seed) if isinstance(source, TaskText) else source.documents()
            for i, document in enumerate(given):
                if any(m.role == "assistant" for m in document.messages):  # some dialogues have only one turn
                    yield f"{source.name}[{i}]", Dialogue(document.messages)

    def _refuse_text(self, document: Document) -> None:
        problem, remedy = "text without turns", "SFT learns from dialogues."
        raise UserError(f"{self.stage.name}.text", document.text[:60], problem, remedy)

    def _report(self, reading: _Reading, source: Source, kept: int, learnt: int) -> None:
        """Adds counts to the results and prints warnings; raises UserError if nothing is left."""
        name, unusable, contaminated = reading.name, reading.unusable, reading.contaminated
        shown = [f"{each['where']} ({each['why']})" for each in unusable[:SHOWN]]
        left_out = {"unusable": len(unusable), "contaminated": contaminated.total(), "empty_answers": reading.empty}
        if name not in self.stage.traces:
            about = origin(source, kept)
            about["documents"] |= {why: n for why, n in left_out.items() if n}
            self.results.setdefault("sources", {})[name] = about
        self.results["empty_answers"] += reading.empty
        if unusable:
            self.results["unusable"][name] = {"records": len(unusable), "first": shown}
            self._warn(f"{len(unusable):,} records of {name} are unusable: {'; '.join(shown)}")
        if contaminated:
            self.results["contaminated"][name] = dict(contaminated)
            exams = ", ".join(f"{exam} ({n:,})" for exam, n in contaminated.items())
            self._warn(f"{contaminated.total():,} records of {name} contain exam questions and are left out: {exams}")
        if reading.empty:
            self._warn(f"{reading.empty:,} empty answers of {name} are skipped")
        if not learnt and (unusable or contaminated):
            first = shown[0] if shown else f"all contain questions of the exam {next(iter(contaminated))}"
            problem = f"it has no usable records: {first}"
            raise UserError(f"{self.stage.name}.text", name, problem, "Correct it, or leave it out.")

    def _warn(self, text: str) -> None:
        self.run.say(f"{self.stage.name:10} warning: {text}")
