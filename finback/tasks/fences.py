"""The program within a reply: the last Python block that defines what is asked, however it is fenced. Nothing runs here. No torch here."""

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
    """Lines between two fences, without what stands before each: an indentation or marks of a quotation."""

    mark: str
    info: str
    before: str
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def is_python(self) -> bool:
        """Whether it says so or says nothing."""
        return bool(_PYTHON.fullmatch(self.info.strip()))

    @property
    def is_page(self) -> bool:
        """Whether it is Markdown, which may hold blocks of its own."""
        return bool(re.fullmatch(r"(?i)markdown|md", self.info.strip()))


def program(answer: str, entry: str = "") -> str:
    """The last Python block that defines `entry`, or else does something; the last block, or all of the answer, if none does.

    A block without its end counts, and so does code without a fence. A block of output behind the program does not.
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
    """The blocks in a block of Markdown, or in one without a name if one of them defines what is asked."""
    inner = _blocks(block.text, entry) if block.is_page or not block.info.strip() else []
    return inner if block.is_page or any(entry and defines(each.text, entry) for each in inner) else []


def defines(source: str, entry: str) -> bool:
    """Whether a line of a program defines a name, as a function, a class or a value."""
    name = re.escape(entry)
    return bool(
        re.search(
            rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|^{name}[ \t]*(?::[^=\n]+)?=(?!=)", source, re.MULTILINE
        )
    )


def _blocks(answer: str, entry: str) -> list[_Block]:
    """Fenced blocks, as CommonMark has them but with any indentation; one of four backticks may hold one of three."""
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
    if block is not None:  # its end may have words behind it
        ends = [i for i, line in enumerate(block.lines) if line.startswith(block.mark + " ")]
        block.lines = block.lines[: ends[0]] if ends else block.lines
    for block in blocks:
        dedented = textwrap.dedent(block.text)
        # A body alone, which continues the question, keeps its indentation.
        if block.before or (entry and defines(dedented, entry)) or not entry:
            block.lines = dedented.split("\n")
    return blocks


def _inner(line: str, before: str) -> str:
    """A line of a block whose fence stands behind `before`."""
    if ">" in before:
        return re.sub(r"^[ \t]*>[ \t]?", "", line)
    return line


def _acts(source: str) -> bool:
    """Whether a program could do anything: more than values, prompts of a shell or of Python."""
    lines = [line for line in source.split("\n") if line.strip() and not line.lstrip().startswith("#")]
    return any(_CODE.match(line) for line in lines) and not all(
        re.match(r"\s*(?:>>>|\$|\.\.\.)", line) for line in lines[:1]
    )


def _unfenced(answer: str, entry: str) -> str:
    """Code without a fence, cut out of the sentences around it; all of the answer where no definition begins."""
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
    """The lines of code that stands indented between sentences, at the margin; others as they are."""
    if any(_BEGINS.match(line) for line in lines):
        return lines
    indents = [line[: len(line) - len(line.lstrip())] for line in lines if _BEGINS.match(line.lstrip())]
    if not indents:
        return lines
    indent = min(indents)
    return [line.removeprefix(indent) for line in lines if not line.strip() or line.startswith(indent)]
