"""`finback compare` behind its options: open the contestants, load the suites, write and print the report."""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from finback.comparison import picture, table
from finback.comparison.compare import compare
from finback.comparison.contestant import Contestant, Price, distinct, prices
from finback.comparison.endpoint import Endpoint
from finback.comparison.options import CompareOptions
from finback.comparison.protocol import SAMPLES, SamplingProtocol
from finback.config import UserError
from finback.runs import terminal
from finback.runs.files import write_json
from finback.runs.folder import locked, prepare_folder
from finback.suites import catalogue
from finback.suites import contamination as overlaps
from finback.suites import published as tables
from finback.suites.suite import Suite

KEY = "FINBACK_ENDPOINT_KEY"  # not OPENAI_API_KEY: that one is OpenAI's, and not for every address


def run(options: CompareOptions, environment: Mapping[str, str]) -> tuple[dict[str, Any], str, bool]:
    """The report, its text, and whether every request was answered; all of it is in `options.out` too."""
    if not options.tasks and options.published:
        report = {"published": published([])}
        return report, _shown(report), True
    prepare_folder(options.out)
    with locked(options.out):
        return _measured(options, environment)


def _measured(options: CompareOptions, environment: Mapping[str, str]) -> tuple[dict[str, Any], str, bool]:
    contestants, rules = open_all(options, environment), protocol(options)
    if options.harness:
        from finback.comparison import harness

        report = harness.measure(contestants, options.tasks, rules, options, environment)
    else:
        suites = load(options.tasks, options.problems, rules.seed)
        report = compare(contestants, suites, rules, options.out)
        if options.contamination:
            report["contamination"] = contamination(suites, options.contamination)
    if options.published:
        report["published"] = published([suite["name"] for suite in report["suites"]])
    write(report, options.out)
    return report, _shown(report), not report["failures"]


def _shown(report: dict[str, Any]) -> str:
    """The report with tables as wide as a terminal, if it goes to one, and else in Markdown."""
    return table.render(report, terminal.table if sys.stdout.isatty() else table.markdown)


def protocol(options: CompareOptions) -> SamplingProtocol:
    """The protocol; where nobody says how many samples, four, or one if they would all be alike."""
    o, samples = options, options.samples or (SAMPLES if options.temperature else 1)
    return SamplingProtocol(samples, o.temperature, o.top_p, o.max_tokens, o.seed, o.think)


def write(report: dict[str, Any], out: Path) -> None:
    """compare.json, compare.md, and compare.png where there is something to draw."""
    write_json(out / "compare.json", report)
    part = out / "compare.md.part"
    part.write_text(table.render(report) + "\n", encoding="utf-8")
    part.replace(out / "compare.md")
    if any(score["accuracy"] is not None for score in report["scores"]):
        picture.draw(report, out / "compare.png")


def load(specs: Sequence[str], problems: int | None, seed: int) -> list[Suite]:
    """The suites by their names or files."""
    return [catalogue.load(spec, problems, seed) for spec in specs]


def open_all(options: CompareOptions, environment: Mapping[str, str]) -> list[Contestant]:
    """Contestants in the order of the command line, files before endpoints; nothing is loaded or contacted yet."""
    endpoints = [Endpoint.parse(text) for text in options.endpoints]
    models = [(path, _label(path)) for path in options.models]
    names = distinct([*(name for _, name in models), *(e.name for e in endpoints)])
    own, theirs = names[: len(models)], names[len(models) :]
    into, out_of = (
        prices(given, option, theirs)
        for given, option in ((options.price_in, "--price-in"), (options.price_out, "--price-out"))
    )
    keys, extra = _keys(options.key_env, theirs, environment), _extra(options.extra)
    opened: list[Contestant] = []
    if models:
        from finback.checkpoint.models import find_model
        from finback.comparison.local import Local, price_here

        price = price_here(options.price_hour)
        for (path, _), name in zip(models, own, strict=True):
            opened.append(Local(find_model(path), name, options.dtype, options.rows, price))
    for endpoint, name in zip(endpoints, theirs, strict=True):
        basis = f"${into.get(name, math.nan):g} in, ${out_of.get(name, math.nan):g} out per million tokens, as given"
        price = Price(None, into.get(name), out_of.get(name), basis) if name in into and name in out_of else Price()
        opened.append(
            Endpoint(
                endpoint.url,
                endpoint.model,
                name,
                keys.get(name, ""),
                extra,
                price,
                options.concurrency,
                options.rate,
                options.timeout,
            )
        )
    return opened


def _label(path: Path) -> str:
    """What a model is called in tables: its path, or for a long one its last parts."""
    text = str(path).rstrip("/")
    return text if len(text) <= 40 else "/".join(path.resolve().parts[-2:])


def _keys(given: Sequence[str], names: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The keys by endpoint, from the environment; for all the same, or one named."""
    found = dict.fromkeys(names, environment.get(KEY, ""))
    for text in sorted(given, key=lambda t: "=" in t):
        name, _, variable = text.rpartition("=")
        if not environment.get(variable):
            raise UserError("--key-env", variable, "no such environment variable, or empty", "Export it first.")
        if name and name not in names:
            raise UserError("--key-env", text, "no such endpoint", f"Known: {', '.join(names) or 'none'}.")
        found |= dict.fromkeys([name] if name else names, environment[variable])
    return found


def _extra(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError("--extra", text, "not a JSON object", """Write for example '{"reasoning_effort": "high"}'.""")
    return value


def published(suites: Sequence[str]) -> list[dict[str, Any]]:
    """Published scores on the questions of these suites; all there are where no suite is named."""
    return [asdict(row) for name in suites or [""] for row in tables.rows(name)]


def contamination(suites: Sequence[Suite], folders: Sequence[Path]) -> list[dict[str, Any]]:
    """Which of the suites' questions each prepared folder of training text holds."""
    return [overlaps.check(suite, folder).as_json() for suite in suites for folder in folders]
