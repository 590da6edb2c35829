"""From scores to what is said: penalties, schemas and forced tokens before the choice, its consequences after it."""

import operator
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from finback.data.tokenizer import END_THINK, THINK, Tokenizer
from finback.engine.request import COLD, Finish, SamplingParams, Sequence
from finback.engine.sampler import Knobs, alternatives, sample


class Chooser:
    """Chooses tokens; any of `stops` ends a sequence. With a tokenizer it follows the chain of thought."""

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

    def close_thinking(self, s: Sequence) -> None:
        """Have a sequence close its chain of thought with the next token, if it is in one."""
        if s.thinking and not s.forced:
            s.forced.extend(self._closing)

    def mind_the_budget(self, s: Sequence) -> None:
        """Close the chain when it has used up its tokens."""
        budget = s.sampling.think_tokens
        if budget is not None and s.thinking and s.thought >= budget:
            self.close_thinking(s)

    def say(self, rows: list[Sequence], scores: Tensor) -> list[tuple[Sequence, Finish]]:
        """Choose the next token of each row from scores (rows, vocab), and say which rows end with it."""
        reported = [i for i, s in enumerate(rows) if s.sampling.top_logprobs is not None]
        altered = scores
        for i, s in enumerate(rows):
            if s.sampling.penalises or s.sampling.logit_bias or s.constraint is not None:
                altered = scores.clone() if altered is scores else altered
                self._alter(s, altered[i])
        uniform = torch.tensor([s.uniform() for s in rows], device=scores.device)
        chosen, logp = sample(altered, self.columns(rows, scores), uniform)
        tokens, logps = chosen.tolist(), logp.tolist()
        forced = [bool(s.forced) for s in rows]
        for i, s in enumerate(rows):
            if forced[i]:
                tokens[i] = s.forced.popleft()
                logps[i] = float(
                    (altered[i] / (s.sampling.temperature if s.sampling.temperature >= COLD else 1)).log_softmax(-1)[
                        tokens[i]
                    ]
                )
        if reported:
            counts = [rows[i].sampling.top_logprobs or 0 for i in reported]
            lines = torch.tensor(reported, device=scores.device)
            found = alternatives(scores[lines], [tokens[i] for i in reported], counts)
            for i, line in zip(reported, found, strict=True):
                rows[i].top.append(line)
        now, ended = time.perf_counter(), []
        for s, token, value, free in zip(rows, tokens, logps, map(operator.not_, forced), strict=True):
            s.tokens.append(token)
            if s.said is not None:
                s.said[token] += 1
            if s.met is not None:
                s.met[token] = True
            s.logprobs.append(value)
            s.first, s.last = s.first or now, now
            if reason := self._after(s, token, free):
                ended.append((s, reason))
        return ended

    def columns(self, rows: list[Sequence], scores: Tensor) -> Knobs:
        """The rows' knobs as tensors; those of the last call as long as nothing has changed."""
        wanted = [s.sampling for s in rows]
        if self._knobs is None or self._knobs[0] != wanted:
            self._knobs = wanted, Knobs.of(wanted, scores.size(1), scores.device)
        return self._knobs[1]

    def _alter(self, s: Sequence, scores: Tensor) -> None:
        """Apply penalties, bias and schema to one row of scores (vocab,), in place."""
        k = s.sampling
        if k.repetition_penalty != 1:
            penalised = torch.where(scores > 0, scores / k.repetition_penalty, scores * k.repetition_penalty)
            scores.copy_(torch.where(_met(s, scores), penalised, scores))
        if k.frequency_penalty or k.presence_penalty:
            said = _said(s, scores)
            scores -= k.frequency_penalty * said + k.presence_penalty * (said > 0)
        if s.constraint is not None and s.thinking:
            scores[list(self.stops)] = float("-inf")  # an answer was promised, so the chain cannot be all
        elif s.constraint is not None:
            allowed = s.constraint.allowed()[: len(scores)].to(scores.device)
            if not s.tokens and self._open >= 0:
                allowed[self._open] = True  # the model may think before it answers
            scores.masked_fill_(~allowed, float("-inf"))
        if k.logit_bias:
            ids, values = zip(*k.logit_bias, strict=True)
            scores[torch.tensor(ids, device=scores.device)] += torch.tensor(values, device=scores.device)

    def _after(self, s: Sequence, token: int, free: bool) -> Finish | None:
        """What follows from a token: the chain opens or closes, the grammar moves on, the answer ends.

        What is put into a sequence's mouth behind its chain is not `free`, and no part of what a schema describes.
        """
        k = s.sampling
        opens = token == self._open and len(s.tokens) == 1 and not s.thinking
        chained = s.thinking or opens
        if chained:
            s.thought += 1
            s.thinking = token != self._close
        ends = (token in self.stops and not k.ignore_eos) or token in k.stop_tokens
        if s.text is not None and not ends and s.text.push([token]) is not None:
            ends = True
        if s.constraint is not None and free and not chained and not ends:
            ends = s.constraint.accept(token)
        if ends:
            return "stop"
        if len(s.tokens) >= k.max_tokens:
            return "length"
        self.mind_the_budget(s)
        return None


def _said(s: Sequence, like: Tensor) -> Tensor:
    """How often the answer has said each token, (vocab,); made once and kept up to date."""
    if s.said is None:
        s.said = torch.bincount(torch.tensor(s.tokens, dtype=torch.long), minlength=len(like)).to(like)
    return s.said


def _met(s: Sequence, like: Tensor) -> Tensor:
    """Which tokens prompt or answer have, (vocab,)."""
    if s.met is None:
        s.met = torch.zeros(len(like), dtype=torch.bool, device=like.device)
        s.met[torch.tensor(s.prompt + s.tokens, device=like.device)] = True
    return s.met
