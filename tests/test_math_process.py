"""Mathematical comparison in a worker: what counts as equal, why hostile answers are harmless, and how workers end."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import finback
from finback.config import UserError
from finback.tasks import math_process
from finback.tasks.math_process import NOTHING, Comparison, MathProcess, compare

RIGHT, WRONG = Comparison(same=True, read=True), Comparison(same=False, read=True)
ROOT = Path(finback.__path__[0]).parent
HOSTILE = {
    "import": "__import__('os').system('touch F')",
    "import without underscores": "eval(chr(95)*2+'import'+chr(95)*2+\"('os').system('touch F')\")",
    "open": "open('F', 'w')",
    "tower": "9**9**9**9",
    "tower in LaTeX": "9^{9^{9^{9^{9}}}}",
    "factorials": "9999999!!",
    "megabyte of braces": "{" * 2**20,
    "megabyte of pairs": "{}" * 2**19,
    "fractions in fractions": r"\frac{1}{" * 100 + "1" + "}" * 100,
    "fractions in a few fractions": r"\frac{1}{" * 11 + "1" + "}" * 11,
    "parentheses": "(" * 200 + "1" + ")" * 200,
    "digits": "9" * 499,
    "no end": r"\frac{1",
    "closed early": r"\frac12}{",
    "nul": "1\0",
    "surrogate": "\ud8001",
    "line break": '1\n{"gold": "1", "answer": "1"}',
    "nothing": "",
}


@pytest.fixture(scope="module")
def worker() -> Iterator[MathProcess]:
    worker = MathProcess(seconds=2)
    yield worker
    worker.close()


@pytest.mark.parametrize(
    ("gold", "answer", "comparison"),
    [
        (r"\frac{1}{2}", "0.5", RIGHT),
        (r"\frac{1}{2}", "1/2", RIGHT),
        (r"\frac12", r"\dfrac{2}{4}", RIGHT),
        (r"\frac12", r"50\%", RIGHT),
        (r"\frac12", r"a = \frac12", RIGHT),
        (r"\frac12", r"\frac13 = \frac12", WRONG),
        (r"\frac12", r"\frac12 = \frac13", WRONG),
        (r"\frac12", r"x = y = \frac12", WRONG),
        (r"\frac12", r"\frac12 \text{ or } \frac13", WRONG),
        (r"\frac12", r"\pm\frac12", WRONG),
        (r"\frac12", r"\frac12, \frac13", WRONG),
        (r"\frac12", r"\frac12 \frac13", WRONG),
        (r"\frac12", r"\frac12 < 1", WRONG),
        (r"\frac12", r"\frac12 \text{ maybe } 3", WRONG),
        (r"\frac12", "The answer is 1/2", WRONG),
        (r"\frac{1}{10000000}", "0.0000001", RIGHT),
        (r"\frac{1}{10000000}", "0.0000002", WRONG),
        (r"\frac{1}{10000000}", "0", WRONG),
        (r"\sqrt{2}", "1.414214", RIGHT),
        (r"\sqrt{2}", "1.41", WRONG),
        (r"2\sqrt{3}", r"\sqrt{12}", RIGHT),
        (r"10\text{ meters}", "10", RIGHT),
        (r"90^\circ", "90", RIGHT),
        (r"\{1,2\}", "2, 1", RIGHT),
        (r"\{1,2\}", "1, 2, 3", WRONG),
        (r"\{1,2\}", "(1,2)", WRONG),
        ("(2,1)", "(2,1)", RIGHT),
        ("(2,1)", "(1,2)", WRONG),
        ("(1,2]", "(1,2]", RIGHT),
        ("(1,2]", "[1,2]", WRONG),
        ("(1,2]", "1,2", WRONG),
        (r"(-\infty,2)\cup(3,\infty)", r"(3,\infty)\cup(-\infty,2)", RIGHT),
        ("x(x+2)", "x^2+2x", RIGHT),
        ("y=2x+1", "y-2x=1", RIGHT),
        ("x=3", "3", RIGHT),
        ("x=3", "y=3", WRONG),
        ("3+4i", "4i+3", RIGHT),
        (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", RIGHT),
        (r"\frac12", r"\frac12 \\ \frac13", NOTHING),
    ],
)
def test_equal_answers(gold: str, answer: str, comparison: Comparison, worker: MathProcess) -> None:
    assert worker.compare(gold, answer) == comparison


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_answers_do_nothing_and_end_in_time(
    attack: str, worker: MathProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(math_process, "shared", lambda: worker)
    start = time.monotonic()
    assert not compare(r"\frac12", HOSTILE[attack]).same
    assert time.monotonic() - start < 600  # unlimited, it would take hours
    assert not list(tmp_path.iterdir())
    assert compare(r"\frac12", "0.5") == RIGHT  # in the same worker or in a new one


def test_without_the_parents_filter_the_worker_still_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    worker = MathProcess(seconds=1, megabytes=600)
    for name in ("import", "megabyte of braces", "fractions in fractions", "surrogate"):
        start = time.monotonic()
        assert not worker.compare("2", HOSTILE[name]).same
        assert time.monotonic() - start < 600
    assert not list(tmp_path.iterdir()) and worker.compare("2", "4/2") == RIGHT
    worker.close()


@pytest.mark.parametrize(
    "deed",
    [
        "open('F', 'w')",
        "os.system('touch F')",
        "os.fork()",
        "os.remove('G')",
        "socket.socket()",
        "subprocess.run(['touch', 'F'])",
        "bytearray(2**30)",
    ],
)
def test_the_worker_may_not(deed: str, tmp_path: Path) -> None:
    (tmp_path / "G").touch()
    code = (
        "import os, socket, subprocess, runpy; "
        f"w = runpy.run_path({str(ROOT / 'finback/tasks/math_worker.py')!r}); w['confine'](500); open(os.devnull); "
        f"print('confined', flush=True); {deed}; print('done')"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, timeout=120)
    assert ended.stdout == b"confined\n" and ended.returncode
    assert [path.name for path in tmp_path.iterdir()] == ["G"]


def test_threads_share_a_worker(worker: MathProcess) -> None:
    results: dict[int, Comparison] = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: worker.compare(f"\\frac{{{i}}}{{7}}", f"{2 * i}/14")}))
        for i in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(1, 9), RIGHT)


def test_a_worker_that_died_is_replaced(worker: MathProcess) -> None:
    assert worker.compare("1/2", "0.5") == RIGHT
    first = worker.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)  # it may not have exited yet when the next request comes
    assert worker.compare("1/2", "0.5") == RIGHT and worker.pid != first
    worker.close()
    worker.close()
    assert worker.compare("1/2", "0.5") == RIGHT


def test_a_stopped_worker_is_not_a_wrong_answer(worker: MathProcess) -> None:
    """The limit is CPU time: here the worker is suspended for three seconds, where two of computing are allowed."""
    assert worker.compare("1/2", "0.5") == RIGHT
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGSTOP)
    timer = threading.Timer(3, os.kill, (worker.pid, signal.SIGCONT))
    timer.start()
    assert worker.compare("1/3", "2/6") == RIGHT
    timer.join()


def test_a_worker_that_cannot_start_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"its worker does not start.*pip install math-verify"):
        MathProcess(program=tmp_path / "none.py").compare("1", "2")


PARENT = """
import json, os, sys, threading, time
from finback.tasks.math_process import MathProcess
worker = MathProcess(seconds=3)
worker.compare("1/2", "0.5")
print(worker.pid, flush=True)
if sys.argv[1] == "busy":
    threading.Thread(target=worker.compare, args=("1", "9^{9^{9}}")).start()
    time.sleep(0.3)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("state", ["idle", pytest.param("busy", marks=pytest.mark.slow)])
