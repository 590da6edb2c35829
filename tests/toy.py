"""What several tests share: a model of a few thousand parameters and a recipe that runs in seconds."""

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor

from finback.cli import main
from finback.model.config import CSA, HCA, SLIDING, TINY, ModelConfig
from finback.model.transformer import Transformer
from finback.train.batch import Batch, of_windows
from finback.train.loss import Losses, LossTerms, training_losses

ROOT = Path(__file__).parent.parent

CONFIG = ModelConfig(
    **{
        **{f: getattr(TINY, f) for f in TINY.__dataclass_fields__},
        "vocab_size": 320,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "q_lora_rank": 24,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": 16,
        "max_position_embeddings": 256,
    }
)

# a dense student's layout, with grouped-query attention
DENSE = replace(
    CONFIG,
    attention="gqa",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    n_routed_experts=0,
    num_nextn_predict_layers=0,
    rope_interleaved=False,
)

# V4's parts: a layer with each kind of attention, streams, hash routing, clamps
_V4: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "attention": "compressed",
    "q_lora_rank": 20,
    "head_dim": 16,
    "qk_rope_head_dim": 8,
    "sliding_window": 5,
    "layer_types": (CSA, SLIDING, HCA),
    "compress_rate_hca": 8,
    "o_groups": 2,
    "o_lora_rank": 8,
    "hc_mult": 4,
    "index_topk": 3,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "rope_theta": 4000.0,
    "local_rope_theta": 1000.0,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "num_hash_layers": 1,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 1.0,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
V4 = ModelConfig(**_V4)

RECIPE = """
from pathlib import Path
from finback.data.sources import Files
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.stages.prepare import Prepare, TaskText
from finback.stages.pretrain import Pretrain, Probe
from finback.tasks.math import Chains
from tests.toy import CONFIG

chains = Chains(2, 3)
exams = (Exam(name="sampled", task=chains, problems=24, max_tokens=12),
         Exam(name="greedy", task=Chains(3, 4), problems=24, temperature=0.0, max_tokens=12))
recipe = [
    Prepare(name="prepare", text=(Files((str(Path(__file__).parent / "words.txt"),), name="words"),),
            tasks=(TaskText(name="chains", tasks=(chains,), documents=2000, think=0.5),), vocab_size=320),
    Pretrain(name="base", data="prepare", model=CONFIG, mixture={"words": 0.4, "chains": 0.6}, batch_size=8, seq_len=32,
             max_tokens=16384, decay_tokens=4096, warmup_tokens=2048, compute="bf16", checkpoint_steps=8,
             probe=Probe(task=chains, at_least=0.9, problems=8, every_tokens=4096, max_tokens=8)),
    Evaluate(name="before", start="base", exams=exams, data="prepare", sources=("words",)),
    GRPO(name="zero", start="base", task=chains, steps=8, prompts_per_step=4, num_generations=4, max_tokens=12, checkpoint_steps=2),
    Evaluate(name="after", start="zero", exams=exams, data="prepare", sources=("words",)),
]
"""

WORDS = "\n\n".join(
    f"The {a} {b} near the {c} and the {c} did not mind, for it was {d}."
    for a in ("cat", "dog", "old man", "whale")
    for b in ("sat", "slept", "sang", "waited")
    for c in ("door", "river", "harbour", "tall tree", "fire")
    for d in ("late", "warm", "raining", "Sunday")
)


def write_recipe(folder: Path) -> Path:
    """Writes the toy recipe and its text into a folder; returns the recipe file."""
    (folder / "words.txt").write_text(WORDS, encoding="utf-8")
    (folder / "toy.py").write_text(RECIPE, encoding="utf-8")
    return folder / "toy.py"


def environment() -> dict[str, str]:
    """The environment of child processes that must find finback and tests.toy."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"PYTHONPATH": str(ROOT)}


def finback(*arguments: object, input: str = "") -> subprocess.CompletedProcess[str]:
    """Runs the command line in this process: like `python -m finback <arguments>`, without a second import of torch."""
    given, code = [str(argument) for argument in arguments], None
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as err,
        mock.patch.object(sys, "argv", ["finback", *given]),
        mock.patch.object(sys, "stdin", io.StringIO(input)),
        mock.patch.dict(os.environ, environment(), clear=True),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code
        out.seek(0), err.seek(0)
        return subprocess.CompletedProcess(given, int(code or 0), out.read(), err.read())


def finback_process(*arguments: object, wrapper: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a separate process, which starts ranks; `wrapper` is a command to run it under."""
    command = [*wrapper, sys.executable, "-m", "finback", *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300)


def toy_model(seed: int = 0) -> Transformer:
    """A model with spread-out random weights, so that tokens, experts and heads differ."""
    return Transformer(replace(CONFIG, initializer_range=0.15)).initialise(seed).eval()


def backward(
    model: Transformer, windows: Tensor, mtp_weight: float = 0.3, balance_alpha: float = 1e-4, parts: int = 1
) -> Losses:
    """One forward and backward pass over windows (rows, seq_len + 1 + depths), one of `parts` equal parts of a step."""
    batch = of_windows(windows, len(model.mtp))
    return backward_batch(model, batch, batch.counts(len(model.mtp)) * parts, mtp_weight, balance_alpha, 1 / parts)


def backward_batch(
    model: Transformer,
    batch: Batch,
    counts: Tensor,
    mtp_weight: float = 0.3,
    balance_alpha: float = 1e-4,
    row_share: float = 1.0,
) -> Losses:
    """The same over any batch; counts (1 + depths,) are the numbers of labels in the whole step."""
    terms = LossTerms(counts.tolist(), mtp_weight, balance_alpha, row_share)
    losses = training_losses(model, batch, terms)
    losses.total(terms).backward()
    return Losses(losses.main.detach(), losses.mtp.detach(), losses.balance.detach())
