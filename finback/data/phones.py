"""Finds telephone numbers of any country in text, with Google's metadata (the phonenumbers library).

A number is recognized by its form (a country code, an area code in parentheses, a leading 0, America's 3-3-4), or by a
preceding word if some country has such a number. Bare runs of digits, dates, amounts and lists are left alone.
Does not import torch.
"""

import re
from array import array
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

from finback.config import UserError
from finback.extras import how_to_install

_SPACE = " \u00a0\u2009\u202f"
_DASH = "\\-\u2010-\u2015"
_SEPARATOR = rf"[{_SPACE}.{_DASH}/()]"
# the shortest number has seven digits, so only runs of seven are examined
_SEVEN = re.compile(rf"\d(?:{_SEPARATOR}{{0,3}}\d){{6}}")
_RUN = re.compile(rf"(?:[+＋][{_SPACE}]?)?\(?[+＋]?\d(?:{_SEPARATOR}{{0,3}}\d){{6,}}+\)?")
_LATIN = r"0-9A-Za-z_\u00c0-\u058f"
# context before digits that belong to something else: a name, an amount of money, an expression
_BEFORE_ANY = re.compile(rf"(?:[{_LATIN}$€£¥₹\\]|[{_LATIN}][-/])$")
_BEFORE_WEAK = re.compile(rf"(?:[%#^*=.,-]|[{_LATIN}][.=&?,'+*^]|\d ?[+*/=-] ?)$")
_BEHIND_ANY = re.compile(rf"\d|[-_][{_LATIN}]|\.\d")
_BEHIND_WEAK = re.compile(rf"(?!\s?(?:x|ext)\.?\s?\d)(?:[{_LATIN}]|/[{_LATIN}]|,\d|\s?[%€£¥₹$°*+=^])")
_DATE = re.compile(
    rf"(?<!\d)(?:(?:19|20)\d\d([-./ ])\d\d?\1\d\d?|\d\d?([-./ ])\d\d?\2(?:19|20)\d\d|(?:19|20)\d\d ?[{_DASH}/] ?(?:19|20)\d\d"
    rf"|[0-2]?\d\.[0-5]\d ?[{_DASH}] ?[0-2]?\d\.[0-5]\d)(?!\d)"  # years, opening hours
)
_GROUP = re.compile(r"\d+")
_AMERICAN = re.compile(
    rf"(?:\(\d{{3}}\)[ ]?[ .{_DASH}]?|\d{{3}}[{_SPACE}.{_DASH}])\d{{3}}[{_SPACE}.{_DASH}]\d{{4}}(?!\d)"
)
_AMERICAN_HERE = re.compile(rf"(?:1[{_SPACE}.{_DASH}])?(?:{_AMERICAN.pattern})")
_THOUSANDS = re.compile(rf"\d{{1,3}}(?:[{_SPACE}.]\d{{3}})+")
_YEAR = re.compile(r"\((?:19|20)\d\d\)")
# a word for a telephone, followed by at most a few words
_CALLED = re.compile(
    r"(?:\b(?:tel|telephone|phones?|telefon\w*|téléphone|teléfono|telefone|telefoon|puhelin|mobiles?|mobil|móvil|celular|cel|"
    r"cell|cellphone|handy\w*|portable|fax|whats ?app|signal|viber|telegram|hotline|landline|rufnummer|durchwahl|sms|tlf|gsm|"
    r"(?:call|text|reach|ring|dial|contact|phone) (?:me|us|him|her|them|now|at|on)|dial|llám[ae]\w*|appelez|"
    r"(?:my|his|her|your|our|the) (?:number|nummer)|phone number|тел(?:ефон\w*)?|мобильн\w+|звоните|позвоните|номер|τηλ\w*|"
    r"điện thoại|telepon|hp|wa|hívj\w*)\b|电话|手机|号码|致电|電話|携帯|手機|號碼|微信|전화|연락처|휴대폰|फ़?ोन|मोबाइल|هاتف|جوال|تلفن|موبایل|טלפון|נייד|"
    r"โทร|เบอร์)"
    r"(?:\W{0,3}\b(?:no|nr|num|number|nummer|numéro|número|numero|is|was|it's|at|on|me|us|him|her|them|now|or|and|also|work|home|"
    r"office|ist|lautet|est|es|è|é|au|al|el|le|la|il|à|по|номер|номеру|line|under|unter|via|for|to|here|mobile|phone|s)\b){0,4}"
    r"(?:[^\w+]|是|为|：|番号|は|번호|는){0,4}$",
    re.IGNORECASE,
)
_NAMED_ELSE = re.compile(
    r"(?:\b(?:orders?|invoices?|isbn|issn|account|acct|konto|id|ids|no|serial|tracking|ref|reference|ean|upc|sku|code|ticket|case|"
    r"iban|bic|timestamp|time|pmid|doi|arxiv|vin|part|model|version|v|patent|bates|customer|seed|hash|checksum|pi|rechnung\w*|"
    r"bestell\w*)\b|#)[\w'.]{0,3}\W{0,3}(?:(?:number|no|nr|is|=)\b\W{0,3}){0,2}$",
    re.IGNORECASE,
)
_AFTER_ANOTHER = re.compile(r"[^\w\n]{0,4}(?:(?:or|and|und|oder|y|o|et|ou|e|и|или)\b)?[^\w\n]{0,3}", re.IGNORECASE)
_ASIAN = re.compile("[\u3040-\u30ff\u4e00-\u9fff]")
# countries with large numbering plans are tried first, for speed only
_WIDE = ("DE", "ID", "CN", "JP", "KR", "IT", "AT", "GB", "FR", "IN", "MX", "BR")


