"""The order of imports: a folder knows only those below it, so that it can be read without the ones above."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import finback

PACKAGE = Path(finback.__path__[0])
LAYERS = (  # lowest first; names on one line do not know each other
    "config",
    "options client",
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
    modules = [p for p in sorted(PACKAGE.rglob("*.py")) if "No torch here" in p.read_text(encoding="utf-8")]
    names = [".".join(("finback", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in modules]
    assert "finback.config" in names and "finback.tasks.task" in names
    code = f"import sys, finback.cli, {', '.join(names)}; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, check=True, cwd=PACKAGE.parent).stdout == b"False\n"
