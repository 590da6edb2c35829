"""The interface between stages that learn and whatever generates answers for them.

A stage's knob (a `Backend`: `Here`, `Servers`, `Fleet`) is opened with a `PolicyModel` and returns `Rollouts`, which take prompts,
sampling parameters and seeds, and return completions with sampling log-probabilities and the version of the weights.
"""

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from finback.data.tokenizer import Tokenizer
from finback.engine.request import Completion, SamplingParams
from finback.model.config import ModelConfig
from finback.parallel.served_weights import ServedWeights
from finback.runs.folder import StageRun

InFlight = Literal["none", "continue", "drop"]


class Generator(Protocol):
    """Anything that answers prompts, such as an Engine."""

    @property
    def model_config(self) -> ModelConfig:
        """Config of the model that answers."""
        ...

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order. Completion i uses random numbers of seeds[i] only."""


@dataclass(frozen=True)
class PolicyModel:
    """The model that answers, as generators see it."""

    # its current, whole weights; collective, and the result must not be stored
    weights: ServedWeights
    config: ModelConfig
    tokenizer: Tokenizer
    run: StageRun
    # precision of the trainer's products, "fp32" or "bf16"
    compute: str = "fp32"
    # False: it never changes, and external generators already have it
    learns: bool = True
    # record the experts that each token is routed to
    return_routed_experts: bool = False
    # record the entries that each token's indexers select
    return_indexer_topk: bool = False
    # what happens to answers in progress when the weights change; none: nothing is generated at that time
    in_flight: InFlight = "none"


@dataclass
class Tally:
    """What one rank's generation has cost: bytes of weights sent, tokens generated, and seconds of both."""

    sync_bytes: int = 0
    sync_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


class Rollouts(ABC):
    """Generates with a policy. `update` is collective; each rank generates for itself.

    If the policy is `in_flight`, weights may arrive while other threads generate.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.model_config = config
        # number of updates of the weights in use; -1: none yet
        self.version = -1
        # whether weights and cache have been released
        self.resting = False
        self._tally = Tally()
        # one thread may generate while another updates weights
        self._counting = threading.Lock()

    def update(self, version: int) -> None:
        """Switches generation to the policy's current weights, after `version` updates.

        Does nothing if they are already in use. UserError if the generator cannot take them.
        """
        if version == self.version and not self.resting:
            return
        begin = time.perf_counter()
        sent = self._take_weights(version)
        self._count(sync_bytes=sent, sync_seconds=time.perf_counter() - begin)
        self.version, self.resting = version, False

    def rest(self) -> None:
        """Releases what generation needs until the next `update`, to make room for others. Collective."""
        self.resting = self._rest()

    def _rest(self) -> bool:
        """Returns whether there was anything to release."""
        return False

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order. Completion i uses random numbers of seeds[i] only."""
        found = dict(self.stream(prompts, sampling, seeds))
        return [found[i] for i in range(len(prompts))]

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Completion]]:
        """Yields (place, completion) as soon as each is done; every place once."""
        if self.version < 0:
            self.update(0)
        assert not self.resting, "`update` must come before generating"
        begin = time.perf_counter()
        for place, completion in self._answers(prompts, sampling, seeds):
            if not completion.versions:
                completion = replace(completion, versions=((self.version, 0, len(completion.tokens)),))
            self._count(tokens=len(completion.tokens), seconds=time.perf_counter() - begin)
            yield place, completion
            begin = time.perf_counter()

    def take_tally(self) -> Tally:
        """What was spent since the last call."""
        with self._counting:
            found, self._tally = self._tally, Tally()
        return found

    def _count(self, **spent: float) -> None:
        with self._counting:
            for name, value in spent.items():
                setattr(self._tally, name, getattr(self._tally, name) + value)

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Releases connections."""

    @abstractmethod
    def _take_weights(self, version: int) -> int:
        """Takes the policy's weights. Returns the bytes sent for it."""

    @abstractmethod
    def _answers(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Completion]]: ...


class Backend(ABC):
    """A stage's knob for where its answers are generated."""

    @abstractmethod
    def open(self, policy: PolicyModel, sampling: SamplingParams) -> Rollouts:
        """The rollouts for a stage with this sampling; UserError if it is not possible. The caller makes the first `update`."""

    def check_ahead(self, field: str, max_staleness: int) -> None:  # noqa: B027 - most can
        """Raises UserError about the stage's knob if it cannot generate this many updates ahead."""
