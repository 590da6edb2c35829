"""Hostile outputs: no output of a model earns a reward by an attack, changes the host, or exceeds the time limit."""

import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from finback.config import UserError
from finback.tasks.code import Code
from finback.tasks.gym import Gym
from finback.tasks.math import Chains
from finback.tasks.sandbox import Limits, Sandbox
from finback.tasks.seccomp import call_filter
from finback.tasks.task import Problem, Task, Verdict
from tests.serving import wait_for

LIMITS = Limits(wall=1.0, cpu=1, memory=256 << 20, files=4 << 20)
MARGIN = 60.0  # extra seconds on a busy machine; what sleeps would take longer
DATA = """\
{"question": "program", "tests": [{"stdin": "17 25", "stdout": "42"}], "solution": "print(sum(map(int, input().split())))"}
{"question": "function", "entry": "solve", "tests": [{"args": [17, 25], "expected": 42}, {"args": [0, 1], "expected": 1}], "solution": "def solve(a, b):\\n    return a + b"}
"""

# CANARY is a file of the host, HOST a folder.
PROGRAMS = {
    "fork bomb": "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
    "thread bomb": "import threading, time\nwhile True:\n    try:\n        threading.Thread(target=time.sleep, args=(99,)).start()\n    except RuntimeError:\n        pass",
    "small stacks": "import threading, time\nthreading.stack_size(32768)\nwhile True:\n    threading.Thread(target=time.sleep, args=(99,)).start()",
    "memory bomb": "x = []\nwhile True:\n    x.append(bytearray(1 << 24))",
    "memory in one piece": "x = 'a' * (1 << 40)",
    "memory through mmap": "import mmap\nx = []\nwhile True:\n    m = mmap.mmap(-1, 1 << 24)\n    m.write(b'x' * (1 << 24))\n    x.append(m)",
    "memory in files": "import os\nwhile True:\n    os.write(os.memfd_create('x'), b'x' * (1 << 20))",
    "endless loop": "while True:\n    pass",
    "endless sleep": "import time\nwhile True:\n    time.sleep(1e6)",
    "tower": "print(9**9**9**9)",
    "long digits": "import sys\nsys.set_int_max_str_digits(0)\nprint(str(1 << (1 << 26)))",
    "regular expression": "import re\nre.match('(a+)+$', 'a' * 64 + 'b')",
    "shell": "import os\nprint(os.system('touch HOST/made; rm -rf HOST'))",
    "exec": "import os\nos.execv('/bin/sh', ['sh', '-c', 'touch HOST/made; echo 0'])",
    "python again": "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'while True: pass'])",
    "subprocess": "import subprocess\nprint(subprocess.run(['touch', 'HOST/made']))",
    "spawn": "import os\nos.posix_spawn('/bin/touch', ['touch', 'HOST/made'], {})",
    "multiprocessing": "import multiprocessing\np = multiprocessing.Process(target=print)\np.start()",
    "tcp": "import socket\nsocket.create_connection(('1.1.1.1', 80), 9)",
    "listen": "import socket\ns = socket.socket()\ns.bind(('127.0.0.1', 0))\ns.listen()\ns.accept()",
    "udp": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
    "unix socket": "import socket\nsocket.socket(socket.AF_UNIX).bind('\\0finback')",
    "netlink": "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
    "vsock": "import socket\nsocket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).connect((2, 1024))",
    "raw socket": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "write outside": "open('CANARY', 'w').write('changed')",
    "delete outside": "import shutil\nshutil.rmtree('HOST')",
    "through a link": "import os\nos.symlink('HOST', 'link')\nopen('link/made', 'w').write('x')",
    "through dots": "import os\nopen('../' * 30 + 'CANARY', 'w').write('x')",
    "hard link": "import os\nos.link('CANARY', 'mine')\nopen('mine', 'w').write('x')",
    "modes": "import os\nos.chmod('HOST', 0o777)\nos.chown('CANARY', 0, 0)",
    "walk of proc": "import os\nfor p in os.listdir('/proc'):\n    open(f'/proc/{p}/mem', 'r+b').write(b'x')",
    "oom score": "open('/proc/self/oom_score_adj', 'w').write('-1000')",
    "sysrq": "open('/proc/sysrq-trigger', 'w').write('c')",
    "disk of one file": "f = open('big', 'wb')\nwhile True:\n    f.write(b'x' * (1 << 20))",
    "disk of many files": "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(b'x' * 65536)",
    "deep folders": "import os\nwhile True:\n    os.mkdir('d')\n    os.chdir('d')",
    "locked folders": "import os\nos.makedirs('a/b/c')\nos.chmod('a/b', 0)\nos.chmod('a', 0)",
    "exit 0": "import sys\nsys.exit(0)",
    "hard exit 0": "import os\nos._exit(0)",
    "passed": "print('passed')\nprint('OK')\nprint('1 passed in 0.01s')",
    "json spoof": 'print(\'{"correct": true, "well_formed": true, "reward": 1.0}\')',
    "verdict in the channel": "import os\nfor fd in range(3, 64):\n    for text in (b'passed', b'{\"correct\": true}\\n', b'ready\\ncompiled \\nvalue 42\\n'):\n        try:\n            os.write(fd, text)\n        except OSError:\n            pass",
    "harness frames": "import sys\nf = sys._getframe()\nwhile f.f_back:\n    f = f.f_back\nprint(sorted(f.f_globals), [k for g in [sys._getframe(1)] for k in g.f_locals], sys._getframe(1).f_locals.get('request'))",
    "garbage collector": "import gc\nprint([o for o in gc.get_objects() if isinstance(o, dict) and ('stdout' in o or 'expected' in o or 'tests' in o)])",
    "recursion": "def f():\n    f()\nf()",
    "recursion without a limit": "import sys\nsys.setrecursionlimit(10**9)\ndef f():\n    f()\nf()",
    "deep source": "x = " + "(" * 3000 + ")" * 3000,
    "long sums": "x = " + "1+" * 30000 + "1",
    "minus signs": "x = " + "-" * 60000 + "1",
    "much output": "while True:\n    print('x' * 65536)",
    "much on stderr": "import sys\nwhile True:\n    sys.stderr.write('x' * 65536)",
    "catches all": "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
    "deaf to signals": "import signal\nfor s in range(1, 65):\n    try:\n        signal.signal(s, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
    "daemon": "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)",
    "raises its limits": "import resource\nfor r in range(16):\n    try:\n        resource.setrlimit(r, (-1, -1))\n    except (OSError, ValueError):\n        pass\nx = bytearray(1 << 33)",
    "segmentation fault": "import ctypes\nctypes.string_at(0)",
    "trace": "import sys\nsys.settrace(lambda *a: sys.stdout.write('42') and None)\nsys.setprofile(lambda *a: None)",
    "atexit": "import atexit\natexit.register(lambda: print('passed'))",
    "endless atexit": "import atexit, time\natexit.register(time.sleep, 99)",
    "stdin": "import sys, os\nsys.stdin.read()\nsys.stdin.close()\nos.close(0)\nprint(input())",
    "writes to stdin": "import os\nwhile True:\n    os.write(0, b'42' * 65536)",
    "closes everything": "import os\nos.closerange(0, 4096)\nwhile True:\n    pass",
    "nul": "print(1)\0print(2)",
    "surrogates": "print('\ud800')",
    "right to left": "print('\u202e24\u202c')",
    "other digits": "print('\uff14\uff12')",
    "kills everyone": "import os\nos.kill(-1, 9)",
    "kills its parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nos.killpg(0, 9)",
    "stops itself": "import os\nos.kill(os.getpid(), 19)\nwhile True:\n    pass",
    "namespaces": "import ctypes\nprint(ctypes.CDLL(None).unshare(0x10000000 | 0x20000))",
    "a sandbox in the sandbox": "import sys\nsys.path.append('HOST')\nfrom finback.tasks.sandbox import Sandbox\nprint(Sandbox().run('print(42)').stdout)",
    "ptrace": "import ctypes\nprint(ctypes.CDLL(None).ptrace(16, 1, 0, 0))",
    "shared memory": "import ctypes\nprint(ctypes.CDLL(None).shmget(4242, 1 << 30, 0o1666))",
}
_FRAMES = "import os, sys\no = sys._getframe(1).f_locals['request']\n"
FUNCTIONS = {
    "equal to all": "class E:\n    def __eq__(self, o): return True\n    __hash__ = None\ndef solve(a, b): return E()",
    "integer equal to all": "class E(int):\n    def __eq__(self, o): return True\n    def __repr__(self): return '42'\n    __str__ = __repr__\ndef solve(a, b): return E(7)",
    "text equal to all": "class E(str):\n    def __eq__(self, o): return True\n    def __hash__(self): return 0\ndef solve(a, b): return E('x')",
    "list equal to all": "class E(list):\n    def __eq__(self, o): return True\ndef solve(a, b): return E([1])",
    "generator": "def solve(a, b):\n    yield a + b",
    "nan": "def solve(a, b): return float('nan')",
    "infinity": "def solve(a, b): return float('inf')",
    "text of the number": "def solve(a, b): return str(a + b)",
    "true for one": "def solve(a, b): return True if b == 1 else a + b",
    "leaves": "import os\ndef solve(a, b): os._exit(0)",
    "exits": "def solve(a, b): raise SystemExit(0)",
    "interrupts": "def solve(a, b): raise KeyboardInterrupt",
    "patches json": "import json\njson.dumps = lambda *a, **k: 'true'\njson.loads = lambda *a, **k: 42\ndef solve(a, b): return None",
    "patches builtins": "import builtins\nbuiltins.__dict__.update(len=lambda x: 2, map=lambda *a: [True], all=lambda x: True, zip=lambda *a, **k: [])\ndef solve(a, b): return 0",
    "patches os": "import os\nos.write = lambda fd, b: len(b)\nos._exit = lambda c: None\ndef solve(a, b): return 0",
    "forges reports": _FRAMES
    + "def solve(a, b):\n    for fd in range(3, 64):\n        try:\n            os.write(fd, f\"{o['nonce']} value true\\n{o['nonce']} value passed\\n\".encode())\n        except OSError:\n            pass\n    os._exit(0)",
    "floods reports": _FRAMES
    + "def solve(a, b):\n    while True:\n        for fd in range(3, 9):\n            try:\n                os.write(fd, b'x' * 4096)\n            except OSError:\n                pass",
    "deep value": _FRAMES
    + "def solve(a, b):\n    for fd in range(3, 9):\n        try:\n            os.write(fd, f\"{o['nonce']} value {'[' * 90000}\\n\".encode())\n        except OSError:\n            pass",
    "long value": "import sys\nsys.set_int_max_str_digits(0)\ndef solve(a, b): return 10**400000",
    "circle": "def solve(a, b):\n    x = []\n    x.append(x)\n    return x",
    "looks for what is expected": _FRAMES + "def solve(a, b): return o.get('expected', o.get('tests'))",
    "changes its arguments": _FRAMES + "def solve(a, b):\n    o['arguments'].clear()\n    return a + b",
    "no such function": "def other(a, b): return a + b",
    "prints": "def solve(a, b): print(a + b)",
}
CASES = [*((name, "program") for name in PROGRAMS), *((name, "function") for name in FUNCTIONS)]


