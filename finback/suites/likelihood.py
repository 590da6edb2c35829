"""Scores choices by log-likelihood, like lm-evaluation-harness: nothing is generated, the likeliest choice is the answer.

FILE?score=letters           question, lettered choices, "Answer:"; the letters are compared (the form of MMLU)
FILE?score=texts             "Question: …", "Answer:"; the texts of the choices are compared (the form of ARC: acc)
FILE?score=texts-normalized  the same, each divided by its number of characters (acc_norm)
FILE?score=…&shots=5         five other questions of the file, with their answers, precede each question

Examples are drawn as by the harness's default: with its seed, never the question itself, for one question after another in
the order of the file. As there, no begin-of-sequence token is added. Imports torch only to measure.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from finback.config import UserError
from finback.suites.hub import digest
from finback.suites.suite import Continuations, Suite
from finback.tasks.choice import lettered
from finback.tasks.letters import LETTERS
from finback.tasks.task import Problem

if TYPE_CHECKING:
    from finback.data.tokenizer import Tokenizer
    from finback.model.transformer import Transformer

FORMS = ("letters", "texts", "texts-normalized")
_SEED = 1234  # the harness's seed for examples
_ROWS = 64  # continuations per batch

Asked = tuple[Problem, list[str]]


class Measured(NamedTuple):
    """The letter of the likeliest continuation, all log-likelihoods, and the tokens of context and continuations."""

    letter: str
    logprobs: list[float]
    prompt_tokens: int
    tokens: int


def scored(suite: Suite, asked: Sequence[Asked], form: str, shots: int) -> Suite:
    """A suite of choices, scored by log-likelihood; `asked` are all questions of its file, from which examples are drawn."""
    if form not in FORMS:
        raise UserError("suite.score", form, "no such way to score choices", f"Use one of {', '.join(FORMS)}.")
    if not 0 <= shots < len(asked):
        problem = f"the file has only {len(asked) - 1} questions besides the one that is asked"
        raise UserError("suite.shots", shots, problem, "Ask for fewer examples.")
    rng, contexts = random.Random(_SEED), dict[str, str]()
    for each in asked:
        examples = _examples(rng, asked, each, shots)
        parts = [f"{_put(other, form)} {_target(other, form)}" for other in examples]
        contexts.setdefault(each[0].key, "\n\n".join([*parts, _put(each, form)]))
    choices = {problem.key: tuple(shown) for problem, shown in reversed(asked)}
    problems = tuple(replace(p, question=contexts[p.key]) for p in suite.problems)
    found = {p.key: Continuations(_texts(choices[p.key], form), form == "texts-normalized") for p in problems}
    rows = ([p.question, p.answer, *found[p.key].texts, form] for p in problems)
    return replace(
        suite,
        problems=problems,
        prompt="{question}",
        extraction="the likeliest continuation",
        metric=f"accuracy of the likeliest choice ({form}, {shots} examples)",
        source=replace(suite.source, digest=digest(rows)),
        continuations=found,
    )


def measure(model: "Transformer", tokenizer: "Tokenizer", context: str, given: Continuations) -> Measured:
    """The log-likelihood of each continuation after a context; a context beyond the model's window is cut from the left."""
    import torch

    from finback.model.logprobs import text_logprobs

    begun = len(tokenizer.encode(context))
    window = model.config.max_position_embeddings
    wholes = [tokenizer.encode(f"{context} {text}") for text in given.texts]
    counts = [len(whole) - begun for whole in wholes]
    logprobs = list[float]()
    for start in range(0, len(wholes), _ROWS):
        batch = [whole[-window - 1 :] for whole in wholes[start : start + _ROWS]]
        longest = max(map(len, batch))
        ids = torch.tensor([row + [0] * (longest - len(row)) for row in batch])
        picked = text_logprobs(model, ids).double()
        for i, (row, count) in enumerate(zip(batch, counts[start : start + _ROWS], strict=True)):
            logprobs.append(picked[i, max(0, len(row) - 1 - count) : len(row) - 1].sum().item())
    compared = [p / len(text) if given.normalize else p for p, text in zip(logprobs, given.texts, strict=True)]
    return Measured(LETTERS[compared.index(max(compared))], logprobs, begun, sum(counts))


def _examples(rng: random.Random, asked: Sequence[Asked], own: Asked, shots: int) -> list[Asked]:
    """Questions other than `own`, drawn like the harness's ContextSampler."""
    if not shots:
        return []
    found = [each for each in rng.sample(list(asked), shots + 1) if each != own][:shots]
    return found if len(found) == shots else rng.sample([each for each in asked if each != own], shots)


def _put(asked: Asked, form: str) -> str:
    problem, choices = asked
    if form == "letters":
        return f"{problem.question}\nAnswer:"
    return f"Question: {problem.question.removesuffix(lettered('', choices))}\nAnswer:"


def _target(asked: Asked, form: str) -> str:
    problem, choices = asked
    return _texts(choices, form)[LETTERS.index(problem.answer)]


def _texts(choices: Sequence[str], form: str) -> tuple[str, ...]:
    return tuple(LETTERS[: len(choices)]) if form == "letters" else tuple(choices)


def options(given: dict[str, str]) -> tuple[str, int]:
    """The form of scoring ("" if the model generates an answer) and the number of examples."""
    form, shots = given.get("score", ""), given.get("shots", "0")
    if not (shots.isascii() and shots.isdecimal()) or (shots != "0" and not form):
        remedy = f"Write score={'|'.join(FORMS)} and shots=5, for example."
        raise UserError("suite.shots", shots, "not a number of examples, or `score` is missing", remedy)
    return form, int(shots)
