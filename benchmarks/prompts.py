"""Groups that share their prompt: a rollout and an update of one group, with the prompt read once and once per answer.

    python benchmarks/prompts.py [--rounds 5] [--answers 8] [--tokens 32]

The quickstart's model with random weights and a longer window, one thread, fp32. Both forms take turns; a ratio
compares CPU seconds within a round. Tokens, log-probabilities and gradients of both are compared.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import header, spread, write
from torch import Tensor

from finback.data.messages import Response
from finback.engine.engine import Engine
from finback.engine.request import Completion, SamplingParams
from finback.model.config import TINY
from finback.model.logprobs import token_logprobs
from finback.model.transformer import Transformer
from finback.rollouts.rollouts import Rollout, batches
from finback.rollouts.shared_prompts import predicting, shared_batches
from finback.tasks.task import NO_ANSWER, Problem
from finback.train.batch import Batch

PROMPTS = (14, 512, 4096)
MODEL = dataclasses.replace(TINY, max_position_embeddings=8192, initializer_range=0.1, num_nextn_predict_layers=0)


def generated(
    engine: Engine, prompt: list[int], sampling: SamplingParams, answers: int, share: bool
) -> list[Completion]:
    """Answers of one group; without `share` each of them reads the prompt."""
    if share:
        return engine.generate([prompt] * answers, sampling, range(answers))
    engine._prepare([len(prompt) + sampling.max_tokens] * answers)
    requests = [engine.submit(prompt, sampling, seed) for seed in range(answers)]
    while engine.busy:
        engine.step()
    return [request.completion() for request in requests]


def update(model: Transformer, parts: list[Batch]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the answers' tokens, and all gradients of their mean."""
    model.zero_grad()
    found = []
    for batch in parts:
        logprobs, _ = token_logprobs(model, predicting(model, batch), batch.labels[batch.learnt])
        logprobs.mean().backward()
        found.append(logprobs.detach())
    return torch.cat(found), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def race(plain: Callable[[], Any], shared: Callable[[], Any], rounds: int) -> tuple[dict[str, Any], Any, Any]:
    """Seconds of both forms and how many times faster the second is; the last result of each."""
    seconds: list[list[float]] = [[], []]
    made: list[Any] = [None, None]
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            began = time.process_time()
            made[which] = (plain, shared)[which]()
            seconds[which].append(time.process_time() - began)
    ratios = [one / other for one, other in zip(*seconds, strict=True)]
    return {"plain": spread(seconds[0]), "shared": spread(seconds[1]), "gain": spread(ratios)}, *made


def measure(size: int, answers: int, tokens: int, rounds: int) -> dict[str, Any]:
    """One group with a prompt of `size` tokens."""
    model = Transformer(MODEL).initialise(0).eval()
    prompt = torch.randint(10, 1000, (size,), generator=torch.Generator().manual_seed(size)).tolist()
    sampling, engine = SamplingParams(1.0, tokens, ignore_eos=True), Engine(model, ())
    rollout, one, other = race(
        lambda: generated(engine, prompt, sampling, answers, share=False),
        lambda: generated(engine, prompt, sampling, answers, share=True),
        rounds,
    )
    rollout["same_tokens"] = [c.tokens for c in one] == [c.tokens for c in other]
    gaps = [abs(a - b) for c, d in zip(one, other, strict=True) for a, b in zip(c.logprobs, d.logprobs, strict=True)]
    rollout["largest_logprob_difference"] = max(gaps)
    response = Response("", "", thinks=False, closed=True)
    rows = [(Rollout(Problem("?", "!", ""), prompt, done, response, NO_ANSWER), 1.0) for done in other]
    whole = answers * (size + tokens)
    learning, first, second = race(
        lambda: update(model, batches(rows, whole)), lambda: update(model, shared_batches(rows, whole)), rounds
    )
    (logprobs, gradient), (others, other_gradient) = first, second
    learning["largest_logprob_difference"] = float((logprobs - others).abs().max())
    learning["largest_gradient_difference"] = float((gradient - other_gradient).abs().max())
    learning["largest_gradient"] = float(gradient.abs().max())
    return {"prompt": size, "rollout": rollout, "update": learning}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {"rounds": options.rounds, "answers": options.answers, "tokens": options.tokens, "threads": 1}
    results = header("prompts", settings)
    results["prompts"] = [measure(size, options.answers, options.tokens, options.rounds) for size in PROMPTS]
    write(results, options.out)


if __name__ == "__main__":
    main()
