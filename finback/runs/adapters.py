"""Adapters in files: which folder is one, and which base it belongs to. No torch here.

A model may be named by the folder of its adapter, which says where its base is, or as BASE+ADAPTER.
"""

from pathlib import Path

from finback.config import UserError
from finback.runs.files import RECIPE, read_object
from finback.runs.hub_models import fetched, is_name

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # PEFT's names
BASE = "base_model_name_or_path"


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter."""
    return (path / CONFIG_FILE).is_file()


def split(name: str) -> tuple[str, str]:
    """BASE+ADAPTER -> both; a name without + or of something that exists -> itself and ""."""
    base, plus, adapter = name.rpartition("+")
    return (base, adapter) if plus and base and adapter and not Path(name).exists() else (name, "")


def places(path: Path) -> tuple[Path, Path | None]:
    """Where the base of a model lies, and its adapter, None where it has none; UserError where one of them is missing.

    What is named as the hub's is fetched, and nothing else: not the base that an adapter from there names.
    """
    name, own = split(str(path))
    path = fetched(Path(name))
    if own:
        if not is_adapter(adapter := fetched(Path(own))):
            problem = f"no {CONFIG_FILE} there"
            raise UserError("adapter", own, problem, "Name a folder that PEFT or a stage with an adapter has written.")
        return path, adapter
    return (_base_of(path), path) if is_adapter(path) else (path, None)


def tokenizer_place(path: Path) -> Path:
    """Where the tokenizer of a model lies: with its adapter, if it has one that brings its own, else with its base."""
    base, adapter = places(path)
    if adapter is not None:
        return adapter if (adapter / "tokenizer.json").is_file() else tokenizer_place(base)
    return base


def base_name(folder: Path, base: Path) -> str:
    """How an adapter in a folder names its base: another stage of the run by its name, so that the run can be moved."""
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
    remedy = f"Name it: BASE+{adapter}"
    if name and is_name(Path(name)):
        remedy = f"Name it, and it is fetched from the hub: {name}+{adapter}"
    raise UserError(BASE, name, problem, remedy)
