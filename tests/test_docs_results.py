"""docs/results.md and docs/roofline.md equal benchmarks/results, and the pages name existing files."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/*/*.md"), ROOT / "benchmarks/README.md"})


def test_results_are_those_of_the_measurements(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts/results.py"), str(tmp_path)], check=True)
    for page in ("results.md", "roofline.md"):
        made = (tmp_path / page).read_text(encoding="utf-8")
        assert made == (ROOT / "docs" / page).read_text(encoding="utf-8"), "make results"


def test_the_table_of_cards_is_the_planners(tmp_path: Path) -> None:
    made = tmp_path / "cards.md"
    subprocess.run([sys.executable, str(ROOT / "scripts/cards.py"), str(made)], check=True)
    assert made.read_text(encoding="utf-8") == (ROOT / "docs/reference/cards.md").read_text(encoding="utf-8"), (
        "make results"
    )


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_shows_what_was_measured() -> None:
    """Its shares of correct answers are those of the first seed in benchmarks/results/seeds.json."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    seed = json.loads((ROOT / "benchmarks/results/seeds.json").read_text(encoding="utf-8"))["seeds"][0]
    assert f"{seed['pretraining_tokens']:,}" in text
    for exam in ("sampled", "greedy", "8 terms"):
        before, after = (f"{seed[when][exam]['accuracy']:.1%}" for when in ("before", "after"))
        assert re.search(rf"^{exam} .* {re.escape(before)} .* {re.escape(after)} ", text, re.M), (exam, before, after)


def sentences(text: str) -> list[str]:
    """The sentences of a page's prose, without code, tables, headings and comments."""
    for other in (r"^```.*?^```\s*$", r"^<!--.*?-->", r"^\$\$.*?^\$\$", r"^[|#].*?$"):
        text = re.sub(other, "", text, flags=re.M | re.S)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", re.sub(r"`[^`]*`", "x", text))
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n|\n(?=- |\d+\. )", text)]
    found = [sentence for block in blocks for sentence in re.split(r"(?<=[.!?:])\s+(?=[A-Z*x])", block)]
    return [sentence for sentence in found if len(sentence.split()) > 2]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted(ROOT.glob("docs/[gc]*/*.md"))], ids=lambda path: path.stem
)
def test_half_of_the_sentences_are_short(page: Path) -> None:
    words = [len(sentence.split()) for sentence in sentences(page.read_text(encoding="utf-8"))]
    assert statistics.median(words) <= 20


def test_the_site_shows_every_page() -> None:
    """Each guide, concept and reference page is in the navigation exactly once."""
    named = re.findall(
        r'"((?:guides|concepts|reference|cookbook)/[\w-]+\.md)"', (ROOT / "zensical.toml").read_text(encoding="utf-8")
    )
    made = {f"reference/{name}.md" for name in ("stages", "parts", "commands", "http", "python")}
    assert len(named) == len(set(named))
    assert set(named) - made == {str(path.relative_to(ROOT / "docs")) for path in ROOT.glob("docs/*/*.md")}


def test_the_walks_name_files_that_are_there() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+/[a-z_/0-9.]+\.(?:py|js|cpp))`", text))
    assert len(named) > 50
    assert {name for name in named if not any((ROOT / place / name).is_file() for place in ("finback", "."))} == set()
