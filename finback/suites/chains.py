"""The quickstart's task as a suite: held-out sums of single digits. Does not import torch.

chains                        5 to 7 terms, as in recipes/tiny.py
chains?min_terms=8&max_terms=8  any field of finback.tasks.math.Chains
"""

from typing import get_type_hints

from finback.config import parse
from finback.suites.problems import ProblemList, fingerprint
from finback.suites.suite import Suite, SuiteSource, check_options
from finback.tasks.math import Chains
from finback.tasks.task import distinct

DEFAULT = 200  # problems
TERMS = {"min_terms": "5", "max_terms": "7"}


def load(options: dict[str, str], problems: int | None, seed: int) -> Suite:
    """Distinct held-out sums; the prompt is the bare question, as in training."""
    hints = get_type_hints(Chains)
    check_options("chains", options, hints)
    task = Chains(**{name: parse(text, hints[name], f"chains.{name}") for name, text in (TERMS | options).items()})
    made = tuple(distinct(task, "held_out", problems or DEFAULT, seed))
    return Suite(
        name=task.name,
        problems=made,
        task=ProblemList(task.name, made, task.check),
        source=SuiteSource(f"finback.tasks.math.Chains seed {seed}", "MIT", fingerprint(made)),
        extraction="all of the answer",
    )
