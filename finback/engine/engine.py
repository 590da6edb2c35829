"""Generation in batches, on the model that is being trained: the engine holds a reference, never a copy.

Prompts are read in expanded form, then one token per step in absorbed form on the latent cache. Finished rows leave
the batch, so a step costs about what is still alive.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from finback.config import UserError
from finback.engine.sampler import sample, uniforms
from finback.engine.sequence import Completion, Sampling
from finback.model.cache import Cache
from finback.model.transformer import Transformer

LEAN = 0.9  # rows leave when this share or less is alive: leaving copies the cache, staying costs a dead row's step


class Engine:
    """Generates from a Transformer; any of the ids in `stops` ends a sequence, `rows` bounds how many run at once."""

    def __init__(self, model: Transformer, stops: Sequence[int], rows: int = 256) -> None:
        self.model, self.stops, self.rows = model, tuple(stops), rows

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order. Sequence i uses random numbers of seeds[i] alone."""
        assert len(prompts) == len(seeds), "one seed per prompt"
        was_training = self.model.training
        self.model.eval()
        # Similar lengths together: padding costs as much as tokens do.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        done: dict[int, Completion] = {}
        for start in range(0, len(order), self.rows):
            wave = order[start : start + self.rows]
            results = self._wave([prompts[i] for i in wave], sampling, [seeds[i] for i in wave])
            done.update(zip(wave, results, strict=True))
        self.model.train(was_training)
        return [done[i] for i in range(len(prompts))]

    def _wave(self, prompts: list[Sequence[int]], sampling: Sampling, seeds: list[int]) -> list[Completion]:
        cache, scores = self._prefill(prompts, sampling.max_tokens)
        device, n = scores.device, len(prompts)
        random = torch.from_numpy(np.stack([uniforms(seed, sampling.max_tokens) for seed in seeds])).to(
            device
        )
        # Every row writes into its own line; finished rows simply stop writing.
        tokens = torch.full((n, sampling.max_tokens), -1, dtype=torch.long, device=device)
        logprobs = torch.zeros(n, sampling.max_tokens, device=device)
        rows = torch.arange(n, device=device)  # the sequence that each row of the cache belongs to
        running = torch.ones(n, dtype=torch.bool, device=device)
        stops = torch.tensor(self.stops, dtype=torch.long, device=device)
        for step in range(sampling.max_tokens):
            chosen, logp = sample(scores, sampling, random[rows, step])
            tokens[rows, step], logprobs[rows, step] = torch.where(running, chosen, -1), logp
            running = running & ~torch.isin(chosen, stops)
            left = int(running.sum())
            if left == 0 or step == sampling.max_tokens - 1:
                break
            if left <= LEAN * len(rows):
                kept = running.nonzero().squeeze(1)
                rows, chosen, running = rows[kept], chosen[kept], running[kept]
                cache.keep(kept, cache.longest)
            hidden = self.model(chosen[:, None], cache)
            cache.advance(1, cache.longest + 1)
            scores = self.model.logits(hidden[:, 0])
        return _completions(tokens, logprobs, self.stops)

    def _prefill(self, prompts: list[Sequence[int]], more: int) -> tuple[Cache, Tensor]:
        """Read prompts (padded on the right) into a fresh cache; scores for each one's next token."""
        lengths = [len(prompt) for prompt in prompts]
        longest, config = max(lengths), self.model.config
        if longest + more > config.max_position_embeddings:
            raise UserError(
                "max_tokens", more, f"the prompt has {longest} tokens and the model reads {config.max_position_embeddings}",
                "Shorten the prompt or ask for fewer tokens.",
            )  # fmt: skip
        device = self.model.embed.device
        padded = torch.zeros(len(prompts), longest, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = torch.tensor(prompt)
        cache = Cache(config, len(prompts), longest + more, self.model.compute, device)
        hidden = self.model(padded.to(device), cache)
        counts = torch.tensor(lengths, device=device)
        cache.advance(counts, longest)
        last = hidden[torch.arange(len(prompts), device=device), counts - 1]
        return cache, self.model.logits(last)

    @torch.inference_mode()
    def stream(self, prompt: Sequence[int], sampling: Sampling, seed: int) -> Iterator[int]:
        """Token ids of one completion as they are made, without the one that ends it."""
        self.model.eval()
        cache, scores = self._prefill([prompt], sampling.max_tokens)
        random = torch.from_numpy(uniforms(seed, sampling.max_tokens)).to(scores.device)
        for step in range(sampling.max_tokens):
            chosen, _ = sample(scores, sampling, random[step : step + 1])
            if int(chosen.item()) in self.stops:
                return
            yield int(chosen.item())
            if step < sampling.max_tokens - 1:
                hidden = self.model(chosen[:, None], cache)
                cache.advance(1, cache.longest + 1)
                scores = self.model.logits(hidden[:, 0])


def _completions(tokens: Tensor, logprobs: Tensor, stops: Sequence[int]) -> list[Completion]:
    lengths = (tokens >= 0).sum(dim=1).tolist()
    rows = zip(tokens.tolist(), logprobs.tolist(), lengths, strict=True)
    return [Completion(t[:n], p[:n], "stop" if t[n - 1] in stops else "length") for t, p, n in rows]
