"""Language consistency on real sentences of several languages, and which chains are readable."""

import time

import pytest

from finback.config import UserError
from finback.tasks.language import consistency, words
from finback.tasks.readable import Readable, code_share, longest_paragraph, repeated_lines, repeated_ngrams

ENGLISH = """Let me think. Natalia sold clips to her friends in April, and then she sold half as many in May.
So in May she sold half of 48, which is 48/2 = 24 clips. Wait, let me check this again: half of forty-eight is
twenty-four. Hmm, yes. Altogether she sold $48 + 24 = 72$ clips, so the answer should be seventy-two."""
GERMAN = """Zuerst berechnen wir, wie viele Klammern sie im Mai verkauft hat. Das ist die Hälfte von 48, also 24.
Moment, ich prüfe das noch einmal. Zusammen sind es 72 Klammern, und damit ist die Aufgabe gelöst."""
FRENCH = """D'abord, on calcule combien elle en a vendu au mois de mai. C'est la moitié de 48, donc 24. Attends, je
vérifie encore une fois. En tout, elle a vendu 72 pinces, et c'est la réponse que nous cherchons."""
SPANISH = "Primero calculamos cuántos vendió en mayo. Es la mitad de 48, así que son 24. Espera, lo compruebo otra vez."
CHINESE = "首先我们计算五月份卖了多少个夹子。四月份的一半是二十四个。等一下，让我再检查一遍。所以一共卖了七十二个夹子。"
JAPANESE = "まず、五月に売れたクリップの数を計算します。四月の半分なので二十四個です。もう一度確認してみましょう。"
RUSSIAN = "Сначала посчитаем, сколько заколок она продала в мае. Это половина от 48, то есть 24. Проверим ещё раз."
UKRAINIAN = (
    "Спочатку порахуємо, скільки шпильок вона продала в травні. Це половина від 48, тобто 24. Перевіримо ще раз."
)


def share(chain: str, target: str = "en", *others: str) -> float:
    value = consistency(chain, target, others) if others else consistency(chain, target)
    assert value is not None
    return value


@pytest.mark.parametrize(
    ("text", "target", "others"),
    [
        (ENGLISH, "en", ()),
        (GERMAN, "de", ("en", "fr", "nl")),
        (FRENCH, "fr", ("en", "de", "es", "it")),
        (SPANISH, "es", ("en", "pt", "it", "fr")),
        (CHINESE, "zh", ("en", "ja")),
        (JAPANESE, "ja", ("en", "zh")),
        (RUSSIAN, "ru", ("en", "uk", "bg")),
        (UKRAINIAN, "uk", ("en", "ru")),
    ],
)
def test_a_chain_in_its_own_language(text: str, target: str, others: tuple[str, ...]) -> None:
    assert share(text, target, *others) > 0.97


@pytest.mark.parametrize("text", [GERMAN, FRENCH, SPANISH, CHINESE, JAPANESE, RUSSIAN])
def test_a_chain_in_another_language(text: str) -> None:
    assert share(text) < 0.04


def test_neighbours_of_one_script() -> None:
    assert share(UKRAINIAN, "ru", "uk") < 0.1
    assert share(CHINESE, "ja", "zh") < 0.1 and share(JAPANESE, "zh", "ja") < 0.1
    assert share(GERMAN, "en", "fr") > 0.5 > share(GERMAN)  # an unlisted language is mostly missed
    assert share(CHINESE) == 0  # another script need not be listed


def test_mixed_chains() -> None:
    both = f"{ENGLISH}\n{GERMAN}"
    n, m = len(words(ENGLISH)), len(words(GERMAN))
    assert share(both) == pytest.approx(n / (n + m), abs=0.05)
    assert share(both, "de", "en") == pytest.approx(m / (n + m), abs=0.05)
    third = f"{ENGLISH} {FRENCH} {SPANISH}"
    total = sum(len(words(text)) for text in (ENGLISH, FRENCH, SPANISH))
    assert share(third) == pytest.approx(n / total, abs=0.08)
    switching = (
        "First we add them up. Dann teilen wir alles durch zwei. Now check the result again. Das stimmt also wirklich."
    )
    assert share(switching) == pytest.approx(0.5, abs=0.1)


def test_two_chinese_words_in_an_english_chain() -> None:
    mixed = ENGLISH.replace("Wait", "等等").replace("check", "检查")
    n = len(words(ENGLISH.replace("$48 + 24 = 72$", "")))
    assert share(mixed) == pytest.approx((n - 2) / n, abs=0.005)
    assert share(mixed) < share(ENGLISH) == 1


