"""DeepSeek-V3's pre-training as in its report: 14.8T tokens, then context extension to 32K and to 128K (4.1 to 4.3).

    finback plan recipes/v3.py --on h800:2048 --recompute selective
    finback run recipes/v3.py --set size=tiny --ranks 4

V3's corpus is not published, so at full size the recipe can be planned, not run. `size=tiny` shrinks the model, the
rows and the tokens and keeps every phase and knob: a minute or two on two CPU cores. Its layouts need four ranks; on
one rank remove them:

    finback run recipes/v3.py --set size=tiny --ranks 1 \\
        --set pretrain.layout=none --set extend-32k.layout=none --set extend-128k.layout=none

The report does not give the shape of the ramp, the decay of the average, or the extension's layout and document mask.
Post-training is in recipes/r1.py.
"""

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from finback.config import UserError
from finback.data.sources import Chitchat, Files
from finback.model.config import V3, ModelConfig
from finback.parallel.layout import Layout
from finback.parallel.schedules import ScheduleName
from finback.runs.folder import StageRun
from finback.runs.recipe import Stage
from finback.stages.extend import Extend
from finback.stages.prepare import Prepare
from finback.stages.pretrain import Pretrain
from finback.train.rates import Phase


@dataclass(frozen=True, kw_only=True)
class Corpus(Prepare):
    """V3's corpus; a plan needs only the size of its vocabulary."""

    def run(self, run: StageRun) -> dict[str, Any]:
        problem, remedy = (
            "can be planned, not run: V3's corpus is not published",
            "Use finback plan, or --set size=tiny.",
        )
        raise UserError("size", "v3", problem, remedy)


@dataclass(frozen=True, kw_only=True)
class Size:
    """The quantities that `size` changes."""

    model: ModelConfig
    # tokens per row, and how many times as long the rows of the two extensions are
    length: int
    longer: tuple[int, int] = (8, 32)
    # rows per step: at first, after the ramp, and in each extension
    rows: tuple[int, int, int, int]
    # tokens: for each of V3's trillions, in the warm-up of 2,000 steps, and in the ramp
    trillion: float
    warmup: int
    ramp: int
    extension_steps: int
    lr: float
    # ranks of pre-training; in the extensions a part of dp becomes cp
    pp: int
    dp: int
    ep: int
    nodes: int
    cp: tuple[int, int]
    schedule: ScheduleName

    def layout(self, rows: int, cp: int = 1) -> Layout:
        """A layout with one row per micro-batch and ZeRO-1."""
        dp = self.dp // cp
        mesh = {"pp": self.pp, "dp": dp, "cp": cp, "ep": self.ep, "nodes": self.nodes}
        return Layout(**mesh, micro_batches=rows // dp, schedule=self.schedule, sharding="zero1")


SIZES = {
    "v3": Size(
        model=dataclasses.replace(V3, rope_scaling=None, max_position_embeddings=4096),
        length=4096,
        rows=(3072, 15360, 1920, 480),
        trillion=1e12,
        warmup=2000 * 3072 * 4096,
        ramp=469_000_000_000,
        extension_steps=1000,
        lr=2.2e-4,
        pp=16,
        dp=128,
        ep=64,
        nodes=8,
        cp=(8, 32),
        schedule="dualpipe",
    ),
    "tiny": Size(
        model=dataclasses.replace(
            V3,
            rope_scaling=None,
            max_position_embeddings=16,
            vocab_size=512,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=128,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            n_group=4,
            topk_group=2,
            initializer_range=0.15,  # with 0.006 so small a model sends all tokens to the same experts
        ),
        length=16,
        rows=(4, 20, 4, 4),
        trillion=300,
        warmup=128,
        ramp=1280,
        extension_steps=2,
        lr=2e-3,
        pp=2,
        dp=2,
        ep=2,
        nodes=1,
        cp=(2, 2),
        schedule="dualpipev",
    ),
}

CODE = Files(
    (str(Path(os.__file__).parent / "[a-m]*.py"),), split="files", name="code", licence="PSF-2.0 (Python's own library)"
)


def recipe(size: Literal["v3", "tiny"] = "v3") -> list[Stage]:
    """The stages at V3's size, or at one that two cores train in minutes."""
    s = SIZES[size]
    first, full, *extended = s.rows

    def trillions(count: float) -> int:
        return round(count * s.trillion)

    low = 7.3e-6 / 2.2e-4
    common: dict[str, Any] = {
        "data": "prepare",
        "mixture": {"chitchat": 0.5, "code": 0.5},
        "packing": "best_fit",
        "optimizer": "adamw",
        "adam_lr": s.lr,
        "weight_decay": 0.1,
        "compute": "fp8",
        "ema_decay": 0.999,
    }
    stages: list[Stage] = [
        (Corpus if size == "v3" else Prepare)(
            name="prepare", text=(Chitchat(), CODE), vocab_size=s.model.vocab_size, fim=0.1
        ),
        Pretrain(
            name="pretrain",
            model=s.model,
            seq_len=s.length,
            batch_size=full,
            batch_size_start=first,
            ramp_tokens=s.ramp,
            phases=(
                Phase(s.warmup, 0.0, 1.0),
                Phase(trillions(10) - s.warmup),
                Phase(trillions(4.3), 1.0, 0.1, "cosine"),
                Phase(trillions(0.333), 0.1, 0.1),
                Phase(trillions(0.167), low, low),
            ),
            mtp_weight=((0, 0.3), (trillions(10), 0.1)),
            bias_speed=((0, 0.001), (trillions(14.3), 0.0)),
            layout=s.layout(full),
            **common,
        ),
    ]
    names = "extend-32k", "extend-128k"
    for at, (name, rows, longer, cp) in enumerate(zip(names, extended, s.longer, s.cp, strict=True)):
        stages.append(
            Extend(
                name=name,
                start=names[at - 1] if at else "pretrain",
                # YaRN's factor is 40 from the start; the final window is that of V3's config.json
                window=s.length * (40 if at else longer),
                factor=None if at else 40.0,
                seq_len=s.length * longer,
                batch_size=rows,
                phases=(Phase(s.extension_steps * rows * s.length * longer, low, low),),
                document_mask=True,
                mtp_weight=0.1,
                bias_speed=0.0,
                layout=s.layout(rows, cp),
                **common,
            )
        )
    return stages
