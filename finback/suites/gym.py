"""Suites of reasoning-gym's generators at a chosen difficulty: nobody can have trained on their answers. Does not import torch.

gym:NAME             the generator with reasoning-gym's own settings
gym:NAME?level=hard  steps of its curriculum, all its knobs at once: easy 0, medium 1, hard 2, or a number
gym:NAME?max_terms=3 any field of its settings
"""

import importlib.metadata
import random
import re
from functools import partial
from typing import Any

from finback.config import UserError, did_you_mean, parse
from finback.suites.problems import ProblemList, fingerprint
from finback.suites.suite import Suite, SuiteSource, check_options
from finback.tasks.answers import boxed
from finback.tasks.gym import SUPPORTED, Gym, Setting, setting_types
from finback.tasks.task import NO_ANSWER, Problem, Verdict, draw_distinct

LEVELS = {"easy": 0, "medium": 1, "hard": 2}
PROMPT = "{question}\n\nThink step by step. Give your final answer, and nothing else, between <answer> and </answer>."
EXTRACTION = r"<answer>, or \boxed{}, or all of the answer; two different ones are none"
DEFAULT = 100  # problems
_TAG = re.compile(r"(</?answer>)")
_MISSES = 1000  # draws in a row that bring nothing new: then these are all the problems there are
_LONGEST = 100_000  # characters of an answer that are looked at


def load(dataset: str, options: dict[str, str], problems: int | None, seed: int) -> Suite:
    """Distinct problems of one generator; its knobs are `options`, `bare` leaves out what the prompt asks for."""
    options = dict(options)
    level, bare = options.pop("level", ""), options.pop("bare", "") not in ("", "false")
    checked = Gym(dataset)  # refuses a data set that cannot be judged
    settings = (_at_level(dataset, level) if level else {}) | _read(dataset, options)
    task = Gym(dataset, settings) if settings else checked
    made = tuple(draw_distinct(task, "held_out", problems or DEFAULT, random.Random(seed), _MISSES))
    name, version = f"gym:{dataset}", importlib.metadata.version("reasoning-gym")
    name += f"?level={level}" if level else ""
    return Suite(
        name=name,
        problems=made,
        task=ProblemList(name, made, partial(judge, task)),
        source=SuiteSource(f"reasoning-gym {version} {dataset} seed {seed}", "Apache-2.0", fingerprint(made)),
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
    parts = _TAG.split(answer)  # texts and the tags between them
    found = zip(parts[1::2], parts[2::2], parts[3::2], strict=False)
    return [text for before, text, after in found if (before, after) == ("<answer>", "</answer>")]


def _at_level(dataset: str, level: str) -> dict[str, Setting]:
    """The knobs of the generator's curriculum at a level; those with fewer levels stay at their last."""
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
    return _settings(dataset, curriculum.generate_configuration({}))


def _settings(dataset: str, config: Any) -> dict[str, Setting]:
    """The fields of a config that differ from its defaults, as Gym takes them."""
    own, given = vars(type(config)()), vars(config)
    changed = {name: given[name] for name in setting_types(dataset) if given[name] not in (own[name], None)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in changed.items()}


def _read(dataset: str, options: dict[str, str]) -> dict[str, Setting]:
    """Knobs from text, by the types of the generator's own settings."""
    if not options:
        return {}
    hints = setting_types(dataset)
    check_options(f"gym:{dataset}", options, [*hints, "level", "bare"])
    return {name: parse(text, hints[name], f"gym:{dataset}.{name}") for name, text in options.items()}
