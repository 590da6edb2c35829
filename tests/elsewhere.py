"""A stand-in for an accelerator on any machine: its tensors say "meta", hold numbers, and refuse CPU operands.

It shows that a stage puts every tensor on its model's device, as a GPU requires; it does not test a GPU's own kernels.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
CROSSING = ("copy_", "_to_copy", "_copy_from")  # operators that may read one device and write another
INDEXING = ("index", "index_put_", "_index_put_impl_", "_unsafe_index")  # operators whose indices may be on the CPU


class There(Tensor):
    """A tensor on the stand-in device; `here` has its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls: type["There"], here: Tensor) -> "There":
        made = Tensor._make_wrapper_subclass(
            cls, here.size(), here.stride(), here.storage_offset(), dtype=here.dtype, device=DEVICE
        )  # type: ignore[attr-defined]
        made.here = here
        return made

    def tolist(self) -> Any:
        return self.here.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operator on tensors of one device; its results are on the same device."""
    name = func.overloadpacket.__name__
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in leaves if isinstance(t, There)]
    asked = kwargs.get("device")
    away = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if there and name not in CROSSING:
        checked = args[:1] if name in INDEXING else leaves
        for t in checked:
            if isinstance(t, Tensor) and not isinstance(t, There) and t.dim():
                raise RuntimeError(f"{name}: a CPU tensor, {tuple(t.shape)}, meets one on another device")
    if asked is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    plain = tree_map(lambda t: t.here if isinstance(t, There) else t, (args, kwargs))
    found = func(*plain[0], **plain[1])
    if name.endswith("_") and not name.startswith("_foreach") and isinstance(args[0], Tensor):
        return args[0]
    if isinstance(kwargs.get("out"), Tensor):
        return kwargs["out"]
    return tree_map(lambda t: There(t) if isinstance(t, Tensor) and away else t, found)


class _Factories(TorchDispatchMode):
    """Creates tensors on DEVICE."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def elsewhere(patch: Any) -> Iterator[torch.device]:
    """Yields the stand-in device, which exists until the block ends."""
    plain = torch.tensor
    patch.setattr(
        torch, "tensor", lambda *a, device=None, **k: plain(*a, **k) if device is None else plain(*a, **k).to(device)
    )
    optimizer = importlib.import_module("torch.optim.optimizer")
    patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [DEVICE.type])
    for name in ("__enter__", "__exit__"):  # inference mode requires its own kind of tensors
        patch.setattr(torch.inference_mode, name, getattr(torch.no_grad, name))
    with _Factories():
        yield DEVICE
