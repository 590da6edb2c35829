"""Answers for documents are looked up in their registers, whatever the spelling, or refused with a correction."""

from pathlib import Path

import pytest

from finback.config import UserError
from finback.report.docs import public, questionnaire, registries

LICENCES = {
    "Apache-2.0": (
        *(
            "apache 2.0",
            "APACHE-2.0",
            "Apache License 2.0",
            "apache2",
            "Apache v2",
            "apache-2",
            "Apache License, Version 2.0",
        ),
        *("The Apache Software License, Version 2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
    ),
    "MIT": ("mit", "The MIT License (MIT)", "MIT license", "Expat", "https://opensource.org/licenses/MIT", " MIT "),
    "BSD-3-Clause": ("bsd 3-clause", "3-Clause BSD License", "New BSD", "BSD-3-clause"),
    "GPL-3.0-only": ("GPLv3", "gpl-3.0", "GNU GPL v3", "GNU General Public License v3.0 only"),
    "GPL-3.0-or-later": ("GPL-3.0+", "GNU General Public License v3 or later", "gplv3+", "gpl-3.0-OR-later"),
    "LGPL-2.1-only": ("LGPL 2.1", "GNU Lesser General Public License v2.1"),
    "CC-BY-4.0": (
        "CC BY 4.0",
        "Creative Commons Attribution 4.0 International",
        "https://creativecommons.org/licenses/by/4.0/",
    ),
    "CC-BY-SA-4.0": ("cc-by-sa 4.0", "Creative Commons Attribution-ShareAlike 4.0"),
    "CC-BY-NC-ND-4.0": ("CC BY-NC-ND 4.0", "Creative Commons Attribution-NonCommercial-NoDerivatives 4.0"),
    "CC0-1.0": ("CC0", "cc0 1.0", "Creative Commons Zero v1.0 Universal"),
    "MPL-2.0": ("MPL 2.0", "Mozilla Public License 2.0"),
    "Unlicense": ("The Unlicense",),
    "MIT OR Apache-2.0": ("MIT OR apache 2.0", "(MIT OR Apache-2.0)"),
    "GPL-2.0-only WITH Classpath-exception-2.0": ("GPL-2.0-only WITH Classpath-exception-2.0",),
    "LicenseRef-Mine-1": ("LicenseRef-Mine-1",),
    "": (
        "apache 3.0",
        "GPL",
        "BSD",
        "CC-BY",
        "Llama 3",
        "proprietary",
        "none",
        "-",
        "words",
        "MIT OR mine",
        "LicenseRef-",
        "",
    ),
}
LANGUAGES = {
    "en": ("en", "EN", "eng"),
    "de": ("ger", "deu"),
    "en-US": ("en_us", "EN-us"),
    "zh-Hant-TW": ("zh-hant-tw",),
    "es-419": ("es-419",),
    "de-1996": ("de-1996",),
    "gsw": ("gsw",),
    "en-x-mine": ("en-x-Mine",),
    "": ("english", "xx", "zz", "e", "", "en-", "en-US-US", "en-GB-Latn", "de-QQQ", "en us", "123"),
}


@pytest.mark.parametrize(("wanted", "spelt"), [(w, s) for w, every in LICENCES.items() for s in every])
def test_a_licence_is_known_however_it_is_spelt(wanted: str, spelt: str) -> None:
    assert registries.licence(spelt) == wanted


def test_every_identifier_is_itself_or_what_took_its_place() -> None:
    every = registries.PERMISSIVE | registries.COPYLEFT | registries.OTHER
    assert len(every) > 650
    assert not [n for n in every if registries.licence(n) not in (n, f"{n}-only", n.replace("+", "-or-later"))]
    assert registries.hub_licence("GPL-3.0-or-later") == "gpl-3.0" and registries.hub_licence("JSON") == "other"


@pytest.mark.parametrize(("wanted", "spelt"), [(w, s) for w, every in LANGUAGES.items() for s in every])
def test_a_language_is_a_tag_of_bcp_47(wanted: str, spelt: str) -> None:
    assert registries.language(spelt) == wanted


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("licence = 'apache 2.0'", "Apache-2.0"),
        ("languages = ['EN_us', 'deu']", ["en-US", "de"]),
        ("released = '2026-02-01'", "2026-02-01"),
        ("released = 2026-02-01T10:00:00Z", "2026-02-01"),
        ("download = 'https://example.org/m'", "https://example.org/m"),
        ("name = '  '", None),
        ("licence = 'apach 2.0'", "not a licence of SPDX's list.*LicenseRef-NAME"),
        ("languages = ['en', 'German']", "not a language of BCP 47.*Write 'de'"),
        ("released = '2026-02-30'", "not a valid day.*2026-02-28"),
        ("released = '1.2.2026'", "not a valid day"),
        ("released = 10:00:00", "not a valid day"),
        ("eu_date = 'soon'", "not a valid day"),
        ("download = '/home/me/model'", "not a valid address"),
        ("download = 'file:///home/me/model'", "not a valid address"),
    ],
)
def test_answers_are_kept_in_one_spelling_or_refused(line: str, wanted: str | list[str] | None, tmp_path: Path) -> None:
    path, key = tmp_path / "answers.toml", f"model.{line.partition(' ')[0]}"
    path.write_text(f"\ufeff[model]\n{line}\n", encoding="utf-8")  # a byte order mark, which some editors write
    if isinstance(wanted, str) and wanted.startswith("not "):
        with pytest.raises(UserError, match=wanted):
            questionnaire.read(path)
    else:
        assert questionnaire.read(path).given.get(key) == wanted


@pytest.mark.parametrize("value", ["nan", "inf", "-1.0"])
def test_numbers_are_amounts(value: str, tmp_path: Path) -> None:
    (tmp_path / "answers.toml").write_text(f"[base]\nflop = {value}\n")
    with pytest.raises(UserError, match="negative or not a number"):
        questionnaire.read(tmp_path / "answers.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("/home/me/words.txt", "words.txt"),
        ("/home/my own/words.txt", "words.txt"),
        ("~/words", "words"),
        ("../a/words", "words"),
        ("C:\\Users\\me\\words.txt", "words.txt"),
        ("file:///home/me/words.txt", "words.txt"),
        ("read from /srv/a/b.txt, and (/srv/a/c.txt)", "read from b.txt, and (c.txt)"),
        ("read from /srv/my own things/c.txt today", "read from c.txt today"),
        ("org/name", "org/name"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("1/2/2026 and km/h", "1/2/2026 and km/h"),
        ("<think>a</think>", "<think>a</think>"),
        ("12 / 4 / 3", "12 / 4 / 3"),
    ],
)
def test_paths_lose_their_folders_and_nothing_else_does(text: str, said: str) -> None:
    assert public.without_paths(text) == said
