"""A device that is not the CPU, on any machine: tensors on it say "meta", hold numbers, and refuse to meet those of the CPU.

It shows that a stage puts everything where its model is, as a GPU would have it; it says nothing of a GPU's own kernels.
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
CROSSING = ("copy_", "_to_copy", "_copy_from")  # what may read one device and write another
INDEXING = ("index", "index_put_", "_index_put_impl_", "_unsafe_index")  # whose indices may lie on the CPU


class There(Tensor):
    """A tensor that lies elsewhere; `here` are its numbers."""

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
    """An operator on numbers that all lie in one place; what it makes lies there too."""
    name = func.overloadpacket.__name__
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in leaves if isinstance(t, There)]
    asked = kwargs.get("device")
    away = bool(there) if asked is None else torch.device(asked).type == DEVICE.type
    if there and name not in CROSSING:
        checked = args[:1] if name in INDEXING else leaves
        for t in checked:
            if isinstance(t, Tensor) and not isinstance(t, There) and t.dim():
                raise RuntimeError(f"{name}: a tensor of the CPU, {tuple(t.shape)}, meets one that lies elsewhere")
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
    """Makes what is asked for on DEVICE."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def elsewhere(patch: Any) -> Iterator[torch.device]:
    """The device, for as long as the block lasts."""
    plain = torch.tensor
    patch.setattr(
        torch, "tensor", lambda *a, device=None, **k: plain(*a, **k) if device is None else plain(*a, **k).to(device)
    )
    optimizer = importlib.import_module("torch.optim.optimizer")
    patch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: [DEVICE.type])
    for name in ("__enter__", "__exit__"):  # inference mode wants tensors of its own kind
        patch.setattr(torch.inference_mode, name, getattr(torch.no_grad, name))
    with _Factories():
        yield DEVICE
