"""The sandbox: what a program can use, what it is denied, and how the cause of its end is named."""

import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from finback.config import UserError
from finback.tasks import sandbox as module
from finback.tasks.child_process import remove
from finback.tasks.sandbox import Limits, Sandbox
from tests.test_hostile import left_over

SUM = "def solve(a, b):\n    return a + b"


def working(isolation: Any) -> Sandbox:
    try:
        return Sandbox(isolation)
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["bubblewrap", "rlimits"])
def sandbox(request: pytest.FixtureRequest) -> Sandbox:
    return working(request.param)


@pytest.fixture
def bubble() -> Sandbox:
    return working("bubblewrap")


def test_a_program_reads_stdin_and_writes_both_streams(sandbox: Sandbox) -> None:
    text = "import sys\ntext = sys.stdin.read()\nprint(len(text), text[-1])\nprint('é', file=sys.stderr)\nsys.exit(3)"
    seen = sandbox.run(text, "x" * 500_000 + "ü")
    assert (seen.stdout, seen.stderr, seen.exit_code, seen.reason) == ("500001 ü\n", "é\n", 3, "error")
    assert seen.compiled and seen.values == ()


def test_the_standard_library_is_there_and_nothing_else(sandbox: Sandbox) -> None:
    modules = "asyncio collections ctypes dataclasses decimal heapq itertools json math numpy re sqlite3 statistics"
    text = f"for name in {modules.split()}:\n    try:\n        __import__(name)\n    except ImportError:\n        print(name)\n"
    more = "import asyncio\nasyncio.run(asyncio.sleep(0))\n'x'.encode('idna')\nopen('mine', 'w').write('kept')\nprint(open('mine').read())"
    seen = sandbox.run(text + more)
    assert (seen.stdout, seen.stderr, seen.reason) == ("numpy\nkept\n", "", "ok")


def test_nothing_is_left_for_the_next_run(sandbox: Sandbox) -> None:
    text = "import os\nprint(os.listdir(), sorted(os.environ))\nopen('left', 'w').close()"
    first, second = sandbox.run(text), sandbox.run(text)
    assert first.stdout == second.stdout and first.stdout.startswith("[] [")
    assert not {"HOME", "PATH", "USER"} & set(first.stdout.split("'"))


def test_the_same_program_prints_a_set_alike_in_every_run(sandbox: Sandbox) -> None:
    assert len({sandbox.run("print(set('abcdefghij'))").stdout for _ in range(3)}) == 1


@pytest.mark.parametrize(
    ("text", "limits", "reason"),
    [
        ("while True: pass", Limits(wall=0.5), "timeout"),
        ("while True: pass", Limits(wall=4.0, cpu=1), "timeout"),
        ("x = bytearray(1 << 30)", Limits(), "memory"),
        ("print('x' * 3000)", Limits(output=1000), "output"),
        ("import ctypes\nctypes.string_at(0)", Limits(), "killed"),
        ("1 / 0", Limits(), "error"),
        ("x = bytearray(1 << 27)\nprint('x' * 999)", Limits(output=1000), "ok"),
    ],
)
def test_the_end_is_named(text: str, limits: Limits, reason: str, sandbox: Sandbox) -> None:
    start = time.monotonic()
    seen = sandbox.run(text, limits=limits)
    assert seen.reason == reason and len(seen.stdout) <= limits.output
    assert time.monotonic() - start < 60
    if reason != "output":  # it may have finished before it was stopped
        assert (seen.exit_code == 0) == (reason == "ok")


def test_functions_get_values_and_give_values(sandbox: Sandbox) -> None:
    seen = sandbox.call(SUM + "\nprint('hello')", "solve", [[1, 2], ["a", "ü"], [[1], [None, True, 0.5]]])
    assert seen.values == (3, "aü", [1, None, True, 0.5]) and seen.reason == "ok" and seen.stdout == "hello\n"
    seen = sandbox.call(SUM, "solve", [[1, 2], [1, "a"], [3, 4]])
    assert seen.values == (3,) and seen.reason == "error" and "TypeError" in seen.stderr
    assert not sandbox.call(SUM, "other", [[1, 2]]).compiled and sandbox.call(SUM, "solve", []).compiled


def test_many_threads_share_a_sandbox_and_leak_nothing(sandbox: Sandbox) -> None:
    before, children = psutil.Process().num_fds(), psutil.Process().children()
    with ThreadPoolExecutor(6) as pool:
        seen = list(pool.map(lambda i: sandbox.run(f"print({i}, input())", str(i)).stdout, range(24)))
    assert seen == [f"{i} {i}\n" for i in range(24)]
    assert psutil.Process().num_fds() == before and psutil.Process().children() == children


