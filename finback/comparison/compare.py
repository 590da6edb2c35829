"""Contestants x suites -> one report: ask what is not known yet, judge all of it, and report what the scores show.

One contestant after the other, so that two models are never in memory together. No torch here.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finback import __version__
from finback.comparison.answer_store import Answer, AnswerStore, Failure
from finback.comparison.contestant import Contestant
from finback.comparison.judging import judge_answers
from finback.comparison.protocol import EvalRequest, SamplingProtocol, eval_requests
from finback.comparison.score import Score, pairs, score
from finback.config import UserError, as_json
from finback.runs.files import read_json, write_json
from finback.runs.folder import prepare_folder
from finback.runs.progress import ProgressLine
from finback.suites.compression import METRIC
from finback.suites.suite import Suite

ANSWERS = "answers"  # the folder of stored answers within --out
SURE = 20  # after a tenth of all answers, or so many, the time left is shown


def compare(
    contestants: Sequence[Contestant], suites: Sequence[Suite], rules: SamplingProtocol, out: Path, quiet: bool = False
) -> dict[str, Any]:
    """Ask everybody everything and return the report; KeyboardInterrupt leaves what was answered on disk."""
    _demand_distinct([c.name for c in contestants], "contestants")
    _demand_distinct([suite.name for suite in suites], "--tasks")
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
        failed = gather(contestant, wanted, rules, store, quiet)
        measured += compression(contestant, texts, store.path.with_suffix(".bits.json"))
        failures += [_failure(contestant.name, each) for each in failed]
        scores += _scores(contestant, asked, wanted, store, failed, rules.seed)
    return {
        "finback": __version__,
        "protocol": as_json(rules),
        "suites": [describe(suite) for suite in suites],
        "contestants": [{"name": c.name, "identity": identities[c.name], "price": c.price.basis} for c in contestants],
        "scores": [each.as_json() for each in scores],
        "pairs": pairs(scores, rules.seed),
        "compression": measured,
        "failures": failures,
    }


def gather(
    contestant: Contestant,
    wanted: Sequence[EvalRequest],
    rules: SamplingProtocol,
    store: AnswerStore,
    quiet: bool = False,
) -> list[Failure]:
    """Have a contestant answer what is not stored yet; the requests that failed."""
    missing = [ask for ask in wanted if ask.key not in store.answers]
    progress = ProgressLine(contestant.name, len(missing), "answers", sure=min(SURE, len(missing) / 10))
    earlier = f"{len(wanted) - len(missing):,} from before" if len(missing) < len(wanted) else ""
    failures: list[Failure] = []
    dollars: float | None = 0.0
    if not missing:
        return []
    try:
        for done, each in enumerate(store.save(contestant.answers(missing, rules)), 1):
            if isinstance(each, Failure):
                failures.append(each)
            elif dollars is not None:
                price = contestant.price.of(each)
                dollars = None if price is None else dollars + price
            if not quiet:
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
    """Bits per byte of each text, measured once and then stored; None for a contestant that shows no probabilities."""
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
    seed: int,
) -> list[Score]:
    answered: dict[str, list[tuple[int, Answer]]] = defaultdict(list)
    for ask in wanted:
        if ask.key in store.answers:
            answered[ask.suite.name].append((ask.place, store.answers[ask.key]))
    found = []
    for suite in suites:
        judged = judge_answers(suite, answered[suite.name], contestant.price)
        lost = sum(each.ask.suite.name == suite.name for each in failed)
        found.append(score(contestant.name, suite, judged, lost, seed))
    return found


def describe(suite: Suite) -> dict[str, Any]:
    """What another person needs to ask the same: source, licence, digest, prompt, extraction, metric."""
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


def _failure(contestant: str, failure: Failure) -> dict[str, Any]:
    ask = failure.ask
    return {
        "contestant": contestant,
        "suite": ask.suite.name,
        "question": ask.suite.problems[ask.place].key,
        "sample": ask.sample,
        "problem": failure.problem,
    }


def _demand_distinct(names: Sequence[str], field: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if not names or twice:
        problem = f"named twice: {', '.join(twice)}" if twice else "nothing named"
        raise UserError(field, list(names), problem, "Name each once, and one at least.")
