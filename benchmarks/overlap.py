"""Wall time of GRPO if generating and learning take equally long: alternating, and with answers generated ahead.

    python benchmarks/overlap.py --steps 8 --delay 5

The delays are sleeps, one before each step's answers and one before each update, much longer than the toy model's own
work.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from record import header, write

from finback.checkpoint import models
from finback.data import tokenizer
from finback.engine.request import Completion, SamplingParams
from finback.model.config import TINY
from finback.model.transformer import Transformer
from finback.parallel.mesh import World
from finback.rollouts.generation import PolicyModel, Rollouts
from finback.rollouts.here import Here
from finback.runs.files import read_lines
from finback.runs.folder import StageRun
from finback.stages.grpo import GRPO
from finback.stages.grpo_training import Reinforcement
from finback.tasks.math import Chains
from finback.train.loop import Loop

MOST = 0.65  # largest share of the alternating time
MODEL = replace(TINY, vocab_size=320, hidden_size=32, num_hidden_layers=2, max_position_embeddings=256)


@dataclass(frozen=True)
class Delayed(Here):
    """The engine in this process, which begins each step's answers after `seconds`."""

    seconds: float = 0.0

    def open(self, policy: PolicyModel, sampling: SamplingParams) -> Rollouts:
        opened = super().open(policy, sampling)
        answers, seconds = opened._answers, self.seconds

        def later(
            prompts: Sequence[Sequence[int]], sampling: SamplingParams, seeds: Sequence[int]
        ) -> Iterator[tuple[int, Completion]]:
            time.sleep(seconds)
            yield from answers(prompts, sampling, seeds)

        opened._answers = later  # type: ignore[method-assign]
        return opened


class DelayedLearning(Reinforcement):
    """GRPO whose updates take `seconds` longer."""

    def __init__(self, stage: GRPO, run: StageRun, seconds: float) -> None:
        super().__init__(stage, run)
        self.seconds = seconds

    def _update(self, *given: Any, **more: Any) -> Any:
        time.sleep(self.seconds)
        return super()._update(*given, **more)


def measure(folder: Path, steps: int, delay: float, max_staleness: int) -> dict[str, Any]:
    """Runs `steps` steps; returns their seconds and the logged idle shares."""
    run = StageRun(folder, f"ahead-{max_staleness}", 0, World(), quiet=True)
    run.folder.mkdir()
    stage = GRPO(
        name=run.name,
        start="base",
        task=Chains(2, 3),
        steps=steps,
        prompts_per_step=4,
        num_generations=4,
        max_tokens=10,
        max_gap=9.0,
        patience=0,
        max_staleness=max_staleness,
        rollouts=Delayed(seconds=delay),
    )
    training = DelayedLearning(stage, run, delay)
    begin = time.monotonic()
    Loop(training).train()
    seconds = time.monotonic() - begin
    training.close()
    lines = list(read_lines(run.folder / "metrics.jsonl"))
    idle = {name: [line[name] for line in lines if name in line] for name in ("trainer_idle", "engines_idle")}
    return {"max_staleness": max_staleness, "seconds": seconds, **idle}


def main() -> None:
    """Measures alternation and each staleness, and writes the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--delay", type=float, default=5.0, help="seconds of generating, and of learning, in each step")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/overlap.json"))
    options = parser.parse_args()
    results = header("overlap", {"steps": options.steps, "delay": options.delay})
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        tokenizer.train(["3+4-2=5\n12-3+1=10\n"] * 99, 320, base / "tokenizer.json")
        models.save(base, Transformer(MODEL).initialise(0))
        (base / "manifest.json").write_text("{}")
        found = [measure(Path(folder), options.steps, options.delay, most) for most in (0, 1, 2)]
    results["runs"] = found
    results["share"] = [run["seconds"] / found[0]["seconds"] for run in found]
    write(results, options.out)
    if results["share"][1] > MOST:
        raise SystemExit(
            f"with answers generated ahead it takes {results['share'][1]:.2f} of the time, more than {MOST}"
        )


if __name__ == "__main__":
    main()
