r"""Parses numbers as people write them, exactly, with their unit or currency. Does not import torch.

1,234.5 is 1.234,5 and 1 234,5; 1½, 5 \times 10^3, 1.5 million, 50 % and 2 h 30 min are numbers too. Nothing is
calculated: 24/2 is a fraction, and does not answer a question whose gold answer is an integer.
"""

import re
from fractions import Fraction
from typing import NamedTuple

from finback.tasks.notation import latex, plain, undollared, unstyled, unwrapped
from finback.tasks.spelt import figures, spelt
from finback.tasks.units import COUNTED, SCALE, SCALES, Unit, known, product, units

_CLOSE = Fraction(1, 10**6)  # relative; for decimals of a number without a finite decimal form
_LARGEST = 400  # largest decimal exponent
_NONE = (Unit((), Fraction(1)),)
_GROUPED = (
    r"[0-9]{1,3}(?:,[0-9]{3}){1,30}(?:\.[0-9]{1,60})?|[0-9]{1,2}(?:,[0-9]{2}){1,20},[0-9]{3}(?:\.[0-9]{1,60})?|"
    r"[0-9]{1,3}(?:\.[0-9]{3}){2,30}(?:,[0-9]{1,60})?|[0-9]{1,3}(?:\.[0-9]{3}){1,30},[0-9]{1,60}|"
    r"[0-9]{1,3}(?: [0-9]{3}){1,30}(?:[.,][0-9]{1,60})?|[0-9]{1,3}(?:['_][0-9]{3}){1,30}(?:\.[0-9]{1,60})?"
)
_DECIMAL = r"[0-9]{1,100}(?:\.[0-9]{1,100})?|\.[0-9]{1,100}"
_FRACTION = (
    r"\\frac\s*\{\s*(?P<n1>[+-]?[0-9]{1,60})\s*\}\s*\{\s*(?P<d1>[+-]?[0-9]{1,60})\s*\}"
    r"|(?P<n2>[0-9]{1,60})\s*/\s*(?P<d2>[0-9]{1,60})(?![0-9./])"
)
_MIXED = (
    r"(?P<whole>[0-9]{1,30})\s*"
    r"(?:(?:\+\s*)?\\frac\s*\{(?P<n3>[0-9]{1,30})\}\s*\{(?P<d3>[0-9]{1,30})\}|\s(?:and\s+)?(?P<n4>[0-9]{1,30})/(?P<d4>[0-9]{1,30})(?![0-9]))"
)
_REPEATING = r"(?P<before>[0-9]{0,60})\.(?P<fixed>[0-9]{0,60})\\(?:overline|bar)\s*\{?(?P<cycle>[0-9]{1,60})\}?"
_TIMES_TEN = (
    r"(?:[eE](?P<exp1>[+-]?[0-9]{1,4}))(?![0-9])"
    r"|\s*(?:\\times|\\cdot|[x*])\s*10\s*\^\s*(?:\{\s*(?P<exp2>[+-]?[0-9]{1,4})\s*\}|(?P<exp3>[+-]?[0-9]{1,4})(?![0-9.]))"
)
_MAGNITUDE = re.compile(
    rf"(?:{_MIXED}|{_FRACTION}|{_REPEATING}"
    rf"|(?P<number>{_GROUPED}|[0-9]{{1,60}},[0-9]{{1,60}}|{_DECIMAL})(?![0-9]|[,.][0-9])(?:{_TIMES_TEN})?)"
)
_LISTED = r"[0-9]+,[0-9]{1,2}|[0-9]+,[0-9]{4,}|0,[0-9]+"  # as a gold answer, 1,2 is a list
_CURRENCY = re.compile(
    r"(US\$|[A-Z]{0,2}\$|[€£¥₹₽₩]|(?:USD|EUR|GBP|JPY|CNY|RMB|INR|CHF|KRW)(?![a-zA-Z])|Rs\.?|人民币)\s*"
)
_VARIABLE = re.compile(
    r"((?:m\s*)?\\angle\s*[A-Z]{1,3}|\\(?:theta|alpha|beta|gamma|phi|lambda|omega|mu)(?![a-zA-Z])|[a-zA-Z](?:_\{?\w\}?)?|[a-z]\(\w{1,6}\)|[A-Z]{2,3}|[A-Z]\(\w+\))\s*(?:=|\\approx|(?:equals|is)(?=\s))\s*"
)
_LEAD = re.compile(
    r"^(?:=>?|≈|→|⇒|∴|\\(?:approx|Rightarrow|implies|therefore)(?![a-zA-Z])|(?:approximately|approx\.?|about|roughly|exactly|in|at|the year|in the year|year|AD|en|im Jahre?|an?\s+(?:total|speed|velocity|distance|length|height|width|depth|area|volume|mass|weight|"
    r"cost|price|profit|sum|probability|temperature|time|duration|score|radius|diameter|perimeter|value|rate|average|mean)\s+of)(?=\s)|(?:一共|总共|總共|共)有?)\s*",
    re.IGNORECASE,
)
_MINUS = re.compile(r"(?:minus|negative)\s+(?=[\w.$€£\\])", re.IGNORECASE)
# 1h40, 1:40 h, 6 foot 3: the last unit is omitted
_SHORT = re.compile(r"(\d{1,3})(?:\s*(h|hr|hrs|hours?|['′]|ft|foot|feet)\s*(\d{1,2})|:([0-5]\d)\s*(?:h|hr|hrs|hours))")
# an hour and a half
_AND_PART = re.compile(
    r"(\w[\w-]{0,20}) ([a-z]{1,12}) and ((?:a|an|one|two|three) (?:half|thirds?|quarters?))", re.IGNORECASE
)
_PART = re.compile(r"(\d{1,6}(?:\.\d{1,6})?)\s*([^\W\d_]{1,12}|[°'\"′″])\.?(?:\s*(?:,|and)?\s*)")


