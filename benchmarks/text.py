"""Real text for the benchmarks, prepared by a recipe's stage."""

from pathlib import Path

from finback.data.sources import Chitchat
from finback.parallel.mesh import World
from finback.runs import recipe
from finback.runs.folder import StageRun
from finback.stages.prepare import Prepare, TaskText
from finback.tasks.math import Chains


def prepare(folder: Path, chains: Chains, vocab_size: int = 1024) -> Path:
    """Real text, tokenised: the folder of a finished prepare stage. Problems are included for the tokenizer."""
    sources = TaskText(name="chains", tasks=(chains,), documents=5_000)
    stage = Prepare(name="prepare", text=(Chitchat(),), tasks=(sources,), vocab_size=vocab_size)
    recipe.execute(recipe.Recipe("benchmark", (stage,)), folder, 0, World(), _no_watch, quiet=True)
    return folder / "prepare"


def _no_watch(run: StageRun) -> None:
    pass
