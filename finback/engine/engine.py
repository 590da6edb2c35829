"""Generation with continuous batching, on the model that is being trained or served: by reference, not a copy.

A step reads pieces of some new prompts, then decodes one token for every other request. Prompts are read in expanded
form, single tokens in absorbed form on the paged latent cache. A request gives the same result alone and in any batch,
read at once or in pieces, with a cached prefix, after preemption, and with or without drafts.
"""

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from finback.config import UserError, did_you_mean
from finback.data.tokenizer import Tokenizer
from finback.engine.constrain import Grammars
from finback.engine.detokenizer import Detokenizer
from finback.engine.pages import Pages, affordable
from finback.engine.request import Completion, Request, SamplingParams, check_length
from finback.engine.runner import Runner
from finback.engine.sampler import Sampler
from finback.engine.scheduler import Scheduler
from finback.engine.speculate import NGRAM_DRAFTS, Drafting, speculation_of
from finback.model.cache import PAGE
from finback.model.compressed_cache import pool_of
from finback.model.config import ModelConfig
from finback.model.multi_lora import MultiLoraTransformer
from finback.model.native import use_native
from finback.model.picking import follow
from finback.model.rope_scaling import LongRope
from finback.model.transformer import Transformer


@dataclass(frozen=True)
class EngineConfig:
    """The capacity of an engine, and which techniques it uses."""

    # concurrent requests
    rows: int = 256
    # cache size in tokens; None: what `generate` needs, up to half of the free memory
    tokens: int | None = None
    # most prompt tokens per step
    chunk: int = 8192
    # share cached pages of common prefixes
    reuse: bool = False
    # draft tokens in steps where measurements show a gain
    speculate: bool = False
    # record the experts that each token is routed to
    return_routed_experts: bool = False
    # record the entries that each token's indexers select: index_topk integers per indexer
    return_indexer_topk: bool = False
    # "mtp": by the model's MTP module, if it has one; "ngram": by what followed the same tokens in prompt and answer
    draft: Drafting = "mtp"

    @property
    def choices(self) -> tuple[str, ...]:
        """The kinds of choices that are recorded."""
        return ("experts",) * self.return_routed_experts + ("entries",) * self.return_indexer_topk


