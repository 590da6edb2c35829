"""The text of an HTML page: one line per block, tabs between cells of a row, code verbatim. Does not import torch."""

import re
from html.parser import HTMLParser

_BLOCKS = re.compile(
    "p|div|li|d[tdl]|br|t[rdh]|table|caption|h[1-6]|pre|[uo]l|section|article|main|header|address|figure|figcaption|form|"
    "fieldset|details|summary|blockquote|hr|option|aside|body"
)
# elements without text, or for navigation only
_SKIPPED = frozenset(
    (
        "script",
        "style",
        "nav",
        "head",
        "template",
        "noscript",
        "svg",
        "iframe",
        "object",
        "canvas",
        "button",
        "select",
        "footer",
    )
)
_NAVIGATION = frozenset(("navheader", "navfooter", "sphinxsidebar", "related", "footer", "headerlink"))
_IN_HEAD = frozenset(("title", "meta", "link", "base", "style", "script", "noscript", "template"))
_VOID = frozenset(
    ("br", "img", "meta", "link", "input", "hr", "col", "base", "wbr", "area", "embed", "source", "track", "param")
)
_UNSEEN = re.compile(r"display\s*:\s*none|visibility\s*:\s*hidden", re.IGNORECASE)
_CHARSET = re.compile(
    rb"<meta[^>]{0,200}?charset\s*=\s*[\"']?\s*([\w-]+)|<\?xml[^>]{0,80}?encoding=[\"']([\w-]+)", re.IGNORECASE
)
_MARKS = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_LATIN = ("iso-8859-1", "latin-1", "latin1", "us-ascii", "ascii")  # browsers read all of these as windows-1252


def decode(content: bytes) -> str:
    """Decodes a page by its byte order mark or declaration, else as UTF-8; LookupError or UnicodeDecodeError."""
    for mark, name in _MARKS:
        if content.startswith(mark):
            return content.decode(name)
    found = _CHARSET.search(content[:4096])
    name = (found[1] or found[2]).decode("ascii").lower() if found else "utf-8"
    return content.decode("windows-1252" if name in _LATIN else name)


def plain(html: str) -> str:
    """The text of a page or a fragment of HTML, one line per block, with spacing as rendered."""
    parser = _Words()
    parser.feed(html)
    parser.close()
    return parser.text()


class _Words(HTMLParser):
    """Collects text outside of skipped elements."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        # finished lines; cells of the current line; separator before the next text
        self.lines: list[str] = []
        self.cells: list[list[str]] = [[]]
        self.gap = ""
        # open elements inside a skipped one
        self.hidden: list[str] = []
        # number of open code elements, and their first line
        self.verbatim = self.code_start = 0
        # the current table row: its cells, lines of the last cell, and whether all are empty
        self.row_cells = self.cell_lines = 0
        self.row_is_blank = True

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.hidden[:1] == ["head"] and tag not in _IN_HEAD:
            self.hidden = []  # it was never closed
        given = {name: value or "" for name, value in attrs}
        unseen = "hidden" in given or bool(_UNSEEN.search(given.get("style", "")))
        if tag in _VOID:
            self._part("\n" if tag in ("br", "hr") else "")
        elif self.hidden or unseen or tag in _SKIPPED or _NAVIGATION & {*given.get("class", "").split()}:
            self.hidden.append(tag)
        elif tag in ("td", "th"):
            # a row of plain cells is one line; cells with blocks have their own lines
            if not self.row_cells or self.cell_lines > 1:
                self.gap = "\n"
            else:
                self.gap = f"{self.gap if self.row_is_blank else self.gap.strip(chr(10))}\t"
            self.row_cells, self.cell_lines = self.row_cells + 1, 0
        elif _BLOCKS.fullmatch(tag):
            self._block(tag)
            if tag == "pre":
                self._line()
                self.verbatim, self.code_start = self.verbatim + 1, len(self.lines)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.hidden:
            while self.hidden and self.hidden.pop() != tag:
                pass  # elements that were never closed
        elif not self.hidden and _BLOCKS.fullmatch(tag) and tag not in ("td", "th"):
            if tag == "pre" and self.verbatim:
                if any(map(any, self.cells)):
                    self._line()
                self.verbatim -= 1
            self._block(tag)

    def handle_data(self, data: str) -> None:
        if self.hidden:
            return
        if self.verbatim:
            first, *others = data.split("\n")
            self._add(first)
            for line in others:
                self._line()
                self.cells[-1].append(line)
        elif data.strip():
            self._add(re.sub(r"\s+", " ", data))
        elif not self.gap:
            self.cells[-1].append(" ")

    def text(self) -> str:
        """All lines with text, and those of code."""
        self._line()
        return "\n".join(self.lines).strip("\n")

    def _block(self, tag: str) -> None:
        if tag in ("tr", "table"):
            self.row_cells, self.row_is_blank = 0, True
        self._part("\n")

    def _part(self, gap: str) -> None:
        self.gap = self.gap or gap

    def _add(self, text: str) -> None:
        """Adds text after the separator."""
        if not text:
            return
        tabs = self.gap.count("\t")
        self.cell_lines += self.gap != "" or self.cell_lines == 0
        if "\n" in self.gap:
            self._line()
        self.cells += [[] for _ in range(tabs)]
        self.gap, self.row_is_blank = "", False
        self.cells[-1].append(text)

    def _line(self) -> None:
        """Finishes the current line."""
        if self.verbatim:
            line = "".join("".join(cell) for cell in self.cells).rstrip()
            self.lines += [line] if line or len(self.lines) > self.code_start else []
        else:
            line = "\t".join(" ".join("".join(cell).split()) for cell in self.cells)
            self.lines += [line] if line.strip() else []
        self.cells, self.gap = [[]], ""
