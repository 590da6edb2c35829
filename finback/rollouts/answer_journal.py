"""Answers on disk as they come, before anything else is done with them: what was paid for survives whoever asked."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from finback.engine.request import Completion, SamplingParams
from finback.model.config import ModelConfig
from finback.rollouts.generation import Rollouts
from finback.runs import npy
from finback.runs.files import read_lines

FOLDER = ".answers"  # within a stage's


class AnswerJournal:
    """One file for each step of one rank, and a line in it for each answer, by the seed it was asked with."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        # of the step that was begun last
        self.known: dict[int, Completion] = {}
        self._file: IO[str] | None = None

    def begin(self, step: int) -> None:
        """Go on with a step: what was answered of it before is known."""
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(step)
        self.known = {int(line["seed"]): _read(line) for line in read_lines(path)}
        self._file = path.open("a", encoding="utf-8")
        if self._file.tell():  # a kill may have left half a line
            self._file.write("\n")

    def write(self, seed: int, completion: Completion) -> None:
        """Keep an answer of this step."""
        assert self._file is not None, "a step was begun"
        self._file.write(json.dumps({"seed": seed, **_written(completion)}) + "\n")
        self._file.flush()

    def tokens(self, after: int) -> int:
        """Those of all answers to steps behind one, which nobody has learnt from."""
        paths = [path for path in self.folder.glob(f"*-{self.rank}.jsonl") if _step(path) > after]
        return sum(len(line["tokens"]) for path in paths for line in read_lines(path))

    def forget(self, step: int) -> None:
        """Drop what is known of steps up to this one, which no checkpoint will ask for again."""
        for path in self.folder.glob(f"*-{self.rank}.jsonl"):
            if _step(path) <= step:
                path.unlink()

    def close(self) -> None:
        """Close the file of the step that was begun last."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08}-{self.rank}.jsonl"


class JournaledRollouts:
    """Answers of a journal where it has them, and else new ones, which it then has."""

    def __init__(self, rollouts: Rollouts, journal: AnswerJournal) -> None:
        self.rollouts, self.journal = rollouts, journal

    @property
    def model_config(self) -> ModelConfig:
        """Of the model that answers."""
        return self.rollouts.model_config

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order. Completion i uses random numbers of seeds[i] alone."""
        known = self.journal.known
        asked = [i for i, seed in enumerate(seeds) if seed not in known]
        drawn = [seeds[i] for i in asked]
        for place, completion in self.rollouts.stream([prompts[i] for i in asked], sampling, drawn):
            self.journal.write(drawn[place], completion)
            known[drawn[place]] = completion
        return [known[seed] for seed in seeds]


def _step(path: Path) -> int:
    return int(path.name.partition("-")[0])


def _written(completion: Completion) -> dict[str, Any]:
    routes, mask = completion.routed_experts, completion.sampling_mask
    return {
        "tokens": completion.tokens,
        "logprobs": completion.logprobs,
        "finish": completion.finish_reason,
        "versions": completion.versions,
        **({} if routes is None else {"routed_experts": npy.to_text(routes)}),
        **({} if mask is None else {"sampling_mask": [ids.tolist() for ids in mask]}),
    }


def _read(line: dict[str, Any]) -> Completion:
    routes, mask = line.get("routed_experts"), line.get("sampling_mask")
    return Completion(
        line["tokens"],
        line["logprobs"],
        line["finish"],
        None if routes is None else npy.from_text(routes),
        None if mask is None else [np.array(ids, dtype=np.int32) for ids in mask],
        tuple((int(v), int(first), int(end)) for v, first, end in line["versions"]),
    )
