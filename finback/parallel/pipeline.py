"""Pipeline stages of a complete model, run by torch.distributed.pipelining.

Its runtime executes the tables of parallel/pipeline_tables.py, which the planner simulates.

The first stage has the embedding, the last the final norm, the head and the MTP modules. If both ends need the embedding,
for MTP or a tied head, each has a copy, and both get the sum of their gradients; V3's DualPipe shares the memory instead.
Besides hidden states, or mHC's streams, stages pass on the sums so far of balance losses and of indexers' divergences. So
one loss at the end has all its parts, and one backward pass gives all gradients.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage as TorchStage
from torch.distributed.pipelining.schedules import _Action, _ComputationType, _PipelineScheduleRuntime

from finback.model.config import ModelConfig
from finback.model.dsa_training import take_divergences
from finback.model.logprobs import token_logprobs
from finback.model.moe import take_balance_losses
from finback.model.recompute import Recomputed
from finback.model.transformer import Transformer
from finback.parallel.layout import Layout, split_layers
from finback.parallel.mesh import Mesh
from finback.parallel.pipeline_tables import Op, Slot
from finback.parallel.shard import ShardedParameter, local

# A batch's tensors by name, (b, t + depths): tokens, labels and, optionally, padding_mask and document_ids
Rows = dict[str, Tensor]
# The last stage's model, final hidden states (b, t, d), the micro-batch, and a function that returns the mean balance loss
# over all MoE layers, with or without those of MTP modules, and the indexers' divergence -> the loss, and its parts (main,
# MTP, balance) without gradient
Loss = Callable[[Transformer, Tensor, Rows, Callable[[bool], tuple[Tensor, Tensor]]], tuple[Tensor, Tensor]]


def cut(model: Transformer, stage: int, stages: int) -> Transformer:
    """Drops in place all modules of other stages; the rest keep their names. `model` is whole and may be blank."""
    first, last, config = stage == 0, stage == stages - 1, model.config
    layers = split_layers(config, stages)[stage].layers
    model.blocks = nn.ModuleDict({str(i): model.blocks[i] for i in layers if i < config.num_hidden_layers})  # type: ignore[assignment]
    if not last:
        model.mtp = nn.ModuleList()
        del model.norm, model.head, model.merge
    if not first and not (last and is_twice(config)):
        del model.embed
    return model


def is_twice(config: ModelConfig) -> bool:
    """Whether the last stage needs the embedding too."""
    return config.tie_word_embeddings or config.num_nextn_predict_layers > 0


class PipelineStage(nn.Module):
    """A cut model as one call: the output of the previous stage and the step's rows -> the input of the next stage."""

    def __init__(self, model: Transformer, stage: int, stages: int, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss
        self.is_first, self.is_last = stage == 0, stage == stages - 1
        self.is_compiled = False
        self.losses: list[Tensor] = []  # (main, MTP, balance) of each micro-batch since they were last taken

    def forward(self, *carried: Tensor, **rows: Tensor) -> Any:
        """carried: hidden states (b, t, d) or streams (b, t, n, d), and the sums (2,) of the layers' losses; the first stage ignores it.

        rows: see `Rows`. The last stage returns the loss, a scalar, or in evaluation the labels' log-probabilities (b, t).
        """
        model, tokens = self.model, rows["tokens"]
        length = tokens.size(1) - model.config.num_nextn_predict_layers
        padding_mask, document_ids = (
            rows[n][:, :length] if n in rows else None for n in ("padding_mask", "document_ids")
        )
        if self.is_first:
            x = model.streams(tokens[:, :length])
            sums = torch.zeros(2, device=x.device)
        else:
            x, sums = carried
        cos, sin, attention_mask = model._positions(length, None, document_ids)
        for block in model.blocks.values():  # type: ignore[operator]
            x = block(x, cos, sin, None, padding_mask, attention_mask, tokens[:, :length])
        if not self.is_last:
            return x, sums + self._sums()
        hidden = model.norm(model.merge(x))
        if not self.training:
            labels = rows["labels"][:, :length]
            return token_logprobs(model, hidden.flatten(0, 1), labels.flatten())[0].view_as(labels)
        if len(model.mtp):
            model.merge.leave(x)

        def of_layers(with_mtp: bool) -> tuple[Tensor, Tensor]:
            c = model.config
            layers = c.num_hidden_layers + (c.num_nextn_predict_layers if with_mtp else 0)
            balance, divergence = sums + self._sums()
            return balance / max(1, sum(map(c.is_moe, range(layers)))), divergence

        total, losses = self.loss(model, hidden, rows, of_layers)
        self.losses.append(losses)
        return total

    @property
    def splits(self) -> bool:
        """Whether the backward pass for the weights can run separately from that for the inputs.

        Autograd cannot separate them if a weight has several uses with other modules in between, as the last stage's
        embedding has: one per MTP module and one for a tied head. Recomputed activations and buffers of compiled code
        exist only during the first of the two passes.
        """
        model = self.model
        uses = len(model.mtp) + model.config.tie_word_embeddings if self.is_last else 0
        return uses < 2 and not self.is_compiled and not any(isinstance(m, Recomputed) for m in model.modules())

    def _sums(self) -> Tensor:
        """Balance losses and indexers' divergences (2,), summed over the layers of this stage that have run in this pass."""
        balances, divergence = take_balance_losses(self.model), take_divergences(self.model)
        none = torch.zeros((), device=next(self.model.parameters()).device)
        return torch.stack(
            [torch.stack(balances).sum() if balances else none, none if divergence is None else divergence]
        )


class Pipeline:
    """This rank's stages and the schedule that runs them."""

    def __init__(self, stages: list[PipelineStage], layout: Layout, mesh: Mesh) -> None:
        self.stages, self.layout, self.mesh = stages, layout, mesh
        # layout and shape of tokens of the last step, which `schedule` is for
        self.kind: tuple[Layout, torch.Size] | None = None
        self.schedule: _Tabled | None = None

    def run(self, rows: Rows, layout: Layout) -> Tensor:
        """Accumulates the gradients of all micro-batches; returns their summed losses (main, MTP, balance).

        rows are the same on all ranks of the pipeline; `layout` is the step's (Layout.at). Only the last stage's rank has
        losses, the others return zeros.
        """
        tokens = rows["tokens"]
        if self.schedule is None or (layout, tokens.shape) != self.kind:
            self.kind, self.schedule = (layout, tokens.shape), self._schedule(layout, *tokens.shape)
        start = (tokens,) if self.stages[0].is_first else ()
        for stage in self.stages:
            stage.losses.clear()
        target = tokens if self.stages[-1].is_last else None  # unused: the last stage's output is the loss
        fields: dict[str, Any] = dict(rows)
        self.schedule.step(*start, target=target, return_outputs=False, **fields)
        found = self.stages[-1].losses
        return torch.stack(found).sum(0) if found else torch.zeros(3, device=tokens.device)

    @torch.no_grad()
    def text_logprobs(self, tokens: Tensor) -> Tensor:
        """tokens (n, t + 1) -> the log-probability (n, t) of each but the first, on all ranks; stages run one after another."""
        layout, group, me = self.layout, self.mesh.pp.get_group(), self.mesh.pp.get_local_rank()
        config, mine = self.stages[0].model.config, dict(zip(layout.stages_of(me), self.stages, strict=True))
        owners = dict(sorted((stage, rank) for rank in range(layout.pp) for stage in layout.stages_of(rank)))
        labels = tokens[:, 1:]
        rows = {"tokens": nn.functional.pad(tokens[:, :-1], (0, config.num_nextn_predict_layers)), "labels": labels}
        sums = torch.zeros(2, device=tokens.device)  # losses are not used in evaluation
        x = torch.empty(*labels.shape, *_width(config), dtype=self.stages[0].model.compute, device=tokens.device)
        logp = torch.empty(labels.shape, device=tokens.device)
        for number, owner in owners.items():
            following = owners.get(number + 1, owner)
            if owner == me:
                made = mine[number](x, sums, **rows)
                x, logp = (x, made) if mine[number].is_last else (made[0], logp)
            if following != owner and owner == me:
                dist.send(x, group=group, group_dst=following)
            elif following != owner and following == me:
                dist.recv(x, group=group, group_src=owner)
        dist.broadcast(logp, group=group, group_src=owners[layout.stages - 1])
        return logp

    def _schedule(self, layout: Layout, rows: int, width: int) -> "_Tabled":
        """The schedule for rows of `width` tokens, MTP's included; messages between stages have fixed shapes."""
        model, device = self.stages[0].model, self.mesh.device
        config, micro = model.config, rows // layout.micro_batches
        length = width - config.num_nextn_predict_layers
        states = torch.empty(micro, length, *_width(config), dtype=model.compute, device=device)
        carried = states.requires_grad_(), torch.empty(2, device=device, requires_grad=True)
        tokens = torch.empty(micro, width, dtype=torch.long, device=device)
        loss = torch.empty((), device=device, requires_grad=True)
        pieces = []
        for stage, index in zip(self.stages, layout.stages_of(self.mesh.pp.get_local_rank()), strict=True):
            ends = tokens if stage.is_first else carried, loss if stage.is_last else carried
            kind = TorchStage if stage.splits else _Unsplit
            pieces.append(kind(stage, index, layout.stages, device, *ends, group=self.mesh.pp.get_group()))
        return _Tabled(pieces, layout)


def _width(config: ModelConfig) -> tuple[int, ...]:
    """The shape that stages pass on per token: (d,), or mHC's (n, d)."""
    return (config.hc_mult, config.hidden_size) if config.hc_mult else (config.hidden_size,)


class _Unsplit(TorchStage):
    """A stage that runs its whole backward pass in the slot for the inputs, because autograd cannot separate the two.

    The schedule is unchanged, but its slot for the weights does nothing.
    """

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss, full_backward=True, last_backward=last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:
        """Does nothing: the slot for the inputs has computed the weights' gradients."""


class _Tabled(_PipelineScheduleRuntime):  # type: ignore[misc]  # torch leaves it untyped
    """torch's runtime with a table from pipeline_tables; torch adds the sends and receives."""

    def __init__(self, stages: list[Any], layout: Layout) -> None:
        # the training step scales the gradients, once for all ranks
        super().__init__(stages, layout.micro_batches, loss_fn=lambda output, _: output, scale_grads=False)
        table = layout.pipeline.table(layout.pp, layout.micro_batches)
        self.pipeline_order = {rank: [action(slot) for slot in slots] for rank, slots in enumerate(table)}
        self._prepare_schedule_with_comms(self.pipeline_order)


def action(slot: Slot) -> _Action:
    """A slot as an action of torch's runtime."""

    def single(op: Op) -> _Action:
        return _Action(op.stage, _ComputationType(op.kind), op.micro_batch)

    if len(slot) == 1:
        return single(slot[0])
    return _Action(slot[0].stage, _ComputationType.OVERLAP_F_B, None, tuple(single(op) for op in slot))


@torch.no_grad()
def sum_copies(parts: list[ShardedParameter], mesh: Mesh, layout: Layout) -> None:
    """Gives both copies of the embedding the sum of their gradients; for models with two copies (`is_twice`)."""
    mine = {p.is_copy: local(p.value.grad) for p in parts if p.name == "embed" and p.value.grad is not None}
    if not mine:
        return
    [one, *another] = mine.values()
    total = one + (another[0] if another else _other(one, mesh, layout))
    for gradient in mine.values():
        gradient.copy_(total)


def _other(mine: Tensor, mesh: Mesh, layout: Layout) -> Tensor:
    """The tensor that the other end of the pipeline sends in exchange for `mine`."""
    rank, group = mesh.pp.get_local_rank(), mesh.pp.get_group()
    peer = dist.get_global_rank(group, layout.pp - 1 if rank == 0 else 0)
    theirs = torch.empty_like(mine)
    ops = [dist.P2POp(dist.isend, mine, peer, group), dist.P2POp(dist.irecv, theirs, peer, group)]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    return theirs