class Number(NamedTuple):
    """An exact value, the possible meanings of its unit, and how it was written."""

    value: Fraction
    units: tuple[Unit, ...] = _NONE
    # the variable in "x = ..."
    variable: str = ""
    # "whole", "decimal", "fraction", "power", "sum" (2 h 30 min), "begun 3" (0.333...)
    form: str = "whole"

    def __str__(self) -> str:
        names = "·".join(f"{name}^{power}" if power != 1 else name for name, power in self.unit.dimension)
        return f"{self.value * self.unit.factor} {names}".strip()

    @property
    def unit(self) -> Unit:
        """The unit that is most likely meant."""
        return self.units[0]

    def equals(self, other: "Number") -> bool:
        """Whether `other` is a correct answer: 12 is 12 hours and 720 minutes, but 12 minutes is not 12 hours."""
        if self.variable and other.variable and self.variable != other.variable:
            return False
        if self.unit.dimension and other.unit.dimension:
            return any(_match(self, other, one, two) for one in self.units for two in other.units)
        shares = [unit.factor for unit in (*self.units, *other.units) if unit.dimension == (("share", 1),)]
        if not shares:
            return "sum" not in (self.form, other.form) and _same(self.value, other)
        # Compared with a bare number, 50 % may be 50 or a half; but if the gold answer is 0.5, 0.5 % is wrong.
        if self.unit.dimension:
            return _same(self.value, other) or _same(self.value * shares[0], other)
        return _same(self.value / shares[0], other) or (abs(self.value) >= 1 and _same(self.value, other))


def number(text: str, strict: bool = False) -> Number | None:
    """The number, if the text is one number and nothing else; else None.

    `strict` is for gold answers, in which 2k and 5m are products of variables.
    """
    if len(text) > 600:
        return None
    text = _tidy(text)
    match = _VARIABLE.match(text)
    variable, text = (match[1], text[match.end() :]) if match else ("", text)
    found = _sum(text) or _single(text, strict) or (None if strict else _begun(text))
    return found._replace(variable=variable) if found else None


def _tidy(text: str) -> str:
    text = latex(unstyled(unwrapped(undollared(unwrapped(plain(text))))))
    for _ in range(2):  # in the year 2001
        text = _LEAD.sub("", unwrapped(text), count=1)
    while (inner := re.fullmatch(r"\((.*)\)|\{(.*)\}", text)) and not re.search(
        r"[(){},]", inner[1] or inner[2] or ","
    ):
        text = (inner[1] or inner[2]).strip()
    return text


