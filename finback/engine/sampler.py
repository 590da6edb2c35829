"""From logits to tokens: penalties, grammars and forced tokens before sampling, their consequences after it.

Each token uses one uniform random number of its request. A row depends only on its own parameters, so a request gives
the same result in any batch.
"""

import operator
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from finback.data.tokenizer import END_THINK, THINK, Tokenizer
from finback.engine.request import COLD, FinishReason, Request, SamplingParams, TokenLogprobs

LEAST = 1e-6  # smallest top-p; less would round to an empty set in fp32
LIKELIEST = 512  # likeliest tokens tried for top-p before sorting the whole vocabulary


class Sampler:
    """Samples tokens; any of `stops` ends a request. With a tokenizer it tracks the chain of thought."""

    def __init__(self, stops: Iterable[int], tokenizer: Tokenizer | None) -> None:
        self.stops = frozenset(stops)
        self._batch: tuple[list[SamplingParams], SamplingBatch] | None = None
        self._closing: list[int] = []
        self._open = self._close = -1
        if tokenizer is not None and THINK in tokenizer.ids and END_THINK in tokenizer.ids:
            self._open, self._close = tokenizer.ids[THINK], tokenizer.ids[END_THINK]
            around = ("\n", "\n\n") if tokenizer.template else ("", "")
            before, after = (tokenizer.encode(text) for text in around)
            self._closing = [*before, self._close, *after]

    def close_thinking(self, r: Request) -> None:
        """Makes a request close its chain of thought with the next token, if it is in one."""
        if r.thinking and not r.forced:
            r.forced.extend(self._closing)

    def limit_thinking(self, r: Request) -> None:
        """Closes the chain of thought once its budget is used up."""
        budget = r.sampling.thinking_budget
        if budget is not None and r.thinking and r.thinking_tokens >= budget:
            self.close_thinking(r)

    def sample(self, rows: list[Request], logits: Tensor) -> list[tuple[Request, FinishReason]]:
        """Appends the next token to each row, from logits (rows, vocab). Returns the rows that end with it."""
        processed = logits
        for i, r in enumerate(rows):
            if r.sampling.penalizes or r.sampling.logit_bias or r.constraint is not None:
                processed = logits.clone() if processed is logits else processed
                self._process(r, processed[i])
        uniform = torch.tensor([r.uniform() for r in rows], device=logits.device)
        sampled, logp = sample(processed, self.batch(rows, logits), uniform)
        tokens, logprobs = sampled.tolist(), logp.tolist()
        if any(r.sampling.return_sampling_mask for r in rows):
            self._note_masks(rows, processed, tokens, logprobs)
        forced = [bool(r.forced) for r in rows]
        for i, r in enumerate(rows):
            if forced[i]:
                tokens[i] = r.forced.popleft()
                temperature = r.sampling.temperature if r.sampling.temperature >= COLD else 1
                logprobs[i] = float((processed[i] / temperature).log_softmax(-1)[tokens[i]])
        asking = [i for i, r in enumerate(rows) if r.sampling.top_logprobs is not None]
        if asking:
            counts = [rows[i].sampling.top_logprobs or 0 for i in asking]
            asked = logits[torch.tensor(asking, device=logits.device)]
            lines = top_logprobs(asked, [tokens[i] for i in asking], counts)
            for i, line in zip(asking, lines, strict=True):
                rows[i].top_logprobs.append(line)
        now, ended = time.perf_counter(), []
        for r, token, logprob, free in zip(rows, tokens, logprobs, map(operator.not_, forced), strict=True):
            r.append(token, logprob, now)
            if reason := self.follow(r, token, free):
                ended.append((r, reason))
        return ended

    def _note_masks(self, rows: list[Request], logits: Tensor, tokens: list[int], logprobs: list[float]) -> None:
        """Records the sampling mask of rows that request it, and replaces their log-probability by the one within the mask."""
        batch = self.batch(rows, logits)
        left = narrow((logits / batch.temperature).log_softmax(dim=-1).exp(), batch)
        for i, r in enumerate(rows):
            if r.sampling.return_sampling_mask and r.sampling.temperature >= COLD and not r.forced:
                kept = left[i].nonzero().squeeze(1)
                r.sampling_mask.append(kept.to(torch.int32).cpu().numpy())
                logprobs[i] = float((left[i, tokens[i]] / left[i].sum()).log())

    def batch(self, rows: list[Request], logits: Tensor) -> "SamplingBatch":
        """The rows' parameters as tensors; cached as long as nothing changes."""
        wanted = [r.sampling for r in rows]
        if self._batch is None or self._batch[0] != wanted:
            self._batch = wanted, SamplingBatch.of(wanted, logits.size(1), logits.device)
        return self._batch[1]

    def _process(self, r: Request, logits: Tensor) -> None:
        """Applies penalties, bias and grammar to one row of logits (vocab,), in place."""
        p = r.sampling
        if p.repetition_penalty != 1:
            penalized = torch.where(logits > 0, logits / p.repetition_penalty, logits * p.repetition_penalty)
            logits.copy_(torch.where(r.present(logits), penalized, logits))
        if p.frequency_penalty or p.presence_penalty:
            counts = r.counts(logits)
            logits -= p.frequency_penalty * counts + p.presence_penalty * (counts > 0)
        if r.constraint is not None and r.thinking:
            # a schema requires an answer, so the chain must not end the request
            logits[list(self.stops)] = float("-inf")
        elif r.constraint is not None:
            allowed = r.constraint.allowed()[: len(logits)].to(logits.device)
            if not r.tokens and self._open >= 0:
                allowed[self._open] = True  # the model may open a chain of thought first
            logits.masked_fill_(~allowed, float("-inf"))
        if p.logit_bias:
            ids, values = zip(*p.logit_bias, strict=True)
            logits[torch.tensor(ids, device=logits.device)] += torch.tensor(values, device=logits.device)

    def may_open(self, r: Request) -> bool:
        """Whether an answer may begin with a chain of thought that its prompt has not opened."""
        return not r.tokens and self._open >= 0 and (self._open, float("-inf")) not in r.sampling.logit_bias

    def chains(self, r: Request, token: int) -> bool:
        """Whether `token`, if it comes next, belongs to the request's chain of thought."""
        return r.thinking or (token == self._open and self.may_open(r))

    def follow(self, r: Request, token: int, free: bool) -> FinishReason | None:
        """Consequences of a token: the chain opens or closes, the grammar advances, the answer ends.

        A forced token after the chain is not `free`: it is not part of what a schema describes.
        """
        opens = token == self._open and len(r.tokens) == 1 and not r.thinking
        chained = r.thinking or opens
        if chained:
            r.thinking_tokens += 1
            r.thinking = token != self._close
        if r.constraint is not None and r.constraint.failed:
            return "error"
        ends = (token in self.stops and not r.sampling.ignore_eos) or token in r.sampling.stop_token_ids
        if r.detokenizer is not None and not ends and r.detokenizer.push([token], is_answer=not chained) is not None:
            ends = True
        if r.constraint is not None and free and not chained and not ends:
            ends = r.constraint.accept(token)
            if r.constraint.failed:
                return "error"
        if ends:
            return "stop"
        if len(r.tokens) >= r.sampling.max_tokens:
            return "length"
        self.limit_thinking(r)
        return None


