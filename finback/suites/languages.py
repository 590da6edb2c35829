"""Does a model answer in the language it is asked in? Sums in words, in five languages, made from a seed. No torch here.

R1-Zero mixed languages within a chain (R1 2.3.2). Here an answer counts if its number is right and its words are in the
question's language; `Suite.language` asks for the same share of the chains, which the check does not see.
"""

import random
from functools import partial

from finback.config import UserError, did_you_mean
from finback.suites.problems import ProblemList, fingerprint
from finback.suites.suite import Suite, SuiteSource
from finback.tasks import answers
from finback.tasks.language import consistency
from finback.tasks.task import NO_ANSWER, Problem, Verdict

DEFAULT = 50  # problems
_LONGEST = 20_000  # characters of an answer of two sentences
SHARE = 0.95  # of an answer's words; names of people and places may stay
# Each asks for a + b * c in the words of its language; {n} is a name.
_QUESTIONS = {
    "en": (
        "{n} has {a} apples and buys {b} bags with {c} apples each. How many apples does {n} have now?",
        "A train has {a} empty seats. At each of {b} stations {c} people get off and nobody gets on. How many seats are empty then?",
    ),
    "de": (
        "{n} hat {a} Äpfel und kauft {b} Tüten mit je {c} Äpfeln. Wie viele Äpfel hat {n} jetzt?",
        "In einem Zug sind {a} Plätze frei. An {b} Bahnhöfen steigen je {c} Leute aus und niemand ein. Wie viele Plätze sind dann frei?",
    ),
    "fr": (
        "{n} a {a} pommes et achète {b} sacs de {c} pommes chacun. Combien de pommes {n} a-t-il maintenant ?",
        "Un train a {a} places libres. À chacune des {b} gares, {c} personnes descendent et personne ne monte. Combien de places sont alors libres ?",
    ),
    "es": (
        "{n} tiene {a} manzanas y compra {b} bolsas con {c} manzanas cada una. ¿Cuántas manzanas tiene {n} ahora?",
        "Un tren tiene {a} asientos libres. En cada una de {b} estaciones bajan {c} personas y no sube nadie. ¿Cuántos asientos quedan libres?",
    ),
    "zh": (
        "{n}有{a}个苹果，又买了{b}袋，每袋{c}个苹果。{n}现在有多少个苹果？",
        "一列火车有{a}个空座位。在{b}个车站，每站有{c}个人下车，没有人上车。现在有多少个空座位？",
    ),
}
_PEOPLE = {
    "en": "Anna Ben Carl Dora",
    "de": "Anna Ben Karl Dora",
    "fr": "Luc Paul Marc Jean",
    "es": "Ana Luis Carlos Elena",
    "zh": "小明 小红 小刚 小丽",
}
_ASKED = {
    "en": "Explain in one or two sentences, in English. Put the number in \\boxed{}.",
    "de": "Erkläre es in ein oder zwei Sätzen auf Deutsch. Schreibe die Zahl in \\boxed{}.",
    "fr": "Explique en une ou deux phrases, en français. Écris le nombre dans \\boxed{}.",
    "es": "Explícalo en una o dos frases, en español. Escribe el número en \\boxed{}.",
    "zh": "请用一两句中文说明，并把数字写在 \\boxed{} 中。",
}


def names() -> list[str]:
    """What can follow "language:"."""
    return sorted(_QUESTIONS)


def load(language: str, problems: int | None, seed: int) -> Suite:
    """Distinct questions in one language."""
    if language not in _QUESTIONS:
        raise UserError("suite.language", language, "no such language", did_you_mean(language, _QUESTIONS))
    made = _made(language, DEFAULT if problems is None else problems, random.Random(seed))
    return Suite(
        name=f"language:{language}",
        problems=made,
        task=ProblemList(f"language:{language}", made, partial(judge, language)),
        source=SuiteSource(f"generated, seed {seed}", "MIT", fingerprint(made)),
        prompt=f"{{question}}\n{_ASKED[language]}",
        extraction=r"the number in \boxed{}, and all words of the answer",
        metric="right and in the language",
        chance=0.0,
        language=language,
    )


def judge(language: str, problem: Problem, answer: str) -> Verdict:
    """Right if the number is and the words are in the language; an answer without words has none."""
    given = answers.final_answer(answer) if len(answer) <= _LONGEST and answers.boxed(answer) else None
    number = answers.number(given) if given is not None else None
    share = consistency(answer, language) if number is not None else None
    if number is None or share is None:
        return NO_ANSWER
    return Verdict(correct=number.value == int(problem.answer) and share >= SHARE, well_formed=True)


def _made(language: str, n: int, rng: random.Random) -> tuple[Problem, ...]:
    if not 1 <= n <= 2000:
        raise UserError("problems", n, "not in 1..2000", "Correct it.")
    found: dict[str, Problem] = {}
    while len(found) < n:
        template = rng.choice(_QUESTIONS[language])
        people = _PEOPLE[language].split() if "{n}" in template else [""]
        name, a, b, c = rng.choice(people), rng.randint(2, 60), rng.randint(2, 9), rng.randint(2, 12)
        question = template.format(n=name, a=a, b=b, c=c)
        found.setdefault(question, Problem(question, str(a + b * c), f"language: {question}"))
    return tuple(found.values())
