"""Prompts -> samples -> verdicts, spread over ranks; what evaluation, probes and RL all do."""

from collections.abc import Sequence
from dataclasses import dataclass

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
