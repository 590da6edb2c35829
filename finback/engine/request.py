"""The nouns of generation: sampling parameters, completions, and a request on its way from one to the other."""

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

FinishReason = Literal["stop", "length", "cancelled", "error"]  # error: a grammar that no token can go on with
TokenLogprobs = list[tuple[int, float]]  # (token, log-probability), likeliest first

COLD = 1e-5  # logits divided by less would overflow


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen. A request's seed fixes them, whatever else is in its batch."""

    # 0, or less than COLD, is greedy
    temperature: float = 1.0
    # 0 only with prompt_logprobs: read the prompt, generate nothing
    max_tokens: int = 128
    # only the k likeliest tokens; 0: all
    top_k: int = 0
    # only the likeliest tokens that together reach this probability
    top_p: float = 1.0
    # only tokens with this share of the likeliest one's probability
    min_p: float = 0.0
    # subtracted from a logit for every time the answer has the token
    frequency_penalty: float = 0.0
    # subtracted once if the answer has the token at all
    presence_penalty: float = 0.0
    # logits of tokens in prompt or answer are divided by it, or multiplied where negative (CTRL, 1909.05858)
    repetition_penalty: float = 1.0
    # (token, what is added to its logit)
    logit_bias: tuple[tuple[int, float], ...] = ()
    # stop strings: they end the answer and are no part of it
    stop: tuple[str, ...] = ()
    # ids that end the answer beside the engine's own
    stop_token_ids: tuple[int, ...] = ()
    # go on to max_tokens; for measuring
    ignore_eos: bool = False
    # note which tokens top_k, top_p and min_p leave at each place, and give log-probabilities among these (V3.2's keep-sampling-mask)
    return_sampling_mask: bool = False
    # report this many alternatives for each token, at temperature 1
    top_logprobs: int | None = None
    # the same for every prompt token behind the first
    prompt_logprobs: int | None = None
    # most tokens of a chain of thought; then it is closed for the model
    thinking_budget: int | None = None
    # a JSON schema (as text) that the answer follows once the chain is closed
    schema: str | None = None
    # the same in llguidance's Lark, for what no schema can say; one of the two
    grammar: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, but=("logit_bias", "stop", "stop_token_ids"))  # any sequences, and a bias may be infinite
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
    """UserError where a model that reads `window` tokens cannot continue a prompt of so many by an answer of so many."""
    if not prompt:
        raise UserError("prompt", "", "empty", "Give at least one token.")
    if prompt + answer > window:
        problem = f"the prompt has {prompt} tokens and the model reads {window}"
        raise UserError("max_tokens", answer, problem, "Shorten the prompt or ask for fewer tokens.")