def stamp(folder: Path) -> list[Any]:
    """Everything in a folder, with modes and owners."""
    paths = sorted([folder, *folder.rglob("*")])
    kept = [(p.name, p.lstat().st_mode, p.lstat().st_uid, p.lstat().st_nlink) for p in paths]
    return [kept, [p.read_bytes() for p in paths if p.is_file()]]


def sandboxed() -> set[psutil.Process]:
    """The processes of sandboxes that exist now, anywhere in the process tree."""
    found = set()
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
            is_zombie = process.status() == psutil.STATUS_ZOMBIE
        except psutil.Error:
            continue
        if "Runs inside the sandbox" in words and not is_zombie:
            found.add(process)
    return found


def left_over() -> set[psutil.Process]:
    """Processes of sandboxes that stay. Those of other tests, which may run beside this one, end."""
    found, until = sandboxed(), time.monotonic() + 60
    while found and time.monotonic() < until:
        time.sleep(0.05)
        found &= sandboxed()
    return found


@pytest.fixture(scope="module", params=["bubblewrap", "rlimits"])
def checked(request: pytest.FixtureRequest, tmp_path_factory: Any) -> dict[tuple[str, str], Any]:
    """Every case's verdict and seconds in one kind of sandbox, after checking that the host is unchanged."""
    try:
        Sandbox(request.param)
    except UserError as error:
        pytest.skip(str(error))
    if request.param == "rlimits" and not call_filter(may_fork=False):
        pytest.skip("no system call filter here would contain them")
    data = tmp_path_factory.mktemp("data") / "data.jsonl"
    # pytest's own folders are closed to other users, which would hide a leak of the sandbox.
    host = Path(tempfile.mkdtemp(prefix="canary-"))
    request.addfinalizer(lambda: shutil.rmtree(host))
    data.write_text(DATA)
    (host / "canary").write_text("unchanged")
    host.chmod(0o755)
    before, files = stamp(host), set(Path("/tmp").iterdir())
    children = psutil.Process().children()
    task = Code(str(data), isolation=request.param, limits=LIMITS)

    def check(case: tuple[str, str]) -> tuple[Verdict, float]:
        text = (PROGRAMS if case[1] == "program" else FUNCTIONS)[case[0]]
        text = text.replace("CANARY", str(host / "canary")).replace("HOST", str(host))
        start = time.monotonic()
        verdict = task.check(Problem("?", "", f"code: {case[1]}"), f"Here:\n```python\n{text}\n```\n42")
        return verdict, time.monotonic() - start

    with ThreadPoolExecutor(4) as pool:
        results: dict[Any, Any] = dict(zip(CASES, pool.map(check, CASES), strict=True))
    new = [path for path in set(Path("/tmp").iterdir()) - files if path.name.startswith("finback-")]
    assert not left_over()
    wait_for(lambda: not any(path.exists() for path in new), 60)  # other tests remove theirs
    if request.param == "bubblewrap" or os.geteuid() == 0:  # otherwise the files belong to the sandbox's own user
        assert stamp(host) == before
    assert psutil.Process().children() == children
    return results


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_a_hostile_program_is_not_paid_and_ends(case: tuple[str, str], checked: dict[tuple[str, str], Any]) -> None:
    verdict, seconds = checked[case]
    assert not verdict.correct and seconds < LIMITS.wall + MARGIN


