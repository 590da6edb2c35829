"""Data types of generation: sampling parameters, completions, and requests."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from finback.config import UserError, check_fields
from finback.engine.pages import Line

if TYPE_CHECKING:
    from finback.engine.constrain import Constraint
    from finback.engine.detokenizer import Detokenizer
    from finback.engine.speculate import PromptLookup

FinishReason = Literal["stop", "length", "cancelled", "error"]  # error: no token satisfies the grammar
TokenLogprobs = list[tuple[int, float]]  # (token, log-probability), likeliest first

COLD = 1e-5  # dividing logits by less would overflow


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. A request's seed determines its tokens, whatever else is in the batch."""

    # 0 (or below COLD): greedy
    temperature: float = 1.0
    # longest answer; 0 only with prompt_logprobs: read the prompt, generate nothing
    max_tokens: int = 128
    # sample only from the k likeliest tokens; 0: all
    top_k: int = 0
    # sample only from the likeliest tokens that together reach this probability
    top_p: float = 1.0
    # sample only from tokens with at least this share of the likeliest token's probability
    min_p: float = 0.0
    # subtracted from a token's logit for each of its occurrences in the answer
    frequency_penalty: float = 0.0
    # subtracted from a token's logit if it occurs in the answer
    presence_penalty: float = 0.0
    # divides logits of tokens in prompt or answer (multiplies negative ones) (CTRL, 1909.05858)
    repetition_penalty: float = 1.0
    # pairs (token id, value added to its logit)
    logit_bias: tuple[tuple[int, float], ...] = ()
    # stop strings: they end the answer and are not part of it
    stop: tuple[str, ...] = ()
    # further token ids that end the answer
    stop_token_ids: tuple[int, ...] = ()
    # continue to max_tokens; for measurements
    ignore_eos: bool = False
    # record the tokens left by top_k, top_p and min_p at each position, and give log-probabilities among them (V3.2's keep-sampling-mask)
    return_sampling_mask: bool = False
    # report this many alternatives for each token, at temperature 1
    top_logprobs: int | None = None
    # the same for each prompt token but the first
    prompt_logprobs: int | None = None
    # longest chain of thought in tokens, after which it is closed
    thinking_budget: int | None = None
    # JSON schema (as text) of the answer after the chain of thought
    schema: str | None = None
    # a Lark grammar (llguidance's dialect) instead, for what a schema cannot express; not both
    grammar: str | None = None

    def __post_init__(self) -> None:
        # these may be any sequence, and a bias may be infinite
        check_fields(self, but=("logit_bias", "stop", "stop_token_ids"))
        least = 0 if self.prompt_logprobs is not None else 1
        checks = (
            ("temperature", self.temperature >= 0, "negative", "Use 0 for greedy or a positive number."),
            ("top_k", self.top_k >= 0, "negative", "Use 0 for all tokens."),
            ("top_p", 0 < self.top_p <= 1, "not above 0 and up to 1", "Use 1 for all tokens."),
            ("min_p", 0 <= self.min_p <= 1, "not in 0..1", "Use 0 for all tokens."),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "not in 0.01..100", "Use 1 for none."),
            ("max_tokens", self.max_tokens >= least, "nothing to generate", f"Use at least {least}."),
            ("top_logprobs", (self.top_logprobs or 0) >= 0, "negative", "Use 0 for the token's own."),
            ("prompt_logprobs", (self.prompt_logprobs or 0) >= 0, "negative", "Use 0 for the token's own."),
            ("thinking_budget", (self.thinking_budget or 0) >= 0, "negative", "Use 0 for no chain."),
        )
        for name, fits, problem, remedy in checks:
            if not fits:
                raise UserError(name, getattr(self, name), problem, remedy)

    @property
    def penalizes(self) -> bool:
        """Whether logits depend on earlier tokens."""
        return bool(self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1)


def check_length(prompt: int, answer: int, window: int) -> None:
    """Raises UserError if prompt and answer together exceed a model's context of `window` tokens."""
    if not prompt:
        raise UserError("prompt", "", "empty", "Give at least one token.")
    if prompt + answer > window:
        problem = f"the prompt has {prompt} tokens and the model reads {window}"
        raise UserError("max_tokens", answer, problem, "Shorten the prompt or ask for fewer tokens.")


@dataclass(frozen=True)
class Completion:
    """Generated token ids (without prompt, with the final eos) and log-probabilities under the sampling distribution."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    # experts that each token but the last was routed to, (prompt + answer - 1, layers, k), uint8 or uint16, 0 in dense layers;
    # None if the engine does not record them
    routed_experts: np.ndarray | None = None
    # ids that could be drawn at each position, if requested
    sampling_mask: list[np.ndarray] | None = None
    # (version, start, end): tokens start..end-1 were generated with the weights after `version` updates; () if unknown
    versions: tuple[tuple[int, int, int], ...] = ()
    # entries that each token's indexers selected, (prompt + answer - 1, indexers, index_topk), see model/picking.py; None if not
    # recorded
    indexer_topk: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt that one request has read for others with the same prompt, which start after it and read nothing."""

    # held until all followers have started; each copies the last page, since it will write to it
    pages: list[int]
    # at the prompt's last token: the trunk's last hidden state (d,), or the streams (n, d) if drafts start from those
    state: Tensor
    # state of the row besides its pages
    line: Line


