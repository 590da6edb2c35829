"""`finback chat` at a terminal: line editing, commands, switching models, and resuming a chat."""

import io
import os
import pty
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from finback.checkpoint import models
from finback.config import UserError
from finback.report import chat
from finback.report.chat import Conversation, is_command
from finback.report.options import ChatOptions
from tests.serving import small_model, small_tokenizer, wait_for


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat") / "model"
    folder.mkdir()
    models.save(folder, small_model(256))
    small_tokenizer().save(folder)
    return folder


def test_a_path_is_no_command(tmp_path: Path) -> None:
    for line in ("/new", "/think on", "/help me", "/nwe", "/thinks off"):
        assert is_command(line), line
    for line in (
        "/home/me/x.py explain",
        "/etc",
        "/tmp what is in it",
        "// a comment",
        "/ 2",
        "/usr/bin/env",
        "/zebra",
    ):
        assert not is_command(line), line


def test_ctrl_c_clears_the_line_and_twice_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    typed: list[str | type[BaseException]] = [KeyboardInterrupt, "hello", KeyboardInterrupt, KeyboardInterrupt, "never"]
    clock = iter((10.0, 20.0, 20.5))

    def read(_: str) -> str:
        found = typed.pop(0)
        if isinstance(found, str):
            return found
        raise found

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat, "_pasted", lambda: "")
    monkeypatch.setattr(chat, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert chat._ask(True) == "hello"
    assert chat._ask(True) is None and typed == ["never"]


def test_another_model_answers_and_a_dialogue_goes_on(model: Path, tmp_path: Path) -> None:
    talk = Conversation(model, 0, max_tokens=2)
    "".join(talk.reply("Hello"))
    before = talk.llm
    assert "now chatting with" in talk.command(f"/model {model}") and talk.llm is not before and len(talk.messages) == 2
    with pytest.raises(UserError):
        talk.command("/model /nowhere")
    with pytest.raises(UserError, match="/new"):
        talk.command("/nwe")
    kept = tmp_path / "chats" / "x.json"
    chat._keep(kept, talk.messages)
    assert chat._kept(kept) == talk.messages and stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert chat._kept(tmp_path / "none.json") == []
    assert not chat._keep(kept / "below a file", talk.messages)
    kept.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        chat._kept(kept)


def test_scripts_go_on_too(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for turns in (2, 4):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
        chat.loop(ChatOptions(model=model, max_tokens=2, resume=True, kept=tmp_path / "kept"), True, False)
        (file,) = (tmp_path / "kept").iterdir()
        assert len(chat._kept(file)) == turns


@pytest.mark.slow
def test_a_paste_is_one_message(model: Path, tmp_path: Path) -> None:
    """In a real terminal, which marks a paste as one."""
    ours, theirs = pty.openpty()
    save = tmp_path / "saved.jsonl"
    env = {**os.environ, "TERM": "xterm", "XDG_STATE_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "finback", "chat", str(model), "--max-tokens", "2"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.DEVNULL, env=env) as running:
        os.close(theirs)
        seen = b""

        def shows(text: bytes) -> None:
            nonlocal seen
            until = time.monotonic() + 120
            while text not in seen and time.monotonic() < until:
                seen += os.read(ours, 4096)
            assert text in seen
            seen = b""

        shows(b"you: ")
        os.write(ours, b"\x1b[200~first\nsecond\x1b[201~\n")
        shows(b"you: ")
        os.write(ours, f"/save {save}\n".encode())
        wait_for(save.is_file, 60)
        os.write(ours, b"\x04")
        running.wait(timeout=60)
    assert '"first\\nsecond"' in save.read_text() and save.read_text().count('"user"') == 1