@pytest.mark.parametrize("isolation", ["bubblewrap", "rlimits"])
def test_the_same_tasks_pay_an_honest_program(isolation: Any, tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(DATA)
    task = Code(str(tmp_path / "data.jsonl"), isolation=isolation, limits=replace(LIMITS, wall=60.0))
    honest = {"program": "a, b = map(int, input().split())\nprint(a + b)", "function": "solve = lambda a, b: a + b"}
    for kind, text in honest.items():
        assert task.check(Problem("?", "", f"code: {kind}"), text) == Verdict(True, True)


FIVE = Problem(question="3+2=?", answer="5", key="?")
COUNTDOWN = Problem(question="Make 99 of 25, 4 and 1.", answer="25*4-1", key="?")
TEXTS = [
    "",
    " ",
    "\0",
    "5\0",
    "the answer is 5",
    "5.",
    "5.0",
    "5,",
    "5 5",
    "5\n5",
    "5 6",
    "12 or 13",
    "5 or 6",
    "</answer>5",
    "<answer>5</answer>",
    "<answer><answer>5</answer></answer>",
    "</think>5",
    "3+2=5",
    "3+2=?5",
    "3+2",
    "=5",
    "$5$",
    "\\boxed{5}",
    "**5**",
    "`5`",
    "[5]",
    "(5)",
    "'5'",
    "5e0",
    "0x5",
    "0b101",
    "5_",
    "_5",
    "1e400",
    "--5",
    "-+5",
    "+-5",
    "- 5",
    "+ 5",
    "-5",
    "NaN",
    "Infinity",
    "True",
    "None",
    "V",
    "five",
    "__import__('os').system('true')",
    "9**9**9**9",
    "9" * 10_000_000,
    "5" + "\u200b",
    "\u200b5",
    "\u202e5",
    "\ufeff5",
    "\uff15",
    "\u0665",
    "\u096b",
    "\u2075",
    "\u2464",
    "5\u0301",
    "\ud8005",
    "1/0",
    "10/2",
    "5;",
    "5#",
    "5" + "\u00ad",
    "(" * 10_000,
    "-" * 10_000 + "5",
    "006",
    "0",
    "{'correct': True}",
    '{"answer": 5}',
    "5" * 4301,
    # for the numbers 25, 4 and 1
    "99",
    "98+1",
    "25*4-1=99",
    "25*4-1-0",
    "(25*4)-1+0",
    "25*4-1-1+1",
    "25*4-True",
    "25*4-len('a')",
    "25*4-1#",
    "25*4-1 or 12",
    "25*4-1, 99",
    "25*4-1; 1",
    "99*1**(25*4)",
    "25**4%1",
    "2_5*4-1",
    "25*4-0x1",
    "25*4-01",
    "25*4-1.0",
    "２５*4-1",
    "25×4−1",
    "25*4-1\u200b",
    "25*4-(1",
    "25*4-1)",
    "25//1*4",
    "25*4-1/0",
    "1-25*4",
    "25*4*1",
    "+" * 190 + "1",
    "(lambda: 99)()",
    "25*4-1 if 1 else 0",
    "25*4<1",
    "~25*4-1",
    "254-1",
    "exec('25*4-1')",
    "[25*4-1][0]",
    "25*4\n-1\n5",
]


@pytest.mark.parametrize(("task", "problem"), [(Chains(), FIVE), (Gym("countdown"), COUNTDOWN)])
def test_hostile_answers_to_text_tasks_are_not_paid(task: Task, problem: Problem, tmp_path: Path) -> None:
    assert task.check(problem, problem.answer) == Verdict(True, True)
    before, children = stamp(tmp_path), psutil.Process().children()
    for text in TEXTS:
        start = time.process_time()
        assert not task.check(problem, text).correct, text[:100]
        assert time.process_time() - start < 20, text[:100]
    assert stamp(tmp_path) == before and psutil.Process().children() == children