def _single(text: str, strict: bool = False) -> Number | None:
    text, sign, currency = text.strip(), 1, ""
    if said := _MINUS.match(text):
        sign, text = -1, text[said.end() :]
    for _ in range(2):  # -$5 and $-5
        if text[:1] in ("+", "-") and text[1:2] not in ("+", "-"):
            sign, text = (-sign if text[0] == "-" else sign), text[1:].lstrip()
        if not currency and (match := _CURRENCY.match(text)):
            currency, text = match[1], text[match.end() :]
    match = _MAGNITUDE.match(text)
    if (
        strict
        and match
        and not currency
        and re.fullmatch(_LISTED, match[0])
        and not re.match(r"\s*[€£]", text[match.end() :])
    ):
        return None
    value, form, rest = _value(match, text) if match else spelt(text)
    if value is None:
        return None
    while (scale := SCALE.match(rest)) and not (
        strict and not currency and scale[0].isascii() and scale[0].isalpha() and len(scale[0]) < 3
    ):
        value, rest = value * 10 ** SCALES[scale[1]], rest[scale.end() :]
        form = "whole" if form == "fraction" and value.denominator == 1 else form  # half a million
    if dozen := re.match(r"\s*dozens?\b", rest):
        value, rest = value * 12, rest[dozen.end() :]
    if (currency and (short := re.match(r"\s*([KMB])\b", rest))) or (
        not strict and (short := re.match(r"(M)\b", rest))
    ):
        value, rest = value * 1000 ** ("KMB".index(short[1]) + 1), rest[short.end() :]
    if (
        (again := re.fullmatch(r"\s*\(([^()]{1,40})\)", rest))
        and (same := _single(again[1]))
        and same.value == sign * value
    ):
        rest = ""  # 8 (eight)
    meant = units(rest) if _is_apart(rest, strict) else None
    is_title = not match and (form == "fraction" or rest.lstrip()[:1].isupper())
    if strict and is_title and meant and any(each.is_counted for each in meant):
        return None  # Half Moon, Seven Samurai
    if meant is not None and currency:
        meant = _money(currency, meant)
    if meant == known("€") and match and re.fullmatch(r"[1-9]\d{0,2}\.\d{3}", match[0]):
        value *= 1000  # 1.500 € is 1500 €, not 1 € and 50.0 cents
    return Number(sign * value, meant, form=form) if meant else None


def _value(match: re.Match[str], text: str) -> tuple[Fraction | None, str, str]:
    """Parses a match: its value, its form, and the text after it."""
    groups, rest = match.groupdict(), text[match.end() :]
    for i in "1234":
        if groups[f"d{i}"] is not None:
            if not int(groups[f"d{i}"]):
                return None, "", ""
            part = Fraction(int(groups[f"n{i}"]), int(groups[f"d{i}"]))
            return (part + int(groups["whole"]) if i in "34" else part), "fraction", rest
    if groups["cycle"] is not None:
        fixed, cycle = groups["fixed"], groups["cycle"]
        tail = Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(fixed))
        return Fraction(f"{groups['before'] or 0}.{fixed or 0}") + tail, "fraction", rest
    value = _decimal(groups["number"])
    exponent = next((int(groups[f"exp{i}"]) for i in "123" if groups[f"exp{i}"]), None)
    if exponent is None and (power := re.match(r"\s*\^\s*(?:\{\s*([+-]?\d{1,4})\s*\}|([+-]?\d{1,4})(?![\d.]))", rest)):
        if groups["number"] != "10":
            return None, "", ""
        value, exponent, rest = Fraction(1), int(power[1] or power[2]), rest[power.end() :]
    if exponent is not None:
        return (value * Fraction(10) ** exponent, "power", rest) if abs(exponent) <= _LARGEST else (None, "", "")
    return value, "whole" if value.denominator == 1 else "decimal", rest


