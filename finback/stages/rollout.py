"""Prompts -> samples -> verdicts, what evaluation, probes and RL all do; and samples -> padded training batches."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from finback.config import UserError
from finback.data.messages import Message, Response, encode_prompt, parse_response
from finback.data.tokenizer import THINK, Tokenizer
from finback.engine.engine import Engine
from finback.engine.request import Completion, SamplingParams
from finback.tasks.task import NO_ANSWER, Problem, Task, Verdict, judged


@dataclass(frozen=True)
class Rollout:
    """One answer to one problem, judged."""

    problem: Problem
    prompt: list[int]
    completion: Completion
    response: Response
    verdict: Verdict


def rollout(
    engine: Engine,
    tokenizer: Tokenizer,
    task: Task,
    problems: Sequence[Problem],
    seeds: Sequence[int],
    sampling: SamplingParams,
    think: bool = False,
) -> list[Rollout]:
    """Answer each problem once; `think` opens the chain for the model. An answer cut off in its chain is wrong."""
    asked = [encode_prompt([Message("user", p.question)], tokenizer, think=think or None) for p in problems]
    prompts = [ids for ids, _ in asked]
    _check_window(engine.model.config.max_position_embeddings, prompts, problems, sampling.max_tokens)
    completions = engine.generate(prompts, sampling, seeds)
    texts = [tokenizer.decode(completion.tokens) for completion in completions]
    responses = [parse_response(THINK * opened + text) for text, (_, opened) in zip(texts, asked, strict=True)]
    # an answer that was cut off, or whose chain never ends, is not even looked at
    whole = [c.finish_reason == "stop" and r.closed for c, r in zip(completions, responses, strict=True)]
    pairs = [(p, r.answer) for p, r, ok in zip(problems, responses, whole, strict=True) if ok]
    verdicts = iter(judged(task, pairs))
    return [
        Rollout(p, prompt, c, r, next(verdicts) if ok else NO_ANSWER)
        for p, prompt, c, r, ok in zip(problems, prompts, completions, responses, whole, strict=True)
    ]


def _check_window(window: int, prompts: Sequence[list[int]], problems: Sequence[Problem], answer: int) -> None:
    """Before anything is answered: a question too long is the task's fault, not that of an engine's request."""
    for prompt, problem in zip(prompts, problems, strict=True):
        if len(prompt) + answer > window:
            shown = problem.question if len(problem.question) <= 60 else f"{problem.question[:60]}…"
            raise UserError(
                "question",
                shown,
                f"its {len(prompt)} tokens and max_tokens = {answer} are more than the {window} that the model reads",
                "Leave out such questions, lower max_tokens, or take a model with a longer window.",
            )


def record(r: Rollout) -> dict[str, Any]:
    """A rollout as a line of a JSONL file."""
    return {
        "question": r.problem.question,
        "gold": r.problem.answer,
        "thinking": r.response.reasoning,
        "answer": r.response.answer,
        "thinks": r.response.thinks,
        "correct": r.verdict.correct,
        "tokens": len(r.completion.tokens),
        "finish": r.completion.finish_reason,
    }


@dataclass
class Group:
    """One question's answers, what each has earned by part, and what each is credited with."""

    rollouts: list[Rollout]
    earned: list[dict[str, float]]
    credit: list[float] = field(default_factory=list)

    @property
    def rewards(self) -> list[float]:
        """What each answer has earned in all."""
        return [sum(parts.values()) for parts in self.earned]

    @property
    def differs(self) -> bool:
        """Whether one answer earned something else than another."""
        return max(self.rewards) - min(self.rewards) > 1e-6


@dataclass
class Batch:
    """Answers that are learnt from, padded: tokens (rows, length), the rest aligned with predicted tokens."""

    tokens: Tensor
    real: Tensor  # (rows, length) False for padding
    old: Tensor  # (rows, length - 1) the engine's log-probabilities
    mask: Tensor  # (rows, length - 1) 1 where a generated token is predicted
    advantage: Tensor  # (rows,)
    anchor: Tensor | None = None  # (rows, length - 1) the trainer's, before any update; None: take the engine's
    reference: Tensor | None = None  # (rows, length - 1) the reference model's

    def to(self, device: torch.device) -> "Batch":
        """The same answers where a model computes."""
        return replace(self, **{name: t.to(device) for name, t in vars(self).items() if t is not None})


def batches(
    rollouts: Sequence[Rollout], credit: Sequence[float], micro_tokens: int, all_rows: bool = False
) -> list[Batch]:
    """Answers longest first, cut into batches of at most micro_tokens padded tokens.

    Those without credit are left out unless `all_rows` (a divergence acts on them too).
    """
    rows = [(r, float(a)) for r, a in zip(rollouts, credit, strict=True) if a != 0 or all_rows]
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
