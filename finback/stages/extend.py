"""Context extension: a trained model learns to read longer texts with YaRN and some further training (V3 4.3)."""

import dataclasses
from dataclasses import dataclass

from finback.config import UserError, check_positive
from finback.model.config import ModelConfig
from finback.model.rope_scaling import Yarn
from finback.runs.declaration import Declaration
from finback.stages.pretrain import Pretrain


@dataclass(frozen=True, kw_only=True)
class Extend(Pretrain):
    """Pre-trains further from `start` on rows of `seq_len` tokens, with the model's window extended to `window`.

    V3 took two phases of 1,000 steps, both with a YaRN factor of 40: rows of 32K in batches of 1,920, then rows of 128K in
    batches of 480, at the final learning rate of pre-training. The second phase needs no `factor`: the first one's stays.
    """

    # context length of the extended model, in tokens
    window: int
    # YaRN factor over the window that `start` was trained on; None: its scaling stays
    factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, self.name, "window")
        if self.model is not None:
            raise UserError(
                f"{self.name}.model", "given", "extension continues a trained model", "Give `start` instead."
            )
        if self.longest > self.window:
            raise self.wrong("seq_len", f"rows are longer than the window of {self.window}", "Shorten them.")
        if self.factor is not None and self.factor < 1:
            raise self.wrong("factor", "shortens the window", "Use 1 or more.")

    def declaration(self) -> Declaration:
        return dataclasses.replace(super().declaration(), objective="the same on longer texts")

    def adapted(self, config: ModelConfig) -> ModelConfig:
        """`start`'s config with the longer window, and YaRN applied to its original one."""
        if self.window < config.max_position_embeddings:
            problem = f"{self.start!r} reads {config.max_position_embeddings} already"
            raise self.wrong("window", problem, "Use a longer one.")
        scaling = config.rope_scaling
        if self.factor is not None:
            if scaling is not None:
                problem = f"{self.start!r} already has RoPE scaling ({scaling})"
                raise self.wrong("factor", problem, "Leave it out to use that scaling.")
            scaling = Yarn(factor=self.factor, original_max_position_embeddings=config.max_position_embeddings)
        return dataclasses.replace(config, rope_scaling=scaling, max_position_embeddings=self.window)
