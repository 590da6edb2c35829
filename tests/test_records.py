"""Records from files and the hub: read once, and every bad one named with a remedy."""

import csv
import gzip
import json
import random
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from finback.config import UserError
from finback.tasks.questions import Questions
from finback.tasks.records import read
from tests.test_questions import CAPITAL, GSM8K, write


def test_a_file_is_read_once_and_again_when_it_changed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", CAPITAL)
    assert read(path, "", "train") is read(path, "", "train")
    write(tmp_path / "a.jsonl", CAPITAL, GSM8K)
    assert len(read(path, "", "train")) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"the file has no records. Use another file"),
        ('{"question": "a", "answer": "b"}\nx\n', r"a\.jsonl:2 = 'x': not JSON .*one JSON object per line"),
        ("[1]\n", r"a\.jsonl:1 = \[1\]: not a JSON object"),
        ('{"question": "a"}\n', r"a\.jsonl:1 = 'answer': the record has no such field. Known: question"),
        ('{"questoin": "a", "answer": "b"}\n', r"Did you mean 'questoin'"),
        ('{"question": "a", "answer": ["b"]}\n', r"a\.jsonl:1 answer = \['b'\]: expected text"),
        ('{"question": "a", "answer": "  "}\n', r"a\.jsonl:1 answer = '  ': expected text"),
        ("[" * 100_000, r"not JSON"),
        ("\udcff", r"not UTF-8 text \(byte 0\)"),
        (
            '{"question": "a"}\n{"question": "\\ud83d", "answer": "b"}\n',
            r"a\.jsonl:2 'question' = '\\ud83d': half a char",
        ),
        ('{"question": "a", "answer": "b", "choices": ["\\uDC00"]}', r"a\.jsonl:1 'choices' = .*half a character"),
        ('{"question": "a", "answer": NaN}', r"a\.jsonl:1 answer = nan: expected text"),
    ],
)
def test_bad_files_are_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=message):
        Questions(str(tmp_path / "a.jsonl")).draw(random.Random(0))


def test_bad_sources_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl", CAPITAL)
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.parquet").write_text("no")
    for name, message in {
        "mime.jsonl": "no such file. Did you mean 'mine.jsonl'",
        "no/a.jsonl": "no such file",
        "a.txt": "not a supported file type. Use .jsonl",
        "a.json": "not a list",
        "a.parquet": "not parquet",
    }.items():
        with pytest.raises(UserError, match=message):
            Questions(str(tmp_path / name)).draw(random.Random(0))
    with pytest.raises(UserError, match=r"questions\.checker = 3: expected .*Callable"):
        Questions("a.jsonl", checker=3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"questions\.timeout = 0: not above 0"):
        Questions("a.jsonl", timeout=0)


def test_a_table_and_a_packed_file_hold_the_same_records(tmp_path: Path) -> None:
    rows = [{"question": 'He said "no",\nthen?', "answer": "1"}, {"question": "Größe", "answer": "2"}]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows)
    with (tmp_path / "a.TSV").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["question", "answer"], delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    (tmp_path / "a.ndjson").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.JSONL").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": rows}))
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, rows)))
    names = ["a.csv", "a.TSV", "a.jsonl.gz", "a.ndjson", "a.JSONL", "a.json", "b.json"]
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        pass
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
        (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
        with pyarrow.CompressedOutputStream(str(tmp_path / "a.csv.zst"), "zstd") as packed:
            packed.write((tmp_path / "a.csv").read_bytes())
        names += ["a.parquet", "b.parquet.gz", "a.csv.zst"]
    for name in names:
        assert [record.fields for record in read(str(tmp_path / name), "", "")] == rows
    assert read(str(tmp_path / "a.csv"), "", "")[1].where == f"{tmp_path}/a.csv:4"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"question,answer\nx\n", r"a\.csv:2 = .*not one value for each of the 2 columns"),
        ("a.csv", b'question,answer\n"x,y\n', r"a\.csv:1 = .*not a table"),
        ("a.jsonl.gz", b"{}", "not a complete gzip file"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 999, mtime=0)[:20], "not a complete gzip file"),
        ("a.jsonl.zst", b"{}", "not a complete zstd file"),
        ("a.parquet.gz", gzip.compress(b"no", mtime=0), "not parquet"),
        ("a.txt.gz", b"", "not a supported file type"),
    ],
)
def test_bad_tables_and_packed_files_are_named(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(str(tmp_path / name), "", "")


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, subset: str | None, **given: str | None) -> list[dict[str, Any]]:
        asked.append((name, subset, *given.values()))
        if subset is None:
            raise ConnectionError("Couldn't reach 'openai/gsm8k' on the Hub")
        return [GSM8K]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    task = Questions("hub:openai/gsm8k", subset="main", split="test")
    assert task.draw(random.Random(0)).answer == "72" and task.name == "gsm8k"
    with pytest.raises(
        UserError, match=r"subset '', split 'train' could not be loaded from the hub: Couldn't reach .*file"
    ):
        Questions("hub:openai/gsm8k").draw(random.Random(0))
    assert asked == [("openai/gsm8k", "main", "test", None, None), ("openai/gsm8k", None, "train", None, None)]
    read("hub:openai/gsm8k", "main", "test", revision="abc", files="test.jsonl")
    assert asked[-1] == ("openai/gsm8k", "main", "test", "abc", "test.jsonl")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"not installed. Run: .* -m pip install .*'datasets>=3'"):
        Questions("hub:openai/other").draw(random.Random(0))


def test_the_real_package_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="could not be loaded from the hub"):
        Questions("hub:nobody/nothing").draw(random.Random(0))
