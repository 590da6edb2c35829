"""The order of imports: a folder imports only folders of lower layers, so that it can be read without higher ones."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import finback

PACKAGE = Path(finback.__path__[0])
LAYERS = (  # lowest first; names on one line do not import each other
    "config extras",
    "options client readers hub",
    "runs",
    "kernels",
    "model",
    "checkpoint",
    "data tasks parallel",
    "train engine suites",
    "rollouts",
    "stages",
    "planner serve report comparison",
    "api",
    "__init__ cli",
    "__main__",
)
RANK = {name: rank for rank, line in enumerate(LAYERS) for name in line.split()}


def imported(node: ast.AST) -> list[str]:
    """The folders and modules of finback that an import statement names."""
    match node:
        case ast.Import(names=names):
            modules = [alias.name for alias in names]
        case ast.ImportFrom(module="finback", names=names):
            modules = [f"finback.{alias.name}" for alias in names if not alias.name.startswith("__")]
        case ast.ImportFrom(module=module, level=level):
            assert level == 0, f"line {node.lineno}: a relative import hides what it names"
            modules = [module or ""]
        case _:
            modules = []
    return [m.split(".")[1] for m in modules if m.startswith("finback.")]


def violations(package: Path) -> list[str]:
    found = []
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            wrong = [other for other in imported(node) if other != name and RANK[other] >= RANK[name]]
            found += [f"{path.relative_to(package)}:{node.lineno} imports {other}" for other in wrong]  # type: ignore[attr-defined]
    return found


def test_folders_import_only_what_lies_below_them() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("model/moe.py", "import finback.train.loop"),
        ("model/moe.py", "from finback.stages import grpo"),
        ("data/clean.py", "from finback.tasks.task import is_held_out"),  # the same layer
        ("train/loop.py", "from finback import engine"),
        ("config.py", "def late() -> None:\n    from finback.runs.files import write_json"),
    ],
)
def test_an_import_of_something_higher_is_caught(path: str, line: str, tmp_path: Path) -> None:
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(f"from finback.{path.split('/')[0].removesuffix('.py')} import own\n{line}\n")
    found = violations(tmp_path)
    assert len(found) == 1 and found[0].startswith(f"{path}:{2 if line.startswith(('i', 'f')) else 3} imports ")


def test_what_must_answer_at_once_does_not_wait_for_torch() -> None:
    modules = [p for p in sorted(PACKAGE.rglob("*.py")) if "Does not import torch" in p.read_text(encoding="utf-8")]
    names = [".".join(("finback", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in modules]
    assert "finback.config" in names and "finback.tasks.task" in names
    code = f"import sys, finback.cli, {', '.join(names)}; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, check=True, cwd=PACKAGE.parent).stdout == b"False\n"


# ---- house limits ------------------------------------------------------------------------------------------------------

MOST_LINES, MOST_FUNCTION_LINES, MOST_PARAMETERS = 300, 50, 8


@cache
def trees() -> dict[Path, ast.Module]:
    """Every module of the package, parsed."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def module_of(path: Path) -> str:
    """finback/model/moe.py -> finback.model.moe"""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def runtime_imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements, also inside functions, but not those for type checkers only."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield from runtime_imports(node)


def graph() -> dict[str, set[str]]:
    """Module -> the modules of finback that it imports."""
    modules = {module_of(path) for path in trees()}
    found: dict[str, set[str]] = {}
    for path, tree in trees().items():
        named: set[str] = set()
        for node in runtime_imports(tree):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            else:
                named |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
        found[module_of(path)] = (named & modules) - {module_of(path), "finback"}
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Chains of imports that return to their first module."""
    done: set[str] = set()
    found: list[list[str]] = []

    def visit(module: str, chain: list[str]) -> None:
        if module in chain:
            found.append([*chain[chain.index(module) :], module])
        elif module not in done:
            for other in sorted(edges.get(module, ())):
                visit(other, [*chain, module])
            done.add(module)

    for module in sorted(edges):
        visit(module, [])
    return found


def test_no_import_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c", "a"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
    assert circles(graph()) == []


def test_files_and_functions_are_short_and_take_few_parameters() -> None:
    long = {p.name: n for p in trees() if (n := len(p.read_text(encoding="utf-8").splitlines())) > MOST_LINES}
    assert long == {}
    wrong = []
    for path, tree in trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                count = len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))
                if lines > MOST_FUNCTION_LINES or count > MOST_PARAMETERS:
                    wrong.append(f"{path.name}:{node.lineno} {node.name}: {lines} lines, {count} parameters")
    assert wrong == []


def test_a_class_name_has_one_meaning_and_the_formatter_decides_every_line() -> None:
    names = Counter(n.name for tree in trees().values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []
    assert [path.name for path in trees() if "fmt: skip" in path.read_text(encoding="utf-8")] == []
