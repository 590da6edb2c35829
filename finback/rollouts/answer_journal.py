"""Stores answers on disk as they arrive, so that generated tokens survive a crash of the trainer."""

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

FOLDER = ".answers"  # within a stage's folder


class AnswerJournal:
    """One file per step and rank, with one line per answer, keyed by its seed."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        # answers of the current step
        self.known: dict[int, Completion] = {}
        self._file: IO[str] | None = None

    def begin(self, step: int) -> None:
        """Starts or continues a step; its stored answers become known."""
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(step)
        self.known = {int(line["seed"]): _read(line) for line in read_lines(path)}
        self._file = path.open("a", encoding="utf-8")
        if self._file.tell():  # a kill may have left an incomplete line
            self._file.write("\n")

    def write(self, seed: int, completion: Completion) -> None:
        """Stores an answer of this step."""
        assert self._file is not None, "a step was begun"
        self._file.write(json.dumps({"seed": seed, **_written(completion)}) + "\n")
        self._file.flush()

    def tokens(self, after: int) -> int:
        """Number of tokens in answers of steps after `after`, which are not learned from."""
        paths = [path for path in self.folder.glob(f"*-{self.rank}.jsonl") if _step(path) > after]
        return sum(len(line["tokens"]) for path in paths for line in read_lines(path))

    def forget(self, step: int) -> None:
        """Deletes steps up to this one, which no checkpoint will need again."""
        for path in self.folder.glob(f"*-{self.rank}.jsonl"):
            if _step(path) <= step:
                path.unlink()

    def close(self) -> None:
        """Closes the file of the current step."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _path(self, step: int) -> Path:
        return self.folder / f"{step:08}-{self.rank}.jsonl"


class JournaledRollouts:
    """Takes answers from a journal if they are there; otherwise generates and stores them."""

    def __init__(self, rollouts: Rollouts, journal: AnswerJournal) -> None:
        self.rollouts, self.journal = rollouts, journal

    @property
    def model_config(self) -> ModelConfig:
        """Config of the model."""
        return self.rollouts.model_config

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
    ) -> list[Completion]:
        """One completion per prompt, in order. Completion i uses random numbers of seeds[i] only."""
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
    mask = completion.sampling_mask
    choices = {"routed_experts": completion.routed_experts, "indexer_topk": completion.indexer_topk}
    return {
        "tokens": completion.tokens,
        "logprobs": completion.logprobs,
        "finish": completion.finish_reason,
        "versions": completion.versions,
        **{name: npy.to_text(ids) for name, ids in choices.items() if ids is not None},
        **({} if mask is None else {"sampling_mask": [ids.tolist() for ids in mask]}),
    }


def _read(line: dict[str, Any]) -> Completion:
    mask = line.get("sampling_mask")
    routes, entries = (
        npy.from_text(line[name]) if name in line else None for name in ("routed_experts", "indexer_topk")
    )
    return Completion(
        line["tokens"],
        line["logprobs"],
        line["finish"],
        routes,
        None if mask is None else [np.array(ids, dtype=np.int32) for ids in mask],
        tuple((int(v), int(first), int(end)) for v, first, end in line["versions"]),
        entries,
    )
