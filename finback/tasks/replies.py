r"""Locates the answer in a reply: \boxed{}, after ####, in <answer>, after "The answer is", or the whole reply. Does not import torch."""

import re

_LONGEST_BOX = 2000  # longest content of a box, in characters
_OBJECT = re.compile(
    r"\s*(?:```(?:json)?\s*)?\{\s*\"(?:final[_ ]?)?(?:answer|ans|result|choice)\"\s*:\s*(?:\"([^\"\\\n]{1,200})\"|(-?[0-9][0-9.eE+-]{0,60}))\s*\}\s*(?:```\s*)?",
    re.IGNORECASE,
)
_BRACES = re.compile(r"\\f?boxed\s*\{|\\fbox\s*\{|[{}]")
_NOUN = (
    r"(?:answer|option|choice|ans)|ответ|respuesta|réponse|antwort|resposta|risposta|odpowiedź|antwoord|svar|cevap|đáp án|उत्तर|"
    r"الإجابة|الاجابة|الجواب|απάντηση|התשובה|תשובה|คำตอบ|відповідь|jawaban|jawapan|答案|答え|答|正解|答复|정답|답|正确选项|正确答案"
)
_WHICH = (
    r"(?:final|correct|right|best|true|most likely|most appropriate|full|complete|overall|short|exact|numerical|my|"
    r"правильный|верный|окончательный|правильна|最终|最后|正确|最終的な|최종|सही|अंतिम)"
)
_LINE = re.compile(
    rf"(?<![^\W_])(?:{_WHICH}\s*){{0,3}}(?:{_NOUN})(?:\s+(?:correcta|finale|final|correcte|corretta|الصحيحة|النهائية|الصحيح))?"
    rf"(?:\s*\([^()\n]{{0,30}}\))?[*_\s]{{0,4}}(?:[:：=】]|[ \t]+[-–—](?=\s))[*_ \t]{{0,4}}",
    re.IGNORECASE,
)
_SENTENCE = re.compile(
    rf"(?<![^\W_])(?:{_WHICH}\s+){{0,3}}(?:answer|result|option|choice|solution)(?:\s+(?:to|of|for|here)\b[^.:\n]{{0,80}}?)?\s+"
    r"(?:is|was|would be|must be|should be|will be|becomes|equals)(?:\s+(?:therefore|thus|then|simply|clearly|option|choice|letter))?\s*:?\s+|"
    r"(?:respuesta|resposta|risposta)(?:\s+\w+)?\s+(?:es|é|è)\s*:?\s+|réponse(?:\s+\w+)?\s+est\s*:?\s+|antwort\s+(?:ist|lautet)\s*:?\s+|"
    r"ответ\s*[-–—]\s+|(?:答案|选项)(?:应该|应|就)?[是为爲為选]\s*[:：]?\s*|(?:答え|正解)は\s*[:：]?\s*|(?:정답|답)은\s*|उत्तर\s+|"
    r"(?:đáp án|câu trả lời)(?:\s+đúng)?\s+là\s*:?\s*|doğru\s+(?:cevap|yanıt)\s+|odpowied[zź](?:\s+\w+)?\s+to\s+|antwoord\s+is\s+|svar(?:et)?\s+är\s+|"
    r"jawaban(?:nya)?(?:\s+yang\s+benar)?\s+adalah\s+|відповідь\s*[-–—]\s+|"
    r"(?:الإجابة|الجواب)(?:\s+\w+)?\s+(?:هي|هو)\s*:?\s*|απάντηση\s+είναι\s*:?\s*",
    re.IGNORECASE,
)
_HEADING = re.compile(rf"[#*\s]*(?:the\s+)?(?:{_WHICH}\s*){{0,3}}(?:{_NOUN})[*\s:：]*", re.IGNORECASE)
_DENIED = re.compile(
    r"(?:\bnot|n't|\bnever|\bhardly|\bdoubt\w*|\bunlikely|\bwrong|\bincorrect|\bmistaken|\bdeny|\bimpossible|\bunsure|\bwhether|\bbefore|"
    r"\bopposite|\bfalse|不|没|非|не)\s*[^,;:.\n，。；：]{0,40}$",
    re.IGNORECASE,
)
_END = re.compile(
    r"(?<=[^\W\d_][^\W_])[.!?](?=\s+[^a-z\s])|(?<=[\d)}\]$*%°\"'])[.!?](?=\s+[A-Z])|(?<=[^\s.]{3})[.!?](?=\s+[A-Z])|[。！？](?=.)|।(?=.)"
)
_TAIL = re.compile(r"(?:です|だ|でした|입니다|이다|है|हैं)?\s*[.。।!！]?\s*$")
_BOLD = re.compile(r"[ \t>]*(?:\*\*|__)(?!\s)([^*\n]{1,200}?)(?:\*\*|__)[.。]?[ \t]*")
_LED = re.compile(
    r"(?:(?:∴|so|thus|hence|therefore|then|finally|overall|in total|altogether|in conclusion|of the \w+|综上(?:所述)?|因此|所以),?\s+|"
    r"(?:综上(?:所述)?|因此|所以)[，,]\s*)+",
    re.IGNORECASE,
)
_PREDICATE = re.compile(
    r"(?P<of>(?:the|this|that|its|his|her|their|our|there|it|we|i|you)\b[^.!?;:,=<>\n]{0,80}?)\s+"
    r"(?:(?:will|would|must|has to|can only)\s+be|is|are|was|were|equals|gets?|gives?|have|has|need|needs|sold|found)\s+(?P<what>\S.*)",
    re.IGNORECASE | re.DOTALL,
)
_CONTRACTED = re.compile(r"(?P<of>it|that|he|she|there)'s\s+(?P<what>\S.*)", re.IGNORECASE | re.DOTALL)
_FOREIGN = re.compile(
    r"(?P<of>(?:la|el|los|le|les|die|der|das|il|lo|o|os|as|es|это)\b[^.!?;:,=<>\n]{0,60}?)\s+(?:es|est|ist|sind|é|è|son|sont|war|fue|era)\s+"
    r"(?P<what>\S.*)|(?P<zh>[^。，；：,\n是不非]{1,30})是(?P<zhwhat>[^是\n，,]+)",
    re.IGNORECASE | re.DOTALL,
)
_FOUND = re.compile(
    r"(?P<of>(?:we|i)\s+(?:find|get|have|obtain|conclude|see|deduce)(?:\s+that)?:?)\s+(?P<what>\S.*)", re.IGNORECASE
)
_ANYONE = re.compile(
    r"(?:(?i:so|thus|hence|therefore|then|finally|in total|altogether),?\s+)*(?P<of>(?:I|[a-zA-Z][a-z]+)\s[^.!?;:,=<>\d\n\\^_+*/|(){}]{1,60}?)\s+(?P<what>\\?[$€£¥₹]?\d\S*(?:\s[^.!?;:=<>\n]*)?)"
)
# It happened on 5 May 1900. The train leaves at 7:15 PM.
_WHEN = re.compile(r"(?P<of>[A-Z]\w*\s[^.!?;:,=<>\d\n]{1,60}?)\s+(?:on|at|in)\s+(?P<what>\S.*)", re.DOTALL)
_POINTED = re.compile(
    r"(?P<of>это|це|son|sono|es sind|ce sont|c'est|es ist|das ist|è|é|to jest|det är|det er|het is|是|這是|这是|それは)\s*(?P<what>[^\s不非].*)",
    re.IGNORECASE | re.DOTALL,
)
_NAMED = re.compile(r"(?P<of>[^\W\d_][^.!?;:,=<>\n]{0,40}?)\s*(?:[:：]|(?<=[^\W\d_]{3})\s*=)\s*(?P<what>\S[^\n:：]*)")
_UNSURE = re.compile(
    r"\b(?:not?|wrong|incorrect|false|opposite|except|never|at least|at most|possible|question|example|than|grader|key|under|over|below|above|nearly|almost|up|from|after|before|less|fewer|more|between|around|until|minus|plus|or|doubt\w*|unsure|unlikely|deny|denies|mistaken|if|whether)\b|n't",
    re.IGNORECASE,
)
_SECOND = re.compile(
    r"[.!?\n—-]\s*(?:no|wait|actually|sorry|oops|correction|or|alternatively|hmm+|scratch|on second thought|rather)\b",
    re.IGNORECASE,
)
_MOST = 50  # bold lines to read
NOTHING = "?"  # stands for an answer that the reply itself denies


