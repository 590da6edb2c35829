"""Provenance of a stage: versions, machine, commit and digests of its inputs. Does not import torch."""

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finback import __version__
from finback.runs import processor

PACKAGES = ("torch", "numpy", "safetensors", "tokenizers")


def made_with(recipe: Path | None) -> dict[str, Any]:
    """Time, versions, machine and threads, and the commit of the recipe's checkout if it is in one."""
    checkout = commit(recipe) if recipe is not None else None
    return {
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": software(),
        "machine": machine() | threads(),
        **(checkout or {"commit": None, "dirty": None}),
    }


def software() -> dict[str, str]:
    """Versions of the software that computes."""
    found = {"finback": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a copy on the path has no metadata
            continue
    return found


def commit(path: Path) -> dict[str, Any] | None:
    """The commit of the checkout with `path`, and whether tracked files are modified; None without git."""
    folder = path if path.is_dir() else path.parent
    head = _git(folder, "rev-parse", "HEAD")
    if head is None:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": head, "dirty": None if changed is None else bool(changed)}


def digest(path: Path) -> str | None:
    """SHA-256 that identifies an input: of a stage's manifest, or of a checkpoint's config; None if there is neither."""
    for name in ("manifest.json", "config.json"):
        if (path / name).is_file():
            return sha256(path / name)
    return None


def sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine() -> dict[str, Any]:
    """Names of the processor and GPUs."""
    torch = cuda()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch else []
    return {
        "cpu": processor.name(),
        "cpus": processor.cores(),
        "gpus": gpus,
        "system": f"{platform.system()} {platform.release()}",
    }


def threads() -> dict[str, int]:
    """Numbers of compute threads, once torch is loaded: another number changes the order of rounding."""
    torch = sys.modules.get("torch")
    return {"threads": torch.get_num_threads()} if torch is not None else {}


def cuda() -> Any:
    """torch, if it is loaded and has a GPU."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() else None
