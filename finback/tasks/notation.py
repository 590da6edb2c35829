r"""Normalizes notation: digits, signs, quotation marks, and LaTeX styling. Does not import torch.

`plain` changes single characters and is safe for words. `unwrapped` removes delimiters around an answer.
`unstyled` removes LaTeX styling; `latex` writes keyboard notation as LaTeX.
"""

import re
import unicodedata

_SPACES = "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000"
_PLAIN = {
    **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},  # full-width forms of ASCII
    **dict.fromkeys(map(ord, _SPACES), " "),
    **dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufeff"), ""),
    **dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\u2043\ufe63"), "-"),
    **dict.fromkeys(map(ord, "“”„‟«»「」『』《》"), '"'),
    **dict.fromkeys(map(ord, "‘’‚‛ʼ"), "'"),
    **{0x2044: "/", 0x2215: "/", 0xFFE5: "¥", 0xBA: "°", 0x2DA: "°", 0x2103: "°C", 0x2109: "°F", 0x3002: "."},
}
_RAISED = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni", strict=True))
_LOWERED = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_SIGN_ORDER = "× · ⋅ ∙ π ∞ ≤ ≥ ⩽ ⩾ ≠ ∪ ∩ ∅ ∈ ± √ ≈ θ α β φ λ ∨"
_SIGN_NAMES = (
    "times cdot cdot cdot pi infty le ge le ge ne cup cap emptyset in pm sqrt approx theta alpha beta phi lambda vee"
)
_SIGNS = {
    **{sign: f"\\{name} " for sign, name in zip(_SIGN_ORDER.split(), _SIGN_NAMES.split(), strict=True)},
    **{"÷": "/", "∛": "\\sqrt[3]", "∜": "\\sqrt[4]", "⟨": "(", "⟩": ")", "ℝ": "\\mathbb{R}", "ℤ": "\\mathbb{Z}"},
}
_STYLES = (
    "text|textbf|textit|textrm|texttt|textsf|textnormal|emph|mathrm|mathbf|mathit|mathsf|mathtt|mathnormal|boldsymbol|"
    "bm|mbox|hbox|operatorname|underline|ce|mathord|mathop"
)
_BRACED = r"\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"  # with braces in braces
_STYLE = re.compile(rf"\\(?:{_STYLES})\*?\s*{_BRACED}")
_INVISIBLE = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|rm|bf|it|large|Large|LARGE|huge|Huge|normalsize)"
    r"(?![a-zA-Z])|(?<!\\)\\[!/]"
)
_GAPS = re.compile(r"(?<!\\)\\[,;: ]|\\q?quad(?![a-zA-Z])|\\(?:thin|med|thick)?space(?![a-zA-Z])|~")
_WRITTEN = (
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\{([^{}]*)\\over(?![a-zA-Z])([^{}]*)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s+([a-zA-Z\d])\s*([a-zA-Z\d])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*(\d)\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*(\d)"), r"\1{\2}"),
    (re.compile(r"\{([,.:])\}"), r"\1"),
    (re.compile(r"\{?\}?\s*\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree(?![a-zA-Z])|\\textdegree"), "°"),
    (re.compile(r"\\(?:leqslant|leq)(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\(?:geqslant|geq)(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\neq(?![a-zA-Z])"), r"\\ne"),
    (re.compile(r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}"), r"\\emptyset"),
    (re.compile(r"\\langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])"), ")"),
    (re.compile(r"\\cr(?![a-zA-Z])"), r"\\\\"),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (re.compile(r"\\(?:euro|texteuro|EUR)(?![a-zA-Z])"), "€"),
    (re.compile(r"\\(?:pounds|textsterling)(?![a-zA-Z])"), "£"),
    (re.compile(r"\\yen(?![a-zA-Z])"), "¥"),
    (re.compile(r"(?<!\\)\\([%$#&_])"), r"\1"),
    (re.compile(r"\\log_\{?e\}?(?![a-zA-Z])"), r"\\ln "),
)
REALS = re.compile(r"(?:the\s+set\s+of\s+)?(?:(?:all|any)\s+)?(?:the\s+)?real\s+numbers?|all\s+reals", re.IGNORECASE)
EXCEPT = re.compile(
    r"(?:(?:all|any)\s+)?(?:the\s+)?real(?:\s+number)?s?\s+(?:except(?:\s+for)?|other\s+than|but|excluding|without)\s+(?:[a-z]\s*=\s*)?(.+)",
    re.IGNORECASE,
)
NO_SOLUTION = re.compile(
    r"(?:there\s+(?:is|are|exists?)\s+)?no\s+(?:real\s+)?(?:solutions?|roots?)(?:\s+exists?)?|(?:the\s+)?empty\s+set",
    re.IGNORECASE,
)
_PAIRS = r"** **|__ __|$$ $$|$ $|\( \)|\[ \]|``` ```|` `|* *|_ _|' '|【 】"
_AROUND = [*(pair.split() for pair in _PAIRS.split("|")), ['"', '"']]


def plain(text: str) -> str:
    """Composed characters (NFC), ASCII digits for any script, one kind of space, hyphen and quotation mark."""
    text = unicodedata.normalize("NFC", text).translate(_PLAIN)
    if text.isascii():
        return text
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text)


def unwrapped(text: str, stops: str = ".,;:") -> str:
    r"""Strips white space, a final full stop, and delimiters around the whole text: $ \( \[ ** * ` and quotation marks."""
    before = None
    while before != text:
        before, text = text, text.strip()
        for left, right in _AROUND:
            inner = text[len(left) : -len(right)]
            is_around = text.startswith(left) and text.endswith(right) and bool(inner.strip())
            bare = inner.replace("\\$", "")  # an escaped $ is not a delimiter
            if is_around and left not in bare and right not in bare and not inner.endswith("\\"):
                text = inner.strip()
        if text[-1:] in stops and text[-2:] not in ("..", "\\,", "\\;", "\\:"):
            text = text[:-1]
    return text


def undollared(text: str) -> str:
    """Removes the $ pair around mathematics that is followed by words, such as a unit."""
    match = re.fullmatch(r"(?:\$([^$]+)\$|\\\((.+?)\\\))(\s*[^\W\d_%°][^$]*)", text)
    return (match[1] or match[2]) + match[3] if match else text


def unstyled(text: str) -> str:
    r"""LaTeX without styling: \text{}, \mathbf{}, \left, \dfrac, thin spaces, {,}; ^\circ becomes °, \% becomes %."""
    before = None
    while before != text:
        # a unit right after its number is a separate word: 12\text{cm} is not a product
        before, text = text, re.sub(rf"(?<![_^{{\d])(\d+)\s*(?=\\(?:{_STYLES})\b)", r"\1 ", text)
        text = re.sub(rf"(\\[a-zA-Z]+)(?=\\(?:{_STYLES})\b)", r"\1 ", text)  # \mu\text{m}
        text = _STYLE.sub(r"\1", text)
    text = _GAPS.sub(" ", _INVISIBLE.sub("", text))
    for pattern, written in _WRITTEN:
        text = pattern.sub(written, text)
    return " ".join(text.split())


def latex(text: str) -> str:
    r"""Superscripts, subscripts, single-character fractions and mathematical signs as LaTeX: 1½ is 1\frac{1}{2}."""
    if text.isascii():
        return _keyboard(text)
    text = re.sub(f"[{''.join(_RAISED)}]+", lambda m: "^{" + "".join(_RAISED[c] for c in m[0]) + "}", text)
    text = re.sub(f"[{''.join(_LOWERED)}]+", lambda m: "_{" + "".join(_LOWERED[c] for c in m[0]) + "}", text)
    text = "".join(_SIGNS.get(c) or (c if c.isascii() else _fraction(c)) for c in text)
    return _keyboard(text)


def _fraction(char: str) -> str:
    parts = unicodedata.normalize("NFKD", char).split("\u2044")
    return f"\\frac{{{parts[0]}}}{{{parts[1]}}}" if len(parts) == 2 and all(map(str.isdecimal, parts)) else char


def _keyboard(text: str) -> str:
    """Converts ** for powers, sqrt(3), pi and infinity as words, and roots without braces."""
    text = text.replace("**", "^").replace("<=", "\\le ").replace(">=", "\\ge ").replace(" != ", " \\ne ")
    text = re.sub(r"(?<![a-zA-Z\\])(?:\\?sqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt(\[\d\]|\s)\s*(\d+|[a-zA-Z])", lambda m: f"\\sqrt{m[1].strip()}{{{m[2]}}}", text)
    text = re.sub(r"(?<![a-zA-Z\\])(pi|infty|ln|log|sin|cos|tan|exp)(?![a-zA-Z])", r"\\\1 ", text)
    text = re.sub(r"(?<![a-zA-Z\\])(?:infinity|inf)(?![a-zA-Z])", r"\\infty ", text, flags=re.IGNORECASE)
    return text.strip()
