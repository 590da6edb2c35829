"""Prompts -> samples -> verdicts, what evaluation, probes and RL all do; and samples -> padded training batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from finback.data import chat
from finback.data.chat import Message, Response
from finback.data.tokenizer import THINK, Tokenizer
from finback.engine.engine import Engine
from finback.engine.sequence import Completion, Sampling
from finback.tasks.task import Problem, Task, Verdict


@dataclass(frozen=True)
class Rollout:
    """One answer to one problem, judged."""

    problem: Problem
    prompt: list[int]
    completion: Completion
    response: Response
    verdict: Verdict


def rollout(
    engine: Engine, tokenizer: Tokenizer, task: Task, problems: Sequence[Problem], seeds: Sequence[int],
    sampling: Sampling, think: bool = False,
) -> list[Rollout]:  # fmt: skip
    """Answer each problem once; `think` opens the chain for the model. An answer cut off in its chain is wrong."""
    prompts = [chat.prompt([Message("user", p.question)], tokenizer, think) for p in problems]
    completions = engine.generate(prompts, sampling, seeds)
    think = think or chat.opens_chain(tokenizer)
    rollouts = []
    for problem, prompt, completion in zip(problems, prompts, completions, strict=True):
        text = tokenizer.decode(completion.tokens)
        response = chat.parse(THINK + text if think else text)
        judged = completion.finish == "stop" and response.closed
        verdict = (
            task.check(problem, response.answer) if judged else Verdict(correct=False, well_formed=False)
        )
        rollouts.append(Rollout(problem, prompt, completion, response, verdict))
    return rollouts


@dataclass
class Batch:
    """Answers that carry a gradient, padded: tokens (rows, length), the rest aligned with predicted tokens."""

    tokens: Tensor
    real: Tensor  # (rows, length) False for padding
    old: Tensor  # (rows, length - 1) the engine's log-probabilities
    mask: Tensor  # (rows, length - 1) 1 where a generated token is predicted
    advantage: Tensor  # (rows,)


def batches(rollouts: list[Rollout], credit: Tensor, micro_tokens: int) -> list[Batch]:
    """Answers with a gradient, longest first, cut into batches of at most micro_tokens padded tokens."""
    rows = [(r, float(a)) for r, a in zip(rollouts, credit, strict=True) if a != 0]
    rows.sort(key=lambda pair: -len(pair[0].prompt) - len(pair[0].completion.tokens))
    made, start = [], 0
    while start < len(rows):
        length = len(rows[start][0].prompt) + len(rows[start][0].completion.tokens)
        stop = min(len(rows), start + max(1, micro_tokens // length))
        made.append(_pad(rows[start:stop], length))
        start = stop
    return made


def _pad(rows: list[tuple[Rollout, float]], length: int) -> Batch:
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    real = torch.zeros(len(rows), length, dtype=torch.bool)
    old, mask = torch.zeros(len(rows), length - 1), torch.zeros(len(rows), length - 1)
    for row, (r, _) in enumerate(rows):
        prompt, made = len(r.prompt), len(r.completion.tokens)
        tokens[row, : prompt + made] = torch.tensor(r.prompt + r.completion.tokens)
        real[row, : prompt + made] = True
        old[row, prompt - 1 : prompt + made - 1] = torch.tensor(r.completion.logprobs)
        mask[row, prompt - 1 : prompt + made - 1] = 1.0
    return Batch(tokens, real, old, mask, torch.tensor([a for _, a in rows]))
