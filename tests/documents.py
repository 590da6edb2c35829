"""Runs the code blocks of the documents.

A page's blocks run from top to bottom in one folder. Python blocks share one namespace, which also has every name that
a recipe may use; blocks in no language, or a shell's, run command by command. Recipes run at toy size, through `--set`
and with a few of the packaged dialogues. Comments above a block, which readers do not see, change what happens to it:

    <!-- file: NAME -->             the block is the content of this file
        <!-- output -->                 the block is the output of the command before; "..." stands for any lines
    <!-- output, other numbers -->  the same, but digits and column widths may differ
    <!-- with: WORDS -->            every finback command of the block gets these words
    <!-- where: A = B -->           B replaces A
    <!-- before: COMMAND -->        run this command first; `python: CODE` for Python
    <!-- exit: CODES -->            the exit codes of the block's commands, if not all 0
    <!-- not run: WHY -->           it cannot run here; Python must still compile and commands must have valid options
"""

import ast
import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typer.main import get_command

from finback.cli import app
from finback.report import objects
from finback.runs import recipe as recipes
from tests.toy import ROOT, environment, finback

BLOCK = re.compile(r"((?:^<!-- [^\n]*-->\n)*)^(```+)(\w*)[^\n]*\n(.*?)^\2\s*$", re.M | re.S)
SHELLS = ("", "bash", "sh", "console")
SERVERS = ("serve", "watch")


@dataclass(frozen=True)
class Block:
    """One block of a page, and the comments above it in order."""

    line: int
    language: str
    text: str
    said: tuple[tuple[str, str], ...]

    def all(self, key: str) -> list[str]:
        """The values of all comments with this key."""
        return [value for name, value in self.said if name == key]


def blocks(page: Path) -> list[Block]:
    """The code blocks of a Markdown page."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        said = tuple(
            (key.strip(), value.strip())
            for comment in re.findall(r"<!-- (.*?) ?-->", match[1])
            for key, _, value in [comment.partition(":")]
        )
        body = match[4]
        for key, value in said:
            if key == "where":
                old, new = value.split(" = ")
                assert old in body, f"{page.name}: a block has no {old!r}"
                body = body.replace(old, new)
        found.append(Block(text.count("\n", 0, match.start(2)) + 1, match[3], body, said))
    return found


def small_corpus(folder: Path) -> Path:
    """Writes a package that replaces the dialogues' by its first few; returns the path to import it from."""
    spec = importlib.util.find_spec("chitchat_dataset")
    assert spec is not None and spec.origin is not None, "the dialogues are not installed"
    dialogues = json.loads(Path(spec.origin).with_name("dataset.json").read_text(encoding="utf-8"))
    package = folder / "packages/chitchat_dataset"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    few = dict(list(dialogues.items())[:300])
    (package / "dataset.json").write_text(json.dumps(few), encoding="utf-8")
    return package.parent


def toy_settings(recipe: Path) -> list[str]:
    """The `--set` arguments that shrink any recipe so that it runs in seconds."""
    small = {
        "Prepare": {"workers": 0},
        "Pretrain": {"max_tokens": 16384, "decay_tokens": 4096, "warmup_tokens": 2048},
        "Extend": {"max_tokens": 4096, "decay_tokens": 1024, "warmup_tokens": 1024},
        "Sparsify": {"max_tokens": 4096, "decay_tokens": 1024, "warmup_tokens": 1024},
        "SFT": {"epochs": 1},
        "Distill": {"epochs": 1, "steps": 2, "prompts_per_step": 2, "max_tokens": 8},
        "GRPO": {
            "steps": 2,
            "prompts_per_step": 2,
            "num_generations": 2,
            "max_tokens": 8,
            "patience": 0,
            "overlong": 0,
        },
        "Evaluate": {"data": "", "sources": ""},
        "Reject": {"prompts": 8, "num_generations": 2, "max_tokens": 8},
    }
    words = []

    def say(path: str, value: object) -> None:
        words.extend(("--set", f"{path}={value}"))

    for stage in recipes.load(recipe).stages:
        for knob, value in small.get(type(stage).__name__, {}).items():
            say(f"{stage.name}.{knob}", value)
        if getattr(stage, "validation", None):
            say(f"{stage.name}.validation.problems", 4)
        if getattr(stage, "probe", None):
            say(f"{stage.name}.probe.problems", 4)
        for i, _ in enumerate(getattr(stage, "exams", ())):
            say(f"{stage.name}.exams.{i}.problems", 4)
            say(f"{stage.name}.exams.{i}.max_tokens", 8)
        for knob in ("tasks", "text"):
            for i, part in enumerate(getattr(stage, knob, ())):
                if isinstance(getattr(part, "documents", None), int):
                    say(f"{stage.name}.{knob}.{i}.documents", 500 if knob == "tasks" else 24)
    return words


def commands(text: str) -> Iterator[str]:
    """The commands of a block: a line that ends in a backslash continues, and comment lines are skipped."""
    for line in re.sub(r"\\\n\s*", " ", text).splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line


def check_command(line: str) -> None:
    """Checks that a finback command that is not run names an existing command and existing options."""
    words = shlex.split(line, comments=True)
    while words and "=" in words[0]:
        words = words[1:]
    if not words or words[0] != "finback":
        return
    command = get_command(app).commands[words[1]]  # type: ignore[attr-defined]
    known = {name for parameter in command.params for name in parameter.opts}
    unknown = {w.partition("=")[0] for w in words if w.startswith("--")} - known - {"--help"}
    assert not unknown, f"{line}: {unknown}"


