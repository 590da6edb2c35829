r"""Prepares mathematics for math-verify: one LaTeX expression, without words or a second answer. Does not import torch."""

import re

from finback.tasks.notation import EXCEPT, NO_SOLUTION, REALS, latex, plain, undollared, unstyled, unwrapped
from finback.tasks.units import COUNTED, Unit, units

_NAMES = (
    "sin cos tan cot sec csc log ln exp sqrt lim max min mod gcd lcm arcsin arccos arctan sinh cosh tanh det dim ker deg "
    "adj arg Re Im"
)
_FUNCTIONS = frozenset(_NAMES.split())
_WORDS = ("or", "is", "no", "to", "if")
_DOLLARS = re.compile(r"\$([^$]+)\$")
_BETWEEN = re.compile(r"\s*(?:[,;]\s*)?(?:and|or)?\s*(?<=\S)\s*")
_JOINT = re.compile(r"\s*(?:,|;)?\s*\b(?:and|or)\b\s*|\s*(?:\\vee|\\lor|\\land|\\wedge)(?![a-zA-Z])\s*|\s*;\s*")
_OR = re.compile(r"\bor\b|\\vee|\\lor")
_ASSIGNED = re.compile(r"([a-zA-Z](?:_\{?\w+\}?)?)\s*=\s*([^=]+)")
_POINT = re.compile(r"\(?\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\)?\s*=\s*(?=[\[({\\])")
_NAMED = re.compile(r"(?:\\angle\s*)?[A-Z]{1,3}(?:\(\w+\))?\s*=\s*(?=[^=]+$)")
_MEMBER = re.compile(r"[a-zA-Z]\s*\\in\s*")
_INTERVAL = re.compile(r"\s*(?:\\left)?\s*[(\[].*,.*[)\]]\s*$", re.DOTALL)
_OPEN, _SHUT = {">": "(", "\\ge": "["}, {"<": ")", "\\le": "]"}
_TURNED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}
_FRENCH = re.compile(r"([\[\]])([^\[\]()]+)[,;]([^\[\]()]+)([\[\]])")  # ]0, 1] and [0, 1[
# the point (2, 3), P(2, 3)
_KIND = re.compile(
    r"^(?:(?i:the\s+)?(?i:(?:ordered\s+)?(?:point|vertex|vector|pair|triple|interval|set)(?:\s+is)?)\s+|"
    r"(?!C\s*\(\s*\d+\s*,\s*\d+\s*\))[A-Z](?=\s*\(\s*[^()A-Za-z,]+,))\s*(?=[\[({\\])"
)
_ROWS = re.compile(r"\[\s*\[[^\[\]]*\](?:\s*,\s*\[[^\[\]]*\])*\s*\]")
_CHOSEN = re.compile(r"C\s*\(\s*(\d+)\s*,\s*(\d+)\s*\)|(?:\{\}\s*)?[\^_]\{?(\d+)\}?\s*C_\{?(\d+)\}?")
# a set of real numbers, \{x \in \mathbb{R} \mid x > 2\}; the part after the bar may be a range of x
_BUILDER = re.compile(
    r"\\?\{\s*([a-zA-Z])\s*(?:(?:\\in\s*)(?:\\mathbb\s*\{?\s*R\s*\}?|R)\s*)?(?:\\mid(?![a-zA-Z])|\||:)\s*(.+?)\s*\\?\}",
    re.DOTALL,
)
_OTHER_BUILDER = re.compile(
    r"\\?\{\s*([a-zA-Z](?:\s*\\in\s*[^|:]+?)?|\([a-z](?:\s*,\s*[a-z])+\))\s*(?:\\mid(?![a-zA-Z])|\||:)\s*(.+?)\s*\\?\}",
    re.DOTALL,
)
_GAP = re.compile(r"(?<=[\d})a-zA-Z])\s+(?=[a-zA-Zµ°]{2})")
_TAIL = re.compile(
    r"(?P<head>.*[\d}\)a-zA-Z])"
    r"(?:\s*\\(?:text|mathrm|textrm|mbox)\s*\{(?P<styled>[^{}]*)\}(?P<power>\^\{?\d\}?)?"
    r"|\s+(?P<bare>[a-z]{2,}(?: ?/ ?[a-z]+| [a-z]+)*))\s*",
    re.DOTALL,
)


def formula(text: str, like: str = "") -> str | None:
    """An expression for math-verify; None if it has words that `like` does not have, or two answers."""
    one = _one_formula(unwrapped(plain(text)))
    if one is None:
        return None
    one = _KIND.sub("", unstyled(one))
    if REALS.fullmatch(unwrapped(one)):
        return r"\mathbb{R}"
    if NO_SOLUTION.fullmatch(unwrapped(one)):
        return r"\emptyset"
    if but := EXCEPT.fullmatch(unwrapped(one)):
        one = rf"\mathbb{{R}}\setminus\{{{but[1]}\}}"
    if _ROWS.fullmatch(one):  # [[1, 2], [3, 4]]
        rows = [" & ".join(row.split(",")) for row in re.findall(r"\[([^\[\]]*)\]", one)]
        one = r"\begin{pmatrix}" + r" \\ ".join(rows) + r"\end{pmatrix}"
    one = unwrapped(latex(one))
    if found := _as_set(one):
        return found
    listed = _listed(one)
    if not listed:
        return None
    found = _both_signs(listed)
    for sign, prefix in (("=", _POINT), ("=", _NAMED), (r"\in", _MEMBER)):
        if sign not in like and (match := prefix.match(found)):
            found = found[match.end() :]
    allowed = _FUNCTIONS | _letters(like)
    return found if all(word in allowed or (len(word) < 3 and word not in _WORDS) for word in _letters(found)) else None