def test_the_worker_ends_with_a_killed_parent(state: str) -> None:
    parent = subprocess.run([sys.executable, "-c", PARENT, state], cwd=ROOT, capture_output=True, timeout=120)
    assert parent.returncode == -signal.SIGKILL
    pid, until = int(parent.stdout), time.monotonic() + 20
    while _is_running(pid):
        assert time.monotonic() < until, "the worker is still running after its parent"
        time.sleep(0.05)


def test_a_forked_process_has_its_own_worker() -> None:
    code = """
import os
from finback.tasks import math_process
math_process.compare("1/2", "0.5")
mine = math_process.shared().pid
child = os.fork()
if not child:
    assert math_process.compare("1/2", "0.5").same and math_process.shared().pid != mine
    raise SystemExit  # through atexit, which must leave the parent's worker alone
assert os.waitpid(child, 0)[1] == 0
assert math_process.compare("1/3", "2/6").same and math_process.shared().pid == mine
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, check=True, timeout=120)


def test_the_math_reader_never_enters_this_process() -> None:
    code = "import sys, finback.tasks.math_process as a; a.compare('1/2', '0.5'); print(json.dumps([m for m in sys.modules if 'sympy' in m]))"
    done = subprocess.run([sys.executable, "-c", "import json;" + code], cwd=ROOT, capture_output=True, check=True)
    assert json.loads(done.stdout) == []


def _is_running(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
