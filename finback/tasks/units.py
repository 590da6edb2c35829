"""Units, currencies and words for magnitudes: what a unit measures, and how it converts. Does not import torch."""

import re
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

COUNTED = "a "  # starts the dimension of a counted thing, such as apples


class Unit(NamedTuple):
    """A unit: its dimension as powers of base units, and its size in these. A counted thing is its own dimension."""

    dimension: tuple[tuple[str, int], ...]
    factor: Fraction

    def __bool__(self) -> bool:
        return bool(self.dimension)

    @property
    def is_counted(self) -> bool:
        """Whether it is a counted thing, such as apples."""
        return bool(self.dimension) and self.dimension[0][0].startswith(COUNTED)


# dimension: symbol or names, each with its factor (default 1)
_TABLE = """
length: in|inch|inches|″|\"=0.0254 ft|foot|feet|'|′=0.3048 yd|yard|yards=0.9144 mi|mile|miles=1609.344 米 公里|千米|км=1000 厘米|см=0.01 毫米|мм=0.001 м|метр|метров
mass: lb|lbs=453.59237 oz|ounce|ounces=28.349523125 t|ton|tons|tonne|tonnes=1000000 kilo|kilos|кг|公斤|千克=1000 克|г
time: s|sec|secs|second|seconds|Sekunde|Sekunden|segundo|segundos|seconde|secondes|секунд|秒|сек min|mins|minute|minutes|Minuten|minuto|minutos|minuti|минут|минуты|минута|分钟|分鐘|мин=60 h|hr|hrs|hour|hours|Stunde|Stunden|heure|heures|hora|horas|ora|ore|小时|小時|часов|часа|час|ч=3600 day|days|Tag|Tage|jour|jours|día|días|dia|dias|дней|дня|день|天=86400 week|weeks|Woche|Wochen|semana|semanas|semaines|недель|недели|wk|wks=604800
month: month|months|Monat|Monate|mois|mes|meses|месяцев year|years|yr|yrs|Jahr|Jahre|ans|año|años|anos|anni|лет|года|год|岁|歲|年=12
angle: °|degree|degrees|deg|Grad|градус|градуса|градусов arcmin|arcminute|arcminutes=1/60
radian: rad|radian|radians
celsius: °C|degC|celsius|C
fahrenheit: °F|degF|fahrenheit|F
kelvin: K|kelvin|kelvins
share: %|percent|pct|percentage|процентов=1/100 ‰|permille=1/1000
dollar: $|dollar|dollars|usd|US$|buck|bucks|美元 ¢|cent|cents=1/100
euro: €|euro|euros|eur|欧元 cent|cents=1/100
sterling: £|pound|pounds|gbp|英镑 p|pence|penny=1/100
yen: ¥|yen|jpy|円|日元
yuan: ¥|yuan|cny|rmb|元|人民币 角=1/10
rupee: ₹|rupee|rupees|inr|rs
won: ₩|won|krw
ruble: ₽|ruble|rubles|rouble|roubles|rub|руб|рублей
franc: chf|franc|francs
area: acre|acres ha|hectare|hectares=2.4710538146717
speed-in-knots: knot|knots|kn
bytes: byte|bytes|B bit|bits=1/8 KB|kilobyte|kilobytes=1000 MB|megabyte|megabytes=1000000 GB|gigabyte|gigabytes=1000000000
"""
_PREFIXED = """
m|meter|metre|meters|metres length 1
g|gram|grams|gramme|grammes mass 1
s time 1
l|L|liter|litre|liters|litres length^3 1/1000
J|joule|joules length^2*mass*time^-2 1000
Wh length^2*mass*time^-2 3600000
Nm length^2*mass*time^-2 1000
cal|calorie|calories food-energy 1
N|newton|newtons length*mass*time^-2 1000
W|watt|watts length^2*mass*time^-3 1000
Pa|pascal|pascals length^-1*mass*time^-2 1000
Hz|hertz time^-1 1
V|volt|volts current^-1*length^2*mass*time^-3 1000
A|amp|amps|ampere|amperes current 1
Ω|ohm|ohms current^-2*length^2*mass*time^-3 1000
eV electronvolt 1
mol|mole|moles amount 1
"""
_PREFIXES = {
    "": 0,
    "k": 3,
    "c": -2,
    "m": -3,
    "d": -1,
    "µ": -6,
    "μ": -6,
    "u": -6,
    "n": -9,
    "p": -12,
    "M": 6,
    "G": 9,
    "T": 12,
}
_LONG = {"kilo": 3, "centi": -2, "milli": -3, "deci": -1, "micro": -6, "nano": -9, "mega": 6, "giga": 9}
_SHORT = {
    "mph": "mi/h",
    "kph": "km/h",
    "kmh": "km/h",
    "bpm": "beat/min",
    "rpm": "revolution/min",
    "sqft": "ft^2",
    "cc": "cm^3",
}
# powers of ten
SCALES = {
    "hundred": 2,
    "thousand": 3,
    "k": 3,
    **dict.fromkeys(
        ("million", "millions", "Million", "Millionen", "millón", "millones", "milhão", "milhões", "milioni"), 6
    ),
    "mn": 6,
    "mio": 6,
    "lakh": 5,
    "crore": 7,
    **dict.fromkeys(("billion", "billions", "Milliarde", "Milliarden", "milliard", "milliards", "miliardi", "bn"), 9),
    "trillion": 12,
    "千": 3,
    "万": 4,
    "萬": 4,
    "百万": 6,
    "亿": 8,
    "億": 8,
    "万亿": 12,
    "兆": 12,
    "тыс": 3,
    "млн": 6,
    "млрд": 9,
}
SCALE = re.compile(r"\s*(" + "|".join(sorted(SCALES, key=len, reverse=True)) + r")(?![a-zA-Z^])\.?")
# Words that change a number, introduce a second one, or deny it: "12 or so" is not 12.
_NO_UNIT = re.compile(
    r"(?:and|or|to|not?|but|than|if|is|are|was|isn't|be|maybe|perhaps|possibly|except|without|instead|rather|could|would|might|"
    r"should|doubled|tripled|halved|wrong|incorrect|false|minus|plus|times|over|dozen|hundred|thousand|[mbtr]+illion|squared|cubed|factorial|bce?|"
    r"b\.c\.?(?:e\.?)?|or so|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|[a-z]+teen|"
    r"(?:twen|thir|for|fif|six|seven|eigh|nine)ty|oder|und|ou|et|y|o|или|и|не)s?",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"(?P<over>/|per\b)|(?P<name>[^\W\d_]+\$?|[°%‰$€£¥₹₩₽¢″'\"](?:[CF]\b)?)(?P<power>\^\{?-?\d\}?)?\.?|(?P<dot>\\cdot|[*·])"
)


