"""DeepSeek-V3's pre-training as its report gives it, to be planned, not run.

    finback plan recipes/v3.py --on h800:2048 --mesh pp=16,ep=64 --schedule dualpipe

14.8T tokens of 4096 each, then context extension: 1000 steps at 32K and 1000 at 128K (report 4.2 and 4.3). The ramp of the
batch over the first 469B tokens is left out, and so is post-training, whose tokens are not published.
"""

from dataclasses import dataclass
from typing import Any

from finback.config import UserError
from finback.data.sources import Chitchat
from finback.model.config import V3
from finback.runs.folder import StageRun
from finback.stages.prepare import Prepare
from finback.stages.pretrain import Pretrain

REFUSAL = UserError("recipe", "v3", "is there to be planned", "Use finback plan recipes/v3.py --on h800:2048.")


@dataclass(frozen=True, kw_only=True)
class Corpus(Prepare):
    """V3's corpus is not published; only the size of its vocabulary matters to a plan."""

    def run(self, run: StageRun) -> dict[str, Any]:
        raise REFUSAL


@dataclass(frozen=True, kw_only=True)
class Planned(Pretrain):
    """Pre-training that is too large to be started here."""

    def run(self, run: StageRun) -> dict[str, Any]:
        raise REFUSAL


def phase(name: str, rows: int, length: int, tokens: float) -> Planned:
    """One phase of pre-training."""
    return Planned(
        name=name,
        data="prepare",
        model=V3,
        mixture={"chitchat": 1.0},
        batch_size=rows,
        seq_len=length,
        max_tokens=int(tokens),
        compute="fp8",
    )


recipe = [
    Corpus(name="prepare", text=(Chitchat(),), vocab_size=V3.vocab_size),
    phase("pretrain", 15360, 4096, 14.8e12),
    phase("extend-32k", 1920, 32768, 1000 * 1920 * 32768),
    phase("extend-128k", 480, 131072, 1000 * 480 * 131072),
]
