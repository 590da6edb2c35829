"""Private data goes and text that only resembles it stays, by hand-labelled lines; layout survives in every field."""

import json
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from finback.config import UserError
from finback.data.clean import CleaningRules, check
from finback.data.phones import is_known
from finback.data.privacy import redact
from finback.data.sources import Document
from finback.data.tools import ToolCall
from finback.data.turn import Message
from finback.readers import trim

MARKS = ("[email]", "[ip]", "[phone]")
LINES = [
    line.split("\t")
    for line in (Path(__file__).parent / "data" / "privacy.tsv").read_text(encoding="utf-8").splitlines()
    if not line.startswith("# ")
]


def test_private_data_goes_and_nothing_else_does() -> None:
    wrong = {text: redact(text)[0] for text, expected in LINES if redact(text)[0] != expected}
    assert wrong == {}
    assert all(redact(text)[1] == sum(map(expected.count, MARKS)) for text, expected in LINES)
    assert min(sum(text == expected for text, expected in LINES), len(LINES) // 3) > 30


def test_what_stands_together_is_found_as_what_stands_alone() -> None:
    text, expected = ("\n".join(column) for column in zip(*LINES, strict=True))
    assert redact(text) == (expected, sum(map(expected.count, MARKS)))
    assert redact(expected) == (expected, 0)


def test_every_field_of_a_document_is_redacted() -> None:
    """Questions, chains, the tools' arguments and results, names and system messages."""
    private, clean = "write to ann@example.org or +44 20 7946 0958", "write to [email] or [phone]"
    call, hidden = (ToolCall("mail", json.dumps({"to": to}), "1") for to in (private, clean))
    roles = ("system", "user", "assistant", "tool", "assistant")
    given = [Message(role, private, private if role == "assistant" else "") for role in roles]
    given[2] = Message("assistant", "", private, (call,), name="bob@example.org")
    said = [Message(role, clean, clean if role == "assistant" else "") for role in roles]
    said[2] = Message("assistant", "", clean, (hidden,), name="[email]")
    checked = check(Document(tuple(given)), CleaningRules())
    assert checked.document.messages == tuple(said) and checked.redacted == 2 * 7 + 1
    assert check(Document(text=f"<tag a='{private}'>"), CleaningRules()).document.text == f"<tag a='{clean}'>"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f():\n    return 1", "def f():\n    return 1"),
        ("def f():\r\n\treturn 1\r\n", "def f():\n\treturn 1"),
        ("a\rb", "a\nb"),
        ("\n \n    return 1\nx = 2 \n\n", "    return 1\nx = 2"),
        ("  one line ", "one line"),
        ("| a  | b |\n|----|---|\n| 1  | 2 |", "| a  | b |\n|----|---|\n| 1  | 2 |"),
        ("name\ttons\nblue\t150", "name\ttons\nblue\t150"),
        ("1. a\n   - b\n\n\n2. c", "1. a\n   - b\n\n\n2. c"),
    ],
)
def test_lines_and_indentation_survive(text: str, expected: str) -> None:
    assert check(Document(text=text), CleaningRules()).document.text == expected == trim(expected)
    dialogue = Document((Message("user", text), Message("assistant", text, text)))
    for m in check(dialogue, CleaningRules()).document.messages:
        assert m.content == expected and m.reasoning == (expected if m.role == "assistant" else "")
    typed = check(dialogue, CleaningRules(one_line=True)).document.messages[0].content
    assert typed == " ".join(text.split())


def test_many_numbers_and_none_take_no_longer_than_reading() -> None:
    start = time.process_time()
    for text in (
        "1 " * 9000,
        "+1" * 9000,
        "a'" * 9000,
        "a@" * 9000,
        "1.1." * 4000,
        "2001:" * 4000,
        "(1" * 9000,
        "0" * 9000,
    ):
        assert redact(text) == (text, 0)
    assert redact("0171 1234567\n" * 500) == ("[phone]\n" * 500, 500)
    assert time.process_time() - start < 60


def test_a_long_run_of_numbers_is_held_once() -> None:
    """Memory holds the positions of the groups, 16 bytes each, and not a stack of attempts."""
    text = "123456 " * 30_000
    tracemalloc.start()
    assert redact(text) == (text, 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * len(text)


def test_without_phonenumbers_a_number_is_not_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    is_known.cache_clear()
    monkeypatch.setitem(sys.modules, "phonenumbers", None)
    with pytest.raises(
        UserError, match=r"^text = 'phone': the package `phonenumbers`, which finds .* is not installed.*pip install"
    ):
        redact("+44 20 7946 0958")
