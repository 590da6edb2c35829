"""Real text from installed packages, so that a sizeable corpus needs only pip or apt."""

import gzip
import importlib.util
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from finback.config import UserError, check_fields
from finback.data.html_text import plain
from finback.data.sources import Document, Source
from finback.readers import BytesRead


@dataclass(frozen=True)
class PackageSource(Source):
    """Text of an installed package: files of a Python module, or of a Debian package under `root`."""

    # name of the source in `mixture` and in tables
    name: str
    # SPDX identifier
    licence: str
    # the package that contains it
    package: str
    # format of its files
    form: Literal["aws", "google", "wordnet", "html"]
    # its files, relative to the module or the root
    pattern: str
    # Python module; "" for a Debian package
    module: str = ""
    # folder into which a .deb was unpacked with dpkg-deb -x
    root: str = "/"

    def __post_init__(self) -> None:
        check_fields(self, self.name)

    @property
    def install(self) -> str:
        """The command that installs it."""
        return f"{'pip' if self.module else 'apt'} install {self.package}"

    def files(self) -> list[Path]:
        folder = Path(self.root)
        if self.module:
            spec = importlib.util.find_spec(self.module)
            folder = Path(spec.origin).parent if spec and spec.origin else Path(self.module)
        found = sorted(path for path in folder.glob(self.pattern) if path.is_file())
        if not found:
            raise UserError("source", self.name, f"the package {self.package} is not installed", self.install)
        return found

    def read(self, path: Path, bytes_read: BytesRead | None = None) -> Iterator[Document]:
        match self.form:
            case "aws":
                texts = _json(path, "documentation")
            case "google":
                texts = _json(path, "description")
            case "wordnet":
                texts = _wordnet(path)
            case "html":
                texts = _page(path)
        yield from (Document(text=text) for text in texts if text)
        if bytes_read:
            bytes_read.count += path.stat().st_size

    def at(self, root: str) -> "PackageSource":
        """The same text of a Debian package that was unpacked elsewhere."""
        return replace(self, root=root)


AWS = PackageSource("aws", "Apache-2.0", "botocore", "aws", "data/*/*/service-2.json*", "botocore")
GOOGLE = PackageSource(
    "google", "Apache-2.0", "google-api-python-client", "google", "discovery_cache/documents/*.json", "googleapiclient"
)
WORDNET = PackageSource("wordnet", "WordNet 3.0", "wordnet-base", "wordnet", "usr/share/wordnet/data.*")
PYTHON = PackageSource("python", "PSF-2.0", "python3-doc", "html", "usr/share/doc/python3.*[0-9]/html/**/*.html")
POSTGRES = PackageSource(
    "postgres", "PostgreSQL", "postgresql-doc", "html", "usr/share/doc/postgresql-doc-*/html/*.html"
)


def _json(path: Path, key: str) -> Iterator[str]:
    """All texts under a key of a JSON file, which may be compressed, without their HTML markup."""
    raw = path.read_bytes()
    return map(plain, _strings(json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw), key))


def _strings(value: Any, key: str) -> Iterator[str]:
    """All strings under a key, at any depth, in file order."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name == key and isinstance(inner, str):
                yield inner
            else:
                yield from _strings(inner, key)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner, key)


def _wordnet(path: Path) -> Iterator[str]:
    """ "word, word: definition; "an example" of each synset; for the format see wndb(5)."""
    for line in path.read_text(encoding="utf-8").splitlines():
        data, bar, gloss = line.partition(" | ")
        if bar and not line.startswith(" "):
            fields = data.split()
            words = [re.sub(r"\(\w+\)$", "", word) for word in fields[4 : 4 + 2 * int(fields[3], 16) : 2]]
            yield f"{', '.join(words).replace('_', ' ')}: {gloss.strip()}"


def _page(path: Path) -> Iterator[str]:
    if not path.name.startswith(("genindex", "contents")):  # lists of links
        yield plain(path.read_text(encoding="utf-8", errors="replace"))
