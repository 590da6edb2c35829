"""Problems from reasoning-gym's generators, judged by our own checks.

reasoning-gym supplies questions and gold answers, nothing else. Several of its scorers execute the answer as Python and
some reward nonsense, so they never see a model's text: an answer is parsed into a canonical value, such as an exact
number, and is right if it equals the value of the gold answer.
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
# The form of an answer: parses a text into a comparable value, or None if the text does not have this form.
Form = Callable[[str], Hashable | None]

_NUMBER = re.compile(r"[+-]?(?:[0-9]{1,100}|[0-9]{1,3}(?:,[0-9]{3}){1,30})(?:\.[0-9]{1,100})?")
_FRACTION = re.compile(r"\\d?frac\{([0-9]{1,100})\}\{([0-9]{1,100})\}|([0-9]{1,100})\s*/\s*([0-9]{1,100})")
_FACTOR = re.compile(r"[0-9]{1,100}")
_ROLE = re.compile(r"([a-z]+) is an? ([a-z]+)")


def _number(text: str) -> Hashable | None:
    """An integer or a decimal, exactly; 1,000 is 1000. Not a fraction: 6/2 would pass for "Calculate 6 / 2."."""
    text = text.strip()
    return Fraction(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


def _numbers(text: str) -> Hashable | None:
    """A list in brackets, with or without quotes around the numbers."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        return None
    inside = text[1:-1].strip()
    values = tuple(_number(part.strip().strip("'\"")) for part in inside.split(",")) if inside else ()
    return None if None in values else values


def _fraction(text: str) -> tuple[int, ...] | None:
    """A fraction as written: 2/4 is not 1/2, because lowest terms are required."""
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
    """Any text; blank lines and the number of spaces do not matter."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return "\n".join(line for line in lines if line) or None


def _word(text: str) -> Hashable | None:
    """A text in any case, ASCII only: lower() would turn the Kelvin sign into a k."""
    return _text(text.lower() if text.isascii() else text)


def _items(text: str) -> Hashable | None:
    """Items separated by commas; white space does not matter."""
    return "".join(text.split()) or None


def _roles(text: str) -> Hashable | None:
    """Roles of people, in any order: "Ann is a knight, and Bob is a knave."."""
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
    # Any solution is accepted that has the gold answer's value and uses the same numbers equally often.
    "arithmetic": evaluate,
}
# Data sets by the form of their answers, and rejected ones by the reason. Only data sets with a unique answer are
# supported; reasoning-gym's own scorers compare texts or numbers, some with partial credit.
_DATASETS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
SUPPORTED: dict[str, Form] = {name: _FORMS[form] for form, names in _DATASETS["forms"].items() for name in names}
REFUSED: dict[str, str] = {name: reason for reason, names in _DATASETS["refused"].items() for name in names}

# Some generators produce wrong or ambiguous problems, which their metadata reveal; these are not used.
_SOUND: dict[str, Callable[[str, dict[str, Any]], bool]] = {
    # It divides with //, and without parentheses it evaluates from left to right.
    "basic_arithmetic": lambda gold, data: (evaluate(data["expression"]) or (None,))[0] == _number(gold),
    # Some counts of working days extend beyond the year in the question.
    "calendar_arithmetic": lambda gold, data: (
        data["task"] != "weekday_of_date_from_first_date"  # the question does not say whether it is a leap year
        and data.get("start_date", "")[:4] == data.get("end_date", data.get("start_date", ""))[:4]
    ),
    # From 11 coins on, ten digits are not always enough.
    "coin_flip": lambda gold, data: _number(gold) == Fraction(*data["rational"].values()),
    # "Bottom to top" can be done by two rotations, which move different sides.
    "color_cube_rotation": lambda gold, data: "bottom" not in data["rotations"],
    "countdown": lambda gold, data: evaluate(gold) == (data["target"], tuple(sorted(data["numbers"]))),
    # Nephews, nieces and parents-in-law are named the wrong way round.
    "family_relationships": lambda gold, data: not re.search("niece|nephew|in-law", gold),
    "fraction_simplification": lambda gold, data: math.gcd(*(_fraction(gold) or ())) == 1,
    "puzzle24": lambda gold, data: evaluate(gold) == (Fraction(24), tuple(sorted(data["numbers"]))),
}


@dataclass(frozen=True)
class Gym:
    """A data set of reasoning-gym, such as "chain_sum"; `settings` are fields of its config class.

    A problem's canonical form is its question, so it is on the same side of the split under any settings.
    """

    # name in reasoning-gym
    dataset: str
    # fields of the data set's config class
    settings: dict[str, Setting] = field(default_factory=dict, hash=False)
    # name in tables, to distinguish several settings of one data set
    label: str = ""

    def __post_init__(self) -> None:
        check_fields(self, "gym")
        if self.dataset in REFUSED:
            remedy = "Choose one whose answers can be compared exactly, such as 'chain_sum' or 'countdown'."
            raise UserError("gym.dataset", self.dataset, f"this data set {REFUSED[self.dataset]}", remedy)
        if self.dataset not in SUPPORTED:
            raise UserError("gym.dataset", self.dataset, "no such data set", did_you_mean(self.dataset, SUPPORTED))
        if self.settings:  # without settings, avoid the slow import
            _check_settings(self.dataset, self.settings)

    @property
    def name(self) -> str:
        return self.label or f"gym-{self.dataset}"

    def draw(self, rng: random.Random) -> Problem:
        settings = tuple(sorted(self.settings.items()))
        for _ in range(1000):
            # In reasoning-gym, item i of seed s is item 0 of seed s + i: only distant seeds give unrelated problems.
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
        raise UserError("gym.settings", self.settings, "no valid problem in 1,000 draws", "Change them.")

    def check(self, problem: Problem, answer: str) -> Verdict:
        if len(answer) > 4 * len(problem.answer) + 100:  # too long to be right, and slow to parse
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
    # Only the given settings are checked: some defaults of reasoning-gym do not match their own annotations.
    typed = [(key, tuple if _is_list(types[key]) else types[key]) for key in settings]
    check_fields(make_dataclass("Settings", typed)(**settings), "gym.settings")
    try:
        _config(dataset, settings, seed=0, size=1).validate()
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError("gym.settings", settings, str(error), f"Correct the settings of {dataset}.") from None


def _item(dataset: str, settings: tuple[tuple[str, Setting], ...], seed: int) -> dict[str, Any]:
    # These two generate all items when constructed, so one object cannot serve every seed. Item 0 is not used, because
    # the constructor and the item share a seed, so their random choices would be correlated.
    if dataset in ("acre", "gsm_symbolic"):
        return _classes(dataset)[0](_config(dataset, dict(settings), seed=seed, size=5))[4]
    return _generator(dataset, settings)[seed]


@lru_cache(maxsize=128)
def _generator(dataset: str, settings: tuple[tuple[str, Setting], ...]) -> Any:
    return _classes(dataset)[0](_config(dataset, dict(settings), seed=0, size=1))
