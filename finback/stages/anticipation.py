"""Anticipatory routing: after a loss spike, experts are chosen by weights that are some updates old (V4, training stability).

A router and its experts learn at the same time, which amplifies a spike. For some steps after one, the experts for a
step's rows are therefore chosen by the weights of a fixed number of updates earlier; gates and everything else use the
current weights. No old weights are stored: the rows of a later step are read ahead, and the experts that the current
weights choose for them are recorded until that step is taken. The routers of MTP modules are not affected.
"""

from collections import deque
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from finback.data.loader import Loader
from finback.model.count import forward_flops_of
from finback.model.routing import trace_routers
from finback.train.batch import Batch, of_rows
from finback.train.loop import Loop

if TYPE_CHECKING:
    from finback.stages.pretraining import Pretraining


class Anticipation:
    """Expert choices for the next steps of a Pretraining; a checkpoint's tensors include them."""

    def __init__(self, training: "Pretraining", ahead: Loader) -> None:
        """ahead: reads the same rows as the training's own loader, some steps earlier."""
        self.training, self.ahead = training, ahead
        self.routing = trace_routers(training.trainer.model)
        # remaining steps with older choices
        self.left = 0
        # tokens of all steps up to the last one read ahead
        self.tokens = 0
        # for each of the next steps, the experts of this rank's rows: (rows, seq_len, layers, k) int16
        self.choices: deque[Tensor] = deque()

    def start(self) -> None:
        """Uses older choices in the next `anticipatory_steps` steps."""
        self.left = self.training.stage.anticipatory_steps
        self.choices.clear()

    def routed(self, loop: Loop) -> AbstractContextManager[None]:
        """A context for the passes of the next step; called before the step draws its rows."""
        delay = self.training.stage.anticipatory_delay
        if not self.left:
            return nullcontext()
        if not self.choices:  # right after a rewind there are no older weights
            self._catch_up(0)
            for _ in range(min(delay, self.left)):
                self._look(loop)
        given = self.choices.popleft()
        if self.left > delay:
            self._look(loop)
        self.left -= 1
        return self.routing.replaying(given)

    def _catch_up(self, steps: int) -> None:
        """Moves the reader to `steps` steps after the training's own."""
        self.ahead.load_state(self.training.loader.state())
        self.tokens = self.training.tokens
        for _ in range(steps):
            self._drawn()

    def _drawn(self) -> Batch:
        """This rank's rows of the next step that has not been read yet."""
        stage, trainer = self.training.stage, self.training.trainer
        rows, length = stage.batch_size_at(self.tokens), stage.seq_len_at(self.tokens)
        self.tokens += rows * length
        self.ahead.resize(length)
        drawn = self.ahead.draw(rows, trainer.data_rank, trainer.data_ranks, stage.document_mask)
        return of_rows(drawn, length)

    @torch.no_grad()
    def _look(self, loop: Loop) -> None:
        """Records the current weights' choices for one more step."""
        model, world = self.training.trainer.model, self.training.world
        batch = self._drawn().to(world.device)
        tokens, padding_mask, document_ids = batch.inputs
        shape = *tokens.shape, len(model.blocks), model.config.num_experts_per_tok
        found = torch.full(shape, -1, dtype=torch.int16, device=world.device)
        model.eval()  # neither loads nor losses are counted
        with self.routing.recording(found.flatten(0, 1), torch.arange(tokens.numel(), device=world.device)):
            model(tokens, padding_mask=padding_mask, document_ids=document_ids)
        model.train()
        self.choices.append(found)
        flops = torch.tensor([forward_flops_of(model.config, batch.lengths())], dtype=torch.float64)
        loop.spend(auxiliary=world.sum_(flops).item())

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def resume(self, state: dict[str, Any]) -> None:
        """Restores the saved state; called after the choices, the loader and the number of tokens are restored."""
        self.left = state["left"]
        if self.choices:
            self._catch_up(len(self.choices))

    def state(self) -> dict[str, Tensor]:
        """The choices for all ranks' rows, in the order of the rows."""
        of_ranks = self.training.world.gather([each.cpu() for each in self.choices])
        steps = zip(*of_ranks, strict=True)
        return {f"anticipated.{i}": torch.stack(parts, dim=1).flatten(0, 1) for i, parts in enumerate(steps)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        trainer = self.training.trainer
        count = sum(name.startswith("anticipated.") for name in tensors)
        mine = slice(trainer.data_rank, None, trainer.data_ranks)
        self.choices = deque(tensors[f"anticipated.{i}"][mine].to(self.training.world.device) for i in range(count))
