"""A document as a list of blocks, rendered as Markdown or as one self-contained HTML page. Does not import torch."""

import html
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finback.report.docs.facts import MISSING, NOT_PROVIDED
from finback.report.docs.public import without_paths


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class BulletList:
    """A list of points."""

    points: tuple[str, ...]


@dataclass(frozen=True)
class CodeBlock:
    """Verbatim text, such as the answer of a model."""

    text: str


@dataclass(frozen=True)
class TableBlock:
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Figure:
    """A picture: a separate file for Markdown, inlined in HTML."""

    name: str
    title: str
    svg: str


Block = Heading | Paragraph | BulletList | CodeBlock | TableBlock | Figure


def display(value: Any) -> str:
    """A value as readable text; missing values are shown as NOT PROVIDED, empty ones are not."""
    if value is MISSING:
        return NOT_PROVIDED
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, dict):
        return "; ".join(f"{without_paths(str(k))}: {display(v)}" for k, v in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(display, value)) or "none"
    return without_paths(str(value))


def words(answer: Any) -> str:
    """A person's answer, in their own words."""
    return answer if isinstance(answer, str) else display(answer)


def facts(rows: Iterable[tuple[str, Any]], head: tuple[str, str] = ("fact", "value")) -> TableBlock:
    """A table of names and values."""
    return TableBlock(head, tuple((name, display(value)) for name, value in rows))


def records(keys: Sequence[str], named: Iterable[tuple[str, dict[str, Any]]], first: str) -> TableBlock:
    """A table with one row per record and one column per key."""
    rows = tuple((name, *(display(record.get(key, MISSING)) for key in keys)) for name, record in named)
    return TableBlock((first, *(key.replace("_", " ") for key in keys)), rows)


def missing(blocks: Iterable[Block]) -> list[str]:
    """The entries of a document that are NOT PROVIDED."""
    found = []
    for block in blocks:
        if isinstance(block, TableBlock):
            for row in block.rows:
                holes = [head for head, cell in zip(block.head, row, strict=True) if NOT_PROVIDED in cell]
                found += [row[0] if len(row) == 2 else f"{row[0]}: {head}" for head in holes]
        elif isinstance(block, Paragraph) and NOT_PROVIDED in block.text:
            found.append(block.text)
    return found


# ---- Markdown ------------------------------------------------------------------------------------------------------


def markdown(blocks: Iterable[Block]) -> str:
    """CommonMark with tables; pictures are expected in curves/."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_plain(text)}"
        case Paragraph(text):
            return _plain(text)
        case BulletList(points):
            return "\n".join(f"- {_plain(point)}" for point in points)
        case CodeBlock(text):
            longest = max((len(run) for run in re.findall("`+", text)), default=0)
            fence = "`" * max(3, longest + 1)
            return f"{fence}text\n{text}\n{fence}"
        case Figure(name, title, _):
            return f"![{_plain(title)}](curves/{name}.svg)"
        case TableBlock(head, rows):
            lines = [head, tuple("---" for _ in head), *rows]
            return "\n".join(f"| {' | '.join(map(_plain, line))} |" for line in lines)


def _plain(text: str) -> str:
    """Escapes text that Markdown would interpret."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", text).replace("\n", " ")


# ---- HTML ----------------------------------------------------------------------------------------------------------

TEMPLATES = Path(__file__).parent / "templates"
# the page may not load anything, whatever a model or a data set has written into it
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, blocks: Sequence[Block]) -> str:
    """One HTML file without any external address, for light and dark screens."""
    heads = [b for b in blocks if isinstance(b, Heading) and b.level == 2]
    links = "".join(f'<a href="#{_anchor(h.text)}">{html.escape(h.text)}</a>' for h in heads)
    body = "\n".join(_html(block) for block in blocks)
    style = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<nav>{links}</nav>\n"
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f'<h{level} id="{_anchor(text)}">{html.escape(text)}</h{level}>'
        case Paragraph(text):
            return f"<p>{_marked(text)}</p>"
        case BulletList(points):
            return "<ul>" + "".join(f"<li>{_marked(point)}</li>" for point in points) + "</ul>"
        case CodeBlock(text):
            return f"<pre>{html.escape(text)}</pre>"
        case Figure(_, title, svg):
            return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"
        case TableBlock(head, rows):
            top = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
            lines = "".join(f"<tr>{''.join(f'<td>{_marked(c)}</td>' for c in row)}</tr>" for row in rows)
            return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>'


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _marked(text: str) -> str:
    return html.escape(text).replace(NOT_PROVIDED, f"<mark>{NOT_PROVIDED}</mark>")


def as_json(value: Any) -> str:
    """A JSON document."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"