def alike(one: str, other: str) -> tuple[str, str]:
    """Brings two expressions to one form: a range becomes an interval if the other is one, and x = 1, y = 2 a tuple.

    C(10, 3) is a binomial coefficient unless the other is a point.
    """
    one, other = (_without(one) if "setminus" in other else one), (_without(other) if "setminus" in one else other)
    if not (_INTERVAL.match(one) or _INTERVAL.match(other)):
        one, other = (
            _CHOSEN.sub(lambda m: rf"\binom{{{m[1] or m[3]}}}{{{m[2] or m[4]}}}", each) for each in (one, other)
        )
    one, other = (_tuple(one) or one, other) if other.startswith("(") else (one, other)
    one, other = (one, _tuple(other) or other) if one.startswith("(") else (one, other)
    one, other = (
        (_column(one) or one if "matrix}" in other else one),
        (_column(other) or other if "matrix}" in one else other),
    )
    if _INTERVAL.match(one):
        return one, _interval(other) or other
    if _INTERVAL.match(other):
        return _interval(one) or one, other
    return one, other


def _without(text: str) -> str:
    r"""x \ne 2 as \mathbb{R}\setminus\{2\}."""
    return re.sub(r"^[a-z]\s*\\ne\s+([^,]+)$", r"\\mathbb{R}\\setminus\\{\1\\}", text)


def _tuple(text: str) -> str | None:
    """x = 1, y = 2 as (1, 2), in the order of the variables' names; None for anything else."""
    assigned = [_ASSIGNED.fullmatch(part.strip()) for part in _split(text)]
    if len(assigned) < 2 or not all(assigned):
        return None
    values = {match[1]: match[2] for match in assigned if match}
    return f"({', '.join(values[name] for name in sorted(values))})" if len(values) == len(assigned) else None


def _column(text: str) -> str | None:
    r"""(1, 2) as \begin{pmatrix} 1 \\ 2 \end{pmatrix}, to compare it with a column vector; None for anything else."""
    match = re.fullmatch(r"\s*\(([^()]*,[^()]*)\)\s*", text)
    return r"\begin{pmatrix}" + r" \\ ".join(_split(match[1])) + r"\end{pmatrix}" if match else None


def _interval(text: str) -> str | None:
    r"""x \ge 0 as [0, \infty), 1 < x \le 2 as (1, 2], x < 1 or x > 2 as a union; None for anything else."""
    found = list[str]()
    for part in re.split(r"\\text \{ or \}|\\text\{ or \}|\s+or\s+", text):
        tokens = [t.strip() for t in re.split(r"(<|>|\\le(?![a-zA-Z])|\\ge(?![a-zA-Z]))", part)]
        if len(tokens) == 3:
            left, sign, right = tokens
            if not re.fullmatch("[a-zA-Z]", left):
                left, right, sign = right, left, _TURNED.get(sign, sign)
            ends = (f"{_OPEN[sign]}{right}", "\\infty)") if sign in _OPEN else ("(-\\infty", f"{right}{_SHUT[sign]}")
        elif (
            len(tokens) == 5 and (tokens[1] in _SHUT) == (tokens[3] in _SHUT) and {tokens[1], tokens[3]} <= set(_TURNED)
        ):
            if tokens[1] in _OPEN:  # 3 > x > 1
                tokens = [tokens[4], _TURNED[tokens[3]], tokens[2], _TURNED[tokens[1]], tokens[0]]
            left = tokens[2]
            ends = (f"{_OPEN[_TURNED[tokens[1]]]}{tokens[0]}", f"{tokens[4]}{_SHUT[tokens[3]]}")
        else:
            return None
        if not re.fullmatch("[a-zA-Z]", left):
            return None
        found.append(",".join(ends))
    return r" \cup ".join(found)


def _as_set(text: str) -> str | None:
    r"""]0, 1] as (0, 1], a range in set-builder notation as an interval, other such sets with \mid; None for anything else."""
    french = [_FRENCH.fullmatch(part.strip()) for part in re.split(r"\\cup(?![a-zA-Z])", text)]
    if all(french) and any((each[1], each[4]) != ("[", "]") for each in french if each):
        ranges = [(each[1] == "[", f"{each[2]},{each[3]}", each[4] == "]") for each in french if each]
        return r" \cup ".join(f"{'[' if low else '('}{ends}{']' if high else ')'}" for low, ends, high in ranges)
    if built := _BUILDER.fullmatch(text):
        found = _interval(built[2])
        if found and built[1] in re.findall("[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", built[2])):
            return found
    if built := _OTHER_BUILDER.fullmatch(text):
        return rf"\{{{built[1].strip()} \mid {built[2].strip()}\}}"
    return None


