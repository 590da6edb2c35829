"""Suites of reasoning-gym's generators at a chosen difficulty; new problems cannot be in any training data. Does not import torch.

gym:NAME             the generator with reasoning-gym's default settings
gym:NAME?level=hard  a level of its curriculum, which sets all knobs: easy 0, medium 1, hard 2, or a number
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
EXTRACTION = r"<answer>, or \boxed{}, or all of the answer; two different answers count as none"
DEFAULT = 100  # problems
_TAG = re.compile(r"(</?answer>)")
_MISSES = 1000  # after this many draws without a new problem, the generator is taken to be exhausted
_LONGEST = 100_000  # most characters of an answer; longer ones count as none


def load(dataset: str, options: dict[str, str], problems: int | None, seed: int) -> Suite:
    """Distinct problems of one generator. `options` are its knobs; `bare` sends the question without instructions."""
    options = dict(options)
    level, bare = options.pop("level", ""), options.pop("bare", "") not in ("", "false")
    checked = Gym(dataset)  # raises UserError for a generator that cannot be judged
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
    """The names that can follow "gym:"."""
    return sorted(SUPPORTED)


def judge(task: Gym, problem: Problem, answer: str) -> Verdict:
    """Judges the final answer by the task's own check, not by reasoning-gym's scorers."""
    found = _found(answer)
    return task.check(problem, found) if found is not None else NO_ANSWER


def _found(answer: str) -> str | None:
    if len(answer) > _LONGEST:
        return None
    given = _tagged(answer) or boxed(answer) or [answer]
    return given[-1].strip() if len({" ".join(text.split()) for text in given}) == 1 else None


def _tagged(answer: str) -> list[str]:
    """The texts between <answer> and the next </answer>, found in linear time, since a text may hold thousands of tags."""
    parts = _TAG.split(answer)  # texts and the tags between them
    found = zip(parts[1::2], parts[2::2], parts[3::2], strict=False)
    return [text for before, text, after in found if (before, after) == ("<answer>", "</answer>")]


def _at_level(dataset: str, level: str) -> dict[str, Setting]:
    """The knobs of the generator's curriculum at a level; knobs with fewer levels stay at their last."""
    if level not in LEVELS and not (level.isascii() and level.isdecimal() and int(level) <= 100):
        raise UserError("gym.level", level, "no such level", f"{did_you_mean(level, LEVELS)} Or a number from 0.")
    from reasoning_gym.factory import CURRICULA, create_curriculum

    if dataset not in CURRICULA:
        problem = f"{dataset} has no levels"
        raise UserError("gym.level", level, problem, f"Leave it out, or set knobs, for example gym:{dataset}?size=…")
    curriculum = create_curriculum(dataset)
    steps = LEVELS.get(level)
    for name, attribute in curriculum.attributes.items():
        last = len(attribute.levels) - 1
        curriculum.set_attr_level(name, min(int(level) if steps is None else steps, last))
    return _settings(dataset, curriculum.generate_configuration({}))


def _settings(dataset: str, config: Any) -> dict[str, Setting]:
    """The fields of a config that differ from its defaults, in the form that Gym takes."""
    own, given = vars(type(config)()), vars(config)
    changed = {name: given[name] for name in setting_types(dataset) if given[name] not in (own[name], None)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in changed.items()}


def _read(dataset: str, options: dict[str, str]) -> dict[str, Setting]:
    """Parses knobs by the types of the generator's settings."""
    if not options:
        return {}
    hints = setting_types(dataset)
    check_options(f"gym:{dataset}", options, [*hints, "level", "bare"])
    return {name: parse(text, hints[name], f"gym:{dataset}.{name}") for name, text in options.items()}
