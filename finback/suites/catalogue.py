"""Suites by name. Does not import torch.

A spec is NAME, NAME?OPTION=VALUE&…, NAME@PATH (the same set from a copy of the hub's folder or from a file), or the path
of a file of one's own:

gsm8k · math500 · aime24 · aime25 · gpqa · mmlu · mmlu-pro · ceval?subset=… · humaneval · mbpp · livecodebench?since=…
gym:chain_sum?level=hard · chains?min_terms=8&max_terms=8 · needle?lengths=1000,4000&depths=0,50 · language:zh · safety · bits-per-byte · evals-logiqa
mine.jsonl (question and answer; with choices; or with tests, as finback.tasks.code has them). Questions are put with steps and
\\boxed{} asked for, as R1 was asked (?prompt=boxed), choices with a last line, programs with a block; ?prompt=plain puts them as
they stand; choices with ?score=letters, texts or texts-normalized are scored by their log-likelihood, as finback.suites.likelihood
says
"""

from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl

from finback.config import UserError, did_you_mean
from finback.suites import (
    chains,
    choice,
    code,
    compression,
    gym,
    languages,
    likelihood,
    livecodebench,
    mathematics,
    needle,
    packaged,
    safety,
)
from finback.suites.hub import HubDataset, digest
from finback.suites.problems import ProblemList, pick
from finback.suites.suite import Suite, SuiteSource
from finback.tasks.choice import Choice
from finback.tasks.code import Code
from finback.tasks.gym import Gym
from finback.tasks.records import Record, read

_FILES = (
    ".jsonl",
    ".json",
    ".csv",
    ".parquet",
    ".jsonl.gz",
    ".json.gz",
    ".csv.gz",
    ".tsv",
    ".tsv.gz",
    ".ndjson",
    ".ndjson.gz",
)
_PLAIN = (*mathematics.SETS, *choice.SETS, *code.SETS, *packaged.SETS)
_MADE = {"chains": chains, "needle": needle, "safety": safety}
_OTHERS = ("livecodebench", "bits-per-byte", *_MADE)


def names() -> list[str]:
    """Every name that `load` knows."""
    generated = [f"gym:{name}" for name in gym.names()]
    return sorted((*_PLAIN, *_OTHERS, *generated, *(f"language:{name}" for name in languages.names())))


def check(spec: str) -> None:
    """UserError if no suite has this name; nothing is read for it."""
    name = spec.partition("?")[0].partition("@")[0]
    if not name.lower().endswith(_FILES) and name not in names() and not name.startswith("gym:"):
        raise UserError("suite", spec, "no such suite", _near(name))
    if name.startswith("gym:"):
        Gym(name.removeprefix("gym:"))  # says why one that cannot be judged is refused


def load(spec: str, problems: int | None, seed: int) -> Suite:
    """The suite of a spec: at most `problems` of its questions, drawn or made by the seed. All, or a default, for None.

    Sets with fewer questions give all they have. UserError for what cannot be found or read.
    """
    if problems is not None and problems < 1:
        raise UserError("problems", problems, "not above 0", "Use 1 or more.")
    check(spec)
    head, _, query = spec.partition("?")
    name, _, at = head.partition("@")
    options = _options(spec, query)
    if name.lower().endswith(_FILES):
        return _own(head, options, problems, seed)
    family, _, part = name.partition(":")
    if at and (part or name in _MADE):
        raise UserError("suite", spec, "is made from a seed, not read from a path", "Leave out @ and what follows.")
    if family == "gym":
        return gym.load(part, options, problems, seed)
    if name in _MADE:
        return _MADE[name].load(options, problems, seed)
    if name == "livecodebench":
        _known(spec, options, "since", "until")
        return livecodebench.load(at, problems, seed, options.get("since", ""), options.get("until", ""))
    if name in choice.SETS:
        _known(spec, options, "subset", "shuffle")
        return choice.load(name, at, problems, seed, options.get("subset", ""), _shuffled(options, "false"))
    _known(spec, options)
    if family == "language":
        return languages.load(part, problems, seed)
    if name == "bits-per-byte":
        return compression.load(at, problems, seed)
    if name in mathematics.SETS:
        return mathematics.load(name, at, problems, seed)
    return (code if name in code.SETS else packaged).load(name, at, problems, seed)


