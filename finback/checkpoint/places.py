"""Explains a path that holds no model, and where the model may be. Does not import torch."""

from pathlib import Path

from finback.config import UserError
from finback.runs import adapters
from finback.runs.files import CONFIG, is_checkpoint, is_gguf

_POINTER = b"version https://git-lfs"  # the first bytes of a Git LFS pointer file


def demand_checkpoint(path: Path, field: str, remedy: str, problem: str = "holds no model") -> None:
    """Raises UserError unless the path is a Hugging Face folder or a GGUF file.

    `problem` and `remedy` are used where the path's contents suggest nothing more specific.
    """
    if not path.exists():
        raise UserError(field, str(path), "no such file or folder", remedy)
    if not is_checkpoint(path):
        found = _hint(path) if path.is_dir() else None
        raise UserError(field, str(path), *(found or (problem, remedy)))


def _hint(folder: Path) -> tuple[str, str] | None:
    """Returns the problem with a folder that is no model and its remedy; None where its contents give no hint."""
    if adapters.is_adapter(folder):
        remedy = "Name it where a model runs or trains; `finback export` merges it with its base."
        return "holds an adapter, not a model", remedy
    if files := sorted(file for file in folder.iterdir() if is_gguf(file)):
        return f"holds {len(files)} GGUF file(s) and no {CONFIG}", f"Name the file: {files[0]}"
    snapshots = sorted(each for each in folder.glob("snapshots/*") if (each / CONFIG).exists())
    if snapshots:
        return "is a repository in the hub's cache, not a model's folder", f"Name the snapshot: {snapshots[-1]}"
    if within := sorted(each.parent for each in folder.glob(f"*/{CONFIG}") if is_checkpoint(each.parent)):
        return "holds no model itself, but one of its folders does", f"Name the folder: {within[0]}"
    if any(folder.glob("*.safetensors")):
        return f"holds weights but no {CONFIG}", f"Add the model's {CONFIG}."
    return None


def is_pointer(file: Path) -> bool:
    """Whether a file is a Git LFS pointer to a file that was not fetched."""
    with file.open("rb") as handle:
        return handle.read(len(_POINTER)) == _POINTER
