"""Adapters in files: recognizing them and finding their base. Does not import torch.

A model may be named by the folder of its adapter, which names its base, or as BASE+ADAPTER.
"""

from pathlib import Path

from finback.config import UserError
from finback.runs.files import RECIPE, read_object
from finback.runs.hub_models import fetched, is_name

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
BASE = "base_model_name_or_path"


def is_adapter(path: Path) -> bool:
    """Whether a folder contains an adapter."""
    return (path / CONFIG_FILE).is_file()


def split(name: str) -> tuple[str, str]:
    """Splits BASE+ADAPTER; a name without +, or of an existing path, is returned with ""."""
    base, plus, adapter = name.rpartition("+")
    return (base, adapter) if plus and base and adapter and not Path(name).exists() else (name, "")


def places(path: Path) -> tuple[Path, Path | None]:
    """The paths of a model's base and of its adapter (None if it has none); UserError if one is missing.

    Only the names given here are fetched from the hub, not the base that a fetched adapter names.
    """
    name, own = split(str(path))
    path = fetched(Path(name))
    if own:
        if not is_adapter(adapter := fetched(Path(own))):
            problem = f"no {CONFIG_FILE} there"
            raise UserError("adapter", own, problem, "Give a folder written by PEFT or by a stage with an adapter.")
        return path, adapter
    return (_base_of(path), path) if is_adapter(path) else (path, None)


def tokenizer_place(path: Path) -> Path:
    """The path of a model's tokenizer: with its adapter if that has one, else with its base."""
    base, adapter = places(path)
    if adapter is not None:
        return adapter if (adapter / "tokenizer.json").is_file() else tokenizer_place(base)
    return base


def base_name(folder: Path, base: Path) -> str:
    """How an adapter's folder names its base: stages of the same run by name, so that the run can be moved."""
    base = base.resolve()
    for root in folder.resolve().parents:
        if (root / RECIPE).is_file() and base.is_relative_to(root):
            return str(base.relative_to(root))
    return str(base)


def _base_of(adapter: Path) -> Path:
    name = read_object(adapter / CONFIG_FILE).get(BASE) or ""
    roots = [root for root in adapter.resolve().parents if (root / RECIPE).is_file()]
    for root in (*roots, Path()):
        if name and (root / name).exists():
            return root / name
    problem = f"the base of {adapter} is not here" if name else f"{adapter} does not say what its base is"
    remedy = f"Give it: BASE+{adapter}"
    if name and is_name(Path(name)):
        remedy = f"Give it, to fetch it from the hub: {name}+{adapter}"
    raise UserError(BASE, name, problem, remedy)
