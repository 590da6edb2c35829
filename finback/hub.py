"""Data sets of the Hugging Face hub, read with the package `datasets`: their rows and their commit. Does not import torch."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finback.config import UserError
from finback.extras import how_to_get

_COMMIT = re.compile(r"[0-9a-f]{40}")
_REMEDY = "Check the name, the subset, the split and the connection (a gated set needs `hf auth login`), or name a local file."


@dataclass(frozen=True)
class HubRows:
    """One split of a data set: owner/name, owner/name@revision, or a folder that `datasets` reads."""

    name: str
    subset: str = ""
    split: str = "train"
    # a commit, tag or branch; "": what follows the @ in the name, else the newest commit
    revision: str = ""
    # data files to read instead of those that the data set declares
    files: str = ""

    def load(self, field: str) -> Any:
        """All rows in order. Raises UserError about `field` if neither the hub nor the cache has them."""
        datasets, (name, revision) = self._library(field), self.named()
        subset, files = self.subset or None, self.files or None
        try:
            rows = datasets.load_dataset(name, subset, split=self.split, revision=revision, data_files=files)
        except Exception as error:  # `datasets` raises its own errors and those of the hub, HTTP and the file system
            reason = " ".join(str(error).split())[:300]
            problem = f"subset {self.subset!r}, split {self.split!r} could not be loaded from the hub: {reason}"
            raise UserError(field, self.name, problem, _REMEDY) from None
        made = getattr(rows, "cache_files", ())
        commit = Path(made[0]["filename"]).parent.name if made else ""
        pinned = _COMMIT.fullmatch(revision or "") and _COMMIT.fullmatch(commit)
        if pinned and revision != commit:  # offline, the package silently uses the newest cached commit
            problem = f"the cache has commit {commit[:12]}, not {str(revision)[:12]}"
            raise UserError(field, self.name, problem, "Go online once, or name the cached commit.")
        return rows

    def version(self) -> str:
        """A string that changes when the rows change: "commit …", or a folder's SHA-256; "" if neither is known.

        Offline this is the cached commit, which is also the one that would be read.
        """
        if Path(self.name).is_dir():
            return _digest(Path(self.name))
        name, revision = self.named()
        try:
            datasets = self._library("")
            builder = datasets.load_dataset_builder(
                name, self.subset or None, revision=revision, data_files=self.files or None
            )
        except Exception:  # `load` reports what is wrong
            return ""
        return f"commit {builder.hash}" if builder.hash else ""

    def named(self) -> tuple[str, str | None]:
        """The name that the package expects, and the revision."""
        if Path(self.name).exists():
            return self.name, self.revision or None
        name, _, revision = self.name.partition("@")
        return name, self.revision or revision or None

    def _library(self, field: str) -> Any:
        try:
            import datasets
        except ImportError:
            problem = "the package datasets is not installed"
            raise UserError(field, self.name, problem, how_to_get("hub")) from None
        return datasets


def _digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's files, without hidden ones."""
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in name.parts):
            with path.open("rb") as handle:
                whole.update(f"{name}\0{hashlib.file_digest(handle, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()
