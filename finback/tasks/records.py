"""Records of a user's data: JSON objects from a file or the Hugging Face hub, read once. Does not import torch."""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from finback import readers
from finback.config import UserError, check_characters, did_you_mean
from finback.hub import HubRows
from finback.tasks.task import Problem

_HUB = "hub:"


class Record(NamedTuple):
    """A JSON object and its location, such as "my.jsonl:12"."""

    where: str
    fields: dict[str, Any]

    def value(self, name: str) -> Any:
        """The value of a required field."""
        if name not in self.fields:
            known = did_you_mean(name, self.fields)
            raise UserError(self.where, name, f"the record has no such field. {known}", "Name the field in the recipe.")
        return self.fields[name]

    def text(self, *names: str) -> str:
        """The text (or number) of the first of these fields that exists; it must not be empty."""
        name = next((name for name in names if name in self.fields), names[0])
        value = self.value(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if is_number or (isinstance(value, str) and value.strip()):
            return str(value)
        raise UserError(f"{self.where} {name}", value, "expected text", "Correct or remove the record.")

    def texts(self, name: str) -> list[str]:
        """A field that is a list of strings."""
        value = self.value(name)
        if not isinstance(value, list) or not value or not all(isinstance(part, str) for part in value):
            raise UserError(f"{self.where} {name}", value, "expected a list of texts", "Correct the record.")
        return value

    def tags(self, **names: str) -> dict[str, int | str]:
        """Strings and integers among the given fields, under the names that a problem uses."""
        values = {tag: self.fields.get(name) for tag, name in names.items()}
        return {k: v for k, v in values.items() if isinstance(v, (int, str)) and not isinstance(v, bool)}


@dataclass(frozen=True)
class RecordTask:
    """A task with one problem per record; of problems with the same canonical form, the first counts."""

    # a .jsonl, .ndjson, .json, .csv, .tsv or .parquet file, optionally with .gz or .zst, or hub:owner/name
    # (hub:owner/name@revision)
    source: str
    # subset of a hub data set, such as main
    subset: str = ""
    # split of a hub data set
    split: str = "train"
    # field that holds the question
    question_field: str = "question"
    # field that holds the gold answer
    answer_field: str = "answer"
    # text appended to every question
    instruction: str = ""
    # name in tables
    label: str = ""

    @property
    def name(self) -> str:
        """The label, or the file's name without its ending."""
        return self.label or self.source.rsplit("/", 1)[-1].rsplit(".", 1)[0]

    def content_files(self) -> dict[str, list[Path]]:
        """The user's files, by the field that names them."""
        return {} if self.source.startswith(_HUB) else {"source": [Path(self.source)]}

    def content_versions(self) -> dict[str, str]:
        """The version of a hub data set, by the field that names it."""
        if not self.source.startswith(_HUB):
            return {}
        return {"source": HubRows(self.source.removeprefix(_HUB), self.subset, self.split).version()}

    def draw(self, rng: random.Random) -> Problem:
        """A problem of the file, uniformly."""
        return rng.choice(self.all_problems)

    def problems(self) -> Iterator[tuple[Problem, Any]]:
        """The problems of all records, each with what its check needs."""
        raise NotImplementedError

    @cached_property
    def by_key(self) -> dict[str, tuple[Problem, Any]]:
        """Problems and what their checks need, by canonical form."""
        found: dict[str, tuple[Problem, Any]] = {}
        for problem, more in self.problems():
            found.setdefault(problem.key, (problem, more))
        return found

    @cached_property
    def all_problems(self) -> tuple[Problem, ...]:
        """Every distinct problem, from both sides of the split."""
        return tuple(problem for problem, _ in self.by_key.values())


def read(source: str, subset: str, split: str, revision: str = "", files: str = "") -> tuple[Record, ...]:
    """All records of a file, of `hub:owner/name`, or of a folder with a copy of a hub data set; UserError if there are none.

    `revision` is a commit of the data set; `files` replaces the data files it declares (for data sets with a script).
    """
    if source.startswith(_HUB):
        return _from_hub(source, subset, split, revision, files)
    path = Path(source)
    if not path.is_file():
        names = [p.name for p in path.parent.glob("*.json*")] if path.parent.is_dir() else []
        raise UserError("source", source, f"no such file. {did_you_mean(path.name, names)}", "Correct the path.")
    stat = path.stat()
    return _from_file(source, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=16)
def _from_file(source: str, changed: int, size: int) -> tuple[Record, ...]:
    path = Path(source)
    if readers.kind(path) not in readers.RECORDS:
        remedy = "Use .jsonl (one JSON object per line), .json (a list of them), .csv, .tsv or .parquet."
        raise UserError("source", source, "not a supported file type", remedy)
    if not size:
        raise UserError("source", source, "the file has no records", "Use another file.")
    return tuple(_record(value, where) for where, value in readers.records(path, "source"))


@lru_cache(maxsize=16)
def _from_hub(source: str, subset: str, split: str, revision: str, files: str) -> tuple[Record, ...]:
    rows = HubRows(source.removeprefix(_HUB), subset, split, revision, files).load("source")
    return tuple(_record(dict(row), f"{source} {split}: record {n}") for n, row in enumerate(rows, start=1))


def _record(value: Any, where: str) -> Record:
    if isinstance(value, UserError):
        raise UserError(where, value.value, value.problem, value.remedy)
    if not isinstance(value, dict):
        raise UserError(where, value, "not a JSON object", 'Write for example {"question": "…", "answer": "…"}.')
    check_characters(value, json.dumps(value, default=str), where)
    return Record(where, value)
