"""Files of every kind are parsed in their own format or refused by name: markup and bytes are never learnt."""

import gzip
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finback.config import UserError
from finback.data import html_text
from finback.data.sources import Document, Files
from finback.data.turn import Message
from finback.extras import how_to_get
from finback.readers import BytesRead

WHALE, KRILL = "Blue whales sing.", "They eat krill,\nfour tons a day."
DIALOGUE = Document((Message("user", "4+5?"), Message("assistant", "9")))
RECORDS: list[dict[str, Any]] = [{"text": WHALE}, {"text": KRILL}]


def read(path: Path) -> list[Document]:
    return list(Files((str(path),), name="mine").documents())


def written(folder: Path, name: str, content: str | bytes) -> Path:
    """Writes a file, gzipped if its name says so."""
    raw = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(gzip.compress(raw) if name.lower().endswith(".gz") else raw)
    return folder / name


def csv_of(separator: str) -> str:
    return f'id{separator}text\n1{separator}"{WHALE}"\n2{separator}"{KRILL}"\n'


def parquet() -> bytes:
    arrow, library = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    handle = io.BytesIO()
    library.write_table(arrow.Table.from_pylist(RECORDS), handle)
    return handle.getvalue()


@pytest.mark.parametrize("packed", ["", ".gz", ".GZ"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", f"{WHALE}\n\n{KRILL}\n"),
        ("a.MD", f"{WHALE}\n\n{KRILL}\n"),
        ("a.jsonl", "\n".join(map(json.dumps, RECORDS))),
        ("a.JSONL", "\n".join(map(json.dumps, RECORDS))),
        ("a.ndjson", "\n".join(map(json.dumps, RECORDS))),
        ("a.json", json.dumps(RECORDS)),
        ("a.Json", json.dumps({"version": 1, "data": RECORDS}, indent=2)),
        ("a.csv", csv_of(",")),
        ("a.CSV", csv_of(";")),
        ("a.tsv", csv_of("\t")),
        ("a.parquet", parquet),
    ],
)
def test_records_and_text_are_read_as_what_they_are(
    name: str, content: str | Callable[[], bytes], packed: str, tmp_path: Path
) -> None:
    path = written(tmp_path, name + packed, content() if callable(content) else content)
    assert read(path) == [Document(text=WHALE), Document(text=KRILL)]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "question,answer\n4+5?,9\n", DIALOGUE),
        ("a.csv", "prompt,completion\n4+5?,9\n", DIALOGUE),
        ("a.json", '{"question": "4+5?", "answer": "9"}', DIALOGUE),
        ("a.jsonl", '{"instruction": "4+5?", "output": 9}', DIALOGUE),
        ("a.jsonl", '{"conversations": [{"from": "human", "value": "4+5?"}, {"from": "gpt", "value": "9"}]}', DIALOGUE),
        (
            "a.jsonl",
            '{"system": "Add.", "question": "4+5?", "answer": "9", "reasoning": "so"}',
            Document((Message("system", "Add."), Message("user", "4+5?"), Message("assistant", "9", "so"))),
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "4+5?"}]}, {"role": "assistant", "content": "9"}]}',
            DIALOGUE,
        ),
    ],
)
def test_records_of_other_shapes_are_dialogues(name: str, content: str, expected: Document, tmp_path: Path) -> None:
    assert read(written(tmp_path, name, content)) == [expected]


PAGE = """<!DOCTYPE html><html><head><title>T</title><meta charset="utf-8"><style>p {color: red}</style>
<script>if (a < b) { alert("x") }</script><body class=x>
<nav><ul><li><a href="/">Home</a></ul></nav><h1>Whales &amp; krill</h1>
<p>They <b>sing</b> in the deep&nbsp;sea&#8212;often.<br>All night.</p><!-- a remark -->
<ul><li>one</li><li>two</ul><pre><code>
def f():
    x = 1

    return <b>x</b>
</code></pre>
<table><tr><th>name</th><th>tons</th></tr>
<tr><td>blue</td><td>150</td></tr>
<tr><td></td><td>5</td></tr></table>
<p hidden>unseen</p><p style="display: none">unseen</p><svg><text>unseen</text></svg><footer>Copyright</footer></html>"""
SHOWN = (
    "Whales & krill\nThey sing in the deep sea\u2014often.\nAll night.\none\ntwo\ndef f():\n    x = 1\n\n    return x\n"
    "name\ttons\nblue\t150\n\t5"
)


