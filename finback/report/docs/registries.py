"""Normalizes answers to registers: SPDX licences, BCP 47 languages, dates and addresses. Does not import torch."""

import re
import tomllib
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from finback.config import did_you_mean

_TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PERMISSIVE, COPYLEFT, OTHER = (set(_TABLES["licences"][k].split()) for k in ("permissive", "copyleft", "other"))
HUB = set(_TABLES["licences"]["hub"].split())
# common ways to write the words of an identifier, replaced before spellings are compared
_WORDS = (
    (r"https?://(?:www\.)?(?:spdx|opensource)\.org/licenses?/([^/\s]+?)(?:\.html|/)*$", r"\1"),
    (r"https?://(?:www\.)?apache\.org/licenses/license-([\d.]+\d)\S*$", r"apache \1"),
    (r"https?://(?:www\.)?gnu\.org/licenses/(?:old-licenses/)?([a-z]+-[\d.]+\d)\S*$", r"\1"),
    (r"https?://(?:www\.)?creativecommons\.org/licenses/([a-z-]+)/([\d.]+)\S*$", r"cc \1 \2"),
    (r"https?://(?:www\.)?creativecommons\.org/publicdomain/zero/([\d.]+)\S*$", r"cc0 \1"),
    (r"\(.*\)\s*$", ""),
    (r"gnu\s+(?=[al]?gpl)", ""),
    (r"gnu affero general public", "agpl"),
    (r"gnu (lesser|library) general public", "lgpl"),
    (r"gnu general public", "gpl"),
    (r"gnu free documentation", "gfdl"),
    (r"creative commons (zero|cc0)|cc zero", "cc0"),
    (r"creative commons|\bcc(?=-?(by|0))", "cc "),
    (r"\bcc ?0\s*$", "cc0 1.0"),
    (r"attribution", "by"),
    (r"share[- ]?alike", "sa"),
    (r"non[- ]?commercial", "nc"),
    (r"no[- ]?deriv(ative)?s?( works)?", "nd"),
    (r"mozilla public", "mpl"),
    (r"eclipse public", "epl"),
    (r"boost software", "bsl"),
    (r"european union public", "eupl"),
    (r"sil open font|open font", "ofl"),
    (r"academic free", "afl"),
    (r"apache software|\basl\b", "apache"),
    (r"\bexpat\b", "mit"),
    (r"(new|modified|revised) bsd", "bsd 3 clause"),
    (r"(simplified|freebsd) bsd", "bsd 2 clause"),
    (r"(or|and) (any )?(later|newer)( version)?|or-later|\+", " or later "),
    (
        r"\b(the|licen[cs]ed?|under|version|public domain dedication|international|unported|universal|only|dedication)\b",
        " ",
    ),
)


def licence(text: str) -> str:
    """Apache License 2.0 -> Apache-2.0: the SPDX expression for common spellings; "" if there is none, or several."""
    text = text.strip()
    if re.fullmatch(r"(DocumentRef-[A-Za-z0-9.-]+:)?LicenseRef-[A-Za-z0-9.-]+", text):
        return text
    found = _licences().get(text.lower()) or _spelt().get(_spelling(text), "")
    parts: list[str] = re.split(r"\s+(AND|OR)\s+", text.strip("()"))
    if found or len(parts) == 1:
        name, _, exception = text.partition(" WITH ")
        if not found and re.fullmatch(r"[A-Za-z0-9.-]+", exception) and (base := licence(name)):
            return f"{base} WITH {exception}"
        return found
    named = [part if i % 2 else licence(part.strip(" ()")) for i, part in enumerate(parts)]
    if "" in named:
        return ""
    return " ".join(named) if len(set(parts[1::2])) == 1 or "(" not in text else ""


@lru_cache(maxsize=1)
def _licences() -> dict[str, str]:
    """Identifiers by their lower-case form; deprecated SPDX identifiers map to their successors."""
    every = PERMISSIVE | COPYLEFT | OTHER
    found = {name.lower(): name for name in every}
    for name in every:
        for old, new in (("+", "-or-later"), ("", "-only")):
            if name.endswith(old) and (heir := name.removesuffix(old) + new) in every:
                found[name.lower()] = heir
                break
    return found


@lru_cache(maxsize=1)
def _spelt() -> dict[str, str]:
    """Identifiers by their normalized spelling, without ambiguous ones."""
    found: dict[str, set[str]] = {}
    for name in _licences().values():
        found.setdefault(_spelling(name), set()).add(name)
    return {key: names.pop() for key, names in found.items() if len(names) == 1}


def _spelling(text: str) -> str:
    """Words and numbers in alphabetical order: case, order, punctuation, `v` and `.0` are ignored."""
    text = text.lower()
    for pattern, instead in _WORDS:
        text = re.sub(pattern, instead, text)
    text = re.sub(r"(?<![a-z])v(er)?[. ]*(?=\d)|(?<=[a-z])v(?=\d)|(?<=[a-z])(?=\d)|(?<=\d)(?=[a-z])", " ", text)
    words = [re.sub(r"(\.0)+$", "", word.strip(".")) for word in re.split(r"[^a-z0-9.]+", text)]
    return " ".join(sorted(filter(None, words)))


