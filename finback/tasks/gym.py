"""Problems from the generators of reasoning-gym, judged by checks of our own.

reasoning-gym makes the questions and the gold answers, nothing else. Several of its scorers run the answer
as Python and some pay for junk, so no text of a model ever reaches them: an answer is read into a canonical
value, such as an exact number, and is right if that equals the value of the gold answer.
"""

import json
import math
import random
import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, make_dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from finback.config import UserError, check_fields, did_you_mean
from finback.tasks.expression import evaluate
from finback.tasks.task import NO_ANSWER, Problem, Verdict

Setting = int | float | str | bool | tuple[int | float | str, ...]
# A form of answer: reads a text into the value to be compared, or None if the text has not that form.
Form = Callable[[str], Hashable | None]

_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,100}|[0-9]{1,3}(?:,[0-9]{3}){1,30})(?:\.[0-9]{1,100})?")
_FRACTION = re.compile(r"\\d?frac\{([0-9]{1,100})\}\{([0-9]{1,100})\}|([0-9]{1,100})\s*/\s*([0-9]{1,100})")
_FACTOR = re.compile(r"[0-9]{1,100}")
_ROLE = re.compile(r"([a-z]+) is an? ([a-z]+)")


def _number(text: str) -> Hashable | None:
    """An integer or a decimal, exactly; 1,000 is 1000. No fraction: 6/2 would answer "Calculate 6 / 2."."""
    text = text.strip()
    return Fraction(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _numbers(text: str) -> Hashable | None:
    """A list in brackets, with or without quotes around its numbers."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    inside = text[1:-1].strip()
    values = tuple(_number(part.strip().strip("'\"")) for part in inside.split(",")) if inside else ()
    return None if None in values else values


def _fraction(text: str) -> tuple[int, ...] | None:
    """A fraction as it is written: 2/4 is not 1/2 where the lowest terms are asked for."""
    match = _FRACTION.fullmatch(text.strip().strip("$").strip())
    return tuple(int(group) for group in match.groups() if group) if match else None


def _probability(text: str) -> Hashable | None:
    """A decimal, or a fraction in any terms."""
    top, bottom = _fraction(text) or (0, 0)
    return Fraction(top, bottom) if bottom else _number(text)


def _factors(text: str) -> Hashable | None:
    """Factors in any order."""
    parts = [part.strip() for part in re.split("[×x*]", text)]
    return tuple(sorted(map(int, parts))) if all(map(_FACTOR.fullmatch, parts)) else None


def _text(text: str) -> Hashable | None:
    """Any text; blank lines and the width of the gaps inside a line do not count."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line) or None


def _word(text: str) -> Hashable | None:
    """A text whose case does not count, in ASCII: beyond it, lower() makes a k of the Kelvin sign."""
    return _text(text.lower() if text.isascii() else text)


def _items(text: str) -> Hashable | None:
    """Items between commas; white space does not count."""
    return "".join(text.split()) or None


def _roles(text: str) -> Hashable | None:
    """Who is what, in any order: "Ann is a knight, and Bob is a knave."."""
    text = text.lower() if text.isascii() else ""
    pairs, rest = _ROLE.findall(text), _ROLE.sub("", text)
    names = {name for name, _ in pairs}
    is_clean = re.fullmatch(r"(?:and|[\s,.])*", rest) and len(names) == len(pairs) > 0
    return frozenset(pairs) if is_clean else None


_FORMS: dict[str, Form] = {
    "number": _number,
    "numbers": _numbers,
    "fraction": _fraction,
    "probability": _probability,
    "factors": _factors,
    "text": _text,
    "word": _word,
    "items": _items,
    "roles": _roles,
    # Any solution counts: it has the value of the gold answer and uses the same numbers, each as often.
    "arithmetic": evaluate,
}
# The data sets by the form of their answers, and those that are refused by the reason. Only those whose answer is unique
# are supported; their own scorers compare texts or numbers, some with partial credit.
_DATASETS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
SUPPORTED: dict[str, Form] = {name: _FORMS[form] for form, names in _DATASETS["forms"].items() for name in names}
REFUSED: dict[str, str] = {name: reason for reason, names in _DATASETS["refused"].items() for name in names}

# Where a generator is wrong or ambiguous now and then, its metadata show it; such problems are not asked.
_SOUND: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    # It divides with //, and without parentheses it works from left to right.
    "basic_arithmetic": lambda gold, data: (evaluate(data["expression"]) or (None,))[0] == _number(gold),
    # Some counts of working days run past the end of the year that the question names.
    "calendar_arithmetic": lambda gold, data: (
        data["task"] != "weekday_of_date_from_first_date"  # in a leap year or not: the question does not say
        and data.get("start_date", "")[:4] == data.get("end_date", data.get("start_date", ""))[:4]
    ),
    # From 11 coins on, its ten digits are not always enough.
    "coin_flip": lambda gold, data: _number(gold) == Fraction(*data["rational"].values()),
    # The bottom can be turned to the top in two ways, which move different sides.
    "color_cube_rotation": lambda gold, data: "bottom" not in data["rotations"],
    "countdown": lambda gold, data: evaluate(gold) == (data["target"], tuple(sorted(data["numbers"]))),
    # Nephews, nieces and parents-in-law are named the wrong way round.
    "family_relationships": lambda gold, data: not re.search("niece|nephew|in-law", gold),
    "fraction_simplification": lambda gold, data: math.gcd(*(_fraction(gold) or ())) == 1,
    "puzzle24": lambda gold, data: evaluate(gold) == (Fraction(24), tuple(sorted(data["numbers"]))),
}


