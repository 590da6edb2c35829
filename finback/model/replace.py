"""Modes applied from outside: modules of a model are replaced, without changes to the model's code.

A mode that keeps the parameters but computes differently (FP8 products, compilation, C++ kernels, recomputation) is a subclass that
overrides a method, and `recast` changes a module's class to it. A mode that stores weights differently (packed, quantized,
adapters) is a separate module, inserted by `replace_modules`. Parameter names stay the same either way.
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
    """Replaces every module of these kinds below `model` by make(name, module), in place.

    Names are dotted, as in `named_modules`, outer modules first. `make` may return the module itself.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, kinds):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(name, module).train(module.training))
    return model


def recast_modules(model: Model, kinds: type[nn.Module] | tuple[type[nn.Module], ...], to: type[nn.Module]) -> Model:
    """Recasts every module of these kinds."""
    return replace_modules(model, kinds, lambda _, module: recast(module, to))


def recast(module: nn.Module, to: type[Kind]) -> Kind:
    """Gives a module the methods of the class `to`, in place; parameters, buffers and hooks stay.

    If `to` is not a subclass of the module's class, its methods are layered over it: `super()` reaches the original ones.
    """
    if not isinstance(module, to):
        module.__class__ = _laid_over(to, type(module))  # type: ignore[arg-type]  # classes can be hashed
    assert isinstance(module, to)
    return module


@cache  # one class for all blocks, since torch.compile compiles once per class
def _laid_over(to: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    return to if issubclass(to, base) else type(f"{to.__name__}{base.__name__}", (to, base), {})