def _own(path: str, options: dict[str, str], problems: int | None, seed: int) -> Suite:
    """A user's file; what its first record holds says what it is."""
    prompt, records = options.pop("prompt", ""), read(path, "", "")
    is_code = "tests" in records[0].fields
    if prompt not in ("", "plain", *([] if is_code else ["boxed"])):
        remedy = f"Use {'' if is_code else 'prompt=boxed or '}prompt=plain, or leave it out."
        raise UserError("suite", path, f"has no prompt {prompt!r}", remedy)
    if prompt and "score" in options:
        raise UserError("suite", path, "has a prompt, and is scored by likelihood", "Leave out one of the two.")
    suite = _asked(path, records, options, problems, seed)
    return replace(suite, prompt={"": suite.prompt, "plain": "{question}", "boxed": mathematics.BOXED}[prompt])


def _asked(path: str, records: tuple[Record, ...], options: dict[str, str], problems: int | None, seed: int) -> Suite:
    """The suite of a user's records, each put with what asks for its form of answer."""
    name = Path(path).name.split(".")[0]
    if "tests" in records[0].fields:
        _known(path, options)
        return _programs(name, path, records, problems, seed)
    if "choices" in records[0].fields:
        _known(path, options, "question", "answer", "shuffle", "score", "shots")
        fields = options.get("question", "question"), options.get("answer", "answer")
        task = Choice(
            path, question_field=fields[0], answer_field=fields[1], instruction="", shuffle=_shuffled(options, "true")
        )
        choice_set = choice.ChoiceSet(HubDataset(path), choice.mmlu)
        asked, (form, shots) = list(task.problems()), likelihood.options(options)
        suite = choice.made(name, choice_set, asked, problems, seed, path)
        return likelihood.scored(replace(suite, name=f"{name}:{form}"), asked, form, shots) if form else suite
    _known(path, options, "question", "answer")
    fields = options.get("question", "question"), options.get("answer", "answer")
    math_set = mathematics.MathSet(HubDataset(path), *fields)
    questions = [mathematics.problem(record, math_set) for record in records]
    return mathematics.made(name, questions, math_set, path, problems, seed)


def _shuffled(options: dict[str, str], usual: str) -> bool:
    text = options.get("shuffle", usual)
    if text not in ("true", "false"):
        raise UserError("suite.shuffle", text, "neither true nor false", "Write shuffle=true or shuffle=false.")
    return text == "true"


def _programs(name: str, path: str, records: tuple[Record, ...], problems: int | None, seed: int) -> Suite:
    task = Code(path)
    chosen = pick(task.problems, problems, seed)
    tests = {" ".join(str(r.fields["question"]).split()): r.fields["tests"] for r in records}
    rows = ([p.question, tests[p.key.removeprefix("code: ")]] for p in chosen)
    return Suite(
        name=name,
        problems=chosen,
        task=ProblemList(name, chosen, task.check, waits=True),
        source=SuiteSource(path, "unknown", digest(rows)),
        prompt="{question}\n\nReply with the whole program in one ```python block.",
        extraction=code.EXTRACTION,
        metric="pass@1",
        chance=0.0,
    )


def _options(spec: str, query: str) -> dict[str, str]:
    try:
        return dict(parse_qsl(query, keep_blank_values=True, strict_parsing=True)) if query else {}
    except ValueError:
        problem = "what follows ? is no list of options"
        raise UserError("suite", spec, problem, "Write NAME?OPTION=VALUE&OPTION=VALUE.") from None


def _known(spec: str, options: dict[str, str], *known: str) -> None:
    for name in options.keys() - set(known):
        raise UserError("suite", spec, f"has no option {name!r}", did_you_mean(name, known))


def _near(name: str) -> str:
    """The closest name; all families if there is none."""
    near = did_you_mean(name, names())
    if near.startswith("Did"):
        return near
    families = (*_PLAIN, *_OTHERS, "gym:NAME", "language:CODE")
    return f"Known: {', '.join(sorted(families))}; or the path of a file ({', '.join(_FILES[:4])})."
