"""Raw text and task problems -> cleaned documents -> tokenizer -> token shards with their provenance."""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from finback.config import UserError, check_fields, check_positive
from finback.data import chat, pack, tokenizer
from finback.data.chat import Message
from finback.data.clean import Counts, clean
from finback.data.sources import Chitchat, Document, Files, digest
from finback.recipe import Stage, Work
from finback.run import StageRun, write_json
from finback.tasks import task as tasks
from finback.tasks.task import Task


@dataclass(frozen=True)
class TaskText:
    """Problems of a task written out, some answered at once and some with the worked chain before the answer.

    `think` is the share with a chain. `tasks` take turns, so a curriculum is a list. No held-out problem is used.
    A share of `follow_up` goes on with a second problem and as many of those with a third, as dialogues do; like in
    a real prompt, only the last answer then shows its chain.
    """

    tasks: tuple[Task, ...]
    documents: int
    think: float = 0.5
    follow_up: float = 0.0
    name: str = "tasks"
    licence: str = "MIT (generated here)"

    def __post_init__(self) -> None:
        check_fields(self, self.name)
        for share in ("think", "follow_up"):
            if not 0 <= getattr(self, share) <= 1:
                raise UserError(
                    f"{self.name}.{share}", getattr(self, share), "a share is between 0 and 1", "Correct it."
                )
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


@dataclass(frozen=True, kw_only=True)
class Prepare(Stage):
    """Write tokenizer.json, <source>.train.bin, <source>.valid.bin and sources.json."""

    text: tuple[Chitchat | Files, ...] = field(default_factory=tuple)  # real text
    tasks: tuple[TaskText, ...] = field(default_factory=tuple)  # generated text
    vocab_size: int = 1024
    interleave: float = (
        0.0  # share of real dialogues in which somebody asks a problem of the first of `tasks`
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        names = [s.name for s in (*self.text, *self.tasks)]
        bad = [name for name in names if not re.fullmatch(r"[\w-]+", name)]
        if bad:
            raise UserError(
                f"{self.name}.text", bad[0], "not a file name", "Name sources with letters, digits, - and _."
            )
        if not names or len(set(names)) < len(names):
            raise UserError(
                f"{self.name}.text", names, "sources need distinct names, and one at least", "Name them."
            )

    def work(self) -> Work:
        return Work()

    def run(self, run: StageRun) -> dict[str, Any]:
        results: dict[str, Any] = {}
        if run.is_writer:
            results = self._prepare(run)
        run.ranks.barrier()
        return results

    def _prepare(self, run: StageRun) -> dict[str, Any]:
        collected: dict[str, list[Document]] = {}
        record: dict[str, dict[str, Any]] = {}
        for source in self.text:
            counts, files = Counts(), source.files()
            collected[source.name] = list(clean(source.documents(), counts))
            if not collected[source.name]:
                raise UserError(
                    f"{self.name}.text", source.name, "nothing left after cleaning", "Give more text."
                )
            record[source.name] = {
                "licence": source.licence,
                "sha256": digest(files),
                "documents": asdict(counts),
            }
        for made in self.tasks:
            collected[made.name] = list(made.generate(run.seed("tasks", made.name)))
            record[made.name] = {"licence": made.licence, "documents": {"kept": len(collected[made.name])}}
        if self.tasks and self.interleave > 0:
            rng = random.Random(run.seed("interleave"))
            for source in self.text:
                documents = collected[source.name]
                collected[source.name] = [
                    _interleave(d, self.tasks[0], self.interleave, rng) for d in documents
                ]
        run.say(f"{self.name:10} training a tokenizer of {self.vocab_size} entries")
        vocabulary = tokenizer.train(
            _sample(collected.values()), self.vocab_size, run.folder / "tokenizer.json"
        )
        for name, documents in collected.items():
            # task text is split by problem, not by document, so none of it is set aside here
            held = pack.is_validation if name not in {t.name for t in self.tasks} else _never
            record[name] |= _write_shards(run, name, documents, vocabulary, held)
            run.say(
                f"{self.name:10} {name}: {record[name]['train_tokens']:,} tokens, {record[name]['licence']}"
            )
        write_json(run.folder / "sources.json", record)
        return {"sources": record}


def _interleave(document: Document, made: TaskText, share: float, rng: random.Random) -> Document:
    """With chance `share`, a problem and its answer between two turns of a dialogue; half the time it ends there.

    So a model learns to change from talk to sums and back. Documents kept for validation stay as they are.
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


def _never(text: str) -> bool:
    return False


def _sample(collections: Iterable[list[Document]]) -> Iterator[str]:
    """What the tokenizer learns from: all real text, and no more than 20,000 documents of each source of problems."""
    for documents in collections:
        yield from (d.plain for d in documents[:20_000])


def _write_shards(
    run: StageRun,
    name: str,
    documents: list[Document],
    vocabulary: tokenizer.Tokenizer,
    held: Callable[[str], bool],
) -> dict[str, Any]:
    sides: dict[str, list[list[int]]] = {"train": [], "valid": []}
    valid_bytes = 0
    for document in documents:
        plain = document.plain
        side = "valid" if held(plain) else "train"
        if document.messages:
            ids = chat.document(document.messages, vocabulary)
        else:
            ids = [vocabulary.bos, *vocabulary.encode(plain), vocabulary.eos]
        sides[side].append(ids)
        if side == "valid":
            valid_bytes += len(plain.encode("utf-8", "surrogatepass"))
    written = {side: pack.write(run.folder / f"{name}.{side}.bin", ids) for side, ids in sides.items()}
    return {"train_tokens": written["train"], "valid_tokens": written["valid"], "valid_bytes": valid_bytes}
