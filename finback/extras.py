"""Optional packages: which feature needs which, which are installed, and the command that installs the missing ones.

finback does not own its name on PyPI, so no message may suggest `pip install finback[...]`. Does not import torch.
"""

import importlib.metadata
import importlib.util
import re
import shlex
import sys
import tomllib
from functools import cache
from pathlib import Path

# what each extra is for, in the user's words
PURPOSES = {
    "data": "Parquet files, workers that share a large corpus, near-duplicates",
    "documents": "text of PDF and Word files",
    "hub": "data sets of the Hugging Face hub",
    "track": "curves for TensorBoard",
    "scale": "engines that generate for RL in separate processes, on one machine or many (Ray)",
    "sandbox": "isolation of code that models write: bubblewrap on Linux, and monty, an interpreter without access to the machine",
}


@cache
def requirements(extra: str) -> tuple[str, ...]:
    """The requirements of an extra, as pip requirement strings."""
    project = Path(__file__).parent.parent / "pyproject.toml"
    try:
        found = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["optional-dependencies"][extra]
        return tuple(r for r in found if "sys_platform" not in r or sys.platform == "linux")
    except (OSError, KeyError, ValueError):  # an installed wheel has no pyproject.toml next to it
        pass
    declared = importlib.metadata.requires("finback") or []
    parts = [(r, r.partition(";")) for r in declared if re.search(rf"""extra == ['"]{re.escape(extra)}['"]""", r)]
    return tuple(name.strip() for r, (name, _, _) in parts if "sys_platform" not in r or sys.platform == "linux")


def missing(extra: str) -> list[str]:
    """The extra's requirements that are not installed in any version."""
    return [r for r in requirements(extra) if not _is_installed(re.split(r"[\s<>=!~;\[]", r, maxsplit=1)[0])]


def how_to_get(extra: str) -> str:
    """A sentence with the command that installs the missing requirements of an extra."""
    return how_to_install(*(r.partition(";")[0].strip() for r in missing(extra) or requirements(extra)))


def how_to_install(*wanted: str) -> str:
    """The same for given pip requirement strings."""
    return f"Run: {shlex.join([sys.executable, '-m', 'pip', 'install', *wanted])}"


def _is_installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
