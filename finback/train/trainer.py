"""What trains a model, behind one interface: here the whole model on every rank, in sharded_trainer.py a share of it."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from finback.checkpoint import models, resharding, store
from finback.config import UserError
from finback.data.tokenizer import Tokenizer
from finback.model.logprobs import text_logprobs
from finback.model.moe import Router
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.parallel.served_weights import ServedWeights
from finback.runs.folder import StageRun
from finback.train import router_health
from finback.train.batch import Batch
from finback.train.ema import EMA
from finback.train.loss import LossTerms, training_losses
from finback.train.optim import Gradients
from finback.train.router_health import Health

T = TypeVar("T")


class Stateful(Protocol):
    """What a checkpoint saves beside the model: optimizers, averaged weights, a reference model."""

    def state(self) -> dict[str, Tensor]:
        """Tensors by name; names differ between all parts of one trainer."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take them back out of a checkpoint's tensors."""


class Optimizer(Stateful, Protocol):
    """Updates its parameters from their gradients."""

    def step(self, lr: float) -> None: ...


class Trainer(ABC):
    """A model, its gradients and optimizers. Every method is for all ranks at once.

    A step is `zero`, one or more backward passes, `finish`, and `update`, or nothing where the step is skipped; then
    `balance`.
    """

    model: Transformer
    # which of data_ranks equal shares of a step's rows this rank reads
    data_rank: int
    data_ranks: int
    # those of the layers that this rank holds
    routers: list[Router]
    # running averages of the weights that lie here
    averages: Sequence[EMA] = ()
    # what else a checkpoint keeps
    extras: list[Stateful]
    # whether ranks have to make equally many passes
    in_step: bool = False

    @abstractmethod
    def zero(self) -> None:
        """Forget all gradients."""

    @abstractmethod
    def backward(self, batch: Batch | None, terms: LossTerms) -> Tensor:
        """Add the gradients of this rank's part of the losses (see loss.training_losses); (main, MTP, balance) over all
        ranks. None: this rank has no rows in this step."""

    @abstractmethod
    def finish(self, max_norm: float) -> float:
        """Sum gradients over ranks, clip them to the global norm `max_norm`; the norm before clipping."""

    @abstractmethod
    def update(self, *lrs: float) -> None:
        """One step of each optimizer at its learning rate."""

    @abstractmethod
    def balance(self, speed: float) -> Health:
        """Move the routers' biases by the loads of the step (V3 2.1.2), at speed 0 not at all, and forget the loads."""

    def biases(self) -> list[Tensor]:
        """The biases of all routers, bottom to top, wherever they lie; for all ranks at once."""
        return [router.bias for router in self.routers]

    def forget_loads(self) -> None:
        """Drop the loads of a step that is not learnt from."""
        router_health.forget(self.routers)

    @abstractmethod
    def save(self, run: StageRun, step: int, meta: dict[str, Any], keep: int) -> None:
        """Write a checkpoint of this step; the run's folder keeps the newest `keep`."""

    @abstractmethod
    def resume(self, run: StageRun) -> tuple[int, dict[str, Any]] | None:
        """Take back the newest checkpoint; its step and meta, None where there is none."""

    def settle(self) -> None:  # noqa: B027 - most write in the foreground
        """Wait for a checkpoint that is still being written."""

    @abstractmethod
    def text_logprobs(self, tokens: Tensor) -> Tensor:
        """As model/logprobs.py has it; all ranks call it equally often, those of one data_rank with the same tokens."""

    @abstractmethod
    def gathered(self) -> Transformer:
        """The model as it is now, whole on every rank, to generate with; not to be kept."""

    def served(self) -> ServedWeights:
        """What an engine generates with while SFT, distillation or RL goes on."""
        return ServedWeights(self.gathered())

    def part(self, batch: Batch) -> Batch:
        """What this rank reads of rows that it may share with others: all of them unless a layout cuts rows."""
        return batch

    def whole_rows(self, numbers: Tensor, batch: Batch) -> Tensor:
        """Numbers (rows, tokens) of this rank's part of a batch as those of its whole rows; of rows that share prompts the part has
        zeros for what is predicted elsewhere."""
        return numbers

    def of_same_rows(self, value: T) -> list[T]:
        """A value of each rank that reads the same rows as this one."""
        return [value]

    def rest(self) -> None:  # noqa: B027 - most put nothing together
        """After passes that no backward pass follows: let go of what they have put together."""

    def average(self) -> None:
        """Take the weights into their running averages, where there are any."""
        for average in self.averages:
            average.update()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the weights be their running averages."""
        with ExitStack() as stack:
            for average in self.averages:
                stack.enter_context(average.swapped())
            yield

    @abstractmethod
    def export(self, run: StageRun, folder: Path, tokenizer: Tokenizer) -> None:
        """Write the model as it is now and its tokenizer into a folder, for models.load."""


def save(folder: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write a model and its tokenizer into a folder, which is made if it is missing."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder)
    models.save(folder, model)


class ReplicatedTrainer(Trainer):
    """The whole model on every rank; ranks share a step's rows and sum their gradients.

    named: the parameters to train (all of them by default). extras: what else a checkpoint keeps. ema_decay: of a running
    average of all weights.
    """

    def __init__(
        self,
        model: Transformer,
        world: World,
        optimizers: Sequence[Optimizer],
        named: Sequence[tuple[str, nn.Parameter]] | None = None,
        extras: Sequence[Stateful] = (),
        ema_decay: float = 0.0,
    ) -> None:
        self.model, self.world = model, world
        self.data_rank, self.data_ranks = world.rank, world.size
        self.gradients = Gradients([p for _, p in named or list(model.named_parameters())])
        self.averages = [EMA(list(model.named_parameters()), ema_decay)] if ema_decay else []
        self.optimizers, self.extras = optimizers, [*extras, *self.averages]
        # a frozen MTP module's routers stay as they are
        frozen = named is not None and not any(n.startswith("mtp.") for n, _ in named)
        self.routers = [m for m in (model.blocks if frozen else model).modules() if isinstance(m, Router)]

    def zero(self) -> None:
        self.gradients.zero()

    def backward(self, batch: Batch | None, terms: LossTerms) -> Tensor:
        parts = torch.zeros(3, device=self.world.device)
        if batch is not None:
            losses = training_losses(self.model, batch, terms)
            losses.total(terms).backward()  # type: ignore[no-untyped-call]
            parts = losses.detached()
        return self.world.sum_(parts).cpu()

    def finish(self, max_norm: float) -> float:
        return self.gradients.finish(self.world, max_norm)

    def update(self, *lrs: float) -> None:
        for optimizer, lr in zip(self.optimizers, lrs, strict=True):
            optimizer.step(lr)

    def balance(self, speed: float) -> Health:
        return router_health.balance(self.routers, self.world, speed)

    def together(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint keeps, whole on the rank that writes it, where ranks have parts of it; for all ranks at once."""
        return tensors

    def own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What this rank has of a checkpoint's tensors."""
        return tensors

    def save(self, run: StageRun, step: int, meta: dict[str, Any], keep: int = store.KEEP) -> None:
        tensors = models.tensors_of(self.model)
        for part in (*self.optimizers, *self.extras):
            tensors |= part.state()
        tensors = self.together(tensors)
        if run.is_writer:
            store.save_step(run.folder, step, tensors, meta, keep)

    def resume(self, run: StageRun) -> tuple[int, dict[str, Any]] | None:
        of_one, of_many = resharding.newest(run.folder)
        found = resharding.read(run.folder, run.say) if of_many > of_one else store.load_newest(run.folder, run.say)
        if found is None:
            return None
        step, tensors, meta = found
        if of_many > of_one:
            run.say(f"{run.name:10} goes on with whole copies: the same within rounding, no longer to the bit")
            if self.model.config.tie_word_embeddings:
                tensors["model.head.weight"] = tensors["model.embed"]
        tensors = self.own(tensors)
        models.restore(self.model, tensors)
        for part in (*self.optimizers, *self.extras):
            part.load_state(tensors)
        return step, meta

    def text_logprobs(self, tokens: Tensor) -> Tensor:
        return text_logprobs(self.model, tokens)

    def gathered(self) -> Transformer:
        return self.model

    def export(self, run: StageRun, folder: Path, tokenizer: Tokenizer) -> None:
        if run.is_writer:
            save(folder, self.model, tokenizer)


def demand_finite(norm: float, field: str, lr: float, step: int) -> None:
    """UserError where a gradient's norm is NaN or infinite."""
    if not math.isfinite(norm):
        raise UserError(field, lr, f"the gradient is not finite at step {step}", "Lower it.")
