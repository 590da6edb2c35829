"""Dates, times of day, and digit strings such as phone numbers, which look like sums or fractions. Does not import torch."""

import re
from typing import NamedTuple

from finback.tasks.notation import plain, unstyled, unwrapped
from finback.tasks.spelt import WORD_VALUES

_MONTHS = (
    "jan january januar janvier enero января январь",
    "feb february februar février febrero февраля февраль",
    "mar march märz mars marzo марта март",
    "apr april avril abril апреля апрель",
    "may mai mayo мая май",
    "jun june juni juin junio июня июнь",
    "jul july juli juillet julio июля июль",
    "aug august août agosto августа август",
    "sep sept september septembre septiembre сентября сентябрь",
    "oct october oktober octobre octubre октября октябрь",
    "nov november novembre noviembre ноября ноябрь",
    "dec december dezember décembre diciembre декабря декабрь",
)
_MONTH = {name: number for number, names in enumerate(_MONTHS, start=1) for name in names.split()}
_NAME = r"(?P<name>[^\W\d_]{3,10})\.?"
_DAY = r"(?P<day>[0-9]{1,2})(?:st|nd|rd|th|er)?\.?"
_YEAR = r"(?P<year>[0-9]{4})(?:\s*(?:AD|CE|г\.?|года))?"
_DATES = [
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        r"(?P<year>[0-9]{4})(?P<s>[-/.])(?P<month>[0-9]{1,2})(?P=s)(?P<day>[0-9]{1,2})",
        r"(?P<year>[0-9]{4})-(?P<month>[0-9]{2})",
        r"(?P<year>[0-9]{4})\s*年\s*(?:(?P<month>[0-9]{1,2})\s*月\s*(?:(?P<day>[0-9]{1,2})\s*日)?)?",
        r"(?P<month>[0-9]{1,2})\s*月\s*(?P<day>[0-9]{1,2})\s*日",
        r"(?P<day>[0-9]{1,2})\.\s?(?P<month>[0-9]{1,2})\.\s?(?P<year>[0-9]{4})",
        r"(?P<first>[0-9]{1,2})/(?P<second>[0-9]{1,2})/(?P<year>[0-9]{4})",
        rf"(?:the\s+)?{_DAY}\s+(?:of\s+|de\s+)?{_NAME}(?:,?\s+(?:de\s+)?{_YEAR})?",
        rf"{_NAME}\s+{_DAY}(?:,?\s+{_YEAR})?",
        rf"{_NAME},?\s+(?:of\s+|de\s+)?{_YEAR}",
    )
]
_ERA = re.compile(r"(?:the year )?([0-9]{1,4})\s*(?:B\.?\s*C\.?(?:\s*E\.?)?|v\.\s?Chr\.?)", re.IGNORECASE)
_DAYS = "monday mon|tuesday tue tues|wednesday wed|thursday thu thur thurs|friday fri|saturday|sunday"  # Sun and Sat are words
_WEEKDAYS = {name: day for day, names in enumerate(_DAYS.split("|"), start=1) for name in names.split()}
_WEEKDAY = re.compile(rf"(?:(?:on|an?|the|next|le|el|am|on a)\s+)?({'|'.join(_WEEKDAYS)})\.?", re.IGNORECASE)
_BEFORE_DATE = re.compile(
    r"(?:(?:on|in|le|el|il|am|im|em)\s+)?(?:(?:mon|tues|wednes|thurs|fri|satur|sun)day,?\s+)?(?:on\s+)?", re.IGNORECASE
)
_MONTH_OF = re.compile(r"(?P<month>0?[1-9]|1[0-2])/(?P<year>[0-9]{4})")  # 10/1917, which by itself is a fraction
_HALVES = {"noon": 12, "midday": 12, "midnight": 0}
_TIME = re.compile(
    r"(?:at\s+)?(?P<h>[0-9]{1,2})(?:\s*(?::|(?<=[0-9])h(?=[0-9])|(?<=[0-9])\.(?=[0-9]{2}\s*[ap]\.?\s*m\b))\s*(?P<m>[0-9]{2})(?:\s*:\s*(?P<s>[0-9]{2}))?)?\s*(?P<half>[ap]\.?\s*m\.?|[AP]M)?(?P<clock>\s*o'clock|\s*Uhr)?",
    re.IGNORECASE,
)
_CLOCK = re.compile(
    r"(?:at\s+)?(?P<part>half|(?:a\s+)?quarter)\s+(?P<way>past|to)\s+(?P<hour>[a-z]+|[0-9]{1,2})(?:\s*(?P<half>[ap])\.?\s*m\.?)?",
    re.IGNORECASE,
)
_RATIO = re.compile(r"[0-9]{1,9}(?:\s*:\s*[0-9]{1,9}){1,5}")
_DIGITS = re.compile(r"(?:(?:ISBN|tel|phone)[:\s]*)?(?P<all>\+?\(?[0-9][0-9() .-]*(?:[0-9]|-X))", re.IGNORECASE)
_DOTTED = re.compile(r"[vV]?[0-9]{1,9}(?:\.[0-9]{1,9}){2,9}")


class Label(NamedTuple):
    """The kind of label and its canonical value; for a time also hour, minute and second as written."""

    kind: str
    value: tuple[int | str | None, ...]
    shown: tuple[int, ...] = ()
    # whether a time specifies am or pm
    is_whole: bool = True

    def equals(self, other: "Label") -> bool:
        """Whether `other` is the same; if the gold answer leaves am or pm open, either will do."""
        if self.kind != other.kind:
            return False
        return self.value == other.value or (not self.is_whole and bool(self.shown) and self.shown == other.shown)


