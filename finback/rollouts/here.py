"""Answers from finback's own engine in the process that learns, on the very weights that are trained."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from finback.data.tokenizer import Tokenizer
from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import Completion, SamplingParams
from finback.model.config import ModelConfig
from finback.parallel.served_weights import ServedWeights
from finback.rollouts.generation import Backend, PolicyModel, Rollouts


@dataclass(frozen=True)
class Here(Backend):
    """Each rank's own engine generates, in turn with learning."""

    def open(self, policy: PolicyModel, sampling: SamplingParams) -> Rollouts:
        engine = EngineConfig(return_routed_experts=policy.return_routed_experts)
        return EngineRollouts(policy.weights, policy.config, policy.tokenizer, engine)


class EngineRollouts(Rollouts):
    """An engine on the model that is trained, or on a whole copy of it that is put together at each update."""

    def __init__(
        self, weights: ServedWeights, config: ModelConfig, tokenizer: Tokenizer, engine: EngineConfig | None = None
    ) -> None:
        super().__init__(config)
        self.weights, self.tokenizer, self.engine_config = weights, tokenizer, engine or EngineConfig()
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """On the weights of the last update."""
        assert self._engine is not None, "made by the first update"
        return self._engine

    def _take_weights(self, version: int) -> int:
        before, model = self.weights.bytes, self.weights()
        if self._engine is not None and self._engine.model is not model:
            self._engine.use(model)
        elif self._engine is None:
            self._engine = Engine(model, self.tokenizer.stops, self.engine_config)
        return self.weights.bytes - before

    def _answers(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Completion]]:
        yield from enumerate(self.engine.generate(prompts, sampling, seeds))
