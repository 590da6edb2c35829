"""Raw text and task problems -> cleaned documents -> tokenizer -> token shards with their provenance."""

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

SAMPLE = 20_000  # documents of each source that the tokenizer learns from


@dataclass(frozen=True)
class TaskText:
    """Problems of a task written out, some answered at once and some with the worked chain before the answer.

    `think` is the share with a chain. `tasks` take turns, so a curriculum is a list. No held-out problem is used.
    A share of `follow_up` goes on with a second problem and as many of those with a third, as dialogues do; like in
    a real prompt, only the last answer then shows its chain.
    """

    # they take turns
    tasks: tuple[Task, ...]
    # how many to write
    documents: int
    # share with a worked chain before the answer
    think: float = 0.5
    # share that goes on with another problem
    follow_up: float = 0.0
    # of the source, as `mixture` and the tables name it
    name: str = "tasks"
    # SPDX identifier, for the documents of a published model
    licence: str = "MIT (generated here)"

    def __post_init__(self) -> None:
        check_fields(self, self.name)
        check_share(self, self.name, "think", "follow_up")
        if not self.tasks:
            raise UserError(f"{self.name}.tasks", self.tasks, "no tasks to write out", "Name at least one.")
        check_positive(self, self.name, "documents")

    def generate(self, seed: int) -> Iterator[Document]:
        """`documents` dialogues of a question and its answer, some with one or two more."""
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
    """Keep the held-out problems of tasks out of real text, by `ngram` words in a row or as a whole question.

    The problems are those that an evaluation of the same run draws, its first `problems` of each task; of a task that has
    fewer, all. Questions of the training side say which words are the task's and not a problem's.
    """

    # whose held-out problems stay out
    tasks: tuple[Task, ...]
    # so many of each task
    problems: int = 1000
    # words in a row that give a problem away
    ngram: int = 13

    def __post_init__(self) -> None:
        check_fields(self, "decontaminate")
        check_positive(self, "decontaminate", "problems", "ngram")

    def decontaminator(self, run: StageRun) -> Decontaminator:
        """What finds the problems in a document."""
        held_out, trained = dict[str, list[str]](), dict[str, list[str]]()
        for task in self.tasks:  # two may have one name
            seed = run.seed("exam", task.name)
            held_out.setdefault(task.name, []).extend(tasks.drawn_questions(task, "held_out", self.problems, seed))
            trained.setdefault(task.name, []).extend(tasks.drawn_questions(task, "train", self.problems, seed))
        return Decontaminator(held_out, trained, self.ngram)


@dataclass(frozen=True, kw_only=True)
class Prepare(Stage):
    """Write tokenizer.json, <source>.train.bin, <source>.valid.bin and sources.json."""

    # real text
    text: tuple[Chitchat | Files | Hub | PackageSource, ...] = field(default_factory=tuple)
    # generated text
    tasks: tuple[TaskText, ...] = field(default_factory=tuple)
    # entries of the tokenizer that is made, special tokens included
    vocab_size: int = 1024
    # take the tokenizer of this model, to go on training it, instead of making one
    vocabulary: str = ""
    # share of real dialogues in which somebody asks a problem of the first of `tasks`
    interleave: float = 0.0
    # rules that drop poor text
    quality: Quality | None = None
    # drop near duplicates, also of earlier sources
    near: NearDuplicates | None = None
    # keep the problems of exams out of real text
    decontaminate: Decontaminate | None = None
    # share of plain texts that ask for their middle; V3: 0.1
    fim: float = 0.0
    # processes of datatrove's executor; 0: this process alone, with the same outputs
    workers: int = 0
    # tokens of one file of a shard
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
            raise UserError(f"{self.name}.text", names, "sources need distinct names, and one at least", "Name them.")
        check_share(self, self.name, "fim")
        if self.workers < 0:
            raise self.wrong("workers", "below 0", "Use 0 for this process alone.")
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
        if run.ranks.any(results is None):  # the others have waited here for the writer
            raise Interrupted
        return results or {}

    def _prepare(self, run: StageRun) -> dict[str, Any]:
        """Sources one after the other, then the tokenizer, then shards; what an interrupted call finished stays."""
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
            # task text is split by problem, not by document, so none of it is set aside here
            validation = name not in {made.name for made in self.tasks}
            about |= corpus.write(name, vocabulary, validation, self.fim, run.seed("fim"))
            run.say(f"{self.name:10} {name}: {about['train_tokens']:,} tokens, {about['licence']}")
        write_json(run.folder / "sources.json", record)
        corpus.finish()
        return {"sources": record}

    def _collect(self, run: StageRun, corpus: Corpus) -> dict[str, dict[str, Any]]:
        """The documents of all sources onto the disk; what is known of each."""
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
        """A tokenizer of no more than 20,000 documents of each source, the first ones."""
        path = run.folder / "tokenizer.json"
        if self.vocabulary:
            given = Tokenizer(run.input(self.vocabulary))
            if given.eos < 0:
                problem = "its tokenizer names no token that ends a text"
                remedy = "Put eos_token into its tokenizer_config.json."
                raise self.wrong("vocabulary", problem, remedy)
            given.save(run.folder)
            return Tokenizer(run.folder)
        if not path.is_file():
            run.say(f"{self.name:10} training a tokenizer of {self.vocab_size} entries")
            made = tokenizer.train(corpus.sample(SAMPLE), self.vocab_size, corpus.folder / path.name)
            made.path.replace(path)
        return Tokenizer(path)


def origin(source: Source | TaskText, documents: int) -> dict[str, Any]:
    """Where documents come from, for the record."""
    if isinstance(source, TaskText):
        return {"licence": source.licence, "documents": {"kept": documents}}
    return provenance(source, source.files()) | {"documents": {"kept": documents}}


def _interleave(document: Document, made: TaskText, share: float, rng: random.Random) -> Document:
    """With chance `share`, a problem and its answer between two turns of a dialogue; half the time it ends there.

    So a model learns to change from dialogue to sums and back. Validation documents stay as they are.
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
