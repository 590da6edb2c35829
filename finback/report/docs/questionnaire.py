"""Facts that only people know: the questions of questionnaire.toml, and answers in such a file. Does not import torch."""

import math
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finback.config import UserError, did_you_mean
from finback.report.docs import registries
from finback.report.docs.facts import MISSING

Kind = Literal["text", "list", "yes or no", "number"]


@dataclass(frozen=True)
class Question:
    """A key of the file, the question, and the type of its answer; --check requires the `needed` ones."""

    key: str
    text: str
    kind: Kind
    needed: bool


# the template to fill in; every line of it may stay unchanged
TEMPLATE = Path(__file__).with_suffix(".toml").read_text(encoding="utf-8")
_KINDS: dict[str, Kind] = {'""': "text", "[]": "list", "true or false": "yes or no", "0.0": "number"}
QUESTIONS = tuple(
    Question(f"{section}.{name}", text, _KINDS[empty], not optional)
    for section, lines in re.findall(r"^\[(\w+)\]\n((?:.+\n)+)", TEMPLATE, re.M)
    for text, optional, name, empty in re.findall(r"^# (.+?)( \(optional\))?\n(?:# )?(\w+) = (.+)$", lines, re.M)
)
_KNOWN = {question.key: question for question in QUESTIONS}
# answers that are looked up and normalized
_LOOKED_UP = {
    "model.licence": "licence",
    "base.licence": "licence",
    "model.languages": "languages",
    "model.released": "day",
    "model.eu_date": "day",
    "data.latest": "month",
    "model.download": "address",
}
_FORMS = {"text": str, "list": list, "yes or no": bool, "number": (int, float)}


@dataclass(frozen=True)
class Answers:
    """Answers by key; unanswered ones are MISSING."""

    given: dict[str, Any]

    def __call__(self, key: str) -> Any:
        assert key in _KNOWN, f"there is no question {key}"
        return self.given.get(key, MISSING)

    def unanswered(self, from_elsewhere: bool) -> list[Question]:
        """Needed questions without an answer; questions about the base model only if there is one."""
        wanted = [q for q in QUESTIONS if q.needed or (from_elsewhere and q.key.startswith("base."))]
        return [q for q in wanted if q.key not in self.given]


def read(path: Path) -> Answers:
    """Answers of a TOML file; UserError for an unknown key or a value of the wrong type."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError("--answers", str(path), str(error.strerror), "Write one with --questions > FILE.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError("--answers", str(path), f"not TOML ({error})", "Correct it.") from None
    given = {}
    for section, table in tables.items():
        for name, value in table.items() if isinstance(table, dict) else ((None, table),):
            key = section if name is None else f"{section}.{name}"
            if key not in _KNOWN:
                raise UserError("--answers", key, "no such question", did_you_mean(key, _KNOWN))
            if value not in ("", []) and not (isinstance(value, str) and not value.strip()):
                given[key] = _checked(key, value)
    return Answers(given)


def _checked(key: str, value: Any) -> Any:
    """A value of its question's type; dates may be TOML dates."""
    kind = _KNOWN[key].kind
    value = value.isoformat() if hasattr(value, "isoformat") else value
    fits = isinstance(value, _FORMS[kind]) and (kind != "number" or not isinstance(value, bool))  # type: ignore[arg-type]
    if kind == "list" and fits:
        fits = all(isinstance(item, str) for item in value)
    if not fits:
        example = {"text": '"words"', "list": '["en", "de"]', "yes or no": "true", "number": "3.3e24"}[kind]
        raise UserError("--answers", f"{key} = {value!r}", f"expected {kind}", f"Write for example {example}.")
    if kind == "number" and not (math.isfinite(value) and value >= 0):
        raise UserError("--answers", f"{key} = {value!r}", "negative or not a number", "Write for example 3.3e24.")
    form = _LOOKED_UP.get(key, "")
    return [_looked_up(key, form, v) for v in value] if kind == "list" else _looked_up(key, form, value)


def _looked_up(key: str, form: str, value: Any) -> Any:
    """An answer as its register spells it; UserError if the register does not have it."""
    if not form:
        return value
    found = registries.FORMS[form](value)
    if not found:
        problem = {"licence": "not a licence of SPDX's list", "languages": "not a language of BCP 47"}.get(
            form, f"not a valid {form}"
        )
        raise UserError("--answers", f"{key} = {value!r}", problem, registries.said_of(form, value))
    return found