@dataclass(eq=False)
class Request:
    """A request in the engine. Compared by identity; its lists grow as tokens are generated."""

    prompt: list[int]
    sampling: SamplingParams
    seed: int
    # requests with different salts never share cached pages
    salt: bytes = b""
    # wait until this request has read the common prefix
    leader: "Request | None" = None
    # number of requests that wait for this one to read their common prompt
    followers: int = 0
    prefix: Prefix | None = None
    # whether it is one of its leader's followers
    follows: bool = False
    # holds the answer's text, if the engine has a tokenizer
    detokenizer: "Detokenizer | None" = None
    constraint: "Constraint | None" = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # ids that each token could be drawn from, if requested
    sampling_mask: list[np.ndarray] = field(default_factory=list)
    # one entry per token, the token itself first, if requested
    top_logprobs: list[TokenLogprobs] = field(default_factory=list)
    # the same for prompt tokens 1, 2, …
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    # the error that ended it, if it is not its grammar
    problem: str = ""
    # whether it is inside the chain of thought
    thinking: bool = False
    # tokens in the chain, including its marks
    thinking_tokens: int = 0
    # index of its adapter on the model; 0: none
    adapter: int = 0
    # tokens to append next, regardless of the model
    forced: deque[int] = field(default_factory=deque)
    # its cache pages
    pages: list[int] = field(default_factory=list)
    # number of tokens whose cache entries are stored
    computed: int = 0
    # number of prompt tokens found in the cache
    cached: int = 0
    # number of leading pages that are published
    published: int = 0
    # digest of the tokens in those pages
    digest: bytes = b""
    # digest of the page after which its answer's row state is stored
    lined: bytes = b""
    # its row in the page table while it runs
    slot: int = -1
    # MTP's draft of the token after the last one
    draft: int = -1
    # n-gram drafts, from its first step with them on
    lookup: "PromptLookup | None" = None
    # first position from which MTP's own cache entries are complete
    drafts_from: int = 0
    # number of drafts and of accepted drafts
    drafted: int = 0
    accepted: int = 0
    # positions of accepted drafts
    accepted_at: list[int] = field(default_factory=list)
    preempted: int = 0
    # whether it has outgrown the window within which cached keys are scaled differently (LongRoPE)
    outgrown: bool = False
    # choices of its tokens (tokens, modules, k), by kind, recorded before it was preempted or finished
    choices: dict[str, Tensor] = field(default_factory=dict)
    submitted: float = field(default_factory=time.perf_counter)
    # time at which it first entered the batch
    started: float = 0.0
    # time of its first token
    first: float = 0.0
    last: float = 0.0
    _random: np.ndarray | None = None
    # (vocab,) occurrences of each token in the answer, for penalties
    _counts: Tensor | None = None
    # (vocab,) whether a token occurs in prompt or answer
    _present: Tensor | None = None

    @property
    def text(self) -> str:
        """The answer's text so far; needs an engine with a tokenizer."""
        assert self.detokenizer is not None, "the engine has no tokenizer"
        return self.detokenizer.text

    @property
    def length(self) -> int:
        """Length of prompt and answer so far, in tokens."""
        return len(self.prompt) + len(self.tokens)

    @property
    def reads(self) -> bool:
        """Whether it still has prompt to read, rather than a single token to decode."""
        left = self.length - self.computed
        # a request for prompt_logprobs only reads its prompt to the last token
        for_logprobs = self.sampling.prompt_logprobs is not None and self.computed < len(self.prompt)
        return left > 1 or (left == 1 and for_logprobs)

    @property
    def end(self) -> int:
        """Its maximal length in tokens."""
        return len(self.prompt) + self.sampling.max_tokens

    def slice(self, start: int, stop: int) -> list[int]:
        """Tokens start..stop of the concatenated prompt and answer."""
        n = len(self.prompt)
        if stop <= n:
            return self.prompt[start:stop]
        return self.prompt[start:n] + self.tokens[max(0, start - n) : stop - n]

    def uniform(self) -> float:
        """The next token's random number in [0, 1), a function of seed and position only."""
        index = len(self.tokens)
        if self._random is None or index >= len(self._random):
            self._random = uniforms(self.seed, max(64, 2 * index))
        return self._random[index]

    def append(self, token: int, logprob: float, now: float) -> None:
        """Appends a token that was sampled at time `now`."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.first, self.last = self.first or now, now
        if self._counts is not None:
            self._counts[token] += 1
        if self._present is not None:
            self._present[token] = True

    def counts(self, like: Tensor) -> Tensor:
        """(vocab,) occurrences of each token in the answer; computed once, then updated."""
        if self._counts is None:
            self._counts = torch.bincount(torch.tensor(self.tokens, dtype=torch.long), minlength=len(like)).to(like)
        return self._counts

    def present(self, like: Tensor) -> Tensor:
        """(vocab,) whether each token occurs in prompt or answer; computed once, then updated."""
        if self._present is None:
            self._present = torch.zeros(len(like), dtype=torch.bool, device=like.device)
            self._present[torch.tensor(self.prompt + self.tokens, device=like.device)] = True
        return self._present

    def completion(self) -> Completion:
        """The result of a finished request."""
        assert self.finish_reason is not None, "still running"
        last = self.length - 1
        # missing if it was cancelled before all was read
        made = {name: ids[:last].cpu().numpy() for name, ids in self.choices.items() if len(ids) >= last}
        experts, mask = made.get("experts"), self.sampling_mask if self.sampling.return_sampling_mask else None
        if experts is not None and experts.dtype == np.int16:
            experts = experts.view(np.uint16)
        done = self.tokens, self.logprobs, self.finish_reason, experts, mask
        return Completion(*done, indexer_topk=made.get("entries"))


def uniforms(seed: int, count: int) -> np.ndarray:
    """The first random numbers of a request, (count,) in [0, 1), a function of its seed only."""
    return np.random.Generator(np.random.Philox(seed)).random(count, dtype=np.float32)
