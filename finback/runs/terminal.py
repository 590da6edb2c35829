"""Tables for the terminal, by rich. Does not import torch."""

import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO

from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

GAP = 2  # spaces between columns
UNLIMITED = 100_000  # maximal line length in a file or pipe


def columns() -> int:
    """Width of the terminal in columns; practically unlimited for a file or a pipe."""
    return Console().width if sys.stdout.isatty() else UNLIMITED


def table(rows: Iterable[Sequence[str]], headers: Sequence[str] = (), indent: int = 0, right: bool = True) -> str:
    """Rows of cells as lines of text, at most as wide as the terminal; in a file or pipe as wide as needed.

    The first column is left-aligned, the others right-aligned unless `right` is False. A table that is too wide is
    transposed if that makes it narrower; otherwise cells wrap within their column. If even single words do not fit,
    each row becomes a list of lines.
    """
    given = [list(row) for row in rows]
    cells, named = given, headers
    width = columns() - indent
    if headers and _width([headers, *cells]) > width:
        turned = [list(column) for column in zip(headers, *cells, strict=True)]
        if _width(turned) < _width([headers, *cells]):
            headers, cells = turned[0], turned[1:]
    if headers and _width([[row[0], *map(_longest_word, row[1:])] for row in (headers, *cells)], 1) > width:
        return "\n".join(line for row in given for line in _apart(named, row, width, " " * indent))
    gap = GAP if _width([headers or cells[0], *cells]) <= width else 1
    made = Table(box=None, show_header=bool(headers), pad_edge=False, padding=(0, gap, 0, 0), header_style="")
    for place, header in enumerate(headers or cells[0]):
        made.add_column(
            Text(header), justify="right" if place and right else "left", no_wrap=not place, overflow="fold"
        )
    for row in cells:
        made.add_row(*map(Text, row))
    console = Console(file=StringIO(), width=width + indent, color_system=None, force_jupyter=False)
    console.print(Padding(made, (0, 0, 0, indent), expand=False))
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in text.splitlines())


def _apart(headers: Sequence[str], row: Sequence[str], width: int, margin: str) -> Iterator[str]:
    """A row as lines: its first cell, then each nonempty cell after its header."""
    yield margin + row[0]
    for header, cell in ((h, c) for h, c in zip(headers[1:], row[1:], strict=True) if c):
        for place, line in enumerate(textwrap.wrap(f"{header}  {cell}".strip(), max(8, width - 2 * GAP))):
            yield f"{margin}{' ' * (GAP if place == 0 else 2 * GAP)}{line}"


def _longest_word(text: str) -> str:
    return max(text.split(), key=cell_len, default="")


def _width(rows: Iterable[Iterable[str]], gap: int = GAP) -> int:
    return sum(max(map(cell_len, column)) + gap for column in zip(*rows, strict=True)) - gap