def without_thinking(params: SamplingParams, tokenizer: Tokenizer) -> SamplingParams:
    """The same parameters, but the model cannot open a chain of thought."""
    if THINK not in tokenizer.ids:
        return params
    mark = tokenizer.ids[THINK]
    bias = (*((token, value) for token, value in params.logit_bias if token != mark), (mark, float("-inf")))
    return replace(params, logit_bias=bias)


@dataclass(frozen=True)
class SamplingBatch:
    """Sampling parameters of a batch as columns (rows, 1), None if no row uses one."""

    # bool; None: no row is greedy
    greedy: Tensor | None
    all_greedy: bool
    # 1 for greedy rows
    temperature: Tensor
    # whether any row's temperature differs from 1
    tempered: bool
    top_k: Tensor | None
    # the largest top_k
    most: int
    top_p: Tensor | None
    min_p: Tensor | None

    @classmethod
    def of(cls, rows: Sequence[SamplingParams], vocab: int, device: torch.device) -> "SamplingBatch":
        """The columns for these rows, on `device`."""

        def column(values: list[float], off: float) -> Tensor | None:
            return None if all(v == off for v in values) else torch.tensor(values, device=device)[:, None]

        greedy = [s.temperature < COLD for s in rows]
        warmth = [1.0 if g else s.temperature for s, g in zip(rows, greedy, strict=True)]
        # greedy rows need no top-k, top-p or min-p
        k = [vocab if g or not 0 < s.top_k < vocab else s.top_k for s, g in zip(rows, greedy, strict=True)]
        return cls(
            greedy=torch.tensor(greedy, device=device) if any(greedy) else None,
            all_greedy=all(greedy),
            temperature=torch.tensor(warmth, device=device)[:, None],
            tempered=any(t != 1 for t in warmth),
            top_k=None if min(k) == vocab else torch.tensor(k, device=device)[:, None],
            most=max((n for n in k if n < vocab), default=0),
            top_p=column([1.0 if g else max(s.top_p, LEAST) for s, g in zip(rows, greedy, strict=True)], 1.0),
            min_p=column([0.0 if g else s.min_p for s, g in zip(rows, greedy, strict=True)], 0.0),
        )


