"""Tests whether a model answers in the question's language, by generated word problems in five languages. Does not import torch.

R1-Zero mixed languages within a chain of thought (R1 2.3.2). An answer is correct if its number is right and its words are
in the question's language. The check does not see the chain; `Suite.language` reports its share of words in the language.
"""

import json
import random
from functools import partial
from pathlib import Path

from finback.config import UserError, did_you_mean
from finback.suites.problems import ProblemList, fingerprint
from finback.suites.suite import Suite, SuiteSource
from finback.tasks import answers
from finback.tasks.language import consistency
from finback.tasks.task import NO_ANSWER, Problem, Verdict

DEFAULT = 50  # problems
_LONGEST = 20_000  # most characters of an answer, of which two sentences are expected
SHARE = 0.95  # least share of an answer's words in the language; the rest allows for names
# By language code: templates of questions about a + b * c (n is a name), names of people, and the instruction for the answer.
_LANGUAGES = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))


def names() -> list[str]:
    """The language codes that can follow "language:"."""
    return sorted(_LANGUAGES)


def load(language: str, problems: int | None, seed: int) -> Suite:
    """Distinct questions in one language."""
    if language not in _LANGUAGES:
        raise UserError("suite.language", language, "no such language", did_you_mean(language, _LANGUAGES))
    made = _made(language, DEFAULT if problems is None else problems, random.Random(seed))
    return Suite(
        name=f"language:{language}",
        problems=made,
        task=ProblemList(f"language:{language}", made, partial(judge, language)),
        source=SuiteSource(f"generated, seed {seed}", "MIT", fingerprint(made)),
        prompt=f"{{question}}\n{_LANGUAGES[language]['request']}",
        extraction=r"the number in \boxed{}, and all words of the answer",
        metric="right and in the language",
        chance=0.0,
        language=language,
    )


def judge(language: str, problem: Problem, answer: str) -> Verdict:
    """Correct if the number is right and the words are in the language; NO_ANSWER without a number or without words."""
    given = answers.final_answer(answer) if len(answer) <= _LONGEST and answers.boxed(answer) else None
    number = answers.number(given) if given is not None else None
    share = consistency(answer, language) if number is not None else None
    if number is None or share is None:
        return NO_ANSWER
    return Verdict(correct=number.value == int(problem.answer) and share >= SHARE, well_formed=True)


def _made(language: str, n: int, rng: random.Random) -> tuple[Problem, ...]:
    if not 1 <= n <= 2000:
        raise UserError("problems", n, "not in 1..2000", "Use a number from 1 to 2000.")
    found: dict[str, Problem] = {}
    while len(found) < n:
        template = rng.choice(_LANGUAGES[language]["questions"])
        people = _LANGUAGES[language]["people"] if "{n}" in template else [""]
        name, a, b, c = rng.choice(people), rng.randint(2, 60), rng.randint(2, 9), rng.randint(2, 12)
        question = template.format(n=name, a=a, b=b, c=c)
        found.setdefault(question, Problem(question, str(a + b * c), f"language: {question}"))
    return tuple(found.values())
