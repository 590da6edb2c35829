"""Suites of reasoning-gym's generators at a chosen difficulty: nobody can have trained on their answers. No torch here.

gym:NAME             the generator with reasoning-gym's own settings
gym:NAME?level=hard  steps of its curriculum, all its knobs at once: easy 0, medium 1, hard 2, or a number
gym:NAME?max_terms=3 any field of its settings
"""

import dataclasses
import importlib.metadata
import random
import re
from functools import partial
from typing import Any, get_type_hints

from finback.config import UserError, did_you_mean, parse
from finback.suites.problems import ProblemList, fingerprint
from finback.suites.suite import Suite, SuiteSource
from finback.tasks.answers import boxed
from finback.tasks.gym import SUPPORTED, Gym, Setting
from finback.tasks.task import NO_ANSWER, Problem, Verdict, draw

LEVELS = {"easy": 0, "medium": 1, "hard": 2}
PROMPT = "{question}\n\nThink step by step. Give your final answer, and nothing else, between <answer> and </answer>."
EXTRACTION = r"<answer>, or \boxed{}, or all of the answer; two different ones are none"
DEFAULT = 100  # problems
_TAG = re.compile(r"</?answer>")
_MISSES = 1000  # draws in a row that bring nothing new: then these are all the problems there are
_LONGEST = 100_000  # characters of an answer that are looked at


def load(dataset: str, options: dict[str, str], problems: int | None, seed: int) -> Suite:
    """Distinct problems of one generator; its knobs are `options`, `bare` leaves out what the prompt asks for."""
    options = dict(options)
    level, bare = options.pop("level", ""), options.pop("bare", "") not in ("", "false")
    checked = Gym(dataset)  # refuses a data set that cannot be judged
    settings = (_at_level(dataset, level) if level else {}) | _read(dataset, options)
    task = Gym(dataset, settings) if settings else checked
    made = _made(task, problems or DEFAULT, seed)
    name = f"gym:{dataset}" + (f"?level={level}" if level else "")
    return Suite(
        name=name,
        problems=made,
        task=ProblemList(name, made, partial(judge, task)),
        source=SuiteSource(
            f"reasoning-gym {importlib.metadata.version('reasoning-gym')} {dataset} seed {seed}",
            "Apache-2.0",
            fingerprint(made),
        ),
        prompt="{question}" if bare else PROMPT,
        extraction=EXTRACTION,
        notes={"settings": ", ".join(f"{k}={v}" for k, v in sorted(settings.items()))} if settings else {},
    )


def names() -> list[str]:
    """What can follow "gym:"."""
    return sorted(SUPPORTED)


def judge(task: Gym, problem: Problem, answer: str) -> Verdict:
    """The one answer that is given, by the task's own check; reasoning-gym's scorers see none."""
    found = _found(answer)
    return task.check(problem, found) if found is not None else NO_ANSWER


def _found(answer: str) -> str | None:
    if len(answer) > _LONGEST:
        return None
    given = _tagged(answer) or boxed(answer) or [answer]
    return given[-1].strip() if len({" ".join(text.split()) for text in given}) == 1 else None


def _tagged(answer: str) -> list[str]:
    """What stands between <answer> and the next </answer>, in one pass: a text may hold thousands of tags."""
    found, start = list[str](), -1
    for tag in _TAG.finditer(answer):
        if tag[0] == "<answer>":
            start = tag.end()
        elif start >= 0:
            found.append(answer[start : tag.start()])
            start = -1
    return found


def _made(task: Gym, n: int, seed: int) -> tuple[Problem, ...]:
    """Up to n held-out problems with different canonical forms."""
    rng, found, misses = random.Random(seed), dict[str, Problem](), 0
    while len(found) < n and misses < _MISSES:
        problem = draw(task, "held_out", rng)
        misses = misses + 1 if problem.key in found else 0
        found.setdefault(problem.key, problem)
    return tuple(found.values())


def _at_level(dataset: str, level: str) -> dict[str, Setting]:
    """What the generator's curriculum sets after so many steps; knobs with fewer steps stay at their last."""
    if level not in LEVELS and not (level.isascii() and level.isdecimal() and int(level) <= 100):
        raise UserError("gym.level", level, "no such level", f"{did_you_mean(level, LEVELS)} Or a number from 0.")
    from reasoning_gym.factory import CURRICULA, create_curriculum

    if dataset not in CURRICULA:
        problem = f"{dataset} has no levels"
        raise UserError("gym.level", level, problem, f"Leave it out, or set its knobs, as in gym:{dataset}?size=…")
    curriculum = create_curriculum(dataset)
    steps = LEVELS.get(level)
    for name, attribute in curriculum.attributes.items():
        last = len(attribute.levels) - 1
        curriculum.set_attr_level(name, min(int(level) if steps is None else steps, last))
    return _settings(curriculum.generate_configuration({}))


def _settings(config: Any) -> dict[str, Setting]:
    """The fields of a config that differ from its defaults, as Gym takes them."""
    found: dict[str, Setting] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        default = field.default if field.default is not dataclasses.MISSING else None
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if field.name not in ("seed", "size") and value != default and value is not None:
            found[field.name] = tuple(value) if isinstance(value, list) else value
    return found


def _read(dataset: str, options: dict[str, str]) -> dict[str, Setting]:
    """Knobs from text, by the types of the generator's own settings."""
    if not options:
        return {}
    from reasoning_gym.factory import DATASETS

    hints = {name: hint for name, hint in get_type_hints(DATASETS[dataset][1]).items() if name not in ("seed", "size")}
    if unknown := [name for name in options if name not in hints]:
        near = did_you_mean(unknown[0], [*hints, "level", "bare"])
        raise UserError(f"gym:{dataset}", unknown[0], "no such option", near)
    return {name: parse(text, hints[name], f"gym:{dataset}.{name}") for name, text in options.items()}
