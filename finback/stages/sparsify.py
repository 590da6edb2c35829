"""Sparse attention for a trained model: indexers that learn where its attention looks (V3.2 2.1.1, the dense stage)."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from finback.config import UserError, check_positive
from finback.model.config import ModelConfig
from finback.runs.declaration import Declaration
from finback.stages.pretrain import Pretrain
from finback.train.rates import Level


@dataclass(frozen=True, kw_only=True)
class Sparsify(Pretrain):
    """Gives a model of latent attention DSA's indexers, and teaches them alone, on the data of pre-training.

    A V4 has indexers, which are taught as they are: `index_topk` may become another. While it lasts every token looks at all
    earlier ones, of V4 at all entries. A Pretrain that starts from it goes on sparse: each token looks at
    `index_topk` of them, the loss of tokens teaches everything else, and indexers go on learning. V3.2 took 1,000 steps
    of 16 rows of 128K at a rate of 1e-3, then 15,000 steps of 480 rows at 7.3e-6.
    """

    # tokens that each will look at
    index_topk: int
    # heads of an indexer, and their width, which is at least the rotary part of a head
    index_n_heads: int
    # width of a head, at least the rotary part of one of attention
    index_head_dim: int
    optimizer: Literal["muon", "adamw"] = "adamw"
    # of the indexers (V3.2: 1e-3)
    adam_lr: float = 1e-3
    weight_decay: float = 0.0
    # nothing else moves, routers' biases included
    bias_speed: Level = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, self.name, "index_topk", "index_n_heads", "index_head_dim")
        if self.model is not None:
            raise UserError(f"{self.name}.model", "given", "it goes on with a trained model", "Give `start` instead.")
        if self.bias_speed:
            raise self.wrong("bias_speed", "moves routers of a model that stays as it is", "Use 0.")

    def declaration(self) -> Declaration:
        given = super().declaration()
        curves = given.curves | {"indexer: KL to the attention (nats per token)": ("indexer_loss",)}
        return dataclasses.replace(given, objective="where the model's attention looks", curves=curves)

    def adapted(self, config: ModelConfig) -> ModelConfig:
        """`start`'s config with indexers."""
        names = "index_topk", "index_n_heads", "index_head_dim"
        if config.index_topk and config.attention != "compressed":
            problem = f"{self.start!r} has indexers already"
            raise self.wrong("index_topk", problem, "Go on with Pretrain.")
        for name in names[1:]:
            if config.index_topk and getattr(self, name) != (had := getattr(config, name)):
                raise self.wrong(name, f"the indexers of {self.start!r} have {had}", f"Use {had}.")
        try:
            return dataclasses.replace(config, **{name: getattr(self, name) for name in names})
        except UserError as error:
            leaf = error.field.removeprefix("model.")
            raise UserError(f"{self.name}.{leaf}", error.value, error.problem, error.remedy) from None

    @property
    def attends_densely(self) -> bool:
        return True

    def learns(self, name: str) -> bool:
        return ".indexer." in name