def test_bubblewrap_shows_neither_files_nor_network_nor_processes(bubble: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    paths = [str(tmp_path / "secret"), "/etc/passwd", "/proc/1/cmdline", "/sys", "/bin/sh", str(Path.home() / ".ssh")]
    text = f"import os\nprint([p for p in {paths} if os.path.exists(p)], os.getpid(), os.getuid(), os.uname().nodename)"
    assert bubble.run(text).stdout == "[] 1 65534 sandbox\n"
    # Even without the system call filter there is no way out: the namespace has no interface that is up.
    text = "import socket\nprint([name for _, name in socket.if_nameindex()])"
    assert "eth" not in bubble.run(text).stdout
    places = ["/", "/dev", "/usr/lib", str(Path(os.__file__).parent), sys.base_prefix]
    text = f"import os\nfor p in {places}:\n    try:\n        open(p + '/x', 'w')\n        print(p)\n    except OSError:\n        pass"
    seen = bubble.run(text)
    assert (seen.stdout, seen.reason) == ("", "ok")


def test_the_working_folder_is_bounded_as_a_whole(bubble: Sandbox) -> None:
    text = "for i in range(100):\n    open(str(i), 'wb').write(bytes(1 << 16))"
    assert "No space left" in bubble.run(text, limits=Limits(files=1 << 20)).stderr
    assert bubble.run(text, limits=Limits(files=8 << 20)).reason == "ok"


def test_processes_are_allowed_where_asked_for_and_end_with_the_run(bubble: Sandbox) -> None:
    text = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)\nelse:\n    print('parent')"
    assert bubble.run(text).stdout == ""
    seen = bubble.run(text, limits=Limits(processes=4))
    assert seen.stdout == "parent\n" and seen.reason == "ok"
    assert not left_over()
    with pytest.raises(UserError, match=r"^limits\.processes = 2: only bubblewrap can contain several"):
        working("rlimits").run("pass", limits=Limits(processes=2))


def test_without_bubblewrap_it_says_once_that_this_is_no_boundary(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "why_unavailable", lambda form: "no" if form == "bubblewrap" else None)
    module.warn_of_no_boundary.cache_clear()
    assert Sandbox().isolation == Sandbox().isolation == "rlimits"
    error = capsys.readouterr().err
    assert error.count("not a security boundary") == 1 and error.count("\n") == 1
    with pytest.raises(UserError, match=r"^sandbox\.isolation = 'bubblewrap': no\. Run: .* -m pip install"):
        Sandbox("bubblewrap")


def test_a_sandbox_that_does_not_start_is_our_fault_not_the_programs(
    bubble: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finback.tasks.isolation.bubblewrap", lambda: "/bin/false")
    with pytest.raises(RuntimeError, match="no start"):
        bubble.run("print(1)")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Limits(wall=0.0), "limits.wall = 0.0: not above 0. Use a positive number."),
        (lambda: Limits(memory="1"), "limits.memory = '1': expected int, got str. Correct the value in the recipe."),
        (lambda: Sandbox("jail"), "sandbox.isolation = 'jail': no such isolation. Known: bubblewrap, monty, rlimits."),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings_name_the_field(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert str(caught.value) == message


def test_folders_are_removed_however_deep_and_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outside").write_text("kept")
    top = here = tmp_path / "top"
    here.mkdir()
    (top / "link").symlink_to(tmp_path)
    monkeypatch.chdir(top)  # no path is long enough to reach the bottom
    for _ in range(1200):
        Path("d").mkdir()
        os.chdir("d")
    Path("file").write_text("x")
    monkeypatch.undo()
    (top / "d").chmod(0)
    remove(top)
    assert [path.name for path in tmp_path.iterdir()] == ["outside"]


def test_monty_runs_functions_only_when_asked_for() -> None:
    pytest.importorskip("pydantic_monty")
    sandbox, limits = Sandbox("monty"), Limits(wall=0.5, memory=64 << 20)
    assert sandbox.call(SUM, "solve", [[1, 2], ["a", "b"]]).values == (3, "ab")
    for text, reason in (
        ("def solve(a, b):\n    while True: pass", "timeout"),
        ("def solve(a, b): return [0] * 10**9", "memory"),
        ("import os\ndef solve(a, b): return os.system('true')", "error"),
        ("def solve(a, b): return open('/etc/passwd').read()", "error"),
        ("def solve(a, b): return float('nan')", "error"),
    ):
        seen = sandbox.call(text, "solve", [[1, 2]], limits)
        assert (seen.reason, seen.values, seen.compiled) == (reason, (), True)
    assert not sandbox.call("def solve(", "solve", [[1, 2]]).compiled
    with pytest.raises(UserError, match=r"^sandbox\.isolation = 'monty': can run functions only"):
        sandbox.run("print(1)")
