"""Sources of every kind: a compressed file gives the same documents, and errors in a file are reported."""

import gzip
import json
import re
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from finback.config import UserError
from finback.data import document_store, package_sources
from finback.data.package_sources import AWS, GOOGLE, POSTGRES, PYTHON, WORDNET
from finback.data.sources import Document, Files
from finback.data.tools import ToolCall
from finback.data.turn import Message
from finback.extras import how_to_get
from finback.readers import BytesRead

TEXT = "One\nline.\r\n\r\nTwo: 鲸.\n\n\n  Three \n"
RECORDS = [
    {"text": "Whales sing."},
    {"question": "4+5?", "answer": "9"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
]
DOCUMENTS = [
    Document(text="Whales sing."),
    Document((Message("user", "4+5?"), Message("assistant", "9"))),
    Document((Message("user", "hi"), Message("assistant", "hello"))),
]


def packed(folder: Path, name: str, content: bytes) -> Path:
    """Writes a file, compressed as its name says."""
    pyarrow = pytest.importorskip("pyarrow")
    path = folder / name
    if path.suffix == ".gz":
        content = gzip.compress(content)
    elif path.suffix == ".zst":
        content = pyarrow.compress(content, codec="zstd", asbytes=True)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("ending", ["", ".gz", ".zst"])
def test_a_compressed_file_holds_the_documents_of_a_plain_one(ending: str, tmp_path: Path) -> None:
    path = packed(tmp_path, f"a.txt{ending}", TEXT.encode())
    source = Files((str(path),))
    assert [d.text for d in source.documents()] == ["One\nline.", "Two: 鲸.", "Three"]
    assert [d.text for d in Files((str(path),), split="files").documents()] == ["One\nline.\n\nTwo: 鲸.\n\n\n  Three"]
    lines = packed(tmp_path, f"b.jsonl{ending}", "\n".join(map(json.dumps, RECORDS)).encode())
    assert list(Files((str(lines),)).documents()) == DOCUMENTS
    bytes_read = BytesRead()
    both = [list(source.read(p, bytes_read)) for p in (path, lines)]
    assert len(both[0]) == 3 and bytes_read.count == path.stat().st_size + lines.stat().st_size


@settings(max_examples=200)
@example("\ufeffa\r\n\r\nb\n \nc\r\r\n\nd\u2028\x85\x1c")
@given(st.text("ab \n\r\ufeff\u2028鲸", min_size=1).filter(lambda text: text.strip("\ufeff \r\n\u2028") != ""))
def test_reading_line_by_line_splits_as_reading_the_whole(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "paragraphs.txt"
    path.write_bytes(text.encode())
    whole = text.removeprefix("\ufeff").replace("\r\n", "\n").split("\n\n")
    found = [d.text for d in Files((str(path),)).documents()]
    assert [text.strip() for text in found] == [p.strip() for p in whole if p.strip()]
    assert all(text.strip() == text or "\n" in text for text in found)  # the first of several lines may be indented


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.txt.zst", "a.parquet"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    whole = packed(tmp_path, name, b'{"text": "Whales sing and sing again, 1234567890."}\n' * 50).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    text = rf"^mine\.paths = '{re.escape(str(tmp_path / name))}': damaged \(.+\)\. Download it again or leave it out\.$"
    with pytest.raises(UserError, match=text):
        list(Files((str(tmp_path / name),), name="mine").documents())


def test_parquet_rows_are_records(tmp_path: Path) -> None:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"song {i}", "length": i} for i in range(2500)]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    bytes_read = BytesRead()
    source = Files((str(tmp_path / "a.parquet"),))
    assert [d.text for d in source.read(tmp_path / "a.parquet", bytes_read)] == [row["text"] for row in rows]
    assert bytes_read.count == (tmp_path / "a.parquet").stat().st_size
    columns = {key: [record.get(key) for record in RECORDS] for key in ("text", "question", "answer", "messages")}
    parquet.write_table(arrow.table(columns), tmp_path / "b.parquet")
    assert list(Files((str(tmp_path / "b.parquet"),)).documents()) == DOCUMENTS
    parquet.write_table(arrow.Table.from_pylist([{"words": "a"}]), tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet\[0\] = .*no usable field"):
        list(Files((str(tmp_path / "c.parquet"),)).documents())


@pytest.mark.parametrize("record", ['{"text": "a \\ud800"}', '{"messages": [{"role": "user", "content": "\\uDFff"}]}'])
def test_half_a_character_is_named_with_its_line(record: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "whole \\ud83d\\udc0b"}\n' + record)
    with pytest.raises(UserError, match=rf"^{path}:2 '(text|messages)' = '.ud[8f].*': half a character"):
        list(Files((str(path),)).documents())


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl.zst"])
def test_without_pyarrow_its_files_are_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    text = f"files.paths = '{tmp_path / name}': the package `pyarrow` is not installed. {how_to_get('data')}"
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        list(Files((str(tmp_path / name),)).documents())


@given(st.lists(st.tuples(st.text(st.characters()), st.lists(st.tuples(st.text(), st.text())))))
def test_stored_documents_come_back(tmp_path_factory: pytest.TempPathFactory, given: list) -> None:  # type: ignore[type-arg]
    documents = [Document(tuple(Message("assistant", a, b) for a, b in said), text) for text, said in given]
    call = ToolCall("sing", '{"song": 1}', "7")
    documents += [Document((Message("assistant", "a", "b", (call,), learnt=False), Message("tool", "c", name="sing")))]
    written = document_store.DocumentWriter(tmp_path_factory.getbasetemp(), "stored", segment=3)
    with written:
        for document in documents:
            written.add(document)
    back = [list(document_store.read_documents(path)) for path in written.paths(len(documents))]
    assert [document for segment in back for document in segment] == documents
    assert all(len(segment) == 3 for segment in back[:-1])


WORDNET_LINES = """\
  1 This software and database is being provided to you
00914632 04 n 02 warpath 0 war_path 0 001 @ 00914631 n 0000 | a course leading to warfare or battle  
00002098 00 a 01 unable(p) 0 001 = 05200169 n 0000 | (usually followed by `to') not able; "unable to get to town"  
"""  # noqa: W291 - as in the file

PAGE = """<html><head><title>t</title><style>p{}</style></head><body>
<div class="navheader"><p>Home <br/>Next<img src="x"></p></div>
<h1>Whales<a class="headerlink" href="#x">¶</a></h1><p>They <em>sing</em>&nbsp;&amp; dive
deep.</p><ul><li>one<li>two</ul><pre>a = 1
b = 2</pre><script>if (a < b) {}</script><div class="footer">2024</div></body></html>"""


def test_pages_by_hand() -> None:
    assert package_sources.plain(PAGE).split("\n") == [
        "Whales",
        "They sing & dive deep.",
        "one",
        "two",
        "a = 1",
        "b = 2",
    ]
    assert package_sources.plain("<p>Gets <code>x</code>.</p><p>Also y &lt; z.") == "Gets x.\nAlso y < z."
    assert package_sources.plain("No tags, 4 < 5.") == "No tags, 4 < 5."


def test_packages_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small copy of each package, with its files in their usual places."""
    aws = {
        "operations": {"Sing": {"documentation": "<p>Sings.</p>", "input": {"shape": "S"}}},
        "documentation": "Whales <b>2</b>.",
    }
    google = {
        "methods": [{"description": "Lists songs."}],
        "description": "Song API",
        "schemas": {"description": {"type": "s"}},
    }
    for path, content in {
        "site/botocore/__init__.py": b"",
        "site/googleapiclient/__init__.py": b"",
        "site/botocore/data/sea/2024-01-01/service-2.json.gz": gzip.compress(json.dumps(aws).encode()),
        "site/googleapiclient/discovery_cache/documents/sea.v1.json": json.dumps(google).encode(),
        "root/usr/share/wordnet/data.noun": WORDNET_LINES.encode(),
        "root/usr/share/doc/python3.11/html/a/b.html": PAGE.encode(),
        "root/usr/share/doc/python3.11/html/genindex-A.html": PAGE.encode(),
        "root/usr/share/doc/postgresql-doc-15/html/sql.html": b"<p>SELECT reads.",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path / "site")
    root = str(tmp_path / "root")
    found = {
        s.name: [d.text for d in s.documents()]
        for s in (AWS, GOOGLE, *(s.at(root) for s in (WORDNET, PYTHON, POSTGRES)))
    }
    assert found == {
        "aws": ["Sings.", "Whales 2."],
        "google": ["Lists songs.", "Song API"],
        "wordnet": [
            "warpath, war path: a course leading to warfare or battle",
            'unable: (usually followed by `to\') not able; "unable to get to town"',
        ],
        "python": [package_sources.plain(PAGE)],
        "postgres": ["SELECT reads."],
    }


@pytest.mark.parametrize("source", [AWS, GOOGLE, WORDNET, PYTHON, POSTGRES], ids=lambda s: s.name)
def test_a_package_that_is_absent_is_named(
    source: package_sources.PackageSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    text = f"source = '{source.name}': the package {source.package} is not installed. {source.install}"
    with pytest.raises(UserError, match=f"^{re.escape(text)}$"):
        list(source.at(str(tmp_path)).documents())
    assert source.licence in ("Apache-2.0", "WordNet 3.0", "PSF-2.0", "PostgreSQL")
