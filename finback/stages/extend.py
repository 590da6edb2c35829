"""Context extension: a trained model reads longer texts after some further training under YaRN (V3 4.3)."""

import dataclasses
from dataclasses import dataclass

from finback.config import UserError, check_positive
from finback.model.config import ModelConfig
from finback.model.rope_scaling import Yarn
from finback.runs.declaration import Declaration
from finback.stages.pretrain import Pretrain


@dataclass(frozen=True, kw_only=True)
class Extend(Pretrain):
    """Pre-training's knobs on rows of `seq_len` tokens, from `start`, whose window becomes `window`.

    V3 took two phases of 1,000 steps, both under YaRN by 40 from the start: rows of 32K, then of 128K, 1,920 and 480
    to the batch, at the rate that pre-training ended with. The second needs no `factor`: the first one's stays.
    """

    # tokens the model reads afterwards
    window: int
    # of YaRN over the window that `start` was trained on; None: its scaling stays
    factor: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, self.name, "window")
        if self.model is not None:
            raise UserError(f"{self.name}.model", "given", "extension goes on with a model", "Give `start` instead.")
        if self.seq_len > self.window:
            raise self.wrong("seq_len", f"rows longer than the window of {self.window}", "Shorten them.")
        if self.factor is not None and self.factor < 1:
            raise self.wrong("factor", "shortens the window", "Use 1 or more.")

    def declaration(self) -> Declaration:
        return dataclasses.replace(super().declaration(), objective="the same on longer texts")

    def adapted(self, config: ModelConfig) -> ModelConfig:
        """`start`'s config with the longer window, and YaRN over its old one."""
        if self.window < config.max_position_embeddings:
            problem = f"{self.start!r} reads {config.max_position_embeddings} already"
            raise self.wrong("window", problem, "Use a longer one.")
        scaling = config.rope_scaling
        if self.factor is not None:
            if scaling is not None:
                problem = f"{self.start!r} is scaled already ({scaling})"
                raise self.wrong("factor", problem, "Leave it out: the scaling stays.")
            scaling = Yarn(factor=self.factor, original_max_position_embeddings=config.max_position_embeddings)
        return dataclasses.replace(config, rope_scaling=scaling, max_position_embeddings=self.window)