@dataclass
class Reader:
    """Follows the instructions of a page in a folder of its own."""

    folder: Path
    namespace: dict[str, Any] = field(default_factory=dict)
    printed: str = ""
    code: int = 0
    servers: list[subprocess.Popen[str]] = field(default_factory=list)
    ports: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.namespace |= {cls.__name__: cls for cls in objects.objects()}
        programs = self.folder / "bin"
        programs.mkdir(exist_ok=True)
        for name, module in (("finback", "finback"), ("torchrun", "torch.distributed.run"), ("python", "")):
            program = programs / name
            options = f"-m {module}" if module else ""
            program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {options} "$@"\n')
            program.chmod(0o755)
        paths = {"PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": f"{self.folder / 'packages'}:{ROOT}"}
        self.environment = environment() | paths | {"COLUMNS": "120"}

    def read(self, page: Path) -> None:
        """Runs every block of the page; an AssertionError names the line of the page."""
        for block in blocks(page):
            try:
                self.do(block)
            except Exception as error:
                raise AssertionError(
                    f"{page.relative_to(ROOT)}:{block.line}: {error!r}\n{self.printed[-3000:]}"
                ) from error

    def do(self, block: Block) -> None:
        """Runs one block."""
        keys = {key for key, _ in block.said}
        for command in block.all("before"):
            if command.startswith("python: "):
                self.python(command.removeprefix("python: "))
            else:
                self.shell(command, "")
                assert self.code == 0, f"{command}: exit code {self.code}"
        if "file" in keys:
            path = self.folder / block.all("file")[0]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.here(block.text), encoding="utf-8")
        elif "output" in keys or "output, other numbers" in keys:
            self.compare(block.text, "output, other numbers" in keys)
        elif "not run" in keys:
            check_unrun(block)
        elif block.language == "python":
            self.python(block.text)
        elif block.language in SHELLS:
            self.commands(block)
        else:
            raise AssertionError(f"cannot run {block.language}: say which file it is, or why it is not run")

    def commands(self, block: Block) -> None:
        lines = list(commands(block.text))
        codes = [int(code) for code in " ".join(block.all("exit")).split()] or [0] * len(lines)
        for line, code in zip(lines, codes, strict=True):
            self.shell(line, " ".join(block.all("with")))
            assert self.code == code, f"{line}: exit code {self.code}"

    def here(self, text: str) -> str:
        """Replaces the ports in a text by those of this reader's servers."""
        for port, mine in self.ports.items():
            text = re.sub(rf"\b{port}\b", str(mine), text)
        return text

    def python(self, text: str) -> None:
        printed = io.StringIO()
        try:
            with contextlib.chdir(self.folder), contextlib.redirect_stdout(printed):
                exec(compile(self.here(text), "block", "exec"), self.namespace)
        finally:
            self.printed, self.code = printed.getvalue(), 0

    def shell(self, line: str, more: str) -> None:
        line = self.here(line)
        words = shlex.split(line, comments=True)
        if words[:1] == ["finback"] and words[1] in SERVERS:
            return self.serve([*words[1:], *shlex.split(more)])
        if words[:1] == ["finback"]:
            line = f"{line.partition(' #')[0]} {more}"
            # a run starts its own processes, whose ranks must find the few dialogues
            if words[1] != "run" and not re.search(r"[|<>&$~*]", line):
                with contextlib.chdir(self.folder):
                    done = finback(*shlex.split(line)[1:])
                self.printed, self.code = done.stdout + done.stderr, done.returncode
                return None
        if recipe := re.search(r"\bfinback run (\S+\.py)", line):
            with contextlib.chdir(self.folder):
                line = f"{line} {shlex.join(toy_settings(Path(recipe[1])))} --ranks 1"
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300
        )
        self.printed, self.code = done.stdout + done.stderr, done.returncode
        return None

    def serve(self, words: list[str]) -> None:
        """Starts a server in the background on a free port, and replaces the previous server."""
        self.stop()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        asked = words[words.index("--port") + 1] if "--port" in words else "8000" if words[0] == "serve" else "8001"
        self.ports[asked] = port
        command = [sys.executable, "-m", "finback", *words, "--port", str(port)]
        log = self.folder / "server.log"
        with log.open("w") as out:
            self.servers.append(
                subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=out, stderr=out, text=True)
            )
        for _ in range(1200):
            if self.servers[-1].poll() is not None:
                raise AssertionError(f"{words}: {log.read_text()}")
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    self.printed, self.code = "", 0
                    return
            time.sleep(0.1)
        raise AssertionError(f"{words}: no server answers")

    def stop(self) -> None:
        """Stops the servers."""
        for server in self.servers:
            server.terminate()
            server.wait(30)
        self.servers.clear()

    def compare(self, expected: str, other_numbers: bool) -> None:
        """Checks that every line of a page is printed, in order, and consecutively unless "..." comes between."""
        places = iter([_like(line, other_numbers) for line in self.printed.splitlines()])
        for line in expected.splitlines():
            if line.strip() and line.strip() != "...":
                assert any(_like(line, other_numbers) == printed for printed in places), f"not printed: {line}"


def _like(line: str, other_numbers: bool) -> str:
    if not other_numbers:
        return line.rstrip()
    return re.sub(r"[\s-]+", " ", re.sub(r"[\d.,:]*\d%?", "0", line)).strip()


def check_unrun(block: Block) -> None:
    """Checks what can be checked of a block without running it."""
    if block.language == "python":
        ast.parse(block.text)
    elif block.language in SHELLS:
        for line in commands(block.text):
            check_command(line)
