"""The interface of trainers, and the one that holds the whole model on every rank; sharded_trainer.py has the sharded one."""

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
from finback.kernels.formats import round_mxfp4
from finback.model.fp4 import is_expert_stack, is_fp4
from finback.model.logprobs import text_logprobs
from finback.model.moe import Router
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.parallel.served_weights import ServedWeights, whole_copy
from finback.runs.folder import StageRun
from finback.train import router_health
from finback.train.batch import Batch
from finback.train.ema import EMA
from finback.train.loss import LossTerms, training_losses
from finback.train.optim import Gradients, clip_scale
from finback.train.router_health import Health

T = TypeVar("T")


class Stateful(Protocol):
    """State that a checkpoint saves besides the model: optimizers, averaged weights, a reference model."""

    def state(self) -> dict[str, Tensor]:
        """Tensors by name; names are unique within a trainer."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restores them from a checkpoint's tensors."""


class Optimizer(Stateful, Protocol):
    """Updates its parameters from their gradients."""

    def step(self, lr: float, scale: float = 1.0) -> None:
        """Updates its parameters at learning rate `lr`, with gradients multiplied by `scale`."""
        ...


class Trainer(ABC):
    """A model with its gradients and optimizers. Every method is collective: all ranks call it.

    A step is `zero`, one or more `backward`, `finish`, then `update` (unless the step is skipped), then `balance`.
    """

    model: Transformer
    # the model, or the pipeline stages of it, on this rank
    models: list[Transformer]
    # index of this rank's share of a step's rows, out of data_ranks equal shares
    data_rank: int
    data_ranks: int
    # routers of the layers on this rank
    routers: list[Router]
    # moving averages of the weights on this rank
    averages: Sequence[EMA] = ()
    # further state for checkpoints
    extras: list[Stateful]
    # the factor by which an update multiplies the step's gradients
    scale: float = 1.0
    # whether all ranks must make the same number of passes
    in_step: bool = False

    @abstractmethod
    def zero(self) -> None:
        """Sets all gradients to zero."""

    @abstractmethod
    def backward(self, batch: Batch | None, terms: LossTerms) -> Tensor:
        """Adds the gradients of this rank's part of the losses (see loss.training_losses). Returns (main, MTP, balance) summed
        over ranks. None: this rank has no rows in this step."""

    def overlap(self) -> None:  # noqa: B027 - most sum gradients in `finish`
        """Call before a step's last pass if it is not one of `backward`: ranks may sum gradients while it runs."""

    @abstractmethod
    def finish(self, max_norm: float) -> float:
        """Sums gradients over ranks; `update` clips them to the global norm `max_norm`. Returns the norm before clipping."""

    @abstractmethod
    def update(self, *lrs: float) -> None:
        """One step of each optimizer at its learning rate."""

    @abstractmethod
    def balance(self, speed: float) -> Health:
        """Moves the routers' biases by the step's loads (V3 2.1.2) with this speed, and resets the loads."""

    def biases(self) -> list[Tensor]:
        """The biases of all routers, bottom to top, wherever they are."""
        return [router.bias for router in self.routers]

    def forget_loads(self) -> None:
        """Resets the loads, for a step that is skipped."""
        router_health.forget(self.routers)

    @abstractmethod
    def save(self, run: StageRun, step: int, meta: dict[str, Any], keep: int) -> None:
        """Writes a checkpoint of this step; the run folder keeps the newest `keep`."""

    @abstractmethod
    def resume(self, run: StageRun) -> tuple[int, dict[str, Any]] | None:
        """Restores the newest checkpoint. Returns its step and meta, None if there is none."""

    def settle(self) -> None:  # noqa: B027 - most write in the foreground
        """Waits for a checkpoint that is still being written."""

    @abstractmethod
    def text_logprobs(self, tokens: Tensor) -> Tensor:
        """See model/logprobs.py. All ranks call it equally often; those with the same data_rank pass the same tokens."""

    @abstractmethod
    def gathered(self) -> Transformer:
        """The current model, whole on every rank, for generation; do not keep a reference to it."""

    def served(self) -> ServedWeights:
        """The weights that an engine generates with during SFT, distillation or RL."""
        return ServedWeights(self.gathered())

    def part(self, batch: Batch) -> Batch:
        """The part of a batch that this rank reads: all of it unless a layout splits rows."""
        return batch

    def whole_rows(self, numbers: Tensor, batch: Batch) -> Tensor:
        """Expands values (rows, tokens) of this rank's part of a batch to its whole rows. With shared prompts, the part has zeros
        where other ranks predict."""
        return numbers

    def of_same_rows(self, value: T) -> list[T]:
        """The value of each rank that reads the same rows as this one."""
        return [value]

    def rest(self) -> None:  # noqa: B027 - most trainers gather nothing
        """Releases gathered parameters, after passes without a backward pass."""

    def average(self) -> None:
        """Updates the moving averages of the weights, if there are any."""
        for average in self.averages:
            average.update()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A context in which the weights are replaced by their moving averages."""
        with ExitStack() as stack:
            for average in self.averages:
                stack.enter_context(average.swapped())
            yield

    @abstractmethod
    def export(self, run: StageRun, folder: Path, tokenizer: Tokenizer) -> None:
        """Writes the current model and its tokenizer into a folder, for models.load."""


def save(folder: Path, model: Transformer, tokenizer: Tokenizer) -> None:
    """Writes a model and its tokenizer into a folder, creating it if needed."""
    folder.mkdir(exist_ok=True)
    tokenizer.save(folder)
    models.save(folder, model)


class ReplicatedTrainer(Trainer):
    """Holds the whole model on every rank; ranks split a step's rows and sum their gradients.

    named: the parameters to train (default: all). extras: further state for checkpoints. ema_decay: decay of a moving average
    of all weights.
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
        self.model, self.models, self.world = model, [model], world
        self.data_rank, self.data_ranks = world.rank, world.size
        self.gradients = Gradients([p for _, p in named or list(model.named_parameters())])
        self.averages = [EMA(list(model.named_parameters()), ema_decay)] if ema_decay else []
        self.optimizers, self.extras = optimizers, [*extras, *self.averages]
        # routers of a frozen MTP module are not balanced
        frozen = named is not None and not any(n.startswith("mtp.") for n, _ in named)
        self.routers = [m for m in (model.blocks if frozen else model).modules() if isinstance(m, Router)]
        # the weights for engines and files, if passes round them
        self.rounded = rounded_weights(model) if is_fp4(model) else None

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
        norm = self.gradients.summed(self.world)
        self.scale = clip_scale(norm, max_norm)
        return norm

    def update(self, *lrs: float) -> None:
        for optimizer, lr in zip(self.optimizers, lrs, strict=True):
            optimizer.step(lr, self.scale)
        if self.rounded is not None:
            self.rounded.learnt()

    def balance(self, speed: float) -> Health:
        return router_health.balance(self.routers, self.world, speed)

    def together(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's tensors, gathered on the rank that writes it, if ranks hold parts of them. Collective."""
        return tensors

    def own(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of a checkpoint's tensors."""
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
            run.say(f"{run.name:10} resumes with whole copies: the same within rounding, but not bit-exact")
            if self.model.config.tie_word_embeddings:
                tensors["model.head.weight"] = tensors["model.embed"]
        tensors = self.own(tensors)
        models.restore(self.model, tensors)
        for part in (*self.optimizers, *self.extras):
            part.load_state(tensors)
        if self.rounded is not None:
            self.rounded.learnt()
        return step, meta

    def text_logprobs(self, tokens: Tensor) -> Tensor:
        return text_logprobs(self.model, tokens)

    def gathered(self) -> Transformer:
        if self.rounded is None:
            return self.model
        self.rounded.learnt()  # anything may have changed the weights
        return self.rounded()

    def served(self) -> ServedWeights:
        return super().served() if self.rounded is None else self.rounded

    def export(self, run: StageRun, folder: Path, tokenizer: Tokenizer) -> None:
        if run.is_writer:
            save(folder, self.gathered(), tokenizer)


def rounded_weights(model: Transformer) -> ServedWeights:
    """A frozen copy of a model that trains with rounded weights; the copy has them rounded."""
    copied, _ = whole_copy(model.config, model.compute, torch.float32, World(device=model.embed.device))

    @torch.no_grad()
    def fill(copy: Transformer) -> int:
        found = model.state_dict()
        for name, tensor in copy.state_dict().items():
            mine = found[name]
            tensor.copy_(round_mxfp4(mine) if is_expert_stack(name, mine.shape) else mine)
        return 0

    return ServedWeights(copied, fill)


def demand_finite(norm: float, field: str, lr: float, step: int) -> None:
    """Raises UserError if the gradient norm is NaN or infinite."""
    if not math.isfinite(norm):
        raise UserError(field, lr, f"the gradient is not finite at step {step}", "Lower it.")
