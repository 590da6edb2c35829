"""Words that the documents and the package's comments do not use, because the field has others for what they meant.

docs/log.md is left out, which keeps the words of its day, and so are the changelog's tables of renamed things.
"""

import ast
import io
import json
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

from tests.toy import ROOT

UNUSED = re.compile(
    r"\b(said|told|news|tickets?|anchors?|aims?|story|distil|distil[es]d?|widened|beside|kept apart|spread out|"
    r"what ends it|so-manieth|no number)\b(?! is given)",
    re.IGNORECASE,
)
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/*/*.md")} - {ROOT / "docs/log.md"})


def prose(page: Path) -> str:
    """A page without code, links' addresses and tables of two names."""
    text = page.read_text(encoding="utf-8")
    for other in (r"^```.*?^```\s*$", r"`[^`\n]*`", r"\]\([^)]*\)", r"^\| `.*$"):
        text = re.sub(other, "", text, flags=re.M | re.S if "```" in other else re.M)
    return text


def comments(source: str) -> Iterator[str]:
    """Comments and docstrings of a Python file."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def test_documents_use_the_fields_words() -> None:
    found = {str(page.relative_to(ROOT)): sorted({m[0] for m in UNUSED.finditer(prose(page))}) for page in PAGES}
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        found[path.name] = sorted({m[0] for m in UNUSED.finditer(text)})
    assert len(found) > 50 and {name: words for name, words in found.items() if words} == {}


def test_comments_use_the_fields_words() -> None:
    files = [*ROOT.glob("finback/**/*.py"), *ROOT.glob("recipes/*.py"), *ROOT.glob("scripts/*.py")]
    found = {}
    for path in files:
        texts = [re.sub(r"`[^`\n]*`", "", text) for text in comments(path.read_text(encoding="utf-8"))]
        found[str(path.relative_to(ROOT))] = sorted({m[0] for text in texts for m in UNUSED.finditer(text)})
    assert len(found) > 400 and {name: words for name, words in found.items() if words} == {}


def test_the_search_finds_words() -> None:
    text = "This is kept apart, beside what was said; no number is given."
    assert [m[0] for m in UNUSED.finditer(text)] == ["kept apart", "beside", "said"]
    assert list(comments('"""a"""\nx = 1  # b\n')) == ["# b", "a"]
