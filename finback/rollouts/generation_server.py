"""The interface of servers that generate for a trainer: what they are asked, and what their answers must contain.

Does not import torch.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from finback.client import Client, RequestFailed
from finback.config import UserError
from finback.runs.external import TokenCount

# scripts, digits, code and spaces, where tokenizers differ
TEXTS = (
    "The whale sang: 4+5=9, didn't it? 3.14159 and 1,024.",
    "    for i in range(10):\n\t\tprint(i ** 2)\r\n\n",
    "Ünïcode, naïve café; 鯨が歌う 你好 Привет 🐋",
)
# (version, start, end): tokens of an answer
Span = tuple[str, int, int]
# (token, log-probability) of the tokens that may come next
Likeliest = list[tuple[int, float]]


def tokenized(client: Client, model: str, text: str) -> Any:
    """A server's reply to a request for the ids of a text: {"tokens": [...]} if it has the route."""
    return client.reply("/tokenize", {"model": model, "prompt": text, "add_special_tokens": False})


@dataclass(frozen=True)
class TokenPrompt:
    """One request; fields as in engine.SamplingParams."""

    token_ids: Sequence[int]
    seed: int
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    # keeps cached prefixes of different weight versions apart
    cache_salt: str


@dataclass(frozen=True)
class TokenAnswer:
    """An answer in one form for all servers; None for what the server does not report."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    routed_experts: np.ndarray | None = None
    sampling_mask: list[np.ndarray] | None = None
    versions: list[Span] | None = None


@dataclass(frozen=True)
class ServedModel:
    """The model in training, whose shape answers must match, and what the stage needs from them."""

    vocab_size: int
    layers: int
    experts_per_token: int
    return_routed_experts: bool = False
    return_sampling_mask: bool = False


class GenerationServer(ABC):
    """A server. Its methods may be called from several threads; they raise RequestFailed if it does not answer."""

    # name of the program
    kind = ""
    # remedies for answers that lack something
    without_logprobs = "Use a server that returns the log-probabilities of its tokens."
    without_masks = "Leave out top_k and top_p."

    def __init__(self, url: str, client: Client, name: str, field: str, model: ServedModel) -> None:
        """name: the model's name on the server. field: the user's knob, for errors."""
        self.url, self.client, self.name, self.field, self.model = url, client, name, field, model
        # version of the weights that its answers must report; None: accept the first one
        self.expected: str | None = None
        # whether answers in progress are aborted when new weights arrive
        self.drops = False
        # whether it has released its memory since the last weights
        self.asleep = False
        # what it has read and generated for this rank
        self.count = TokenCount()

    def unfit(self, problem: str, remedy: str) -> UserError:
        """The error for a server that a run cannot use."""
        return UserError(self.field, self.url, f"{self.kind} server: {problem}", remedy)

    def answer(self, prompt: TokenPrompt) -> TokenAnswer:
        """Continues a prompt; UserError if the answer lacks something."""
        return self._checked(prompt, self._answer(prompt))

    def answers(self, prompts: Sequence[TokenPrompt]) -> Iterator[tuple[int, TokenAnswer]]:
        """Continues several prompts; yields (place, answer) as each is done. Errors as in `answer`."""
        for place, answer in self._answers(prompts):
            yield place, self._checked(prompts[place], answer)

    def _answers(self, prompts: Sequence[TokenPrompt]) -> Iterator[tuple[int, TokenAnswer]]:
        for place, prompt in enumerate(prompts):
            yield place, self._answer(prompt)

    @abstractmethod
    def _answer(self, prompt: TokenPrompt) -> TokenAnswer:
        """The raw answer of the server."""

    def likeliest(self, token_ids: Sequence[int], k: int) -> list[Likeliest]:
        """The model's k likeliest tokens at each position of a text except the first, at temperature 1; UserError if it reports fewer."""
        found = [sorted(pairs, key=lambda pair: -pair[1])[:k] for pairs in self._likeliest(token_ids, k)]
        self.count.add(len(token_ids), 1)  # programs generate at least one token
        if len(found) != len(token_ids) - 1 or any(len(pairs) < k for pairs in found):
            remedy = f"Start it so that it returns {k} (vLLM: --max-logprobs {k}), or lower top_k."
            raise self.unfit(f"does not report its {k} likeliest tokens at each position of a text", remedy)
        if not all(0 <= token < self.model.vocab_size for pairs in found for token, _ in pairs):
            raise self.unfit(
                f"reports ids beyond the vocabulary of {self.model.vocab_size:,}", "Serve a model with this one."
            )
        return found

    def _likeliest(self, token_ids: Sequence[int], k: int) -> list[Likeliest]:
        """At least the k likeliest tokens at each position, in any order."""
        raise self.unfit("does not report log-probabilities of a text's tokens", "Use vLLM, SGLang or `finback serve`.")

    @abstractmethod
    def load(self, weights: Any, version: str) -> None:
        """Makes it answer with other weights, under this version, with nothing cached from earlier ones.

        weights: their folder, or what replaces it for servers that use no files.
        """

    def sleep(self) -> None:
        """Makes it release weights and cache until the next `load`; it must not be asked before that."""
        self._sleep()
        self.asleep = True

    def _sleep(self) -> None:
        raise self.unfit("cannot release its memory", "Leave out colocated.")

    @contextmanager
    def _woken(self) -> Iterator[None]:
        """A context with memory for the weights; on exit also for the cache, if it was released."""
        if self.asleep:
            self._wake("weights")
        yield
        if self.asleep:
            self._wake("kv_cache")
            self.asleep = False

    def _wake(self, tag: str) -> None:  # noqa: B027 - those that never sleep
        """Restores the memory of "weights" or "kv_cache"."""

    def version(self) -> str | None:
        """Version of the weights, for servers whose answers do not report it; None if it cannot be asked."""
        return None

    def tokenize(self, text: str) -> list[int] | None:
        """Token ids of a text, None if the server has no tokenizer."""
        try:
            found = tokenized(self.client, self.name, text)
        except RequestFailed as error:
            if error.final:
                return None
            raise
        ids = found.get("tokens") if isinstance(found, dict) else None
        if not isinstance(ids, list):
            raise RequestFailed(f"no token ids in {str(found)[:100]}")
        return [int(token) for token in ids]

    def _checked(self, prompt: TokenPrompt, answer: TokenAnswer) -> TokenAnswer:
        """The answer, whose tokens are counted. UserError if it cannot be learned from, RequestFailed if it was aborted."""
        m, count = self.model, len(answer.tokens)
        self.count.add(len(prompt.token_ids), count)
        if answer.finish_reason == "abort" and self.drops:
            raise RequestFailed("an answer that was dropped for new weights", busy=True, retry_after=0.0)
        if answer.finish_reason not in ("stop", "length") or not count:
            raise RequestFailed(f"an answer of {count} tokens that ended by {answer.finish_reason!r}")
        if not all(0 <= token < m.vocab_size for token in answer.tokens):
            remedy = "Serve the model that is trained, with its tokenizer."
            raise self.unfit(f"answers with ids beyond the vocabulary of {m.vocab_size:,}", remedy)
        if len(answer.logprobs) != count or not all(map(math.isfinite, answer.logprobs)):
            raise self.unfit("its answers lack log-probabilities", self.without_logprobs)
        narrows = prompt.top_k > 0 or prompt.top_p < 1  # validation and watched prompts may use other sampling
        if m.return_sampling_mask and narrows and (answer.sampling_mask is None or len(answer.sampling_mask) != count):
            raise self.unfit("does not report which tokens top_k and top_p leave", self.without_masks)
        experts, rows = answer.routed_experts, len(prompt.token_ids) + count - 1
        if experts is not None and experts.shape != (rows, m.layers, m.experts_per_token):
            wanted = (rows, m.layers, m.experts_per_token)
            raise self.unfit(
                f"routed experts of shape {experts.shape}, not {wanted}", "Serve the model that is trained."
            )
        return answer


def object_of(reply: Any, *names: str | int) -> Any:
    """The value at a path of a JSON reply; RequestFailed if there is none."""
    found = reply
    try:
        for name in names:
            found = found[name]
    except (KeyError, IndexError, TypeError):
        raise RequestFailed(f"no {'.'.join(map(str, names))} in {str(reply)[:200]}") from None
    return found
