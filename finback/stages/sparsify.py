"""Sparse attention for a trained model: trains indexers to predict where its attention looks (V3.2 2.1.1, the dense stage)."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from finback.config import UserError, check_positive
from finback.model.config import ModelConfig
from finback.model.dsa_training import Attention
from finback.runs.declaration import Declaration
from finback.stages.pretrain import Pretrain
from finback.train.rates import Level


@dataclass(frozen=True, kw_only=True)
class Sparsify(Pretrain):
    """Adds DSA's indexers to a model with latent attention, and trains only them, on pre-training data.

    A V4 model already has indexers; they are trained further, and `index_topk` may change. During this stage every token
    attends to all earlier ones, in V4 to all entries. A Pretrain stage that starts from the result is sparse: each token
    attends to `index_topk` of them, the token loss trains everything else, and the indexers keep learning. V3.2 took 1,000
    steps of 16 rows of 128K tokens at a learning rate of 1e-3, then 15,000 steps of 480 rows at 7.3e-6.
    """

    # earlier tokens that each token will attend to
    index_topk: int
    # number of heads of an indexer
    index_n_heads: int
    # width of an indexer's head, at least the rotary part of an attention head
    index_head_dim: int
    optimizer: Literal["muon", "adamw"] = "adamw"
    # learning rate of the indexers (V3.2: 1e-3)
    adam_lr: float = 1e-3
    weight_decay: float = 0.0
    # nothing but the indexers moves, not even the routers' biases
    bias_speed: Level = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, self.name, "index_topk", "index_n_heads", "index_head_dim")
        if self.model is not None:
            raise UserError(
                f"{self.name}.model", "given", "this stage continues a trained model", "Give `start` instead."
            )
        for name in ("sparse_from", "indexer_tokens"):
            if getattr(self, name):
                raise self.wrong(name, "this stage is all warm-up", "Use 0; Pretrain has the knob.")
        if self.bias_speed:
            raise self.wrong("bias_speed", "would move the routers of a frozen model", "Use 0.")

    def declaration(self) -> Declaration:
        given = super().declaration()
        curves = given.curves | {"indexer: KL to the attention (nats per token)": ("indexer_loss",)}
        return dataclasses.replace(given, objective="where the model's attention looks", curves=curves)

    def adapted(self, config: ModelConfig) -> ModelConfig:
        """`start`'s config with indexers."""
        names = "index_topk", "index_n_heads", "index_head_dim"
        if config.index_topk and config.attention != "compressed":
            problem = f"{self.start!r} already has indexers"
            raise self.wrong("index_topk", problem, "Continue with Pretrain.")
        for name in names[1:]:
            if config.index_topk and getattr(self, name) != (had := getattr(config, name)):
                raise self.wrong(name, f"the indexers of {self.start!r} have {had}", f"Use {had}.")
        try:
            return dataclasses.replace(config, **{name: getattr(self, name) for name in names})
        except UserError as error:
            leaf = error.field.removeprefix("model.")
            raise UserError(f"{self.name}.{leaf}", error.value, error.problem, error.remedy) from None

    def attention_at(self, tokens: int) -> Attention:
        return "warm-up"

    def learns(self, name: str) -> bool:
        return ".indexer." in name