@lru_cache
def _units() -> dict[str, tuple[Unit, ...]]:
    """Possible meanings by name: a pound is money or a mass. Symbols are case-sensitive, names are not."""
    found: dict[str, list[Unit]] = {}
    for line in _TABLE.strip().split("\n"):
        dimension, _, entries = line.partition(": ")
        for entry in entries.split():
            names, _, factor = entry.partition("=")
            for name in names.split("|"):
                found.setdefault(name, []).append(Unit(((dimension, 1),), Fraction(factor or "1")))
    for line in _PREFIXED.strip().split("\n"):
        names, dimension, factor = line.split()
        powers = [part.partition("^") for part in dimension.split("*")]
        for name in names.split("|"):
            prefixes = {**_LONG, "": 0} if len(name) > 3 and name.islower() else _PREFIXES
            for prefix, ten in prefixes.items():
                unit = Unit(tuple((n, int(e or 1)) for n, _, e in powers), Fraction(factor) * Fraction(10) ** ten)
                known = found.setdefault(prefix + name, [])
                if not known:
                    known.append(unit)
    found["pound"].append(Unit((("mass", 1),), Fraction("453.59237")))
    found["pounds"].append(found["pound"][-1])
    return {name: tuple(units) for name, units in found.items()}


def known(name: str) -> tuple[Unit, ...]:
    """Possible meanings of a name, () if it is not a known unit."""
    units = _units()
    return units.get(name) or units.get(name.lower()) or ()


