"""`finback compare`: contestants x suites -> one report. Requests missing answers, judges all answers and summarizes them.

Contestants run one after another, so that two models are never in memory together. Does not import torch.
"""

import json
import math
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from finback import __version__
from finback.comparison import picture, table
from finback.comparison.contestant import Answer, AnswerStore, Contestant, Failure, Price, by_endpoint, distinct, prices
from finback.comparison.endpoint import Endpoint
from finback.comparison.judging import judge_answers
from finback.comparison.options import CompareOptions
from finback.comparison.protocol import SAMPLES, EvalRequest, SamplingProtocol, eval_requests
from finback.comparison.score import MAX_NO_ANSWER, Score, pairs, score
from finback.comparison.served import Served
from finback.config import UserError, as_json
from finback.runs import terminal
from finback.runs.files import read_json, write_json
from finback.runs.folder import prepare_folder
from finback.runs.hub_models import model_name
from finback.runs.lock import locked
from finback.runs.progress import ProgressLine
from finback.suites import catalogue
from finback.suites import contamination as overlaps
from finback.suites import published as tables
from finback.suites.compression import METRIC
from finback.suites.suite import Suite

KEY = "FINBACK_ENDPOINT_KEY"  # not OPENAI_API_KEY, a secret that must not be sent to any other address
ANSWERS = "answers"  # the folder of stored answers within --out
SURE = 20  # the remaining time is shown after this many answers, or after a tenth of them if that is fewer


def run(options: CompareOptions, environment: Mapping[str, str]) -> tuple[dict[str, Any], str, bool]:
    """Returns the report, its text, and whether every request was answered.

    A report of measurements is also written to `options.out`; published scores alone are only returned.
    """
    if options.tasks or not options.published:
        prepare_folder(options.out)
        with locked(options.out):
            report = _measured(options, environment)
    else:
        report = {"published": published([])}
    # tables are fitted to the terminal if the text goes to one, and are Markdown otherwise
    text = table.render(report, terminal.table if sys.stdout.isatty() else table.markdown)
    return report, text, not report.get("failures")


def _measured(options: CompareOptions, environment: Mapping[str, str]) -> dict[str, Any]:
    contestants, rules = open_all(options, environment), protocol(options)
    if options.harness:
        from finback.comparison import harness

        report = harness.measure(contestants, options.tasks, rules, options, environment)
    else:
        suites = [catalogue.load(spec, options.problems, rules.seed) for spec in options.tasks]
        report = compare(contestants, suites, rules, options.out, options.max_no_answer)
        if options.contamination:
            checked = [overlaps.check(suite, folder) for suite in suites for folder in options.contamination]
            report["contamination"] = [each.as_json() for each in checked]
    if options.published:
        report["published"] = published([suite["name"] for suite in report["suites"]])
    write(report, options.out)
    return report


def protocol(options: CompareOptions) -> SamplingProtocol:
    """The sampling protocol. `samples` defaults to 4, or to 1 for greedy decoding, whose samples are all equal."""
    o, samples = options, options.samples or (SAMPLES if options.temperature else 1)
    return SamplingProtocol(samples, o.temperature, o.top_p, o.max_tokens, o.seed, o.think)


def write(report: dict[str, Any], out: Path) -> None:
    """Writes compare.json, compare.md and, if there is an accuracy to draw, compare.png."""
    write_json(out / "compare.json", report)
    part = out / "compare.md.part"
    part.write_text(table.render(report) + "\n", encoding="utf-8")
    part.replace(out / "compare.md")
    if any(score["accuracy"] is not None for score in report["scores"]):
        picture.draw(report, out / "compare.png")


