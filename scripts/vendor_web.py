"""Fetches the libraries of the web page from npm, at pinned versions, into finback/serve/web/vendor.

Needs `npm`, which only downloads (no code of a package is run), and `pip install fonttools[woff]`, which subsets the
font. Every package is checked against its digest below before its files are copied, and vendor.json records their
package, licence and SHA-256. `--check` compares the existing files with vendor.json and needs no network.
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "finback/serve/web/vendor"
TESTS = ROOT / "tests/data"
LANGUAGES = (
    "bash",
    "c",
    "cpp",
    "css",
    "diff",
    "go",
    "java",
    "javascript",
    "json",
    "latex",
    "markdown",
    "python",
    "rust",
    "sql",
    "typescript",
    "xml",
    "yaml",
)
# Latin, Greek, letter-like signs, arrows, operators, brackets, technical and geometric signs, the alphabets of mathematics
MATH_CHARACTERS = (
    *(range(0x20, 0x7F), range(0xA0, 0x180), range(0x2B0, 0x400), range(0x2000, 0x2070), range(0x20D0, 0x2100)),
    *(range(0x2100, 0x2400), range(0x25A0, 0x2700), range(0x27C0, 0x2800), range(0x2900, 0x2C00)),
    range(0x1D400, 0x1D800),
)
MATH_FONT = "STIXTwoMath.woff2"
MATH_FEATURES = ("ssty", "dtls", "flac")  # smaller forms in exponents, letters without their dots under accents


@dataclass(frozen=True)
class Package:
    """One npm package: which files are copied, under which names, and with which changes."""

    name: str
    version: str
    licence: str
    sha256: str  # of the package as npm packs it
    files: Mapping[str, str]  # path inside the package -> name here
    edits: Sequence[tuple[str, str]] = field(default_factory=tuple)  # texts replaced, each found exactly once
    exports: str = ""  # the global that a script without modules defines


PACKAGES = (
    Package(
        "preact",
        "11.2.0",
        "MIT",
        "3c4456766bd32b6b534d52bf4e9c2a29b33e7eedf6e96ed479300ba1a7888ebf",
        {"dist/preact.mjs": "preact.js"},
    ),
    Package(  # a browser finds no "preact" without an import map, which the page's policy forbids
        "preact",
        "11.2.0",
        "MIT",
        "3c4456766bd32b6b534d52bf4e9c2a29b33e7eedf6e96ed479300ba1a7888ebf",
        {"hooks/dist/hooks.mjs": "hooks.js"},
        edits=(('from"preact"', 'from"./preact.js"'),),
    ),
    Package(
        "htm",
        "3.1.1",
        "Apache-2.0",
        "2425b9bee11409177bcabc7f32e319926fc6690c1701c0b257c88bdff2d5ba90",
        {"dist/htm.module.js": "htm.js"},
    ),
    Package(
        "marked",
        "18.2.1",
        "MIT",
        "d66c5213fc203466186060105b01f51896764ba64b3797d2620d02e28e34b8ca",
        {"lib/marked.esm.js": "marked.js"},
    ),
    Package(
        "dompurify",
        "3.4.18",
        "MPL-2.0 OR Apache-2.0",
        "8b86f79c6481fec23dd81d4de32179422668912ed033c0c47e786a6e70cb3379",
        {"dist/purify.es.mjs": "purify.js"},
    ),
    Package(
        "temml",
        "0.13.5",
        "MIT",
        "bca5b76dd26d1d6c81f8d817f6cc8bf0f0a1a7787512e281d5c22b986f8ae582",
        {"dist/temml.min.js": "temml.js"},
        exports="temml",
    ),
    Package(
        "temml",
        "0.13.5",
        "MIT",
        "bca5b76dd26d1d6c81f8d817f6cc8bf0f0a1a7787512e281d5c22b986f8ae582",
        {"dist/Temml-Local.css": "temml.css", "dist/Temml.woff2": "Temml.woff2"},
    ),
    Package(
        "@highlightjs/cdn-assets",
        "11.12.0",
        "BSD-3-Clause",
        "b8a006d30f45afe783072569f3d69c5b60c0e7b9ca28cd474e12f2584e2a3bd9",
        {"es/core.min.js": "highlight.js"} | {f"es/languages/{n}.min.js": f"languages/{n}.js" for n in LANGUAGES},
    ),
    Package(
        "uplot",
        "1.6.32",
        "MIT",
        "4b8a8191e425658e3ea8c8c1314b0fc679c861ee3a1af2b20c7b16ba50b5133d",
        {"dist/uPlot.iife.min.js": "uplot.js"},
        exports="uPlot",
    ),
    Package(
        "uplot",
        "1.6.32",
        "MIT",
        "4b8a8191e425658e3ea8c8c1314b0fc679c861ee3a1af2b20c7b16ba50b5133d",
        {"dist/uPlot.min.css": "uplot.css"},
    ),
    Package(  # its MATH table is what makes brackets grow
        "@fontsource/stix-two-math",
        "5.3.0",
        "OFL-1.1",
        "948de1b5470fbbd745fedbe6135797454fe833d94feecc6f2073cd771fe2f5fd",
        {"files/stix-two-math-latin-400-normal.woff2": MATH_FONT},
    ),
)
AXE = Package(
    "axe-core",
    "4.14.1",
    "MPL-2.0",
    "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
    {"axe.min.js": "axe.min.js"},
)


def main() -> None:
    """Fetches everything again, or checks the existing files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare the files with vendor.json and exit")
    if parser.parse_args().check:
        wrong = damaged(TARGET)
        raise SystemExit(f"changed since they were fetched: {', '.join(wrong)}" if wrong else 0)
    with tempfile.TemporaryDirectory() as folder:
        record = [taken(package, Path(folder), TARGET) for package in PACKAGES]
        taken(AXE, Path(folder), TESTS)
    (TARGET / "vendor.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def taken(package: Package, folder: Path, target: Path) -> dict[str, object]:
    """Copies a package's files and licence into `target`; returns its entry in vendor.json."""
    archive = packed(package, folder)
    files: dict[str, str] = {}
    with tarfile.open(archive) as tar:
        for inside, name in package.files.items():
            content = subset(_read(tar, inside)) if name == MATH_FONT else edited(package, name, _read(tar, inside))
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            files[name] = hashlib.sha256(content).hexdigest()
        licence = f"licences/{package.name.split('/')[0].lstrip('@')}.txt"
        if target == TARGET:
            (target / licence).parent.mkdir(exist_ok=True)
            (target / licence).write_bytes(_read(tar, "LICENSE"))
    return {
        "package": f"{package.name}@{package.version}",
        "licence": package.licence,
        "licence_text": licence,
        "package_sha256": package.sha256,
        "files": files,
    }


def packed(package: Package, folder: Path) -> Path:
    """The package's archive, as pinned; SystemExit if npm delivers another one."""
    wanted = f"{package.name}@{package.version}"
    command = ["npm", "pack", wanted, "--silent", "--ignore-scripts"]
    name = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
    archive = folder / name
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != package.sha256:
        raise SystemExit(f"{wanted}: SHA-256 is {found}, expected {package.sha256}")
    return archive


def edited(package: Package, name: str, content: bytes) -> bytes:
    """A file as it is served: without its link to a source map, with a default export and the package's edits."""
    if not name.endswith(".js") or package is AXE:
        return content
    lines = [line for line in content.decode().splitlines() if not line.startswith("//# sourceMappingURL")]
    text = "\n".join(lines) + "\n"
    for old, new in package.edits:
        assert text.count(old) == 1, f"{name}: {old!r} occurs {text.count(old)} times"
        text = text.replace(old, new)
    return (text + (f"export default {package.exports};\n" if package.exports else "")).encode()


def subset(font: bytes) -> bytes:
    """The characters and forms that mathematics needs; includes the sizes and pieces of growing symbols."""
    from fontTools import subset as cutter

    options = cutter.Options(layout_features=list(MATH_FEATURES), flavor="woff2", hinting=False)
    found, written = cutter.load_font(io.BytesIO(font), options), io.BytesIO()
    cut = cutter.Subsetter(options)
    cut.populate(unicodes=[code for some in MATH_CHARACTERS for code in some])
    cut.subset(found)
    cutter.save_font(found, written, options)
    return written.getvalue()


def damaged(target: Path) -> list[str]:
    """Names of files that differ from vendor.json, are missing, or are not listed in it."""
    known = {"vendor.json": ""}
    for entry in json.loads((target / "vendor.json").read_text(encoding="utf-8")):
        known |= entry["files"] | {entry["licence_text"]: ""}
    there = {p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()}
    changed = [
        n for n in there & set(known) if known[n] and hashlib.sha256((target / n).read_bytes()).hexdigest() != known[n]
    ]
    return sorted(changed + list(there ^ set(known)))


def _read(tar: tarfile.TarFile, inside: str) -> bytes:
    handle = tar.extractfile(f"package/{inside}")
    assert handle is not None, f"{inside} is not a file"
    return handle.read()


if __name__ == "__main__":
    main()