@dataclass(frozen=True)
class Gym:
    """One data set of reasoning-gym, such as "chain_sum"; `settings` are fields of its config class.

    The canonical form of a problem is its question, so it stays on its side of the split under any settings.
    """

    # its name in reasoning-gym
    dataset: str
    # fields of its config class
    settings: dict[str, Setting] = field(default_factory=dict, hash=False)
    # the name in tables, where one data set is used with several settings
    label: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "gym")
        if self.dataset in REFUSED:
            remedy = "Choose one whose answers can be compared exactly, such as 'chain_sum' or 'countdown'."
            raise UserError("gym.dataset", self.dataset, f"this data set {REFUSED[self.dataset]}", remedy)
        if self.dataset not in SUPPORTED:
            raise UserError("gym.dataset", self.dataset, "no such data set", did_you_mean(self.dataset, SUPPORTED))
        if self.settings:  # without any, do not wait for the import
            _check_settings(self.dataset, self.settings)

    @property
    def name(self) -> str:
        return self.label or f"gym-{self.dataset}"

    def draw(self, rng: random.Random) -> Problem:
        settings = tuple(sorted(self.settings.items()))
        for _ in range(1000):
            # Item i of seed s is item 0 of seed s + i there: only seeds far apart give unrelated problems.
            item = _item(self.dataset, settings, rng.getrandbits(62))
            gold, data = item["answer"], item["metadata"]
            is_sound = _SOUND.get(self.dataset, lambda gold, data: True)
            if SUPPORTED[self.dataset](gold) is not None and is_sound(gold, data):
                return Problem(
                    question=item["question"],
                    answer=gold,
                    key=f"{self.dataset}: " + " ".join(item["question"].split()),
                    solution=data.get("answer_cot", "").split("\n####")[0],
                    tags={"source": self.dataset},
                )
        raise UserError("gym.settings", self.settings, "no sound problem in 1,000 draws", "Change them.")

    def check(self, problem: Problem, answer: str) -> Verdict:
        if len(answer) > 4 * len(problem.answer) + 100:  # far from any right answer, and costly to read
            return NO_ANSWER
        read = SUPPORTED[self.dataset]
        value, gold = read(answer), read(problem.answer)
        return Verdict(correct=value is not None and value == gold, well_formed=value is not None)


def _classes(dataset: str) -> tuple[Any, Any]:
    """The data set's class and its config class."""
    from reasoning_gym.factory import DATASETS  # takes a second

    return DATASETS[dataset]


def setting_types(dataset: str) -> dict[str, Any]:
    """The type of each setting of a generator."""
    hints = get_type_hints(_classes(dataset)[1])
    return {name: hint for name, hint in hints.items() if name not in ("seed", "size")}


def _config(dataset: str, settings: dict[str, Setting], **others: int) -> Any:
    types = setting_types(dataset)
    lists = {k: list(v) for k, v in settings.items() if isinstance(v, tuple) and _is_list(types[k])}
    return _classes(dataset)[1](**{**settings, **lists}, **others)


def _is_list(hint: Any) -> bool:
    return any(get_origin(part) is list for part in (hint, *get_args(hint)))


def _check_settings(dataset: str, settings: dict[str, Setting]) -> None:
    types = setting_types(dataset)
    for key in settings.keys() - types.keys():
        near = did_you_mean(key, types)
        raise UserError(f"gym.settings.{key}", settings[key], f"{dataset} has no such setting", near)
    # Only the given ones: some defaults of reasoning-gym do not fit their own annotations.
    typed = [(key, tuple if _is_list(types[key]) else types[key]) for key in settings]
    check_fields(make_dataclass("Settings", typed)(**settings), "gym.settings")
    try:
        _config(dataset, settings, seed=0, size=1).validate()
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError("gym.settings", settings, str(error), f"Correct the settings of {dataset}.") from None


def _item(dataset: str, settings: tuple[tuple[str, Setting], ...], seed: int) -> dict[str, Any]:
    # These two draw for all their items when they are built, so one object cannot serve every seed. Not item 0,
    # because what is drawn for it and what it draws come from the same seed, and agree.
    if dataset in ("acre", "gsm_symbolic"):
        return _classes(dataset)[0](_config(dataset, dict(settings), seed=seed, size=5))[4]
    return _generator(dataset, settings)[seed]


@lru_cache(maxsize=128)
def _generator(dataset: str, settings: tuple[tuple[str, Setting], ...]) -> Any:
    return _classes(dataset)[0](_config(dataset, dict(settings), seed=0, size=1))