@pytest.mark.parametrize("name", ["a.html", "a.HTM", "a.xhtml", "a.html.gz"])
def test_pages_are_read_for_their_words(name: str, tmp_path: Path) -> None:
    path, count = written(tmp_path, name, PAGE), BytesRead()
    assert list(Files((str(path),)).read(path, count)) == [Document(text=SHOWN)]
    assert count.count == path.stat().st_size


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<p>caf\u00e9".encode(), "caf\u00e9"),
        ('<meta charset="ISO-8859-1"><p>caf\u00e9 \u20ac'.encode("windows-1252"), "caf\u00e9 \u20ac"),
        ('<meta http-equiv=x content="text/html; charset=shift_jis"><p>\u9be8'.encode("shift_jis"), "\u9be8"),
        ("<p>\u9be8".encode("utf-16"), "\u9be8"),
        (b'<?xml version="1.0" encoding="utf-8"?><html><script src="a"/><p>x</p></html>', "x"),
    ],
)
def test_a_page_says_which_characters_it_has(html: bytes, text: str) -> None:
    assert html_text.plain(html_text.decode(html)) == text


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("<td><p>a</p></td><td><p>b</p></td>", "a\tb"),
        ("<tr><td><p>a</p><p>b</p></td><td>c</td></tr>", "a\nb\nc"),
        ("<table><tr><td><h1>Layout</h1>one<p>two</table>", "Layout\none\ntwo"),
        ("a<pre>x\n  y</pre>b", "a\nx\n  y\nb"),
        ("<p>1 &lt; 2 &amp;&amp; x", "1 < 2 && x"),
        ("<div>a<div>b</div>c</div>", "a\nb\nc"),
    ],
)
def test_pieces_of_pages_by_hand(html: str, text: str) -> None:
    assert html_text.plain(html) == text


def pdf(text: str) -> bytes:
    """A PDF of one page with a line of text, as a printer driver writes it, without a cross-reference table."""
    stream = f"BT /F1 12 Tf 72 700 Td ({text}) Tj ET".encode()
    parts = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]
    body, places = b"%PDF-1.4\n", []
    for number, part in enumerate(parts, start=1):
        places.append(len(body))
        body += b"%d 0 obj\n%s\nendobj\n" % (number, part)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    end = b"trailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % len(body)
    return body + b"xref\n0 5\n0000000000 65535 f \n" + table + end