def redact(text: str) -> tuple[str, int]:
    """The text with telephone numbers replaced by [phone], and their count."""
    if not _SEVEN.search(text):
        return text, 0
    parts: list[str] = []
    done = 0
    for run in _RUN.finditer(text):
        for start, end in _Run(text, run.start(), run.end(), done if parts else None).numbers():
            parts += text[done:start], "[phone]"
            done = end
    return "".join([*parts, text[done:]]), len(parts) // 2


class _Run:
    """A run of digits and separators of telephone numbers; it may contain several numbers, or none."""

    def __init__(self, text: str, start: int, end: int, last: int | None) -> None:
        self.text, self.start = text, start
        # end of the previous number
        self.last = last
        # start and end of each group of digits; a run may be as long as a file
        self.begins, self.ends = array("q"), array("q")
        for match in _GROUP.finditer(text, start, end):
            self.begins.append(match.start())
            self.ends.append(match.end())
        self.dated = {match.start(): match.end() for match in _DATE.finditer(text, start, end)}

    def numbers(self) -> Iterator[tuple[int, int]]:
        """Start and end of each number."""
        i, explained = 0, True  # whether everything before in this run is a number or a date
        while i < len(self.begins):
            begin = self.begins[i]
            if begin in self.dated:
                while i < len(self.begins) and self.begins[i] < self.dated[begin]:
                    i += 1
                continue
            j = self._number_at(i, explained) if i == 0 or self._gap(i) else None
            if j is None:
                explained, i = False, i + 1
                continue
            self.last = self._end(i, j)
            yield self._begin(i), self.last
            i = j + 1

    def _gap(self, i: int) -> bool:
        """Whether a number may start with group i: a separator of numbers precedes it."""
        between = self.text[self.ends[i - 1] : self.begins[i]]
        return any(c in between for c in f"{_SPACE}/")

    def _begin(self, i: int) -> int:
        begin = self.begins[i]
        if i == 0:
            return self.start
        return begin - (self.text[begin - 1] == "(")

    def _end(self, i: int, j: int) -> int:
        """Position after group j, including a closing parenthesis."""
        end = self.ends[j]
        return end + (self.text[end : end + 1] == ")" and "(" in self.text[self._begin(i) : end])

    def _number_at(self, i: int, explained: bool) -> int | None:
        """The last group of the longest number that starts with group i."""
        begin = self._begin(i)
        if i and not explained and not _AMERICAN_HERE.match(self.text, begin):
            return None  # after something that is not a number, only this form is unambiguous
        lines = self.text[max(0, begin - 60) : begin].rsplit("\n", 2)
        before, above = lines[-1], "\n".join(lines[-2:])  # "Phone:" may be on the line above
        words = before if before.strip() else above
        called = i == 0 and bool(_CALLED.search(words))  # there are no words within a run
        called |= self.last is not None and bool(_AFTER_ANOTHER.fullmatch(self.text, self.last, begin))
        if _BEFORE_ANY.search(before) and not called:
            return None
        weak = explained and (called or not (_BEFORE_WEAK.search(before) or _NAMED_ELSE.search(before)))
        asian = bool(_ASIAN.search(before[-10:]))
        possible = None
        sizes = list(accumulate(self.ends[k] - self.begins[k] for k in range(i, min(i + 8, len(self.begins)))))
        for j in (i + n for n in reversed(range(len(sizes))) if 7 <= sizes[n] <= 15):
            end = self._end(i, j)
            shown = self.text[begin:end]
            if not self._may_end(j, end):
                continue
            if _is_american(shown, called):
                return j
            if shown.lstrip("(")[0] in "+＋":
                if (verdict := _international(shown)) == "valid":
                    return j
                possible = j if verdict and possible is None else possible
            elif weak and not _BEHIND_WEAK.match(self.text, end) and self._is_national(shown, j, called, asian):
                return j
        return possible

    def _may_end(self, j: int, end: int) -> bool:
        return not _BEHIND_ANY.match(self.text, end) if j == len(self.begins) - 1 else self._gap(j + 1)

    def _is_national(self, shown: str, j: int, called: bool, asian: bool) -> bool:
        """Whether digits without a country code are a number, by their form or the preceding word."""
        digits = _digits(shown)
        groups = [len(group) for group in _GROUP.findall(shown)]
        if digits in "01234567890123456789" or len(set(digits)) == 1:
            return False
        if (abroad := re.match(r"0(?:0|11) ?-?(?=[1-9])", shown)) and _international(shown[abroad.end() :]) == "valid":
            return True
        if called and _is_called(shown, digits):
            return True
        if "(" in shown:
            inside = re.search(r"\((\d+)\)", shown)
            fits = inside is not None and 2 <= len(inside[1]) <= 5 and not _YEAR.search(shown)
            return fits and 8 <= len(digits) <= 12 and len(groups) > 1 and is_known(digits)
        if re.match("0[1-9]", digits) and groups[0] > 1 and 9 <= len(digits) <= 12:
            listed = j + 1 < len(self.begins) and self.ends[j + 1] - self.begins[j + 1] == groups[-1] < 3
            decimal = "." in shown and len(groups) == 2
            long_enough = len(groups) > 1 or len(digits) > 9
            return not listed and not decimal and long_enough and not _is_list(shown) and is_known(digits)
        if re.fullmatch(r"1[3-9]\d{9}", digits):  # a Chinese mobile
            return (groups == [3, 4, 4] or (asian and groups == [11])) and is_known(digits)
        return groups == [1, 3, 3, 2, 2] and digits[0] == "8" and is_known(digits)  # Russian


