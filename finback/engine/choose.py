"""From logits to what is said: penalties, schemas and forced tokens before the choice, its consequences after it."""

import operator
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from finback.data.tokenizer import END_THINK, THINK, Tokenizer
from finback.engine.request import COLD, Finish, Request, SamplingParams
from finback.engine.sampler import Knobs, alternatives, sample


class Chooser:
    """Chooses tokens; any of `stops` ends a request. With a tokenizer it follows the chain of thought."""

    def __init__(self, stops: Iterable[int], tokenizer: Tokenizer | None) -> None:
        self.stops = frozenset(stops)
        self._knobs: tuple[list[SamplingParams], Knobs] | None = None
        self._closing: list[int] = []
        self._open = self._close = -1
        if tokenizer is not None and THINK in tokenizer.ids and END_THINK in tokenizer.ids:
            self._open, self._close = tokenizer.ids[THINK], tokenizer.ids[END_THINK]
            around = ("\n", "\n\n") if tokenizer.template else ("", "")
            before, after = (tokenizer.encode(text) for text in around)
            self._closing = [*before, self._close, *after]

    def close_thinking(self, r: Request) -> None:
        """Have a request close its chain of thought with the next token, if it is in one."""
        if r.thinking and not r.forced:
            r.forced.extend(self._closing)

    def mind_the_budget(self, r: Request) -> None:
        """Close the chain when it has used up its tokens."""
        budget = r.sampling.think_tokens
        if budget is not None and r.thinking and r.thought >= budget:
            self.close_thinking(r)

    def say(self, rows: list[Request], logits: Tensor) -> list[tuple[Request, Finish]]:
        """Choose the next token of each row from logits (rows, vocab), and say which rows end with it."""
        reported = [i for i, r in enumerate(rows) if r.sampling.top_logprobs is not None]
        altered = logits
        for i, r in enumerate(rows):
            if r.sampling.penalises or r.sampling.logit_bias or r.constraint is not None:
                altered = logits.clone() if altered is logits else altered
                self._alter(r, altered[i])
        uniform = torch.tensor([r.uniform() for r in rows], device=logits.device)
        chosen, logp = sample(altered, self.columns(rows, logits), uniform)
        tokens, logps = chosen.tolist(), logp.tolist()
        forced = [bool(r.forced) for r in rows]
        for i, r in enumerate(rows):
            if forced[i]:
                tokens[i] = r.forced.popleft()
                logps[i] = float(
                    (altered[i] / (r.sampling.temperature if r.sampling.temperature >= COLD else 1)).log_softmax(-1)[
                        tokens[i]
                    ]
                )
        if reported:
            counts = [rows[i].sampling.top_logprobs or 0 for i in reported]
            lines = torch.tensor(reported, device=logits.device)
            found = alternatives(logits[lines], [tokens[i] for i in reported], counts)
            for i, line in zip(reported, found, strict=True):
                rows[i].top.append(line)
        now, ended = time.perf_counter(), []
        for r, token, value, free in zip(rows, tokens, logps, map(operator.not_, forced), strict=True):
            r.tokens.append(token)
            if r.said is not None:
                r.said[token] += 1
            if r.met is not None:
                r.met[token] = True
            r.logprobs.append(value)
            r.first, r.last = r.first or now, now
            if reason := self._after(r, token, free):
                ended.append((r, reason))
        return ended

    def columns(self, rows: list[Request], logits: Tensor) -> Knobs:
        """The rows' knobs as tensors; those of the last call as long as nothing has changed."""
        wanted = [r.sampling for r in rows]
        if self._knobs is None or self._knobs[0] != wanted:
            self._knobs = wanted, Knobs.of(wanted, logits.size(1), logits.device)
        return self._knobs[1]

    def _alter(self, r: Request, logits: Tensor) -> None:
        """Apply penalties, bias and schema to one row of logits (vocab,), in place."""
        k = r.sampling
        if k.repetition_penalty != 1:
            penalised = torch.where(logits > 0, logits / k.repetition_penalty, logits * k.repetition_penalty)
            logits.copy_(torch.where(_met(r, logits), penalised, logits))
        if k.frequency_penalty or k.presence_penalty:
            said = _said(r, logits)
            logits -= k.frequency_penalty * said + k.presence_penalty * (said > 0)
        if r.constraint is not None and r.thinking:
            logits[list(self.stops)] = float("-inf")  # an answer was promised, so the chain cannot be all
        elif r.constraint is not None:
            allowed = r.constraint.allowed()[: len(logits)].to(logits.device)
            if not r.tokens and self._open >= 0:
                allowed[self._open] = True  # the model may think before it answers
            logits.masked_fill_(~allowed, float("-inf"))
        if k.logit_bias:
            ids, values = zip(*k.logit_bias, strict=True)
            logits[torch.tensor(ids, device=logits.device)] += torch.tensor(values, device=logits.device)

    def _after(self, r: Request, token: int, free: bool) -> Finish | None:
        """What follows from a token: the chain opens or closes, the grammar moves on, the answer ends.

        What is put into a request's mouth behind its chain is not `free`, and no part of what a schema describes.
        """
        k = r.sampling
        opens = token == self._open and len(r.tokens) == 1 and not r.thinking
        chained = r.thinking or opens
        if chained:
            r.thought += 1
            r.thinking = token != self._close
        ends = (token in self.stops and not k.ignore_eos) or token in k.stop_tokens
        if r.text is not None and not ends and r.text.push([token]) is not None:
            ends = True
        if r.constraint is not None and free and not chained and not ends:
            ends = r.constraint.accept(token)
        if ends:
            return "stop"
        if len(r.tokens) >= k.max_tokens:
            return "length"
        self.mind_the_budget(r)
        return None


def _said(r: Request, like: Tensor) -> Tensor:
    """How often the answer has said each token, (vocab,); made once and kept up to date."""
    if r.said is None:
        r.said = torch.bincount(torch.tensor(r.tokens, dtype=torch.long), minlength=len(like)).to(like)
    return r.said


def _met(r: Request, like: Tensor) -> Tensor:
    """Which tokens prompt or answer have, (vocab,)."""
    if r.met is None:
        r.met = torch.zeros(len(like), dtype=torch.bool, device=like.device)
        r.met[torch.tensor(r.prompt + r.tokens, device=like.device)] = True
    return r.met