def is_notation(formula: str) -> bool:
    """Whether a formula uses set-builder notation, which nothing here evaluates: it must match as written."""
    return bool(_OTHER_BUILDER.fullmatch(formula))


def measured(text: str) -> tuple[str, tuple[Unit, ...]]:
    r"""Splits an expression from the unit after it: 3\pi \text{ cm}."""
    plainly = undollared(unwrapped(plain(text)))
    spaced = " ".join(re.sub(r"\\[,;: ]|~", " ", latex(unstyled(plainly))).split())
    for gap in list(_GAP.finditer(spaced))[:8]:  # 4\pi square centimeters
        behind = units(spaced[gap.end() :])
        if behind and behind[0] and not behind[0].is_counted:
            return spaced[: gap.start()], behind
    match = _TAIL.fullmatch(plainly)
    if match is None:
        return text, ()
    styled = match["styled"]
    unit = units(f"{styled}{match['power'] or ''}" if styled is not None else match["bare"])
    if not unit or not unit[0]:
        return text, ()
    is_thing = unit[0].dimension[0][0].startswith(COUNTED) and styled is None and match["head"][-1].isalpha()
    return (text, ()) if is_thing else (match["head"], unit)


def compact(text: str) -> str:
    r"""A normal form without spaces, \left, \right and \dfrac, to see whether two answers are written alike."""
    text = re.sub(r"\\left|\\right|\\[,;:! ]|\s|\$", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return re.sub(
        r"(?<!\d)(?:\\frac\{(\w+)\}\{(\w+)\}|\\frac(\d)(\d))", lambda m: "/".join(g for g in m.groups() if g), text
    )


def _one_formula(text: str) -> str | None:
    """A text whose $ pairs are joined only by words such as "and"; otherwise a second answer could hide in it."""
    if "$" not in text.replace("\\$", ""):
        return text
    parts = _DOLLARS.split(text)[::2]
    if parts[0].strip() or parts[-1].strip(" .") or not all(_BETWEEN.fullmatch(part) for part in parts[1:-1]):
        return None
    return _DOLLARS.sub(r" \1 ", text)


def _listed(text: str) -> str | None:
    r"""x = 1 or x = 2, and 1 and 2, as \{1, 2\}. "1 or 2" without a variable is two guesses, so None."""
    if text.startswith("\\{") or (text.startswith("{") and text.endswith("}")):
        text = re.sub(r",?\s+and\s+", ", ", text)  # {1, 2, and 3}
    if not _JOINT.search(text):
        parts = _split(text)
    else:
        parts = [part for some in _JOINT.split(text) for part in _split(some) if part.strip()]
    if len(parts) < 2:
        return text
    assigned = [_ASSIGNED.fullmatch(part.strip()) for part in parts]
    names = {match[1] for match in assigned if match}
    has_or = bool(_OR.search(text))
    if assigned[0] and len(names) == 1:  # x = 1 or x = 2; x = 1, 2
        values = [match[2] if match else part for match, part in zip(assigned, parts, strict=True)]
        return "\\{" + ", ".join(value.strip() for value in values) + "\\}"
    if has_or:
        is_range = all(re.search(r"[<>]|\\[lg]e\b", part) for part in parts)
        return r" \text{ or } ".join(parts) if is_range else None
    if names:  # a = 2, b = 3
        return ", ".join(sorted(part.strip() for part in parts)) if len(names) > 1 else None
    return "\\{" + ", ".join(part.strip() for part in parts) + "\\}"


def _split(text: str) -> list[str]:
    """The parts between commas outside of brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _both_signs(text: str) -> str:
    r"""Each element with \pm as two elements: 1 \pm \sqrt2 is \{1 + \sqrt2, 1 - \sqrt2\}."""
    if r"\pm" not in text or text.count(r"\pm") > 2:
        return text
    match = re.fullmatch(r"([a-zA-Z])\s*=\s*(.*)", text)
    text = match[2] if match else text
    inner = text[2:-2] if text.startswith("\\{") and text.endswith("\\}") else text
    parts = list[str]()
    for part in _split(inner):
        signs = (("+", "-"), ("-", "+")) if r"\pm" in part else (("", ""),)
        parts += [part.replace(r"\pm", one).replace(r"\mp", other).strip().removeprefix("+") for one, other in signs]
    return "\\{" + ", ".join(parts) + "\\}"


def _letters(text: str) -> set[str]:
    """Runs of letters that are neither commands nor environment names."""
    text = re.sub(
        r"\\text\{ or \}|\\(?:begin|end)\s*\{[a-zA-Z*]+\}(?:\{[lcr|]+\})?|\\(?:mathbb|mathcal)\s*\{[A-Z]\}|\\[a-zA-Z]+",
        " ",
        text,
    )
    return set(re.findall(r"[^\W\d_]+", text))
