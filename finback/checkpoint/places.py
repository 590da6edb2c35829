"""What lies at a path that holds no model, said so that one knows where the model is. Does not import torch."""

from pathlib import Path

from finback.config import UserError
from finback.runs import adapters
from finback.runs.files import CONFIG, is_checkpoint, is_gguf

_POINTER = b"version https://git-lfs"  # begins what git keeps of a large file until it is fetched


def demand_checkpoint(path: Path, field: str, remedy: str, problem: str = "holds no model") -> None:
    """UserError unless a path is a model from elsewhere; problem and remedy are for where nothing better is known."""
    if not path.exists():
        raise UserError(field, str(path), "no such file or folder", remedy)
    if not is_checkpoint(path):
        found = _hint(path) if path.is_dir() else None
        raise UserError(field, str(path), *(found or (problem, remedy)))


def _hint(folder: Path) -> tuple[str, str] | None:
    """What a folder is that is no model, and where to go from there, where one can tell."""
    if adapters.is_adapter(folder):
        remedy = "Name it where a model runs or trains; `finback export` merges it with its base."
        return "holds an adapter, not a model", remedy
    if files := sorted(file for file in folder.iterdir() if is_gguf(file)):
        return f"holds {len(files)} GGUF file(s) and no {CONFIG}", f"Name the file: {files[0]}"
    snapshots = sorted(each for each in folder.glob("snapshots/*") if (each / CONFIG).exists())
    if snapshots:
        return "a repository in the hub's cache, not a model's folder", f"Name the snapshot: {snapshots[-1]}"
    if within := sorted(each.parent for each in folder.glob(f"*/{CONFIG}") if is_checkpoint(each.parent)):
        return "holds no model itself, but a folder in it does", f"Name the folder: {within[0]}"
    if any(folder.glob("*.safetensors")):
        return f"holds weights but no {CONFIG}", f"Put the model's {CONFIG} beside them."
    return None


def is_pointer(file: Path) -> bool:
    """Whether a file is what git leaves in the place of a large one that was not fetched."""
    with file.open("rb") as handle:
        return handle.read(len(_POINTER)) == _POINTER
