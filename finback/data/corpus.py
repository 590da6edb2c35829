"""Turns sources into shards: read and clean, store, encode, write; each step of a source is done only once.

work/stamps.json          size and time of the source files; if they change, the folder is discarded
work/<source>.read.json   written when a source has been read and cleaned
work/<source>.pack.json   written when its shards are complete
"""

import importlib.metadata
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from finback.config import UserError
from finback.data import datatrove_executor, document_store, near_duplicates, pack
from finback.data.clean import CheckedDocument, CleaningRules, DocumentFilter, check
from finback.data.corpus_passes import EncodePass, ReadPass, encode_sides, read_checked, read_encoded
from finback.data.document_store import DocumentWriter
from finback.data.near_duplicates import SignatureIndex
from finback.data.package_sources import PackageSource
from finback.data.sources import Document, Hub, Source, digest
from finback.data.tokenizer import Tokenizer
from finback.readers import BytesRead
from finback.runs.files import read_json, write_json
from finback.runs.folder import Interrupted, StageRun
from finback.runs.progress import Progress

Record = dict[str, Any]


@dataclass(frozen=True)
class ExecutorConfig:
    """Number of processes, and size of their pieces of work."""

    # processes of datatrove's executor; 0: this process only
    workers: int = 0
    # documents per piece of work
    segment_documents: int = document_store.SEGMENT
    # tokens per file of a shard
    shard_tokens: int = pack.LARGE


