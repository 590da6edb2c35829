"""What only people know: the questions, and their answers out of a TOML file. No torch here."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finback.config import UserError, did_you_mean
from finback.report.docs.facts import MISSING


@dataclass(frozen=True)
class Question:
    """A key of the file, what is asked, and how it is answered; `needed` ones are missed by --check."""

    key: str
    text: str
    kind: Literal["text", "list", "yes or no", "number"] = "text"
    needed: bool = True


QUESTIONS = (
    Question("provider.name", "Legal name of whoever publishes the model"),
    Question("provider.contact", "Address for questions about the model, e.g. an e-mail address"),
    Question("provider.representative", "Authorised representative in the EU, if there is one", needed=False),
    Question("provider.commercial", "Is the model published in the course of a commercial activity?", "yes or no"),
    Question("model.name", "Name under which the model is published"),
    Question("model.version", "Its version"),
    Question("model.licence", "Its licence, as an SPDX identifier such as MIT or Apache-2.0"),
    Question("model.licence_link", "Where the licence's text is", needed=False),
    Question("model.use_limits", "Uses that its terms forbid; leave empty for none", needed=False),
    Question("model.monetised", "Is access to it paid for, in money or in data?", "yes or no"),
    Question("model.released", "Date of its release, YYYY-MM-DD"),
    Question("model.eu_date", "Date on which it was placed on the EU's market, YYYY-MM-DD", needed=False),
    Question("model.distribution", "How it is distributed, e.g. as weights on a public hub"),
    Question("model.download", "Where it is downloaded, as an address"),
    Question("model.languages", 'Languages it is meant for, ISO 639-1, e.g. ["en"]', "list"),
    Question("model.category", "Category of its licence and further assets released with it", needed=False),
    Question("use.intended", "Tasks that it is meant for, and kinds of systems it fits"),
    Question("use.excluded", "Uses and systems that it does not fit"),
    Question("use.policy", "Acceptable-use policy: its text or where it is"),
    Question("use.integration", "What is needed to build it into a system: hardware, software, instructions"),
    Question("use.limits", "Known limits beyond those that the evaluations show"),
    Question("use.risks", "Risks to safety, and what was done about them", needed=False),
    Question("training.rationale", "Why it was trained as it was: the decisions behind architecture and stages"),
    Question(
        "training.experiments",
        "Compute of other experiments, in FLOP, if it is to be published",
        "number",
        needed=False,
    ),
    Question("data.collection", "How the data were obtained and chosen, and by what right"),
    Question("data.latest", "Month of the newest data, MM/YYYY"),
    Question(
        "data.crawled", "Was any of it crawled from the web by or for you? If so: crawler, purpose, period, sites"
    ),
    Question("data.user_data", "Data from users of your services, or none"),
    Question("data.licensed", "Data licensed from rightsholders or bought, or none"),
    Question("data.continuous", "Does training go on with new data after release?", "yes or no"),
    Question("data.bias", "What was done to find and lessen bias"),
    Question("data.unsuitable", "What was done to find and remove unlawful or unsuitable content"),
    Question("data.personal", "Personal or sensitive information in the data, or none"),
    Question("data.synthetic_public", "Are the answers sampled for training published?", "yes or no", needed=False),
    Question("copyright.owner", "Who answers for the copyright policy"),
    Question("copyright.reservations", "How reservations of rights (robots.txt, RFC 9309, and others) were respected"),
    Question("copyright.infringing", "What keeps the model from giving back protected works"),
    Question("copyright.complaints", "Where rightsholders complain, and how complaints are handled"),
    Question("copyright.signatory", "Was the EU's Code of Practice signed?", "yes or no", needed=False),
    Question("base.name", "Name of the model that training began from, if from another's", needed=False),
    Question("base.licence", "Its licence, as an SPDX identifier", needed=False),
    Question("base.flop", "Its training compute in FLOP, if known", "number", needed=False),
    Question("base.systemic", "Has it systemic risk under the AI Act?", "yes or no", needed=False),
)
_KNOWN = {question.key: question for question in QUESTIONS}
_FORMS = {"text": str, "list": list, "yes or no": bool, "number": (int, float)}


@dataclass(frozen=True)
class Answers:
    """Answers by key; what was not answered is MISSING."""

    given: dict[str, Any]

    def __call__(self, key: str) -> Any:
        assert key in _KNOWN, f"nobody is asked for {key}"
        return self.given.get(key, MISSING)

    def unanswered(self, from_elsewhere: bool) -> list[Question]:
        """Needed questions without an answer; of the base model only where there is one."""
        wanted = [q for q in QUESTIONS if q.needed or (from_elsewhere and q.key.startswith("base."))]
        return [q for q in wanted if q.key not in self.given]


def read(path: Path) -> Answers:
    """Answers of a TOML file; UserError for a key nobody asks for and for a value of another kind."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("--answers", str(path), str(error.strerror), "Write one with --questions > FILE.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError("--answers", str(path), f"not TOML ({error})", "Correct it.") from None
    given = {}
    for section, table in tables.items():
        for name, value in table.items() if isinstance(table, dict) else ((None, table),):
            key = section if name is None else f"{section}.{name}"
            if key not in _KNOWN:
                raise UserError("--answers", key, "nobody asks for this", did_you_mean(key, _KNOWN))
            if value not in ("", []):
                given[key] = _checked(key, value)
    return Answers(given)


def _checked(key: str, value: Any) -> Any:
    """A value of its question's kind; dates may be TOML's own."""
    kind = _KNOWN[key].kind
    value = value.isoformat() if hasattr(value, "isoformat") else value
    fits = isinstance(value, _FORMS[kind]) and (kind != "number" or not isinstance(value, bool))  # type: ignore[arg-type]
    if kind == "list" and fits:
        fits = all(isinstance(item, str) for item in value)
    if not fits:
        example = {"text": '"words"', "list": '["en", "de"]', "yes or no": "true", "number": "3.3e24"}[kind]
        raise UserError("--answers", f"{key} = {value!r}", f"expected {kind}", f"Write {example}, say.")
    return value


def template() -> str:
    """The file to fill in; every line of it may stay as it is."""
    lines = ["# Answers for `finback docs`. What stays empty is printed as NOT PROVIDED.", ""]
    section = ""
    for question in QUESTIONS:
        here, _, name = question.key.partition(".")
        if here != section:
            lines += ["", f"[{here}]"] if section else [f"[{here}]"]
            section = here
        lines.append(f"# {question.text}" + ("" if question.needed else " (optional)"))
        empty = {"text": '""', "list": "[]", "yes or no": "true or false", "number": "0.0"}[question.kind]
        lines.append(f"{'' if question.kind in ('text', 'list') else '# '}{name} = {empty}")
    return "\n".join(lines) + "\n"