def parts_of(text: str) -> list[list[str]]:
    """Alternatives of an expression, each with the licences that apply together; unknown words stand alone."""
    known = licence(text) or licence(text.partition(" (")[0]) or text
    return [each.split(" AND ") for each in known.strip("()").split(" OR ")]


def is_open(text: str) -> bool:
    """Whether a licence lets anyone use, change and redistribute for any purpose."""
    return any(all(part.partition(" WITH ")[0] in PERMISSIVE | COPYLEFT for part in each) for each in parts_of(text))


def hub_licence(expression: str) -> str:
    """The hub's name for a licence; "other" if it has none."""
    word = re.sub(r"-(only|or-later)$", "", expression).lower()
    return word if word in HUB else "other"


@lru_cache(maxsize=1)
def _languages() -> tuple[dict[str, str], dict[str, str]]:
    """Two-letter codes by two- or three-letter code, and by English name."""
    codes: dict[str, str] = {}
    names: dict[str, str] = {}
    for line in _TABLES["languages"]["names"].strip().splitlines():
        two, three, name = line.split(" ", 2)
        codes |= dict.fromkeys((two, *three.split(",")), two)
        names[name.lower()] = two
    return codes | {code: code for code in _TABLES["languages"]["three"].split()}, names


def language(text: str) -> str:
    """eng-latn_gb -> en-Latn-GB: a BCP 47 tag in canonical form; "" if it is not one."""
    first, *rest = re.split(r"[-_]", text.strip())
    found = [_languages()[0].get(first.lower(), "")]
    seen: set[str] = set()
    kinds = ("script", "region", "variant", "extension")
    for i, part in enumerate(rest):
        kind, form = _subtag(part)
        if kind == "extension":  # -u-co-phonebk, -x-mine: private extensions
            found += [p.lower() for p in rest[i:]] if len(rest) > i + 1 and all(rest[i:]) else [""]
            break
        late = any(kinds.index(kind) < kinds.index(k) or kind == k != "variant" for k in seen) if form else False
        found.append("" if late else form)
        seen.add(kind)
    return "-".join(found) if all(found) else ""


def _subtag(text: str) -> tuple[str, str]:
    """The kind of a language subtag, and its canonical form; "" for neither."""
    if text.title() in _TABLES["languages"]["scripts"].split():
        return "script", text.title()
    if text.upper() in _TABLES["languages"]["regions"].split() or re.fullmatch(r"[0-9]{3}", text):
        return "region", text.upper()
    if re.fullmatch(r"[a-wyzA-WYZ0-9]|[xX]", text):
        return "extension", text.lower()
    return "variant", text.lower() if re.fullmatch(r"[A-Za-z0-9]{5,8}|[0-9][A-Za-z0-9]{3}", text) else ""


def day(text: str) -> str:
    """A date as YYYY-MM-DD, also from a date with a time; "" if it does not exist."""
    found = re.fullmatch(r"(\d{4}-\d{2}-\d{2})([T ]\d{2}:\d{2}\S*)?", text.strip())
    try:
        return date.fromisoformat(found[1]).isoformat() if found else ""
    except ValueError:
        return ""


def month(text: str) -> str:
    """A month as MM/YYYY; "" if it does not exist."""
    found = re.fullmatch(r"(\d{1,2})/(\d{4})|(\d{4})-(\d{2})", text.strip())
    number, year = (int(found[1] or found[4]), found[2] or found[3]) if found else (0, "")
    return f"{number:02d}/{year}" if 1 <= number <= 12 else ""


def address(text: str) -> str:
    """A public URL; "" for anything else, including local files."""
    found = re.fullmatch(r"(?!file:)[a-z][a-z0-9+.-]*://[^\s/]+\S*|(mailto|urn|doi):\S+", text.strip(), re.I)
    return text.strip() if found else ""


def said_of(form: str, value: str) -> str:
    """What to write instead of an invalid answer."""
    if form == "licence":
        near = did_you_mean(value.lower(), _licences(), " ")
        return f"{near} Write an identifier of spdx.org/licenses, or LicenseRef-NAME for terms of your own.".strip()
    if form == "languages":
        two: Any = _languages()[1].get(value.strip().lower())
        return f"Write {two or 'en'!r}{'' if two else ', pt-BR or zh-Hant: a BCP 47 tag'}."
    return {
        "day": "Write an existing day, as 2026-02-28.",
        "month": "Write a month as 02/2026.",
        "address": "Write an address such as https://example.org/model.",
    }[form]


# parsers of answers that are not free text
FORMS = {"licence": licence, "languages": language, "day": day, "month": month, "address": address}
