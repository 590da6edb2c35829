"""The progress line: in a terminal of any width, piped, and in a notebook; and tables in a terminal."""

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path
from typing import Any

import pytest

from finback.runs.folder import StageRun
from finback.runs.progress import Progress, ProgressLine, short
from finback.runs.terminal import table
from tests.toy import environment

SHOWN = """
import time
from finback.runs import progress
progress.REDRAWN = 0
line = progress.ProgressLine("pretrain", 5_000_000, "tokens")
line.began -= 400
for done in range(0, 5_000_001, 250_000):
    line.draw(done, done, done * 1e-8, "loss 2.345, MFU 38%, and a note that is longer than the terminal is wide", done == 5_000_000)
"""


def in_terminal(code: str, columns: int, **variables: str) -> str:
    """A program's output to a terminal with so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {k: v for k, v in environment().items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    env |= {"TERM": "xterm-256color", **variables}
    child = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    found = b""
    try:
        while piece := os.read(ours, 65536):
            found += piece
    except OSError:  # how Linux reports that the other end is closed
        pass
    os.close(ours)
    assert child.wait() == 0, found.decode()
    return found.decode()


def on_screen(text: str, columns: int) -> list[str]:
    """The rows that a terminal shows for the text, with wrapping, cursor movement and erasing; colors are left out."""
    rows, column = [""], 0
    while text:
        if text.startswith("\x1b["):
            end = next(i for i, c in enumerate(text[2:], 2) if c.isalpha())
            if text[end] == "K":
                rows[-1] = ""
            else:
                assert text[end] in "m", f"unexpected {text[: end + 1]!r}"
            text = text[end + 1 :]
            continue
        c, text = text[0], text[1:]
        if c == "\r":
            column = 0
        elif c == "\n":
            rows.append("")
        else:
            if column == columns:
                rows, column = [*rows, ""], 0
            rows[-1] = rows[-1][:column] + c
            column += 1
    return rows


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_the_line_never_wraps(columns: int) -> None:
    text = in_terminal(SHOWN, columns)
    row, rest = on_screen(text, columns)
    assert rest == "" and len(row) < columns and row.startswith("pretrain 5M/5M tokens, ")
    assert text.count("\r\x1b[2K") == 21 and "\x1b[?25l" not in text  # a killed run would leave the cursor hidden
    if columns >= 60:
        assert "0:00 left, $0.0500" in row and row.endswith("…")


def test_a_bar_where_there_is_room_and_no_color_where_none_is_wanted() -> None:
    code = SHOWN.replace("loss 2.345, MFU 38%, and a note that is longer than the terminal is wide", "")
    colored, plain = in_terminal(code, 100), in_terminal(code, 100, NO_COLOR="1")
    assert on_screen(plain, 100)[0].endswith("━" * 40) and "\x1b[38" in colored and "\x1b[38" not in plain
    assert "\x1b" not in in_terminal(code, 100, TERM="dumb")


def test_piped_it_is_a_line_every_ten_seconds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finback.runs.progress.time", types.SimpleNamespace(monotonic=lambda: 100.0))
    run = StageRun(tmp_path, "base", 0, types.SimpleNamespace(rank=0, size=2))  # type: ignore[arg-type]
    line = Progress(run, 100, "steps", spent=3600)
    line.began -= 10
    for done in range(50, 60):
        line.show(done, "loss 2.0")
    line._last -= 10
    line.show(60, "loss 1.0")
    first, second = capsys.readouterr().err.splitlines()
    assert first == "base 50/100 steps, $0.0802, loss 2.0"  # resumed steps do not count towards the rate
    assert second == "base 60/100 steps, 1/s, 0:40 left, $0.0802, loss 1.0"
    Progress(StageRun(tmp_path, "base", 0, run.ranks, quiet=True), 1, "steps").show(1)
    assert capsys.readouterr().err == ""


def test_time_left_is_told_once_it_is_known() -> None:
    line = ProgressLine("toy", 100, "answers", sure=10)
    for done in range(1, 12):
        assert (" left, " in line.text(done, done, None)) == (done >= 10)
    assert line.text(1, 1, None).endswith("price NOT PROVIDED")


def test_a_notebook_keeps_one_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[Any] = []

    def display(data: Any, raw: bool, display_id: bool) -> Any:
        assert raw and display_id
        shown.append([data])
        return types.SimpleNamespace(update=lambda data, raw: shown[-1].append(data))

    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", types.SimpleNamespace(display=display))
    line = ProgressLine("<base>", 10, "steps")
    line.console.is_jupyter = True
    for done in range(11):
        line._last = 0.0
        line.draw(done, done, 0.5)
    ((*_, last),) = shown
    assert len(shown[0]) == 11 and last["text/plain"].startswith("<base> 10/10 steps, ")
    assert last["text/html"].startswith('<progress value="10" max="10"></progress> &lt;base&gt; 10/10')
    assert capsys.readouterr().err == ""


def test_counts_are_short() -> None:
    counts = (0, 7, 0.1234, 12.5, 99_999, 123_456, 999_990, 1_234_567, 5e9, 14.8e12)
    said = ["0", "7", "0.123", "12.5", "99,999", "123.5k", "1000k", "1.235M", "5G", "14.8T"]
    assert [short(count) for count in counts] == said


ROWS = [["a model", "12.3 % (1.0 to 20.1)", "@4 22 %", "100 x 4"], ["another", "13.0 %", "–", "100 x 4"]]
HEADERS = ["model", "pass@1 (95% interval)", "pass@k", "n x k"]


def test_a_table_is_as_wide_as_it_needs_where_nobody_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert table(ROWS, HEADERS, indent=1).splitlines() == [
        " model    pass@1 (95% interval)   pass@k    n x k",
        " a model   12.3 % (1.0 to 20.1)  @4 22 %  100 x 4",
        " another                 13.0 %        –  100 x 4",
    ]
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)  # keeps tables out of a cell's output
    assert table([["a", "[b]1[/b] :smile:"]], right=False) == "a  [b]1[/b] :smile:"


@pytest.mark.parametrize("columns", [24, 45, 60, 80])
def test_a_table_is_no_wider_than_the_terminal(columns: int) -> None:
    rows, headers = [[*row, "$0.001", "1.25 s"] for row in ROWS], [*HEADERS, "$/answer", "s/answer"]
    code = f"from finback.runs.terminal import table\nprint(table({rows!r}, {headers!r}))"
    lines = in_terminal(code, columns).replace("\r", "").splitlines()
    assert all(len(line) <= columns for line in lines)
    words = " ".join(lines).split()
    assert all(word in words for row in rows for cell in row for word in cell.split())
    assert (lines[0].split()[:2] == ["model", "a"]) == (24 < columns < 80)  # transposed
    assert (lines[0] == "a model") == (columns == 24)  # row by row