class Engine:
    """Generates from a Transformer; any token id in `stops` ends a request.

    With a tokenizer, requests have text, stop strings and schemas work, and tokens of the chain of thought are counted.
    """

    def __init__(
        self,
        model: Transformer,
        stops: Iterable[int],
        config: EngineConfig = EngineConfig(),
        tokenizer: Tokenizer | None = None,
    ) -> None:
        self.model, self.config, self.tokenizer = use_native(model), config, tokenizer
        self.stops = frozenset(token for token in stops if 0 <= token < model.config.vocab_size)
        self.speculation = speculation_of(config.draft, len(model.mtp), model.config) if config.speculate else None
        self.grammars = Grammars(tokenizer, model.config.vocab_size) if tokenizer else None
        self.sampler = Sampler(self.stops, tokenizer)
        self._weights = self._version()
        self._set_up(config.tokens or 0)

    def _set_up(self, tokens: int) -> None:
        """Creates a cache for this many tokens; no request may be running."""
        model, device, choices = self.model, self.model.embed.device, self.config.choices
        self.pages = Pages(-(-tokens // PAGE), PAGE)
        drafts = self.speculation is not None and self.config.draft == "mtp"
        rows, count = self.config.rows, self.pages.count + 1
        pool = pool_of(model.config, count, rows, model.compute, device, drafts=drafts, choices=choices)
        # serving admits new requests at once; a large batch of prompts is better read together
        patience = max(1, self.config.rows // 8) if self.config.tokens is None else 1
        reuse = self.config.reuse and pool.reusable
        self.scheduler = Scheduler(self.pages, rows, self.capacity + PAGE, reuse, patience, pool.lined)
        chunk = self.config.chunk
        followed = follow(model, choices)
        self.runner = Runner(
            model, self.scheduler, pool, self.sampler, chunk, self.speculation, followed, self.config.draft
        )

    # ---- one request at a time -------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Sequence[int],
        sampling: SamplingParams,
        seed: int,
        *,
        salt: bytes = b"",
        leader: Request | None = None,
        thinking: bool = False,
        adapter: str = "",
    ) -> Request:
        """Queues a prompt; `step` generates its tokens. UserError if it could never be served.

        Cached pages are only shared between requests with the same `salt` (at most 64 bytes). The request waits until `leader` has read
        its prompt, so that a common prefix is read once (or, for equal prompts, all of it). `thinking`: the prompt has opened the chain of thought.
        `adapter`: name of one of the model's adapters.
        """
        number = self._number(adapter)
        self._check_length(len(prompt), sampling.max_tokens)
        self._check_ids(prompt, "prompt")
        self._check_ids([token for token, _ in sampling.logit_bias], "logit_bias")
        if self.grammars is None and (sampling.stop or (sampling.schema, sampling.grammar) != (None, None)):
            raise UserError("sampling", "stop, schema or grammar", "needs text", "Give the engine a tokenizer.")
        if number:  # the cache of an adapter is not shared with others
            salt = hashlib.blake2b(adapter.encode(), key=salt, digest_size=32).digest()
        request = Request(list(prompt), sampling, seed, salt, leader, thinking=thinking, adapter=number)
        if self.tokenizer is not None and self.grammars is not None:
            request.detokenizer = Detokenizer(self.tokenizer, sampling.stop)
            request.constraint = self.grammars.of(sampling.schema, sampling.grammar)
        self.sampler.limit_thinking(request)
        if leader is not None:
            self.scheduler.follow(request, leader)
        self.scheduler.waiting.append(request)
        return request

    def use(self, model: Transformer) -> None:
        """Switches to other weights of the same model. Running requests keep cache entries made with the old weights."""
        assert model.config == self.model.config and model.compute == self.model.compute, "another model"
        self.model = use_native(model)
        self.runner = replace(self.runner, model=model, choices=follow(model, self.config.choices))
        self.pages.forget()
        self._weights = self._version()

    @property
    def model_config(self) -> ModelConfig:
        """Config of the model."""
        return self.model.config

    @property
    def capacity(self) -> int:
        """Longest possible request in tokens, answer included."""
        return min(self.model.config.max_position_embeddings, self.pages.count * PAGE)

    def _check_length(self, prompt: int, answer: int) -> None:
        check_length(prompt, answer, self.model.config.max_position_embeddings)
        room = self.pages.count * PAGE
        if prompt + answer > room:
            problem = f"with a prompt of {prompt} tokens, exceeds the cache of {room} tokens"
            remedy = "Shorten the prompt, ask for fewer tokens, or enlarge the engine's cache."
            raise UserError("max_tokens", answer, problem, remedy)

    def _check_ids(self, ids: Iterable[int], field: str) -> None:
        vocab = self.model.config.vocab_size
        for token in ids:
            if not 0 <= token < vocab:
                raise UserError(field, token, f"not a token id in 0..{vocab - 1}", "Use this model's ids.")

    def _number(self, adapter: str) -> int:
        """Index of an adapter on the model; UserError for an unknown name."""
        known = self.model.adapters if isinstance(self.model, MultiLoraTransformer) else ()
        if adapter and adapter not in known:
            raise UserError("adapter", adapter, "the model has no such adapter", did_you_mean(adapter, known))
        return 1 + known.index(adapter) if adapter else 0

    def cancel(self, request: Request) -> None:
        """Ends a request and frees its pages at once. Does nothing if it has finished."""
        if request.finish_reason is None:
            self.scheduler.finish(request, "cancelled")
            if request.detokenizer is not None:
                request.detokenizer.end()

    def close_thinking(self, request: Request) -> None:
        """Makes a request close its chain of thought with the next token, if it is in one."""
        self.sampler.close_thinking(request)

    @property
    def running(self) -> int:
        """Number of requests in the batch."""
        return len(self.scheduler.running)

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do."""
        return bool(self.scheduler.waiting or self.scheduler.running)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """Reads some prompt tokens and decodes one token for each other request. Returns the requests with new output."""
        if not self.busy:
            return []
        if isinstance(scaling := self.model.config.rope_scaling, LongRope):
            self.scheduler.outgrow(scaling.original_max_position_embeddings)
        self.scheduler.admit()
        now = time.perf_counter()
        for request in self.scheduler.running:
            request.started = request.started or now
        changed = self.runner.begin_forked() + self.runner.read_prompts()
        fresh = set(changed)
        rows = [s for s in self.scheduler.running if not s.reads and s not in fresh]
        ahead = NGRAM_DRAFTS if self.speculation and self.config.draft == "ngram" else 1
        # pages may run out; a request that is preempted for another is no longer in `running`
        rows = [s for s in rows if s.slot >= 0 and self.scheduler.make_room(s, min(s.length + ahead, s.end))]
        rows = [s for s in rows if s.slot >= 0]
        if rows:
            self.runner.decode(rows)
        return changed + rows

    # ---- many at once ----------------------------------------------------------------------------------------------

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order. Completion i uses random numbers of seeds[i] only."""
        return [request.completion() for request in self.finished(prompts, sampling, seeds)]

    def finished(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        seeds: Sequence[int],
        thinking: Sequence[bool] = (),
        adapter: str = "",
    ) -> list[Request]:
        """A finished request for each prompt, in order. `thinking`: which prompts have opened the chain of thought; `adapter` applies
        to all."""
        was_training, requests = self.model.training, list[Request]()
        try:
            requests = self.submit_all(prompts, sampling, seeds, thinking, adapter)
            while self.busy:
                self.step()
        finally:  # on interruption, remove its requests from the batch
            for request in requests:
                self.cancel(request)
            self.model.train(was_training)
        return requests

    def submit_all(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        seeds: Sequence[int],
        thinking: Sequence[bool] = (),
        adapter: str = "",
    ) -> list[Request]:
        """Queues a request for each prompt, all or none; arguments as for `finished`. Enlarges the cache if nothing is running."""
        opened = thinking or [False] * len(prompts)
        assert len(prompts) == len(seeds) == len(opened), "one seed per prompt"
        self.model.eval()
        self._prepare([len(prompt) + sampling.max_tokens for prompt in prompts])
        requests: dict[int, Request] = {}
        firsts: dict[tuple[int, ...], int] = {}  # equal prompts are read once, by the first request
        try:
            # similar lengths together, because padding costs as much as tokens
            for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i])):
                leader, asked = requests.get(firsts.setdefault(tuple(prompts[i]), i)), (prompts[i], sampling, seeds[i])
                requests[i] = self.submit(*asked, leader=leader, thinking=opened[i], adapter=adapter)
        except BaseException:
            list(map(self.cancel, requests.values()))
            raise
        return [requests[i] for i in range(len(prompts))]

    def stream(
        self, prompt: Sequence[int], sampling: SamplingParams, seed: int, thinking: bool = False, adapter: str = ""
    ) -> Iterator[Request]:
        """Yields a request after each step until it has finished; `thinking` and `adapter` as for `submit`."""
        self.model.eval()
        self._prepare([len(prompt) + sampling.max_tokens])
        request = self.submit(prompt, sampling, seed, thinking=thinking, adapter=adapter)
        try:
            while request.finish_reason is None:
                self.step()
                yield request
        finally:
            self.cancel(request)

    def _prepare(self, lengths: list[int]) -> None:
        """Ensures a cache for the longest `rows` of these lengths, and drops pages made with older weights."""
        version = self._version()
        if self._weights != version:
            self.pages.forget()
        self._weights = version
        if self.config.tokens is None and not self.busy:
            wanted = sum(-(-(n + 1) // PAGE) + 1 for n in sorted(lengths)[-self.config.rows :]) * PAGE
            if wanted > self.pages.count * PAGE:
                self._set_up(max(min(wanted, affordable(self.model, 2, self.config.choices)), max(lengths) + PAGE))

    def _version(self) -> int:
        """A number that changes whenever a weight does."""
        return sum(parameter._version for parameter in self.model.parameters())