def boxed(text: str) -> list[str]:
    r"""Contents of every \boxed{} and \fbox{} with balanced braces; of nested ones the innermost."""
    found, opened = (list[str](), list[int]())  # opened: start of each open brace's content, -1 if it is not a box
    for match in _BRACES.finditer(text):
        if match[0] != "}":
            opened.append(match.end() if len(match[0]) > 1 else -1)
        elif opened and (start := opened.pop()) >= 0:
            content = text[start : match.start()] if match.start() - start < _LONGEST_BOX else "boxed"
            if "boxed" not in content and "\\fbox" not in content:
                found.append(content.strip())
    return found


def marked(text: str) -> list[str]:
    """What a reply marks as its answer, by the clearest kind of mark that it uses; [] if nothing is marked."""
    return boxed(text) or re.findall(r"####(?!#)([^\n]*)", text) or _tagged(text) or _json(text)


def _json(text: str) -> list[str]:
    """The answer in a reply that is a single JSON object: {"answer": 12}."""
    match = _OBJECT.fullmatch(text)
    return [match[1] or match[2]] if match else []


def _tagged(text: str) -> list[str]:
    """Contents of <answer></answer>, with a few words after them, which may be another answer."""
    *parts, behind = text.split("</answer>")
    found = [content.strip() for _, tag, content in (part.rpartition("<answer>") for part in parts) if tag]
    is_short = len(behind.split()) <= 3 and not behind.rstrip().endswith(("!", ":"))
    return [*found, behind.strip()] if found and is_short and behind.strip("\t\n .*_`") else found


