"""Build the documentation as a site, offline: collects the pages in build/docs and builds build/site from them.

    python scripts/build_docs.py          warnings, broken links included, are errors
    python scripts/build_docs.py --serve  serves the site, and follows changes in build/docs

The pages of docs/ and of the repository's root are copied into one tree, with the reference that scripts/reference.py
generates. A link to another file of the repository leads to a copy of it, Python files and notebooks as pages; Temml,
which the server's page ships, draws equations. Neither the build nor the site downloads anything.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import reference

ROOT = Path(__file__).parent.parent
PAGES, SITE = ROOT / "build/docs", ROOT / "build/site"
VENDOR = ROOT / "finback/serve/web/vendor"
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)]*)?\))")
FENCE = re.compile(r"(^```+.*?^```+\s*$)", re.M | re.S)
EQUATIONS = """import temml from "./temml.js";
for (const element of document.querySelectorAll(".arithmatex")) {
  const text = element.textContent.trim();
  temml.render(text.slice(2, -2), element, {displayMode: text.startsWith("\\\\["), throwOnError: false});
}
"""


def place(path: Path) -> Path:
    """The path of a file's copy, relative to the folder of pages."""
    name = path.relative_to(ROOT)
    if name == Path("README.md"):
        return Path("index.md")
    if name.parts[0] == "docs":
        return Path(*name.parts[1:])
    if name.suffix == ".md" and len(name.parts) == 1:
        return name
    if name.suffix == ".ipynb":
        return name.with_suffix(".md")
    return Path("files", f"{name}.md" if name.suffix == ".py" else name)


def notebook(path: Path) -> str:
    """A notebook as a page; writes its pictures to the same folder."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{len(parts)}.png"
                (PAGES / place(path)).with_name(name).write_bytes(base64.b64decode(data["image/png"]))
                parts.append(f"![a figure that the cell above draws]({name})")
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"````text\n{text}\n````")
    return "\n\n".join(parts) + "\n"


def lay_out(path: Path, seen: set[Path]) -> None:
    """Copies a page and all that it links to; its links then lead to the copies."""
    if path in seen:
        return
    seen.add(path)
    target = PAGES / place(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".py":
        code = path.read_text(encoding="utf-8")
        target.write_text(f"# {path.relative_to(ROOT)}\n\n````python\n{code}````\n", encoding="utf-8")
        return
    if path.suffix not in (".md", ".ipynb"):
        shutil.copyfile(path, target)
        return

    def led(match: re.Match[str]) -> str:
        there = Path(os.path.normpath(path.parent / match[2]))
        if not there.is_file() or not there.is_relative_to(ROOT):
            return match[0]  # the build reports it
        lay_out(there, seen)
        return match[1] + os.path.relpath(place(there), place(path).parent) + match[3]

    page = notebook(path) if path.suffix == ".ipynb" else path.read_text(encoding="utf-8")
    parts = FENCE.split(page)
    text = "".join(part if part.startswith("```") else LINK.sub(led, part) for part in parts)
    target.write_text(text, encoding="utf-8")


def main() -> int:
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.rmtree(SITE, ignore_errors=True)
    seen: set[Path] = set()
    reference.write(PAGES / "reference")
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]):
        if not path.name.endswith(".in.md"):
            lay_out(path, seen)
    assets = PAGES / "assets"
    assets.mkdir()
    (assets / "equations.js").write_text(EQUATIONS, encoding="utf-8")
    for name in ("temml.js", "temml.css", "Temml.woff2"):
        shutil.copyfile(VENDOR / name, assets / name)
    program = Path(sys.executable).with_name("zensical")
    command = ["serve"] if "--serve" in sys.argv[1:] else ["build", "--clean", "--strict"]
    return subprocess.call([str(program), *command], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