@lru_cache(maxsize=4096)
def units(text: str) -> tuple[Unit, ...] | None:
    """Possible meanings of the text after a number; None if it is not a unit. Unknown words name a counted thing."""
    text = re.sub(
        r"\\frac\{([^{}\d]+)\}\{([^{}\d]+)\}",
        r"\1/\2",
        text.replace("\\mu ", "µ").replace("\\Omega", "Ω").replace("per cent", "percent").strip(),
    )
    text = re.sub(r"\bU\.?S\.?\s+(?=dollars?\b)", "", text.strip(" ()[]").replace("\\ ", " "))
    if (
        extent := re.fullmatch(
            r"(.+?)\s+(?:long|tall|wide|high|deep|thick|old|away|apart|in (?:length|width|height|area|volume)|of(?: [a-z]{3,20}){1,2})",
            text,
        )
    ) and (meant := _measured(extent[1])):
        return meant  # 1.2 m long, 250 g of flour
    if not text:
        return ((Unit((), Fraction(1))),)
    if len(text) > 60 or any(text != "times" and _NO_UNIT.fullmatch(word) for word in re.split(r"[\s,]+", text)):
        return _measured(text) if len(text) <= 60 else None
    return _measured(text) or _counted(text)


def _measured(text: str) -> tuple[Unit, ...] | None:
    """A product of known units: km/h, m s^{-1}, square meters, meters per second squared."""
    text = re.sub(r"\b(?:square|sq\.?)\s+(\w+)", r"\1^2", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(?:cubic|cu\.?)\s+(\w+)", r"\1^3", text, flags=re.IGNORECASE)
    text = re.sub(r"^(?:every|each|an?)\s+(?=(?:second|minute|hour|day|week|month|year)$)", "per ", text)
    text = re.sub(r"(?<=[^\W\d_])\s+squared\b", "^2", text)
    text = re.sub(r"(?<=[^\W\d_])\s+cubed\b", "^3", text)
    for letter, scale in (("C", "celsius"), ("F", "fahrenheit")):
        text = re.sub(
            rf"(?:°|\b(?:degrees?|Grad|degrés|grados|gradi|градус\w*))\s*(?:{scale}|{letter})\b",
            f"°{letter}",
            text,
            flags=re.IGNORECASE,
        )
    text = re.sub(r"(?<=[a-z])-(?=[a-z])", " ", text)  # kilowatt-hours
    text = " ".join(_SHORT.get(word.lower(), word) for word in text.split())
    found, at, sign = [Unit((), Fraction(1))], 0, 1
    while at < len(text):
        match = _TOKEN.match(text, at)
        if text[at] == " ":
            at += 1
            continue
        if match is None:
            return None
        at = match.end()
        if match["over"]:
            sign = -1
        elif match["name"]:
            power = sign * int(re.sub(r"[^-\d]", "", match["power"])) if match["power"] else sign
            meanings = known(match["name"])
            found = [product(unit, meaning, power) for unit in found for meaning in meanings]
            if not found:
                return None
    return tuple(found) if any(unit.dimension for unit in found) else None


def product(one: Unit, other: Unit, power: int = 1) -> Unit:
    """One unit times a power of another."""
    powers = dict(one.dimension)
    for name, exponent in other.dimension:
        powers[name] = powers.get(name, 0) + exponent * power
    return Unit(tuple(sorted((n, e) for n, e in powers.items() if e)), one.factor * other.factor**power)


def _counted(text: str) -> tuple[Unit, ...] | None:
    """Names of counted things, each in the singular."""
    words = re.sub(r"(?<=\w\w)\^\{?[23]\}?$", "", text.rstrip(".")).split()
    if not 1 <= len(words) <= 6 or not all(re.fullmatch(r"[^\W\d_]+(?:['-][^\W\d_]+)*[,.]?|/", word) for word in words):
        return None
    if re.search(r"[十百千万萬亿億或和不]", text) or (len(words[0]) == 1 and words[0].isascii()):
        return None
    return (Unit(tuple((COUNTED + _singular(word), 1) for word in words), Fraction(1)),)


def _singular(word: str) -> str:
    word = word.lower().rstrip(".,")
    return word.removesuffix("es") if word.endswith(("xes", "ches", "shes", "sses")) else word.removesuffix("s")
