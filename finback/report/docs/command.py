"""`finback docs`: from a run's records and people's answers to files, or to a list of what is missing. Does not import torch."""

from datetime import UTC, datetime
from typing import Any

from finback.report.docs import build, facts, questionnaire
from finback.report.docs.questionnaire import Answers
from finback.report.options import DocsOptions


def run(options: DocsOptions) -> tuple[dict[str, Any], str]:
    """Writes the documents of a run, or with `check` only examines them; returns values for --json, and text."""
    assert options.run is not None, "the options require a run unless they ask for questions"
    found, now = facts.read(options.run, options.model), datetime.now(UTC)
    path = options.answers or options.run / "answers.toml"
    given = questionnaire.read(path) if options.answers is not None or path.is_file() else Answers({})
    examined = build.examine(found, given, now)
    files = [] if options.check else build.write(found, given, options.out or options.run / "documents", now)
    values = {"files": [str(f) for f in files], **vars(examined), "complete": examined.holds}
    return values, examined.as_text() if options.check else build.outcome(files, examined)