def open_all(options: CompareOptions, environment: Mapping[str, str]) -> list[Contestant]:
    """Contestants in the order of the command line, models in files first; no model is loaded, no endpoint contacted."""
    same = {"concurrency": options.concurrency, "rate": options.rate, "timeout": options.timeout}
    endpoints = [Endpoint.parse(text, **same) for text in options.endpoints]
    models = [(path, _label(path)) for path in options.models]
    names = distinct([*(name for _, name in models), *(e.name for e in endpoints)])
    own, theirs = names[: len(models)], names[len(models) :]
    into, out_of = prices(options.price_in, "--price-in", theirs), prices(options.price_out, "--price-out", theirs)
    keys, extra = _keys(options.key_env, theirs, environment), _extra(options.extra)
    opened: list[Contestant] = []
    if models:
        from finback.checkpoint.models import find_model
        from finback.comparison.local import Local, price_here

        price = price_here(options.price_hour)
        paths = [find_model(path) for path, _ in models]
        here = [Local(p, name, options.dtype, options.rows, price) for p, name in zip(paths, own, strict=True)]
        opened += [Served(each, each.path, options, environment) for each in here] if options.serves else here
    for endpoint, name in zip(endpoints, theirs, strict=True):
        basis = f"${into.get(name, math.nan):g} in, ${out_of.get(name, math.nan):g} out per million tokens, as given"
        price = Price(None, into.get(name), out_of.get(name), basis) if name in into and name in out_of else Price()
        opened.append(replace(endpoint, name=name, key=keys.get(name, ""), extra=extra, price=price))
    return opened


def _label(path: Path) -> str:
    """A model's name in tables: its name on the hub, its path, or the last two parts of a path of over 40 characters."""
    text = model_name(path) if "snapshots" in path.parts else str(path).rstrip("/")
    return text if len(text) <= 40 else "/".join(path.resolve().parts[-2:])