def _digits(shown: str) -> str:
    """Digits of any script as ASCII."""
    return "".join(str(int(c)) for c in shown if c.isdecimal())


def _is_list(shown: str) -> bool:
    """Whether groups are separate items: 01 02 03 04 05, 0800 1200 1630, 0001 0010 0100."""
    groups = _GROUP.findall(shown)
    if set("".join(groups)) <= {"0", "1"} or (len(groups) > 1 and all(group[0] == "0" for group in groups)):
        return True
    pairs = all(len(group) <= 2 for group in groups[:-1])
    if pairs and (
        re.fullmatch("(?:19|20)..", groups[-1]) or len(set(re.findall(r"\D+", shown))) > 1 == len(groups[-1]) - 1
    ):
        return True  # dates
    counted = len(groups) > 2 and all(int(b) - int(a) == 1 for a, b in pairwise(groups))
    return counted or (len(groups) > 1 and all(re.fullmatch(r"[01]\d[0-5]\d|2[0-3][0-5]\d", group) for group in groups))


def _is_american(shown: str, called: bool) -> bool:
    """3-3-4 with any area code: fictitious numbers are redacted too."""
    bare = re.sub(rf"^\(?[+＋]?1\)?[{_SPACE}.{_DASH}]", "", shown)
    if not _AMERICAN.fullmatch(bare):
        return False
    if any(c in bare for c in "(.-\u2010\u2011\u2012\u2013"):
        return True
    return called or _is_valid(_digits(bare), "US")


def _is_called(shown: str, digits: str) -> bool:
    """Whether some country has the number, after a word for telephone; 555-1234 is a short form."""
    if re.fullmatch(rf"\d{{3}}[{_SPACE}.{_DASH}]\d{{4}}", shown):
        return True
    if _THOUSANDS.fullmatch(shown) and (len(digits) % 3 or digits.endswith("000")):
        return False
    return (len(digits) == 10 and digits.startswith("555")) or is_known(digits)


def _international(shown: str) -> str:
    """ "valid" for a number in a country's plan, "possible" for one of valid length, else ""."""
    library = _library()
    digits, groups = _digits(shown), [len(group) for group in _GROUP.findall(shown)]
    try:
        number = library.parse("+" + digits, None)
    except library.NumberParseException:
        return ""
    code = len(str(number.country_code))
    if groups[0] < code and code not in (sum(groups[:2]), sum(groups[:3])):
        return ""  # +3.14159265 is not a Dutch telephone number
    if library.is_valid_number(number):
        return "valid"
    if (
        _THOUSANDS.fullmatch(shown.strip("+＋ "))
        or not number.national_number
        or not library.is_possible_number(number)
    ):
        return ""
    return "possible"


@lru_cache(maxsize=65536)
def is_known(digits: str) -> bool:
    """Whether these digits can be dialed within some country."""
    candidates = (
        r for r, prefix, plan in _plans() if plan.fullmatch(digits) or plan.fullmatch(digits.removeprefix(prefix))
    )
    return any(_is_valid(digits, region) for region in candidates)


def _is_valid(digits: str, region: str) -> bool:
    library = _library()
    try:
        return bool(library.is_valid_number_for_region(library.parse(digits, region), region))
    except library.NumberParseException:
        return False


@lru_cache(maxsize=1)
def _plans() -> list[tuple[str, str, re.Pattern[str]]]:
    """Each country, its national prefix, and the pattern of its numbers."""
    library = _library()
    regions = [*_WIDE, *sorted(set(library.SUPPORTED_REGIONS) - set(_WIDE))]
    known = ((region, library.PhoneMetadata.metadata_for_region(region)) for region in regions)
    return [(r, m.national_prefix or "", re.compile(m.general_desc.national_number_pattern)) for r, m in known]


def _library() -> Any:
    try:
        import phonenumbers
    except ImportError:
        problem = "the package `phonenumbers`, which finds telephone numbers, is not installed"
        raise UserError("text", "phone", problem, how_to_install("phonenumbers")) from None
    return phonenumbers