def sample(logits: Tensor, batch: SamplingBatch, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """logits (n, vocab) fp32, uniform (n,) -> tokens (n,) and their log-probabilities (n,).

    Inverse transform sampling; greedy at temperature 0. Log-probabilities are those of the full distribution at this
    temperature (at 1 if greedy): top-k, top-p and min-p only restrict the choice.
    """
    logp = (logits / batch.temperature if batch.tempered else logits).log_softmax(dim=-1)
    if batch.all_greedy:
        tokens = logits.argmax(dim=-1)
    else:
        cumulative = narrow(logp.exp(), batch).cumsum(dim=-1)
        # Scaling by the last entry keeps rounding from selecting an index beyond the vocabulary.
        target = (uniform * cumulative[:, -1])[:, None]
        tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=logits.size(1) - 1)
        if batch.greedy is not None:
            tokens = torch.where(batch.greedy, logits.argmax(dim=-1), tokens)
    return tokens, logp.gather(1, tokens[:, None]).squeeze(1)


def narrow(p: Tensor, batch: SamplingBatch) -> Tensor:
    """Zeroes the probabilities (n, vocab) excluded by top-k, then top-p, then min-p; the rest is not renormalized.

    top-p keeps the smallest set of tokens whose share of the probability left by top-k reaches it; min-p keeps those with at
    least that share of the likeliest token's probability. The likeliest token and ties with the last one always remain.
    """
    if batch.top_k is not None:
        best = p.topk(batch.most, dim=-1).values
        least = best.gather(1, (batch.top_k - 1).clamp(max=batch.most - 1))
        p = _at_least(p, least.masked_fill(batch.top_k > batch.most, 0.0))  # rows without top-k are unchanged
    if batch.top_p is not None:
        p = _at_least(p, _nucleus(p, batch.top_p))
    if batch.min_p is not None:
        p = _at_least(p, batch.min_p * p.max(dim=-1, keepdim=True).values)
    return p


def _nucleus(p: Tensor, top_p: Tensor) -> Tensor:
    """The smallest probability that top-p keeps, (n, 1); 0 where top_p is 1."""
    needed = top_p * p.sum(dim=-1, keepdim=True)
    # Sorting the vocabulary costs more than a small model's whole step, and the likeliest tokens nearly always suffice.
    ordered = p.topk(min(LIKELIEST, p.size(1)), dim=-1).values
    if bool(((ordered.sum(dim=-1, keepdim=True) < needed) & (top_p < 1)).any()):
        ordered = p.sort(dim=-1, descending=True).values
    before = ordered.cumsum(dim=-1) - ordered
    least = ordered.masked_fill(before >= needed, 2.0).min(dim=-1, keepdim=True).values
    return least.masked_fill(top_p == 1, 0.0)


def _at_least(p: Tensor, least: Tensor) -> Tensor:
    return p.masked_fill(p < least, 0.0)


def top_logprobs(logits: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> list[TokenLogprobs]:
    """For each row of logits (n, vocab): the given token, then the `counts` likeliest, with log-probabilities at temperature 1."""
    logp = logits.log_softmax(dim=-1)
    own = logp.gather(1, torch.tensor(tokens, device=logits.device)[:, None]).squeeze(1).tolist()
    best = logp.topk(min(max(counts), logits.size(1)), dim=-1) if max(counts) else None
    found = []
    for row, (token, value, count) in enumerate(zip(tokens, own, counts, strict=True)):
        line: TokenLogprobs = [(token, value)]
        if best is not None:
            line += zip(best.indices[row, :count].tolist(), best.values[row, :count].tolist(), strict=True)
        found.append(line)
    return found
