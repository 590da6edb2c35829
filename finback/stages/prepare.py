"""Turns raw text and task problems into cleaned documents, a tokenizer, and token shards with provenance."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from finback.config import UserError, check_fields, check_positive, check_share
from finback.data import pack, tokenizer
from finback.data.clean import CleaningRules, Quality
from finback.data.corpus import Corpus, ExecutorConfig, provenance
from finback.data.decontamination import Decontaminator
from finback.data.near_duplicates import MinHashSigner, NearDuplicates, SignatureIndex
from finback.data.package_sources import PackageSource
from finback.data.sources import Chitchat, Document, Files, Hub, Source
from finback.data.tokenizer import Tokenizer
from finback.data.turn import Message
from finback.runs.declaration import Declaration
from finback.runs.files import write_json
from finback.runs.folder import Interrupted, StageRun
from finback.runs.recipe import Stage
from finback.stages.exam_questions import ExamQuestions
from finback.tasks import task as tasks
from finback.tasks.task import Task

SAMPLE = 20_000  # documents per source that the tokenizer is trained on


@dataclass(frozen=True)
class TaskText:
    """Problems of a task written out as dialogues, some answered directly, some with the worked chain first.

    `think` is the share with a chain. `tasks` take turns, so a list is a curriculum. Held-out problems are never used.
    A share of `follow_up` continues with a second problem, and the same share of those with a third. As in a real
    prompt, only the last answer then shows its chain.
    """

    # tasks, in turn
    tasks: tuple[Task, ...]
    # number of documents to write
    documents: int
    # share with a worked chain before the answer
    think: float = 0.5
    # share that continues with another problem
    follow_up: float = 0.0
    # name of the source in `mixture` and in tables
    name: str = "tasks"
    # SPDX identifier, for the documents of a published model
    licence: str = "MIT (generated here)"

    def __post_init__(self) -> None:
        check_fields(self, self.name)
        check_share(self, self.name, "think", "follow_up")
        if not self.tasks:
            raise UserError(f"{self.name}.tasks", self.tasks, "no tasks to write out", "Give at least one.")
        check_positive(self, self.name, "documents")

    def generate(self, seed: int) -> Iterator[Document]:
        """Yields `documents` dialogues of a question and its answer, some with one or two more of both."""
        rng = random.Random(seed)
        for index in range(self.documents):
            messages: list[Message] = []
            more = True
            while more:
                problem = tasks.draw(self.tasks[index % len(self.tasks)], "train", rng)
                more = len(messages) < 4 and rng.random() < self.follow_up
                chain = problem.solution if not more and rng.random() < self.think else ""
                messages += [Message("user", problem.question), Message("assistant", problem.answer, chain)]
            yield Document(tuple(messages))


@dataclass(frozen=True)
class Decontaminate:
    """Removes real text that contains held-out problems, found by `ngram` consecutive words or as a whole question.

    The problems are those that an evaluation of the same run draws: the first `problems` of each task, or all if there are
    fewer. Training questions show which n-grams belong to the task rather than to one problem.
    """

    # tasks whose held-out problems are removed
    tasks: tuple[Task, ...]
    # problems per task
    problems: int = 1000
    # consecutive words that identify a problem
    ngram: int = 13

    def __post_init__(self) -> None:
        check_fields(self, "decontaminate")
        check_positive(self, "decontaminate", "problems", "ngram")

    def decontaminator(self, run: StageRun) -> Decontaminator:
        """Finds these problems in documents."""
        held_out, trained = dict[str, list[str]](), dict[str, list[str]]()
        for task in self.tasks:  # two tasks may have the same name
            seed = run.seed("exam", task.name)
            held_out.setdefault(task.name, []).extend(tasks.drawn_questions(task, "held_out", self.problems, seed))
            trained.setdefault(task.name, []).extend(tasks.drawn_questions(task, "train", self.problems, seed))
        return Decontaminator(held_out, trained, self.ngram)


@dataclass(frozen=True, kw_only=True)
class Prepare(Stage):
    """Writes tokenizer.json, <source>.train.bin, <source>.valid.bin and sources.json."""

    # sources of real text
    text: tuple[Chitchat | Files | Hub | PackageSource, ...] = field(default_factory=tuple)
    # sources of generated text
    tasks: tuple[TaskText, ...] = field(default_factory=tuple)
    # vocabulary size of the tokenizer, special tokens included
    vocab_size: int = 1024
    # use this model's tokenizer, to continue its training, instead of training a new one
    vocabulary: str = ""
    # share of real dialogues into which a problem of the first of `tasks` is inserted
    interleave: float = 0.0
    # rules that drop low-quality text
    quality: Quality | None = None
    # drop near-duplicates, also of documents in earlier sources
    near: NearDuplicates | None = None
    # remove exam problems from real text
    decontaminate: Decontaminate | None = None
    # share of plain texts rewritten as fill-in-the-middle; V3: 0.1
    fim: float = 0.0
    # processes of datatrove's executor; 0: this process only, with the same output
    workers: int = 0
    # tokens per file of a shard
    shard_tokens: int = pack.LARGE

    watched: ClassVar[frozenset[str]] = frozenset({"text"})

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [s.name for s in (*self.text, *self.tasks)]
        bad = [name for name in names if not re.fullmatch(r"[\w-]+", name)]
        if bad:
            remedy = "Name sources with letters, digits, - and _."
            raise UserError(f"{self.name}.text", bad[0], "not a file name", remedy)
        if not names or len(set(names)) < len(names):
            raise UserError(f"{self.name}.text", names, "needs at least one source, with distinct names", "Name them.")
        check_share(self, self.name, "fim")
        if self.workers < 0:
            raise self.wrong("workers", "below 0", "Use 0 for this process only.")
        check_positive(self, self.name, "shard_tokens")

    def inputs(self) -> tuple[str, ...]:
        return (self.vocabulary,) if self.vocabulary else ()

    def declaration(self) -> Declaration:
        return Declaration("data", results=("sources",))

    def run(self, run: StageRun) -> dict[str, Any]:
        results: dict[str, Any] | None = {}
        try:
            results = self._prepare(run) if run.is_writer else {}
        except Interrupted:
            results = None
        if run.ranks.any(results is None):  # the other ranks wait here for the writer
            raise Interrupted
        return results or {}

    def _prepare(self, run: StageRun) -> dict[str, Any]:
        """Prepares the sources one by one, then the tokenizer, then the shards; reuses what an interrupted call finished."""
        decontaminator = self.decontaminate.decontaminator(run) if self.decontaminate else None
        signer = MinHashSigner(self.near, run.seed("near")) if self.near else None
        rules = CleaningRules(self.quality, decontaminator, signer)
        index = SignatureIndex(self.near) if self.near else None
        corpus = Corpus(run, rules, index, ExecutorConfig(self.workers, shard_tokens=self.shard_tokens))
        if not corpus.claim(self.text):
            (run.folder / "tokenizer.json").unlink(missing_ok=True)
        record = self._collect(run, corpus)
        vocabulary = self._tokenizer(run, corpus)
        for name, about in record.items():
            # task text is split by problem, not by document, so no document is set aside for validation here
            validation = name not in {made.name for made in self.tasks}
            about |= corpus.write(name, vocabulary, validation, self.fim, run.seed("fim"))
            run.say(f"{self.name:10} {name}: {about['train_tokens']:,} tokens, {about['licence']}")
        write_json(run.folder / "sources.json", record)
        corpus.finish()
        return {"sources": record}

    def _collect(self, run: StageRun, corpus: Corpus) -> dict[str, dict[str, Any]]:
        """Writes the documents of all sources to disk; returns their statistics and origin."""
        rng = random.Random(run.seed("interleave"))
        mixes = bool(self.tasks) and self.interleave > 0

        def mix(document: Document) -> Document:
            return _interleave(document, self.tasks[0], self.interleave, rng) if mixes else document

        record = {source.name: corpus.gather(source, mix, rng) for source in self.text}
        for made in self.tasks:
            exams = ExamQuestions(run)
            documents = exams.outside(made.tasks, made.generate(run.seed("tasks", made.name)))
            record[made.name] = corpus.generate(made.name, made.licence, documents, made.documents)
            if exams.left_out:
                record[made.name]["documents"]["contaminated"] = exams.left_out.total()
                run.say(f"{self.name:10} {made.name}: {exams.remark('documents')}")
        return record

    def _tokenizer(self, run: StageRun, corpus: Corpus) -> Tokenizer:
        """A tokenizer trained on at most the first 20,000 documents of each source."""
        path = run.folder / "tokenizer.json"
        if self.vocabulary:
            given = Tokenizer(run.input(self.vocabulary))
            if given.eos < 0:
                problem = "its tokenizer has no end-of-sequence token"
                remedy = "Add eos_token to its tokenizer_config.json."
                raise self.wrong("vocabulary", problem, remedy)
            given.save(run.folder)
            return Tokenizer(run.folder)
        if not path.is_file():
            run.say(f"{self.name:10} training a tokenizer of {self.vocab_size} entries")
            made = tokenizer.train(corpus.sample(SAMPLE), self.vocab_size, corpus.folder / path.name)
            made.path.replace(path)
        return Tokenizer(path)


def origin(source: Source | TaskText, documents: int) -> dict[str, Any]:
    """Where the documents come from, for provenance."""
    if isinstance(source, TaskText):
        return {"licence": source.licence, "documents": {"kept": documents}}
    return provenance(source, source.files()) | {"documents": {"kept": documents}}


def _interleave(document: Document, made: TaskText, share: float, rng: random.Random) -> Document:
    """With probability `share`, inserts a problem and its answer between two turns; half of these dialogues end there.

    This teaches a model to switch between dialogue and arithmetic. Validation documents are not changed.
    """
    chosen = rng.random() < share
    if not chosen or not document.messages or pack.is_validation(document.plain):
        return document
    problem = tasks.draw(rng.choice(made.tasks), "train", rng)
    place, ends = 2 * rng.randint(0, len(document.messages) // 2), rng.random() < 0.5
    chain = problem.solution if ends and rng.random() < made.think else ""
    asked = (Message("user", problem.question), Message("assistant", problem.answer, chain))
    rest = () if ends else document.messages[place:]
    mixed = Document((*document.messages[:place], *asked, *rest))
    return document if pack.is_validation(mixed.plain) else mixed