@pytest.mark.parametrize("name", ["a.pdf", "a.PDF", "a.pdf.gz"])
def test_pdfs_are_read_by_pypdf(name: str, tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    assert read(written(tmp_path, name, pdf(WHALE))) == [Document(text=WHALE)]
    for content, problem in ((pdf(""), "contains no text"), (pdf(WHALE)[:40], r"damaged \(.+\)")):
        with pytest.raises(UserError, match=rf"^mine\.paths = '.*{name}': {problem}\. "):
            read(written(tmp_path, name, content))


def test_word_files_are_read_by_python_docx(tmp_path: Path) -> None:
    docx = pytest.importorskip("docx")
    document = docx.Document()
    document.add_heading("Whales", 1)
    document.add_paragraph("They sing.\tOften.")
    table = document.add_table(2, 2)
    for cell, text in zip(table._cells, ("name", "tons", "blue", "150"), strict=True):
        cell.text = text
    inserted = document.add_paragraph("All ")
    for name, text in (("ins", "night"), ("del", "gone")):
        inner = "t" if name == "ins" else "delText"
        space = 'xmlns:w="http://schemas.openxmlformats.org/wordprocessingml/2006/main"'
        inserted._p.append(
            docx.oxml.parse_xml(f"<w:{name} {space}><w:r><w:{inner}>{text}</w:{inner}></w:r></w:{name}>")
        )
    document.save(str(tmp_path / "a.DOCX"))
    assert read(tmp_path / "a.DOCX") == [Document(text="Whales\nThey sing.\tOften.\nname\ttons\nblue\t150\nAll night")]
    docx.Document().save(str(tmp_path / "b.docx"))
    for name, problem in (("b.docx", "contains no text"), ("c.docx", r"damaged \(.+\)")):
        if name == "c.docx":
            written(tmp_path, name, "not a zip")
        with pytest.raises(UserError, match=rf"^mine\.paths = '.*{name}': {problem}"):
            read(tmp_path / name)


@pytest.mark.parametrize(("name", "package"), [("a.pdf", "pypdf"), ("a.docx", "python-docx")])
def test_a_missing_library_is_named(name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package.removeprefix("python-"), None)
    text = f"mine.paths = '{tmp_path / name}': the package `{package}` is not installed. {how_to_get('documents')}"
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        read(written(tmp_path, name, "x"))


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(
    "ending", ["doc", "odt", "rtf", "xlsx", "xml", "svg", "ipynb", "zip", "tar", "png", "pkl", "arrow", "XML", "Png"]
)
def test_what_is_no_text_is_refused_by_name(ending: str, packed: str, tmp_path: Path) -> None:
    text = f"mine.paths = '{tmp_path / 'a.'}{ending}{packed}': .{ending.lower()} files are not read. Convert it"
    with pytest.raises(UserError, match=f"^{re.escape(text)}"):
        read(written(tmp_path, f"a.{ending}{packed}", WHALE))


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.txt", PAGE, "an HTML page"),
        ("a", "\ufeff\n<html lang=en><p>x</p>", "an HTML page"),
        ("a.md", "<!-- saved -->\n<!doctype HTML>\n<p>x</p>", "an HTML page"),
        ("a.txt", "<div class='x'>a</div>\n", "HTML"),
        ("a.log", '<?xml version="1.0"?><a/>', "XML"),
        ("a.txt", '{"text": "Whales sing."}\n{"text": "b"}', "JSON"),
        ("a.text", '[\n  {"question": "a", "answer": "b"}]', "JSON"),
        ("a.txt", r"{\rtf1\ansi Whales}", "rich text"),
        ("a.txt.gz", "%PDF-1.4\nx", "a PDF"),
    ],
)
def test_what_calls_itself_text_and_is_none_is_refused(name: str, content: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^mine\.paths = '.*{name}': holds {what}, not plain text\. "):
        read(written(tmp_path, name, content))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.md", "<div align='center'>Finback</div>\nWhales sing."),
        ("a.txt", "<3 whales, and x < y > z"),
        ("a.py", "x = {'text': 1}\nif x:\n    y = '<html>'"),
        ("a.txt", "{braces} and [brackets]"),
        ("a.unknown", "Whales sing."),
        ("noending", "Whales sing."),
    ],
)
def test_text_with_a_sign_or_two_is_text(name: str, content: str, tmp_path: Path) -> None:
    assert read(written(tmp_path, name, content)) == [Document(text=content)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,n\na,1\nb\n", ":3 = .*not one value for each of the 2 columns"),
        ("a.csv", "words\nWhales sing.\n", ":2 = .*no usable field"),
        ("a.json", '{"a": 1}', ":1 = .*no usable field"),
        ("a.json", '[{"text": "a"}, {"text": ', ":1 = .*not JSON"),
        ("a.html", b"<p>caf\xe9", r": unknown character encoding \(.*utf-8"),
        ("a.html", "<nav>Home</nav>", ": contains no text"),
        ("a.html", " ", ": the file is empty"),
        ("a.html", "%PDF-1.4", ": contains no HTML"),
        (
            "a.jsonl",
            '{"tools": [{"name": "f"}], "question": "a", "answer": "b"}',
            ":1 = .*its tools are in a separate field",
        ),
        (
            "a.jsonl",
            '{"question": "a", "choices": ["x"], "answer": "b"}',
            ":1 = .*choices that the question does not show",
        ),
    ],
)
def test_what_is_wrong_with_a_file_is_said(name: str, content: str | bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{re.escape(name)}.?{message}"):
        read(written(tmp_path, name, content))