def _decimal(digits: str) -> Fraction:
    """The last of several kinds of separators is the decimal point; a lone comma before three digits separates thousands."""
    if "," in digits and "." in digits:
        thousands = "," if digits.rindex(".") > digits.rindex(",") else "."
        digits = digits.replace(thousands, "").replace(",", ".")
    elif digits.count(".") > 1:
        digits = digits.replace(".", "")
    elif "," in digits and not re.fullmatch(r"[1-9]\d{0,2}(?:,\d{2})*(?:,\d{3})+", digits):
        digits = digits.replace(",", ".")
    return Fraction(re.sub("[ ,'_]", "", digits))


def _sum(text: str) -> Number | None:
    """2 hours and 30 minutes, 6 ft 2 in, one dollar and five cents, 1h40: parts of one dimension, each smaller than the last."""
    if extra := _AND_PART.fullmatch(text):
        first, more, meant = number(re.sub(r"(?i)^an?$", "1", extra[1])), spelt(extra[3])[0], units(extra[2])
        return Number(first.value + more, meant, form="decimal") if first and more and meant and meant[0] else None
    if short := _SHORT.fullmatch(text):
        smaller = "min" if not short[2] or short[2][0] == "h" else "in"
        text = f"{short[1]} {short[2] or 'h'} {short[3] or short[4]} {smaller}"
    text, parts, at = figures(text), list[tuple[Fraction, tuple[Unit, ...]]](), 0
    while match := _PART.match(text, at):
        meanings = known(match[2])
        if not meanings or not match[0]:
            return None
        parts.append((Fraction(match[1]), meanings))
        at = match.end()
    if len(parts) < 2 or at < len(text):
        return None
    for kind in (unit.dimension for unit in parts[0][1]):  # cents may belong to a dollar or a euro
        factors = [unit.factor for _, meanings in parts for unit in meanings if unit.dimension == kind]
        if len(factors) == len(parts) and factors == sorted(set(factors), reverse=True):
            value = sum((value * factor for (value, _), factor in zip(parts, factors, strict=True)), Fraction(0))
            return Number(value, (Unit(kind, Fraction(1)),), form="sum")
    return None


def _begun(text: str) -> Number | None:
    """A decimal with an ellipsis: 0.333..."""
    match = re.fullmatch(r"([+-]?\d{0,20}\.(\d{3,60}))\s*(?:\.{3}|…|\\(?:[lc]?dots)(?![a-zA-Z]))", text)
    return Number(Fraction(match[1]), form=f"begun {len(match[2])}") if match else None


def _is_apart(rest: str, strict: bool) -> bool:
    """Whether the letters after a number can be a unit: 12 n and 12n are products; 12 m, 12m and 12km are not."""
    glued = re.match(r"[a-zA-Z]+", rest)
    if glued is None:
        return True
    name = glued[0]
    return bool(known(name)) and (len(name) > 1 or (not strict and name in "mgshLNJWVK"))


def _money(sign: str, behind: tuple[Unit, ...]) -> tuple[Unit, ...] | None:
    """The unit of a number with a currency sign before it; the same currency's name may also follow it."""
    sign = sign if known(sign) else "$" if sign.endswith("$") else sign.rstrip(".")
    meant = known(sign)
    if behind == _NONE or behind[0].is_counted:
        return meant
    if all(power < 0 for _, power in behind[0].dimension):  # $18 per day
        return tuple(product(unit, each) for unit in meant for each in behind)
    return tuple(unit for unit in meant if unit in behind) or None


def _match(gold: Number, given: Number, one: Unit, two: Unit) -> bool:
    if one.dimension != two.dimension:  # "red apples" are apples
        short, long = sorted((one.dimension, two.dimension), key=len)
        return short[0][0].startswith(COUNTED) and long[-len(short) :] == short and _same(gold.value, given)
    return _same(gold.value * one.factor / two.factor, given)


def _same(value: Fraction, given: Number) -> bool:
    """Exact equality; approximate if decimals stand for a number without a finite decimal form, such as 0.333333 for a third."""
    if value == given.value:
        return True
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    if rest > 1 and given.form.startswith("begun"):
        unit = Fraction(1, 10 ** int(given.form.split()[1]))
        return 0 <= (value - given.value) * (1 if value > 0 else -1) < unit
    return rest > 1 and given.form == "decimal" and abs(given.value - value) <= _CLOSE * abs(value)
