"""The reference model of RL: a copy of the initial policy, or the base if the policy is an adapter."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from torch import Tensor

from finback.model.lora import AdaptedTransformer, adapter_parameters, without_adapter
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.train.trainer import Stateful


def reference_of(policy: Transformer, prefix: str, world: World) -> "Reference":
    """The reference model of a policy at its start; `prefix` starts its names in a checkpoint."""
    if isinstance(policy, AdaptedTransformer):
        return AdapterReference(policy, prefix, world)
    return Frozen(copy.deepcopy(policy), prefix)


class Reference(Stateful, Protocol):
    """A reference model: access to it, and its state for a checkpoint."""

    def asked(self) -> AbstractContextManager[Transformer]:
        """A context in which the model can be used."""
        ...

    def refresh(self, model: Transformer) -> None:
        """Copies what another model has learned."""


class Frozen:
    """A frozen copy of a model, which checkpoints store next to the trained one."""

    def __init__(self, model: Transformer, prefix: str) -> None:
        self.model, self.prefix = model.eval(), prefix

    def asked(self) -> AbstractContextManager[Transformer]:
        return nullcontext(self.model)

    def refresh(self, model: Transformer) -> None:
        """Copies another model's weights."""
        self.model.load_state_dict(model.state_dict())

    def state(self) -> dict[str, Tensor]:
        return {f"{self.prefix}.{name}": tensor for name, tensor in self.model.state_dict().items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        start = f"{self.prefix}."
        found = {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
        if self.model.config.tie_word_embeddings:  # checkpoints of many ranks store one of the two
            found["head.weight"] = found["embed"]
        self.model.load_state_dict(found)


class AdapterReference:
    """The reference model of a policy that trains an adapter: its base without the adapter, or with an earlier state of it."""

    def __init__(self, policy: AdaptedTransformer, prefix: str, world: World) -> None:
        self.policy, self.prefix = policy, prefix
        # the earlier state of the adapter, by name; None: without adapter
        self.adapter: dict[str, Tensor] | None = None
        if world.any(any(bool(p.any()) for name, p in adapter_parameters(policy) if name.endswith(".b"))):
            self.refresh(policy)

    @contextmanager
    def asked(self) -> Iterator[Transformer]:
        if self.adapter is None:
            with without_adapter(self.policy):
                yield self.policy
            return
        learnt = {name: (p, p.data) for name, p in adapter_parameters(self.policy)}
        for name, (parameter, _) in learnt.items():
            parameter.data = self.adapter[name]
        try:
            yield self.policy
        finally:
            for parameter, data in learnt.values():
                parameter.data = data

    def refresh(self, model: Transformer) -> None:
        self.adapter = {name: p.detach().clone() for name, p in adapter_parameters(model)}

    def state(self) -> dict[str, Tensor]:
        return {f"{self.prefix}.{name}": tensor for name, tensor in (self.adapter or {}).items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        start, device = f"{self.prefix}.", self.policy.embed.device
        found = {n.removeprefix(start): t.to(device) for n, t in tensors.items() if n.startswith(start)}
        self.adapter = found or None