@dataclass(frozen=True)
class Completion:
    """Generated ids (without prompt; the final eos included) with log-probabilities under the sampling distribution."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    # ids of the experts that each token but the last was sent to, (prompt + answer - 1, layers, k), uint8 or uint16, 0 in dense
    # layers; where the engine records them
    routed_experts: np.ndarray | None = None
    # ids that could be drawn for each token, where asked for
    sampling_mask: list[np.ndarray] | None = None
    # (version, first, behind the last): after how many updates the weights were that made which tokens; where it is known
    versions: tuple[tuple[int, int, int], ...] = ()


@dataclass(frozen=True, eq=False)
class Prefix:
    """A prompt that one request has read for others with the same one: they begin behind it and read nothing."""

    # held until all of them have begun; each takes a copy of the last one, which it will write to
    pages: list[int]
    # of the prompt's last token: the trunk's last hidden state (d,), or where streams are drafted from, those (n, d)
    state: Tensor
    # what the pool kept of the row beside its pages
    line: Line


@dataclass(eq=False)
class Request:
    """A request on its way through the engine; identity is the request's, the lists grow as tokens are made."""

    prompt: list[int]
    sampling: SamplingParams
    seed: int
    # requests with different salts never share cached pages
    salt: bytes = b""
    # wait until this one has read the prompt that both begin with
    leader: "Request | None" = None
    # requests that wait to begin behind this one's prompt, which is theirs too, and what they need of it
    followers: int = 0
    prefix: Prefix | None = None
    # whether it is one of its leader's followers
    follows: bool = False
    # holds the answer's text, where the engine has a tokenizer
    detokenizer: "Detokenizer | None" = None
    constraint: "Constraint | None" = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    # the ids that each token was drawn from, if asked for
    sampling_mask: list[np.ndarray] = field(default_factory=list)
    # one per token, its own first, if asked for
    top_logprobs: list[TokenLogprobs] = field(default_factory=list)
    # the same for prompt tokens 1, 2, …
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    # what has ended it by an error, where that is not its grammar
    problem: str = ""
    # inside the chain of thought
    thinking: bool = False
    # tokens of the chain, its marks included
    thinking_tokens: int = 0
    # the number of its adapter among the model's; 0 is the base alone
    adapter: int = 0
    # tokens to append next, whatever the model would
    forced: deque[int] = field(default_factory=deque)
    # where it stands in the cache
    pages: list[int] = field(default_factory=list)
    # tokens whose entries are stored
    computed: int = 0
    # prompt tokens that another request had read already
    cached: int = 0
    # leading pages that others may find
    published: int = 0
    # of the tokens in those pages
    digest: bytes = b""
    # that of the page behind which a line of its answer is kept
    lined: bytes = b""
    # its line in the page table while it runs
    slot: int = -1
    # MTP's guess at the token after the last one
    draft: int = -1
    # the position from which on MTP's own entries are whole
    drafts_from: int = 0
    # what it cost
    drafted: int = 0
    accepted: int = 0
    # places of the tokens whose drafts were accepted
    accepted_at: list[int] = field(default_factory=list)
    preempted: int = 0
    # whether it has grown beyond a window within which what is stored of it is different (LongRoPE)
    outgrown: bool = False
    # (tokens, layers, k) the experts of what was read before it was preempted, or before it finished
    routes: Tensor | None = None
    submitted: float = field(default_factory=time.perf_counter)
    # when it first entered the batch
    started: float = 0.0
    # when its first token was made
    first: float = 0.0
    last: float = 0.0
    _random: np.ndarray | None = None
    # (vocab,) how often the answer has each token, for penalties
    _counts: Tensor | None = None
    # (vocab,) whether prompt or answer has it
    _present: Tensor | None = None

    @property
    def text(self) -> str:
        """The answer's text so far; the engine must have a tokenizer."""
        assert self.detokenizer is not None, "the engine has no tokenizer"
        return self.detokenizer.text

    @property
    def length(self) -> int:
        """Prompt and answer so far, in tokens."""
        return len(self.prompt) + len(self.tokens)

    @property
    def reads(self) -> bool:
        """Whether it still has a prompt to read, rather than one token to continue with."""
        left = self.length - self.computed
        # a request for prompt_logprobs alone reads its prompt to the last token
        for_logprobs = self.sampling.prompt_logprobs is not None and self.computed < len(self.prompt)
        return left > 1 or (left == 1 and for_logprobs)

    @property
    def end(self) -> int:
        """How long it can become, in tokens."""
        return len(self.prompt) + self.sampling.max_tokens

    def slice(self, start: int, stop: int) -> list[int]:
        """Tokens start..stop of prompt and answer together."""
        n = len(self.prompt)
        if stop <= n:
            return self.prompt[start:stop]
        return self.prompt[start:n] + self.tokens[max(0, start - n) : stop - n]

    def uniform(self) -> float:
        """The random number, in [0, 1), of the next token: a function of seed and place alone."""
        index = len(self.tokens)
        if self._random is None or index >= len(self._random):
            self._random = uniforms(self.seed, max(64, 2 * index))
        return self._random[index]

    def append(self, token: int, logprob: float, now: float) -> None:
        """Take a token that was sampled at the time `now`."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.first, self.last = self.first or now, now
        if self._counts is not None:
            self._counts[token] += 1
        if self._present is not None:
            self._present[token] = True

    def counts(self, like: Tensor) -> Tensor:
        """How often the answer has each token, (vocab,); made once and kept up to date."""
        if self._counts is None:
            self._counts = torch.bincount(torch.tensor(self.tokens, dtype=torch.long), minlength=len(like)).to(like)
        return self._counts

    def present(self, like: Tensor) -> Tensor:
        """Which tokens prompt or answer have, (vocab,); made once and kept up to date."""
        if self._present is None:
            self._present = torch.zeros(len(like), dtype=torch.bool, device=like.device)
            self._present[torch.tensor(self.prompt + self.tokens, device=like.device)] = True
        return self._present

    def completion(self) -> Completion:
        """What came of it, once it has finished."""
        assert self.finish_reason is not None, "still running"
        routes, last = None, self.length - 1
        if self.routes is not None and len(self.routes) >= last:  # not of one that was cancelled before it had read all
            ids = self.routes[:last].cpu().numpy()
            routes = ids.view(np.uint16) if ids.dtype == np.int16 else ids
        mask = self.sampling_mask if self.sampling.return_sampling_mask else None
        return Completion(self.tokens, self.logprobs, self.finish_reason, routes, mask)


def uniforms(seed: int, count: int) -> np.ndarray:
    """The first random numbers of one request, (count,) in [0, 1): a function of its seed alone."""
    return np.random.Generator(np.random.Philox(seed)).random(count, dtype=np.float32)
