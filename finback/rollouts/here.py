"""Answers from finback's own engine in the training process, on the weights in training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from finback.data.tokenizer import Tokenizer
from finback.engine.engine import Engine, EngineConfig
from finback.engine.request import Completion, SamplingParams
from finback.model.config import ModelConfig
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.parallel.served_weights import ServedWeights, whole_copy
from finback.rollouts.generation import Backend, PolicyModel, Rollouts
from finback.rollouts.live_engine import SIGNS, LiveEngine
from finback.rollouts.weight_files import merged


@dataclass(frozen=True)
class Here(Backend):
    """Each rank's own engine generates, alternating with learning, or in parallel on a copy of the weights."""

    def open(self, policy: PolicyModel, sampling: SamplingParams) -> Rollouts:
        recorded = policy.return_routed_experts, policy.return_indexer_topk
        engine = EngineConfig(return_routed_experts=recorded[0], return_indexer_topk=recorded[1])
        if policy.in_flight != "none":
            return LiveRollouts(policy, engine)
        return EngineRollouts(policy.weights, policy.config, policy.tokenizer, engine)


class EngineRollouts(Rollouts):
    """An engine on the model in training, or on a whole copy of it that is gathered at each update."""

    def __init__(
        self, weights: ServedWeights, config: ModelConfig, tokenizer: Tokenizer, engine: EngineConfig | None = None
    ) -> None:
        super().__init__(config)
        self.weights, self.tokenizer, self.engine_config = weights, tokenizer, engine or EngineConfig()
        self._engine: Engine | None = None

    @property
    def engine(self) -> Engine:
        """The engine, on the weights of the last update."""
        assert self._engine is not None, "created by the first update"
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


class LiveRollouts(Rollouts):
    """An engine in its own thread, on a copy of the weights that each update refreshes."""

    def __init__(self, policy: PolicyModel, engine: EngineConfig) -> None:
        super().__init__(policy.config)
        self.policy = policy
        config = replace(policy.config, num_nextn_predict_layers=0)
        compute = torch.bfloat16 if policy.compute == "bf16" else torch.float32
        model, _ = whole_copy(config, compute, torch.float32, World())
        self.live = LiveEngine(Engine(model, policy.tokenizer.stops, engine))

    def _take_weights(self, version: int) -> int:
        before, found = self.policy.weights.bytes, merged(self.policy.weights(), "fp32").state_dict()

        @torch.no_grad()
        def fill(model: Transformer) -> None:
            for name, tensor in model.state_dict(keep_vars=True).items():
                tensor.copy_(found[name])

        self.live.take(fill, version, drop=self.policy.in_flight == "drop")
        return self.policy.weights.bytes - before

    def _answers(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Completion]]:
        found = self.live.answers(prompts, sampling, seeds, SIGNS)
        yield from (answer for answer in found if answer is not None)

    def close(self) -> None:
        """Ends the thread."""
        self.live.close()
