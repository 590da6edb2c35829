"""Fills the outlines in templates/, Markdown or JSON, in which {names} stand for facts and answers.

Does not import torch.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from finback.report.docs.blocks import TEMPLATES, Block, BulletList, Heading, Paragraph, TableBlock, display, words
from finback.report.docs.facts import MISSING
from finback.report.docs.questionnaire import Answers

NAME = re.compile(r"\{([\w.]+)\}")


def blocks(name: str, values: Mapping[str, Any], answers: Answers) -> list[Block]:
    """The blocks of a Markdown outline. A list on its own inserts blocks; within a table it inserts rows."""
    made: list[Block] = []
    for part in (TEMPLATES / f"{name}.md").read_text(encoding="utf-8").strip().split("\n\n"):
        alone = NAME.fullmatch(part)
        if alone and isinstance(values.get(alone[1]), list):
            made += values[alone[1]]
        elif part.startswith("#"):
            marks, _, text = part.partition(" ")
            made.append(Heading(_said(text, values, answers), len(marks)))
        elif part.startswith("- "):
            made.append(BulletList(tuple(_said(line[2:], values, answers) for line in part.split("\n"))))
        elif part.startswith("|"):
            made.append(_table(part.split("\n"), values, answers))
        else:
            made.append(Paragraph(_said(part, values, answers)))
    return made


def _table(lines: list[str], values: Mapping[str, Any], answers: Answers) -> TableBlock:
    head, _, *rows = [
        [tuple(_said(cell.strip(), values, answers) for cell in line.strip("|").split("|"))]
        if line.startswith("|")
        else values[line.strip("{}")]
        for line in lines
    ]
    return TableBlock(head[0], tuple(row for some in rows for row in some))


def json_values(name: str, values: Mapping[str, Any], answers: Answers) -> Any:
    """The values of a JSON outline. Lists and objects are inserted as they are; entries that are MISSING are omitted."""

    def filled(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: value for key, raw in part.items() if (value := filled(raw)) is not MISSING}
        if isinstance(part, list):
            return list(map(filled, part))
        alone = NAME.fullmatch(part) if isinstance(part, str) else None
        fact = values.get(alone[1]) if alone else None
        if fact is MISSING or isinstance(fact, (list, dict)):
            return fact
        return _said(part, values, answers) if isinstance(part, str) else part

    return filled(json.loads((TEMPLATES / f"{name}.json").read_text(encoding="utf-8")))


def _said(text: str, values: Mapping[str, Any], answers: Answers) -> str:
    """A text with names replaced by their values."""
    return NAME.sub(lambda name: display(values[name[1]]) if name[1] in values else words(answers(name[1])), text)
