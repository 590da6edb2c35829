"""Needle in a haystack: a question about one sentence in a long text. Does not import torch.

Lengths are in words of the haystack, since tokens differ between models (English has about 1.3 per word). The text has
other sentences of the needle's form, so that finding just any number is not enough.
"""

import random
import re
from functools import lru_cache
from typing import Any

from finback.config import UserError
from finback.suites import dialogues
from finback.suites.problems import ProblemList, fingerprint
from finback.suites.suite import Suite, SuiteSource, check_options
from finback.tasks import answers
from finback.tasks.task import Problem, Verdict

LENGTHS = (250, 1000, 4000)  # words
DEPTHS = (0, 25, 50, 75, 100)  # per cent of the way to the end
REPEATS = 3  # questions of each length and depth
DISTRACTORS = 3
PROMPT = "{question}\n\nEnd your answer with the number in \\boxed{}."
_PLACES = [
    "Almeria",
    "Bergen",
    "Cork",
    "Dresden",
    "Esbjerg",
    "Fukuoka",
    "Galway",
    "Hobart",
    "Izmir",
    "Jaipur",
    "Kaunas",
    "Lusaka",
    "Malmo",
    "Nantes",
    "Oporto",
    "Pisa",
    "Quito",
    "Riga",
    "Split",
    "Turku",
    "Utrecht",
    "Varna",
    "Windhoek",
    "Xalapa",
    "York",
    "Zadar",
]
_LONGEST = 1_000_000  # most words of a haystack
_NUMBER = re.compile(r"(?<![\d.,])(?:\d{7}|\d,\d{3},\d{3})(?![.,]?\d)")


def load(options: dict[str, str], problems: int | None, seed: int) -> Suite:
    """Questions that cycle through all pairs of `lengths` and `depths`, comma-separated lists; `problems` in total."""
    check_options("needle", options, ("lengths", "depths"))
    lengths = _numbers("lengths", options.get("lengths", ""), LENGTHS, 50, _LONGEST)
    depths = _numbers("depths", options.get("depths", ""), DEPTHS, 0, 100)
    cells = [(length, depth) for length in lengths for depth in depths]
    n = REPEATS * len(cells) if problems is None else problems
    made = tuple(_problem(*cells[i % len(cells)], random.Random(f"{seed} {i}")) for i in range(n))
    return Suite(
        name="needle",
        problems=made,
        task=ProblemList("needle", made, judge),
        source=SuiteSource(f"generated, seed {seed}, in {dialogues.name()}", dialogues.LICENCE, fingerprint(made)),
        prompt=PROMPT,
        extraction=r"\boxed{}, or ####, or the only number of seven digits; two different answers count as none",
        chance=1 / (1 + DISTRACTORS),  # that of guessing one of the numbers in the text
        notes={"lengths": f"{_listed(lengths)} words", "depths": f"{_listed(depths)} %"},
    )


def judge(problem: Problem, answer: str) -> Verdict:
    """Correct if the answer is the number, digit by digit; text around it does not matter."""
    given = answers.final_answer(answer)
    number = answers.number(given) if given is not None else None
    if number is not None:
        return Verdict(correct=number.value == int(problem.answer) and not number.unit, well_formed=True)
    numbers = set() if answers.boxed(answer) else {found.replace(",", "") for found in _NUMBER.findall(answer)}
    return Verdict(correct=numbers == {problem.answer}, well_formed=len(numbers) == 1)


def _problem(length: int, depth: int, rng: random.Random) -> Problem:
    sentences, need = _haystack(), length
    start = rng.randrange(len(sentences))
    hay: list[str] = []
    while need > 0:
        hay.append(sentences[(start + len(hay)) % len(sentences)])
        need -= len(hay[-1].split())
    place, *others = rng.sample(_PLACES, 1 + DISTRACTORS)
    number, *wrong = (str(value) for value in rng.sample(range(1_000_000, 10_000_000), 1 + DISTRACTORS))
    for city, value in zip(others, wrong, strict=True):
        hay.insert(rng.randint(0, len(hay)), _needle(city, value))
    hay.insert(round(depth / 100 * len(hay)), _needle(place, number))
    asked = f"Here is a text.\n\n{' '.join(hay)}\n\nWhat is the secret number of {place}? The text says it."
    key = f"needle: {length} {depth} {place} {number}"
    return Problem(asked, number, key, tags={"length": length, "depth": depth})


def _needle(place: str, number: str) -> str:
    return f"The secret number of {place} is {number}."


@lru_cache(maxsize=1)
def _haystack() -> list[str]:
    """The lines of the packaged dialogues, in order, without lines with digits, which could be mistaken for needles."""
    lines = (" ".join(line.split()) for text in dialogues.texts() for line in text.split("\n"))
    return [line for line in lines if 4 <= len(line.split()) <= 60 and not any(map(str.isdigit, line))]


def _numbers(name: str, text: str, default: tuple[int, ...], low: int, high: int) -> tuple[int, ...]:
    parts: list[Any] = text.split(",") if text else list(default)
    try:
        values = tuple(int(part) for part in parts)
    except ValueError:
        values = ()
    if not values or not all(low <= value <= high for value in values):
        remedy = "Write for example 100,1000." if name == "lengths" else "Write for example 0,50,100."
        raise UserError(f"needle.{name}", text, f"not whole numbers from {low} to {high:,}", remedy)
    return values


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(f"{value:,}" for value in values)