def test_chinese_is_counted_by_its_characters() -> None:
    assert sum(word.size for word in words("计算面积")) == 2 and sum(word.size for word in words("和")) == 1
    assert share("计算面积 add them") == 0.5


@pytest.mark.parametrize(
    "chain", ["", "  \n", "3+1=4\n4-2=2", "$x^2 = 4$", "x = 5", "\\frac{a}{b}", "`while`", "α → β", "🙂"]
)
def test_without_words_there_is_no_consistency(chain: str) -> None:
    assert consistency(chain) is None


def test_formulas_and_code_are_no_words_but_hide_nothing() -> None:
    code = "```python\nfuer_alle = [zahl for zahl in werte]\n```"
    assert share(f"We write a short program for this. {code} That is all we need. $\\sin\\alpha$") == 1
    assert share("We write a short program. ```\n# 首先我们计算五月份卖了多少个夹子\n```") < 0.5
    assert share("So it is $\\text{首先我们计算五月份卖了多少个夹子}$ as we said.") < 0.5
    assert share(f"We say $\\text{{{GERMAN.splitlines()[1]}}}$.") < 0.4
    assert share(f"{CHINESE} ```python\nprint(total)\n``` \\frac{{a}}{{b}}", "zh") == 1
    assert share("Ｗｅ　ａｄｄ　ｔｈｅｍ　ａｌｌ　ｔｏｇｅｔｈｅｒ") == 1  # full-width letters


def test_names_are_not_held_against_a_chain() -> None:
    assert share("Juan has three apples and Maria has five, so together Juan and Maria have eight apples.") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("$" * 10_000, None),
        ("```" * 10_000, None),
        ("\\(" * 10_000, None),
        ("a " * 10_000, None),
        ("\ud800 word", 1.0),
        ("\0" * 1000, None),
    ],
    ids=["dollars", "fences", "brackets", "letters", "surrogate", "nul"],
)
def test_no_text_takes_long_or_fails(text: str, expected: float | None) -> None:
    share("The models of the languages are loaded before the clock starts.")
    start = time.process_time()
    assert consistency(text) == expected
    assert time.process_time() - start < 20


@pytest.mark.parametrize("code", ["xx", "english", ""])
def test_unknown_languages_are_refused(code: str) -> None:
    with pytest.raises(UserError, match=f"language = '{code}': no such language"):
        consistency("some words", code)


def test_repetition_by_hand() -> None:
    assert repeated_lines("first long line\nsecond long line\nfirst  long line\nfirst long line") == 0.5
    assert repeated_lines("}\n}\n}") == 0 == repeated_lines("")
    assert repeated_ngrams("a b c a b c a b", n=3) == 0.5  # six runs, three different
    assert repeated_ngrams("我们我们我们", n=2) == pytest.approx(0.6)
    assert repeated_ngrams("too short") == 0


def test_paragraphs_and_code_by_hand() -> None:
    assert longest_paragraph("one two\nthree four\n\nfive six") == 4 and longest_paragraph("") == 0
    assert longest_paragraph("one two\n```\nmany many words in a program\n```\nfive six") == 2
    assert code_share("12345\n```\n12\n```") == pytest.approx(11 / 16, abs=0.07) and code_share("") == 0
    assert code_share("```\nnever closed") == 1


def test_readable_chains_and_others() -> None:
    readable = Readable()
    assert readable(ENGLISH) and readable("3+1=4\n4-2=2") and hash(readable)
    program = "We count with a short program that adds them up.\n```python\nprint(48 + 24)\n```\nIt prints 72, so we are done."
    assert readable(program) and not Readable(code=0.0)(program)
    faulty = {
        "": ("empty",),
        "The answer is 5, I think.\n" * 9: ("repeated lines", "repeated words"),
        "wait " * 200: ("repeated words",),
        " ".join(f"{ENGLISH} {i}" for i in "abcdef"): ("repeated lines", "repeated words", "long paragraph"),
        f"Let us see now.\n```\n{ENGLISH}\n```": ("much code",),
        f"{ENGLISH}\n```\nx": ("scattered code",),
        ENGLISH + "\n```\nx\n```\nor\n" * 4: ("scattered code",),
        f"{ENGLISH}\n{FRENCH}": ("mixed languages",),
        f"{ENGLISH} 首先": (),
        f"{ENGLISH} {CHINESE}": ("mixed languages",),
    }
    assert {chain: readable.faults(chain) for chain in faulty} == faulty
    with pytest.raises(UserError, match=r"readable\.code = 2: a share is between 0 and 1"):
        Readable(code=2)
