"""Reads the records of published data sets from the hub at one revision, a copy of it, or a file. Does not import torch."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finback.config import check_fields
from finback.tasks.records import Record, read


@dataclass(frozen=True)
class HubDataset:
    """A data set of the Hugging Face hub at one commit.

    A folder in its place must be a copy of the repository (`hf download --repo-type dataset`); a file must hold the records
    of one split of one subset.
    """

    repo: str
    subset: str = ""
    split: str = "test"
    # a commit of 40 hex digits; "" is the newest
    revision: str = ""
    # SPDX identifier from the data set's card, or "unknown"
    licence: str = "unknown"
    # the files to read, for repositories that consist of a script and data
    files: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "origin")

    def records(self, at: str = "") -> tuple[Record, ...]:
        """All records, from the hub or from `at`; UserError names the file, line and field that is wrong."""
        if not at and self.files:
            return read("hub:json", "", "train", files=f"hf://datasets/{self.repo}@{self.revision}/{self.files}")
        if not at:
            return read(f"hub:{self.repo}", self.subset, self.split, self.revision)
        if not Path(at).is_dir():
            return read(at, "", "")
        if self.files:
            return read(str(Path(at) / self.files), "", "")
        return read(f"hub:{at}", self.subset, self.split)

    def name(self, at: str = "") -> str:
        """The name of the source in tables."""
        place = at or f"hub:{self.repo}"
        parts = (self.files or self.subset, self.split) if not at or Path(at).is_dir() else ()
        commit = f"@{self.revision}" if self.revision else "(its newest revision)"
        return " ".join(part for part in (place, *parts, "" if at else commit) if part)


# The published sets by finback's names.
KNOWN = {
    name: HubDataset(**fields)
    for name, fields in json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8")).items()
}


def digest(rows: Iterable[Any]) -> str:
    """SHA-256 over JSON values in order, independent of the file that they came from."""
    total = hashlib.sha256()
    for row in rows:
        total.update(json.dumps(row, ensure_ascii=True, sort_keys=True).encode())
        total.update(b"\n")
    return total.hexdigest()
