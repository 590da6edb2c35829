"""Extracts the program from a reply: the last Python block that defines the wanted name, however it is fenced. Runs nothing. Does not import torch."""

import re
import textwrap
from dataclasses import dataclass, field

_OPEN = re.compile(
    r"(?P<before>(?:[ \t]|>|[-*+][ \t]|\d{1,3}[.)][ \t])*+)(?P<mark>`{3,}|~{3,})[ \t]*(?P<info>[^`\r\n]*)"
)
_PYTHON = re.compile(r"[{.\s]*(?:python|py|python3|py3|sage|ipython|pycon)?(?![\w+#-])[^\n]*", re.IGNORECASE)
_BEGINS = re.compile(r"(?:async[ \t]+)?def[ \t]|class[ \t]+\w|@\w|import[ \t]+\w|from[ \t]+[\w.]+[ \t]+import\b")
_CODE = re.compile(
    r"[ \t]|(?:async|def|class|import|from|if|elif|else|for|while|try|except|finally|with|return|raise|pass|assert|global|print|await|del|match|case|lambda)\b"
    r"|[@#)\]}\"']|[\w.]+(?:\[[^\]]*\])*(?:[ \t]*,[ \t]*[\w.]+)*[ \t]*(?:[-+*/%&|^]|//|\*\*|<<|>>)?=[^=]|[\w.]+\("
)


@dataclass
class _Block:
    """The lines between two fences, without the prefix of each line: indentation or quotation marks."""

    mark: str
    info: str
    before: str
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def is_python(self) -> bool:
        """Whether it is marked as Python or not marked at all."""
        return bool(_PYTHON.fullmatch(self.info.strip()))

    @property
    def is_page(self) -> bool:
        """Whether it is Markdown, which may contain other blocks."""
        return bool(re.fullmatch(r"(?i)markdown|md", self.info.strip()))


def program(answer: str, entry: str = "") -> str:
    """The last Python block that defines `entry`, else the last that does something, else the last block, else the whole answer.

    An unterminated block counts, and so does unfenced code. A block of output after the program does not.
    """
    blocks = _blocks(answer, entry)
    if not blocks:
        return _unfenced(answer, entry)
    blocks = [inner for block in blocks for inner in _within(block, entry) or [block]]
    python = [block for block in blocks if block.is_python]
    named = [block for block in python if block.info.strip()]
    for some in (named, python, blocks):
        for block in reversed(some):
            if entry and defines(block.text, entry):
                return block.text
    if entry and defines(_unfenced(answer, entry), entry) and not named:
        return _unfenced(answer, entry)
    for some in (named, python):
        for block in reversed(some):
            if _acts(block.text):
                return block.text
    return blocks[-1].text


def _within(block: _Block, entry: str) -> list[_Block]:
    """Blocks nested in a Markdown block, or in an unnamed block if one of them defines the wanted name."""
    inner = _blocks(block.text, entry) if block.is_page or not block.info.strip() else []
    return inner if block.is_page or any(entry and defines(each.text, entry) for each in inner) else []


def defines(source: str, entry: str) -> bool:
    """Whether a line of a program defines a name, as a function, class or variable."""
    name = re.escape(entry)
    return bool(
        re.search(
            rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|^{name}[ \t]*(?::[^=\n]+)?=(?!=)", source, re.MULTILINE
        )
    )


def _blocks(answer: str, entry: str) -> list[_Block]:
    """Fenced blocks as in CommonMark, but with any indentation; a fence of four backticks may contain one of three."""
    blocks, block = list[_Block](), None
    for line in answer.split("\n"):
        match = _OPEN.fullmatch(line.rstrip("\r"))
        if block is None:
            if match:
                blocks.append(block := _Block(match["mark"], match["info"], match["before"]))
        elif match and not match["info"].strip() and match["mark"].startswith(block.mark):
            block = None
        else:
            block.lines.append(_inner(line, block.before))
    if block is not None:  # the closing fence may be followed by words
        ends = [i for i, line in enumerate(block.lines) if line.startswith(block.mark + " ")]
        block.lines = block.lines[: ends[0]] if ends else block.lines
    for block in blocks:
        dedented = textwrap.dedent(block.text)
        # The body of a function that continues the question keeps its indentation.
        if block.before or (entry and defines(dedented, entry)) or not entry:
            block.lines = dedented.split("\n")
    return blocks


def _inner(line: str, before: str) -> str:
    """A line of a block whose fence is preceded by `before`."""
    if ">" in before:
        return re.sub(r"^[ \t]*>[ \t]?", "", line)
    return line


def _acts(source: str) -> bool:
    """Whether a block has a statement, and does not start with the prompt of a shell or of Python."""
    lines = [line for line in source.split("\n") if line.strip() and not line.lstrip().startswith("#")]
    return any(_CODE.match(line) for line in lines) and not all(
        re.match(r"\s*(?:>>>|\$|\.\.\.)", line) for line in lines[:1]
    )


def _unfenced(answer: str, entry: str) -> str:
    """Unfenced code, cut out of the surrounding sentences; the whole answer if it has no definition."""
    lines = _dedented(answer.replace("\r\n", "\n").split("\n"))
    starts = [i for i, line in enumerate(lines) if _BEGINS.match(line) or (entry and defines(line, entry))]
    if not starts or (entry and not defines("\n".join(lines), entry)):
        return answer
    first = min(starts)
    if any(_CODE.match(line) for line in lines[:first] if line.strip() and line[0] not in "#"):
        first = next(i for i, line in enumerate(lines) if _CODE.match(line))
    kept = lines[first:]
    while kept and not (kept[-1].strip() and _CODE.match(kept[-1])):
        kept.pop()
    return "\n".join(kept)


def _dedented(lines: list[str]) -> list[str]:
    """Dedents code that is indented as a block between sentences; other lines stay as they are."""
    if any(_BEGINS.match(line) for line in lines):
        return lines
    indents = [line[: len(line) - len(line.lstrip())] for line in lines if _BEGINS.match(line.lstrip())]
    if not indents:
        return lines
    indent = min(indents)
    return [line.removeprefix(indent) for line in lines if not line.strip() or line.startswith(indent)]
