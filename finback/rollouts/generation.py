"""Where answers are generated: what stands between the stages that learn and whatever generates for them.

A stage's knob (a `Backend`: `Here`, `Servers`, `Fleet`) is opened with a `PolicyModel` and gives `Rollouts`: prompts, sampling parameters and
seeds in; completions out, with the log-probabilities with which they were drawn and the version of the weights.
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
    """Whatever answers prompts; an Engine is one too."""

    @property
    def model_config(self) -> ModelConfig: ...

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order. Completion i uses random numbers of seeds[i] alone."""


@dataclass(frozen=True)
class PolicyModel:
    """The model that answers, for whatever generates with it."""

    # its weights as they are now, whole; all ranks call it at once, and nobody keeps what it returns
    weights: ServedWeights
    config: ModelConfig
    tokenizer: Tokenizer
    run: StageRun
    # precision of the trainer's products, "fp32" or "bf16"
    compute: str = "fp32"
    # False: it is what it is, and what generates with it elsewhere has it already
    learns: bool = True
    # note the experts that each token is sent to
    return_routed_experts: bool = False
    # what becomes of answers under way where the weights change; none: nobody generates meanwhile
    in_flight: InFlight = "none"


@dataclass
class Tally:
    """What one rank's generating has cost: weights that were sent, tokens that were made, and seconds of either."""

    sync_bytes: int = 0
    sync_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0


class Rollouts(ABC):
    """Generates with a policy. `update` is for all ranks at once; each rank generates for itself.

    Where the policy is `in_flight`, weights may come while others generate, each in a thread of its own.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.model_config = config
        # after how many updates of the policy its weights are those that answer; -1: before the first look at them
        self.version = -1
        # whether it has let go of weights and cache
        self.resting = False
        self._tally = Tally()
        # one thread may generate while another gives weights
        self._counting = threading.Lock()

    def update(self, version: int) -> None:
        """Have answers come from the policy's weights as they are now, after `version` updates.

        Nothing happens where they do already. UserError where what generates cannot have them.
        """
        if version == self.version and not self.resting:
            return
        begin = time.perf_counter()
        sent = self._take_weights(version)
        self._count(sync_bytes=sent, sync_seconds=time.perf_counter() - begin)
        self.version, self.resting = version, False

    def rest(self) -> None:
        """Let go of what generating needs until the next `update`, where others want the room; for all ranks at once."""
        self.resting = self._rest()

    def _rest(self) -> bool:
        """Whether there was anything to let go of."""
        return False

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order. Completion i uses random numbers of seeds[i] alone."""
        found = dict(self.stream(prompts, sampling, seeds))
        return [found[i] for i in range(len(prompts))]

    def stream(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Completion]]:
        """The same, each with its place as soon as it is done; every place comes once."""
        if self.version < 0:
            self.update(0)
        assert not self.resting, "updated before it is asked"
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
        """Let go of connections."""

    @abstractmethod
    def _take_weights(self, version: int) -> int:
        """Look at the policy's weights; bytes that had to travel for it."""

    @abstractmethod
    def _answers(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Completion]]: ...


class Backend(ABC):
    """A stage's knob that says where its answers are generated."""

    @abstractmethod
    def open(self, policy: PolicyModel, sampling: SamplingParams) -> Rollouts:
        """What generates for a stage that samples so; UserError where it cannot. Its first `update` is the caller's."""

    def check_ahead(self, field: str, max_staleness: int) -> None:  # noqa: B027 - most can
        """UserError, in the name of the stage's knob, where it cannot answer so many updates ahead."""