class Corpus:
    """A prepare stage's data on disk between its passes."""

    def __init__(
        self, run: StageRun, rules: CleaningRules, index: SignatureIndex | None, executor: ExecutorConfig
    ) -> None:
        self.stage_run, self.rules, self.index, self.executor = run, rules, index, executor
        self.folder = run.folder / "work"
        self.documents: dict[str, int] = {}  # documents kept of each source

    def claim(self, sources: Sequence[Source]) -> bool:
        """Whether data of an interrupted call can be reused: only if the files have not changed."""
        stamps: Record = {
            s.name: [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in s.files()] for s in sources
        }
        stamps |= {s.name: s.content_versions() for s in sources if isinstance(s, Hub)}
        self._name_shared(sources)
        path = self.folder / "stamps.json"
        if path.is_file() and read_json(path) == stamps:
            return True
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        write_json(path, stamps)
        return False

    def _name_shared(self, sources: Sequence[Source]) -> None:
        """Reports files that two sources share, since they are trained on twice."""
        owners: dict[Path, str] = {}
        for source in sources:
            files = [path.resolve() for path in source.files()]
            if shared := [path for path in files if path in owners]:
                both = f"{source.name} and {owners[shared[0]]} both read {shared[0]}"
                more = f" and {len(shared) - 1:,} more" if len(shared) > 1 else ""
                self.stage_run.say(f"{self.stage_run.name:10} {both}{more}")
            owners |= dict.fromkeys(files, source.name)

    def gather(self, source: Source, mix: Callable[[Document], Document], rng: random.Random) -> Record:
        """Reads and cleans a source; `mix` may change kept documents, using random numbers of `rng` only."""
        done = self._marker(source.name, "read")
        if done.is_file():
            return self._known(source.name, read_json(done), rng)
        files, bytes_read = source.files(), BytesRead()
        document_filter = DocumentFilter(source.name, self.index)
        progress = Progress(self.stage_run, sum(p.stat().st_size for p in files), "bytes")
        with self._removed(source.name) as note, self._signatures(source.name) as sign:
            kept = document_filter.sift(self._checked(source, files, bytes_read), note)
            self._store(source.name, (mix(sign(*each)) for each in kept), progress, lambda: bytes_read.count)
        if not document_filter.counts.kept:
            where = f"{self.stage_run.name}.text"
            raise UserError(where, source.name, "nothing left after cleaning", "Give more text.")
        record = provenance(source, files) | {"documents": asdict(document_filter.counts)}
        if skipped := source.skipped():
            record["skipped"] = skipped
            named = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
            self.stage_run.say(f"{self.stage_run.name:10} {source.name}: {len(skipped):,} paths skipped ({named})")
        write_json(done, {"record": record, "kept": document_filter.counts.kept, "rng": rng.getstate()})
        return record

    def generate(self, name: str, licence: str, documents: Iterable[Document], total: int) -> Record:
        """Stores generated documents unchanged."""
        done = self._marker(name, "read")
        if done.is_file():
            return self._known(name, read_json(done), None)
        self._store(name, documents, Progress(self.stage_run, total, "documents"), None)
        record: Record = {"licence": licence, "documents": {"kept": self.documents[name]}}
        write_json(done, {"record": record, "kept": self.documents[name]})
        return record

    def sample(self, most: int) -> Iterator[str]:
        """The words of the first `most` documents of each source."""
        for name in self.documents:
            yield from (document.plain for document in islice(self.read(name), most))

    def read(self, name: str) -> Iterator[Document]:
        """The kept documents of a source."""
        return chain.from_iterable(map(document_store.read_documents, self._segments(name)))

    def write(self, name: str, tokenizer: Tokenizer, validates: bool, fim: float, seed: int) -> Record:
        """Writes a source's shards; with `validates`, one document in twenty goes to validation."""
        done = self._marker(name, "pack")
        if done.is_file():
            return dict(read_json(done))
        paths = [self.stage_run.folder / f"{name}.{side}.bin" for side in ("train", "valid")]
        size, large, valid_bytes = tokenizer.vocab_size, self.executor.shard_tokens, 0
        progress = Progress(self.stage_run, self.documents[name], "documents")
        with pack.ShardWriter(paths[0], size, large) as train, pack.ShardWriter(paths[1], size, large) as valid:
            found = self._encoded(name, tokenizer, validates, fim, seed)
            for number, (ids, counted) in enumerate(found):
                (train if counted < 0 else valid).add(ids)
                valid_bytes += max(counted, 0)
                self._show(progress, number, f"{name} to tokens")
        record = {"train_tokens": train.tokens, "valid_tokens": valid.tokens, "valid_bytes": valid_bytes}
        write_json(done, record)
        return record

    def finish(self) -> None:
        """Deletes files that only the passes needed, and incomplete files of a killed run."""
        shutil.rmtree(self.folder)
        for part in self.stage_run.folder.glob("*.part"):
            part.unlink()

    def _marker(self, name: str, step: str) -> Path:
        return self.folder / f"{name}.{step}.json"

    def _known(self, name: str, found: Record, rng: random.Random | None) -> Record:
        """Restores a source's counts, random state and signatures, as an interrupted call stored them."""
        self.documents[name] = found["kept"]
        if rng:
            version, state, gauss = found["rng"]
            rng.setstate((version, tuple(state), gauss))
        if self.index is not None and rng:
            self.index.load(self.folder / f"{name}.signatures", name)
        return dict(found["record"])

    def _checked(self, source: Source, files: list[Path], bytes_read: BytesRead) -> Iterator[CheckedDocument]:
        rules = replace(self.rules, one_line=not source.has_layout)
        if self.executor.workers and files:
            folder = self.folder / f"{source.name}.reading"
            reading = ReadPass(folder, files, source, rules)
            self._each(reading, len(files), folder, f"files of {source.name}")
            return chain.from_iterable(map(read_checked, reading.parts()))
        documents = (source.read(path, bytes_read) for path in files) if files else [source.documents()]
        return (check(document, rules) for document in chain.from_iterable(documents))

    def _encoded(
        self, name: str, tokenizer: Tokenizer, validates: bool, fim: float, seed: int
    ) -> Iterator[tuple[np.ndarray, int]]:
        if not self.executor.workers:
            return encode_sides(self.read(name), tokenizer, validates, fim, seed)
        segments, folder = self._segments(name), self.folder / f"{name}.encoding"
        encoding = EncodePass(folder, segments, tokenizer.path, validates, fim, seed)
        self._each(encoding, len(segments), folder, f"segments of {name}")
        return chain.from_iterable(map(read_encoded, encoding.parts()))

    def _each(self, task: Callable[[int], None], pieces: int, folder: Path, what: str) -> None:
        progress, workers = Progress(self.stage_run, pieces, what), self.executor.workers
        datatrove_executor.each(task, pieces, workers, folder, lambda done: self._show(progress, done, ""))

    def _segments(self, name: str) -> list[Path]:
        return DocumentWriter(self.folder, name, self.executor.segment_documents).paths(self.documents[name])

    def _store(
        self, name: str, documents: Iterable[Document], progress: Progress, done: Callable[[], float] | None
    ) -> None:
        with DocumentWriter(self.folder, name, self.executor.segment_documents) as written:
            for document in documents:
                written.add(document)
                self._show(progress, done() if done else written.documents, f"{name}: {written.documents:,} kept")
        self.documents[name] = written.documents

    def _show(self, progress: Progress, done: float, note: str) -> None:
        run = self.stage_run
        progress.show(done, note)
        if run.stop_requested:
            raise Interrupted

    @contextmanager
    def _removed(self, name: str) -> Iterator[Callable[[Record], None] | None]:
        """A function that records documents removed for a similarity; None if no rule removes such."""
        if self.rules.decontaminator is None and self.index is None:
            yield None
            return
        path = self.stage_run.folder / f"{name}.removed.jsonl"
        with path.open("w", encoding="utf-8") as handle:
            yield lambda record: print(json.dumps(record), file=handle)

    @contextmanager
    def _signatures(self, name: str) -> Iterator[Callable[[int, CheckedDocument], Document]]:
        """A function that stores signatures of kept documents, for comparison with later sources, also after a restart."""
        with (self.folder / f"{name}.signatures").open("wb") as handle:

            def sign(number: int, checked: CheckedDocument) -> Document:
                if checked.signature is not None:
                    handle.write(near_duplicates.dump_signature(number, checked.signature))
                return checked.document

            yield sign


def provenance(source: Source, files: list[Path]) -> Record:
    """Where a source comes from, for the record."""
    record: Record = {
        "licence": source.licence,
        "files": [str(path) for path in files],
        "bytes": sum(path.stat().st_size for path in files),
        "sha256": digest(files) if files else None,
    }
    if isinstance(source, Hub):
        name, _ = source.hub.named()
        record |= {"hub": name, "split": source.split, "version": source.hub.version()}
    if isinstance(source, PackageSource):
        record["package"] = source.package
        if source.module:
            record["version"] = importlib.metadata.version(source.package)
    return record