def label(text: str, like: Label | None = None) -> Label | None:
    """Parses a text that is one date, time, ratio or digit string; None for anything else.

    When compared with `like`, 10/1917 can be a month, 9783161484100 a digit string, and "3 to 2" a ratio.
    """
    if len(text) > 200:
        return None
    text = unwrapped(unstyled(unwrapped(plain(text))))
    if like is not None and like.kind == "date" and (month := _MONTH_OF.fullmatch(text)):
        return Label("date", (int(month["year"]), int(month["month"]), None))
    if like is not None and like.kind == "digits" and re.fullmatch(r"\+?[0-9]{6,20}", text):
        return Label("digits", (text,))
    if like is not None and like.kind == "ratio" and re.fullmatch(r"[0-9]{1,9}(?:\s+to\s+[0-9]{1,9})+", text):
        return Label("ratio", tuple(int(part) for part in text.split("to")))
    if day := _WEEKDAY.fullmatch(text):
        return Label("weekday", (_WEEKDAYS[day[1].lower()],))
    return _date(text) or _time(text) or _digits(text)


def _date(text: str) -> Label | None:
    text = text[found.end() :] if (found := _BEFORE_DATE.match(text)) else text
    if era := _ERA.fullmatch(text):
        return Label("date", (-int(era[1]), None, None))
    for pattern in _DATES:
        match = pattern.fullmatch(text)
        if match is None:
            continue
        parts = match.groupdict()
        if parts.get("first"):
            first, second = int(parts["first"]), int(parts["second"])
            parts["month"], parts["day"] = map(str, (second, first) if first > 12 else (first, second))
        if parts.get("name"):
            parts["month"] = str(_MONTH.get(parts["name"].lower(), 0))
        year, month, day = (int(parts[p]) if parts.get(p) else None for p in ("year", "month", "day"))
        if month is None or not 1 <= month <= 12 or (day is not None and not 1 <= day <= 31):
            continue
        return Label("date", (year, month, day))
    return None


def _time(text: str) -> Label | None:
    for words, half in ((r"in the morning", "am"), (r"in the (?:afternoon|evening)", "pm")):
        text = re.sub(rf"(?<=[\w'])\s+{words}$", f" {half}", text, flags=re.IGNORECASE)
    if named := re.fullmatch(r"(?:at\s+)?(?:12(?::00)?\s+)?(noon|midday|midnight)", text, re.IGNORECASE):
        hour = _HALVES[named[1].lower()]
        return Label("time", (hour * 3600,), (hour, 0, 0))
    match = _TIME.fullmatch(_shown(text))
    if match is None or not (match["m"] or match["half"] or match["clock"]):
        ratio = _RATIO.fullmatch(text)
        return Label("ratio", tuple(int(part) for part in text.split(":"))) if ratio else None
    h, m, s = (int(match[part] or 0) for part in ("h", "m", "s"))
    half = re.sub(r"[^apm]", "", (match["half"] or "").lower())
    if h > 24 or m > 59 or s > 59 or (half and not 1 <= h <= 12):
        return Label("ratio", tuple(int(part) for part in re.findall(r"\d+", text))) if not half else None
    seconds = ((h % 12 + 12 * (half == "pm") if half else h) * 60 + m) * 60 + s
    return Label("time", (seconds,), (h, m, s), is_whole=bool(half))


def _shown(text: str) -> str:
    """Writes phrases such as half past two or a quarter to three pm as on a clock: 2:30, 2:45 pm."""
    match = _CLOCK.fullmatch(text)
    if match is None:
        return re.sub(
            r"\b[a-z]+(?=\s+o'clock)", lambda m: str(WORD_VALUES.get(m[0].lower(), m[0])), text, flags=re.IGNORECASE
        )
    part, way, hour = (match[name].lower() for name in ("part", "way", "hour"))
    number = int(hour) if hour.isdigit() else WORD_VALUES.get(hour, 0)
    if not 1 <= number <= 12 or (part == "half" and way == "to"):
        return text
    number = (number + 10) % 12 + 1 if way == "to" else number
    minutes = 30 if part == "half" else 15 if way == "past" else 45
    # am or pm stays as written
    return f"{number}:{minutes} {match['half'].lower()}m" if match["half"] else f"{number}:{minutes}"


def _digits(text: str) -> Label | None:
    if _DOTTED.fullmatch(text):
        groups = text.split(".")
        is_grouped = 1 <= len(groups[0]) <= 3 and all(len(group) == 3 for group in groups[1:])
        return None if is_grouped and groups[0].isdecimal() else Label("digits", (text.lower(),))
    match = _DIGITS.fullmatch(text)
    if match is None or "." in text or match["all"].endswith("x"):
        return None
    groups = re.findall(r"[0-9X]+", match["all"])
    is_phone = len(groups) > 1 and (sum(map(len, groups)) >= 7 or match["all"].startswith("+"))
    if "-" in match["all"] or (is_phone and not re.fullmatch(r"[0-9]{1,3}(?: [0-9]{3})+", match["all"])):
        return Label("digits", ("+" * match["all"].startswith("+") + "".join(groups),)) if len(groups) > 1 else None
    return None
