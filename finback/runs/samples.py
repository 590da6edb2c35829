"""Finds answers of RL steps or of an exam by step or question. Does not import torch."""

import json
from collections import defaultdict
from typing import Any

from finback.runs.files import is_number
from finback.runs.metrics_table import Following, records

MOST = 512  # most records in one reply
NEWEST = 4 << 20  # bytes at the end of a file to search for its last step


class SampleIndex(Following):
    """An index of a JSONL file of answers; the answers themselves stay on disk."""

    def clear(self) -> None:
        self.by_step: defaultdict[int, list[int]] = defaultdict(list)  # offsets in the file
        self.by_question: defaultdict[str, list[int]] = defaultdict(list)

    def newest(self) -> list[dict[str, Any]]:
        """Answers of the last step in the file, which may not be indexed yet."""
        if self.tail.path.is_symlink() or not self.tail.path.is_file():
            return []
        with self.tail.path.open("rb") as handle:
            handle.seek(max(0, self.tail.path.stat().st_size - NEWEST))
            found = records(b"\n".join(handle.read().split(b"\n")[1:-1]))
        return [r for r in found if _step(r) == _step(found[-1])]

    def at_step(self, step: int) -> list[dict[str, Any]]:
        """Answers of a step."""
        return self._read(self.by_step.get(step, []))

    def of_question(self, question: str) -> list[dict[str, Any]]:
        """Answers to one question, in training order."""
        return self._read(self.by_question.get(question, []))

    def questions(self, text: str, most: int) -> list[str]:
        """Questions that contain a text, most frequent first."""
        low = text.lower()
        found = [q for q in self.by_question if low in q.lower()]
        return sorted(found, key=lambda q: -len(self.by_question[q]))[:most]

    def take(self, lines: bytes, place: int) -> None:
        split = lines.split(b"\n")[:-1]
        heads = records(b"\n".join(map(_head, split)))
        are_whole = len(heads) == len(split)
        found = [[head] for head in heads] if are_whole else [records(line) for line in split]
        for line, read in zip(split, found, strict=True):
            for record in read:
                self.by_step[_step(record)].append(place)
                self.by_question[str(record.get("question", ""))].append(place)
            place += len(line) + 1

    def _read(self, places: list[int]) -> list[dict[str, Any]]:
        if not places or self.tail.path.is_symlink():
            return []
        lines = []
        try:
            with self.tail.path.open("rb") as handle:
                for place in places[:MOST]:
                    handle.seek(place)
                    lines.append(handle.readline())
        except OSError:
            return []
        return records(b"".join(lines))


def _head(line: bytes) -> bytes:
    """The fields of a line that the index needs, which come before the gold answer; inside a string, `"` is written `\\"`."""
    end = line.find(b', "gold": ')
    return line if end < 0 else line[:end] + b"}"


def _step(record: dict[str, Any]) -> int:
    step = record.get("step", 0)
    return step if isinstance(step, int) else 0


def shown(record: dict[str, Any]) -> dict[str, Any]:
    """A record as the page shows it, with validated types."""
    found = {name: _text(record.get(name)) for name in ("question", "gold", "thinking", "answer", "finish")}
    reward = record.get("reward")
    return found | {
        "step": _step(record),
        "tokens": _number(record.get("tokens")),
        # None: not judged
        "correct": None if "correct" in record and record["correct"] is None else record.get("correct") is True,
        "thinks": record.get("thinks") is True,
        "advantage": _number(record.get("advantage")),
        "detail": _detail(record),
        "reward": {str(k): _number(v) for k, v in reward.items()} if isinstance(reward, dict) else {},
    }


def continued(record: dict[str, Any], later: dict[str, Any] | None) -> dict[str, Any]:
    """As `shown` for an answer to a watched prompt, with what the following look, if any, recorded about its tokens."""
    return shown(record if later is None else record | {"new_logprobs": later.get("former_logprobs")})


def _detail(record: dict[str, Any]) -> dict[str, Any] | None:
    """An answer's tokens: texts, log-probabilities before and after, experts by layer; None if unknown."""
    pieces, before, after = (record.get(name) for name in ("pieces", "logprobs", "new_logprobs"))
    if not isinstance(pieces, list) or not _are_numbers(before, len(pieces)):
        return None
    layers, experts = record.get("expert_layers"), record.get("experts")
    sent = isinstance(experts, list) and all(isinstance(token, list) for token in experts) and _are_numbers(layers)
    return {
        "pieces": [_text(piece) for piece in pieces],
        "before": before,
        "after": after if _are_numbers(after, len(pieces)) else None,
        "layers": layers if sent else [],
        "experts": [[ids if _are_numbers(ids) else [] for ids in token] for token in experts or []] if sent else [],
    }


def _are_numbers(values: Any, count: int | None = None) -> bool:
    """Whether it is a list of numbers, of length `count` if given."""
    return isinstance(values, list) and all(map(is_number, values)) and count in (None, len(values))


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, ensure_ascii=False)


def _number(value: Any) -> float | None:
    return value if is_number(value) else None
