"""The sampling protocol of a comparison; the defaults are R1's (2501.12948, section 3). Does not import torch.

Every contestant gets the same messages, the same sampling params and, for sample n of a question, the same seed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finback.config import UserError, check_fields, check_not_negative, check_positive
from finback.suites.suite import Suite

SAMPLES = 4  # R1 used 4 to 64: more samples where a suite has fewer questions


@dataclass(frozen=True)
class SamplingProtocol:
    """Sampling params for all contestants; `think` True opens a chain of thought, False suppresses it, None leaves it to them."""

    samples: int = SAMPLES
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 32768
    seed: int = 0
    think: bool | None = None

    def __post_init__(self) -> None:
        check_fields(self, "compare")
        check_positive(self, "compare", "samples", "top_p", "max_tokens")
        check_not_negative(self, "compare", "temperature", "seed")
        if self.top_p > 1:
            raise UserError("compare.top_p", self.top_p, "above 1", "Use 1 for all tokens.")
        if self.temperature == 0 and self.samples > 1:
            problem = "greedy samples are all equal"
            raise UserError("--samples", self.samples, problem, "Use 1 sample, or a temperature above 0.")


@dataclass(frozen=True)
class EvalRequest:
    """One sample of one question of one suite, and the key under which a contestant's answer is stored."""

    key: str
    suite: Suite
    # index of the question in the suite
    place: int
    sample: int
    messages: tuple[dict[str, str], ...]
    seed: int


def eval_requests(
    suites: Sequence[Suite], protocol: SamplingProtocol, identity: Mapping[str, Any]
) -> list[EvalRequest]:
    """All requests to one contestant. A key changes with anything that could change the answer."""
    found = []
    for suite in suites:
        same = {
            "contestant": dict(identity),
            "suite": suite.source.digest,
            "stop": list(suite.stop),
            "sampling": [protocol.temperature, protocol.top_p, protocol.max_tokens, protocol.think],
        }
        for place, problem in enumerate(suite.problems):
            messages = tuple(suite.ask(problem))
            # log-likelihoods are deterministic, so one sample is enough
            for sample in range(1 if suite.continuations else protocol.samples):
                seed = _seed(protocol.seed, suite.name, problem.key, sample)
                # a suite may hold a question twice: the index distinguishes its answers
                key = digest({**same, "place": place, "messages": messages, "seed": seed, "sample": sample})
                found.append(EvalRequest(key, suite, place, sample, messages, seed))
    return found


def digest(value: Any) -> str:
    """BLAKE2b of a value's JSON form, as 32 hex digits."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _seed(*words: object) -> int:
    """A seed for one sample; 31 bits, which every server accepts."""
    text = json.dumps([str(word) for word in words])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") >> 1
