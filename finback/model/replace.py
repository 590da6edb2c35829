"""Modes from outside: other modules in the place of a model's own, which know nothing of it.

What keeps the parameters and computes otherwise (FP8 products, compilation, C++ kernels, recomputation) is a subclass that
overrides a method, and `recast` makes a module one. What stores the weights otherwise (packed, quantized, adapters) is a
module of its own, and `replace_modules` puts it in. Names of parameters stay either way.
"""

from collections.abc import Callable
from functools import cache
from typing import TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)
Kind = TypeVar("Kind", bound=nn.Module)


def replace_modules(
    model: Model, kinds: type[Kind] | tuple[type[Kind], ...], make: Callable[[str, Kind], nn.Module]
) -> Model:
    """Put make(name, module) in the place of every module of these kinds below `model`, in place.

    Names are dotted, as `named_modules` gives them, outer modules first. `make` may return the module itself.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, kinds):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(name, module).train(module.training))
    return model


def recast_modules(model: Model, kinds: type[nn.Module] | tuple[type[nn.Module], ...], to: type[nn.Module]) -> Model:
    """Recast every module of these kinds."""
    return replace_modules(model, kinds, lambda _, module: recast(module, to))


def recast(module: nn.Module, to: type[Kind]) -> Kind:
    """Give a module the methods of the class `to`, in place; parameters, buffers and hooks stay.

    Where `to` is no subclass of what the module is, its methods lie over those: `super()` finds what it was before.
    """
    if not isinstance(module, to):
        module.__class__ = _laid_over(to, type(module))  # type: ignore[arg-type]  # classes can be hashed
    assert isinstance(module, to)
    return module


@cache  # one class for all blocks: torch.compile compiles once for each
def _laid_over(to: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    return to if issubclass(to, base) else type(f"{to.__name__}{base.__name__}", (to, base), {})