def _keys(given: Sequence[str], names: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Each endpoint's API key: FINBACK_ENDPOINT_KEY, or the environment variable that --key-env names for it."""

    def key(variable: str, whole: str) -> str:
        if not environment.get(variable):
            raise UserError("--key-env", variable, "not set in the environment, or empty", "Export it first.")
        return environment[variable]

    return dict.fromkeys(names, environment.get(KEY, "")) | by_endpoint(given, "--key-env", names, key)


def _extra(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError("--extra", text, "not a JSON object", """Write for example '{"reasoning_effort": "high"}'.""")
    return value


def published(suites: Sequence[str]) -> list[dict[str, Any]]:
    """Published scores on these suites, or all published scores if no suite is named."""
    return [asdict(row) for name in suites or [""] for row in tables.rows(name)]


def compare(
    contestants: Sequence[Contestant],
    suites: Sequence[Suite],
    rules: SamplingProtocol,
    out: Path,
    max_no_answer: float = MAX_NO_ANSWER,
) -> dict[str, Any]:
    """Asks every contestant every question and returns the report.

    On KeyboardInterrupt the answers so far remain on disk. UserError: repeated names, or a suite that is scored by
    log-likelihood with a contestant that returns none.
    """
    _demand_distinct([c.name for c in contestants], "contestants")
    _demand_distinct([suite.name for suite in suites], "--tasks")
    for contestant in contestants:
        for suite in (s for s in suites if s.continuations and not hasattr(contestant, "compress")):
            problem = f"is scored by log-likelihood, which {contestant.name} does not return"
            remedy = "Compare models in files without --engine and --replicas, or leave out ?score."
            raise UserError("--tasks", suite.name, problem, remedy)
    prepare_folder(out)
    scores: list[Score] = []
    failures: list[dict[str, Any]] = []
    identities, measured = {}, list[dict[str, Any]]()
    asked = [suite for suite in suites if suite.metric != METRIC]
    texts = [suite for suite in suites if suite.metric == METRIC]
    for contestant in contestants:
        identities[contestant.name] = contestant.identity
        wanted = eval_requests(asked, rules, contestant.identity)
        store = AnswerStore(out / ANSWERS, contestant.name, contestant.identity)
        failed = gather(contestant, wanted, rules, store)
        measured += compression(contestant, texts, store.path.with_suffix(".bits.json"))
        for ask, problem in ((each.ask, each.problem) for each in failed):
            found = {"suite": ask.suite.name, "question": ask.suite.problems[ask.place].key, "sample": ask.sample}
            failures.append({"contestant": contestant.name, **found, "problem": problem})
        scores += _scores(contestant, asked, wanted, store, failed)
    return {
        "finback": __version__,
        "protocol": as_json(rules),
        "suites": [describe(suite) for suite in suites],
        "contestants": [{"name": c.name, "identity": identities[c.name], "price": c.price.basis} for c in contestants],
        "scores": [each.as_json() for each in scores],
        "pairs": pairs(scores, rules.seed, max_no_answer),
        "max_no_answer": max_no_answer,
        "compression": measured,
        "failures": failures,
    }


def gather(
    contestant: Contestant, wanted: Sequence[EvalRequest], rules: SamplingProtocol, store: AnswerStore
) -> list[Failure]:
    """Requests the answers that are not stored yet; returns the requests that failed."""
    missing = [ask for ask in wanted if ask.key not in store.answers]
    failures: list[Failure] = []
    if not missing:
        return failures
    progress = ProgressLine(contestant.name, len(missing), "answers", sure=min(SURE, len(missing) / 10))
    earlier = f"{len(wanted) - len(missing):,} stored earlier" if len(missing) < len(wanted) else ""
    dollars: float | None = 0.0
    try:
        for done, each in enumerate(store.save(contestant.answers(missing, rules)), 1):
            if isinstance(each, Failure):
                failures.append(each)
            elif dollars is not None:
                price = contestant.price.of(each)
                dollars = None if price is None else dollars + price
            notes = (f"{len(failures)} failed" if failures else "", earlier)
            progress.draw(done, done, dollars, ", ".join(filter(None, notes)), end=done == len(missing))
    except KeyboardInterrupt:
        there = sum(ask.key in store.answers for ask in wanted)
        print(
            f"\ninterrupted; {there:,} of {len(wanted):,} answers of {contestant.name} are stored in {store.path}; "
            "run the same command to continue",
            file=sys.stderr,
        )
        raise
    return failures


def compression(contestant: Contestant, texts: Sequence[Suite], path: Path) -> list[dict[str, Any]]:
    """Bits per byte of each text, measured once and then stored; None for a contestant that returns no probabilities."""
    known = dict(read_json(path)) if path.is_file() else {}
    missing = [suite for suite in texts if suite.source.digest not in known]
    measure = getattr(contestant, "compress", None)
    if missing and measure is not None:
        known |= {suite.source.digest: bits for suite, bits in zip(missing, measure(missing), strict=True)}
        write_json(path, known)
    return [
        {"contestant": contestant.name, "suite": s.name, "bits_per_byte": known.get(s.source.digest)} for s in texts
    ]


def _scores(
    contestant: Contestant,
    suites: Sequence[Suite],
    wanted: Sequence[EvalRequest],
    store: AnswerStore,
    failed: Sequence[Failure],
) -> list[Score]:
    answered: dict[str, list[tuple[int, Answer]]] = defaultdict(list)
    for ask in wanted:
        if ask.key in store.answers:
            answered[ask.suite.name].append((ask.place, store.answers[ask.key]))
    found = []
    for suite in suites:
        judged = judge_answers(suite, answered[suite.name], contestant.price)
        lost = [each.problem for each in failed if each.ask.suite.name == suite.name]
        found.append(score(contestant.name, suite, judged, lost, contestant.identity.get("model", "")))
    return found


def describe(suite: Suite) -> dict[str, Any]:
    """What is needed to reproduce a suite: source, licence, digest, prompt, extraction, metric."""
    return {
        "name": suite.name,
        "questions": len(suite.problems),
        "source": suite.source.name,
        "licence": suite.source.licence,
        "sha256": suite.source.digest,
        "prompt": suite.prompt,
        "system": suite.system,
        "extraction": suite.extraction,
        "metric": suite.metric,
        "chance": suite.chance,
        "notes": dict(suite.notes),
    }


def _demand_distinct(names: Sequence[str], field: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        problem = f"named twice: {', '.join(twice)}" if twice else "nothing named"
        raise UserError(field, list(names), problem, "Name each once, and at least one.")