def stated(text: str) -> list[str]:
    """The rest of the line after each "Answer:" and "the answer is"; the latter only after the first "Answer:", if any."""
    lines = [(m.start(), m.end(), True) for m in _LINE.finditer(text) if _is_line(text, m)]
    sentences = [(m.start(), m.end(), False) for m in _SENTENCE.finditer(text)]
    first = lines[0][0] if lines else 0
    marks = sorted([*lines, *(mark for mark in sentences if mark[0] >= first)])
    found = list[str]()
    for i, (start, end, is_line) in enumerate(marks):
        if i and start < marks[i - 1][1]:
            continue
        ends = [
            text.find("\n", end),
            marks[i + 1][0] if i + 1 < len(marks) and marks[i + 1][0] > end else -1,
            len(text),
        ]
        content = text[end : min(e for e in ends if e >= 0)].strip()
        if i + 1 < len(marks) and re.fullmatch(
            r"(?:(?:so|thus|hence|therefore|the|that|my|our|is)\b,?\s*)+", content, re.IGNORECASE
        ):
            continue  # Final answer: The final answer is 18.
        if not content and not (is_line and (content := _below(text, end))):
            continue
        followed = i + 1 < len(marks) and "\n" not in text[end : marks[i + 1][0]]
        if followed and len(content.split()) > 4:  # Answer: first we add them … The answer is 12.
            continue
        if content.count("**") % 2:  # the bold text began before "Answer:"
            content = content.replace("**", "", 1)
        line = text[text.rfind("\n", 0, start) + 1 : start]
        if i + 1 == len(marks) and _SECOND.search(text, end):
            content = NOTHING  # The answer is 12. No, 13.
        found.append(NOTHING if _DENIED.search(line[-80:]) else content)
    return found or _headed(text)


def emphasized(text: str) -> list[str]:
    """Lines that are entirely bold, except headings."""
    lines = [match[1] for line in text.split("\n") if (match := _BOLD.fullmatch(line))]
    return [
        line
        for line in lines[:_MOST]
        if not line.endswith((":", "："))
        and not re.match(r"(?i)(?:step|solution|explanation|example|answer|note)\b", line)
    ]


def sentence(text: str) -> str:
    """The first sentence of a statement, without the final verb of Japanese, Korean or Hindi."""
    text = re.split(r",?\s+(?:since|because)\s|,\s+(?:as|which|where|when)\s|，?因为", text.strip())[0] or text
    end = _END.search(text)
    return untailed(text[: end.start()] if end else text)


def untailed(text: str) -> str:
    """Removes the full stop, and the final verb of a sentence in Japanese, Korean or Hindi."""
    return _TAIL.sub("", text, count=1)


def predicates(text: str, anyone: bool = False) -> list[str]:
    """What a sentence may state about its subject: both "The capital is Paris." and "Capital: Paris" state Paris.

    With `anyone`, for numbers, the subject can be a person: "Ann has 8 left."
    """
    text = text.strip().replace("**", "")
    bare = _LED.sub("", text, count=1) if _LED.match(text) else text
    found = [bare] if bare != text else []
    found += [short] if not bare.isascii() and (short := untailed(bare)) and short != bare.rstrip(".。!！ ") else []
    for pattern in (_FOUND, _PREDICATE, _CONTRACTED, _FOREIGN, _POINTED, _NAMED, *([_ANYONE, _WHEN] if anyone else [])):
        match = pattern.fullmatch(bare)
        if match:
            of, *_, what = (group for group in match.groups() if group is not None)
            found += [] if _UNSURE.search(of) else [what]
    return found


def _is_line(text: str, match: re.Match[str]) -> bool:
    """Whether "Answer:" starts its line or a sentence, apart from emphasis marks and words such as "So the"."""
    before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
    if not match[0].rstrip("*_ \t").endswith((":", "：", "=", "】")) or re.match(r"(?i)option|choice", match[0]):
        return not before.strip(" \t*_#>`-") and not re.match(r"(?i)(?:option|choice)", match[0])
    return bool(re.fullmatch(r"(?:.*[.!?;。]\s*)?[\s*_#>`\-\d.)【]*(?:[^\W\d_]+,?\s+){0,3}[*_]*", before[-60:]))


def _below(text: str, at: int) -> str:
    """The last line, if only one line follows."""
    rest = text[at:].strip(" \t\n*_")
    return rest if rest and "\n" not in rest else ""


def _headed(text: str) -> list[str]:
    """The last line under a heading such as **Final Answer**."""
    lines = [line for line in text.split("\n") if line.strip()]
    is_headed = len(lines) > 1 and len(lines[-2]) < 60 and _HEADING.fullmatch(lines[-2])
    return [lines[-1]] if is_headed else []
