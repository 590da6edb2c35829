"""Write docs/reference/cards.md: which models can be trained on which card, according to the planner.

python scripts/cards.py [FILE]
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from finback.model.config import V2_LITE, V3, ModelConfig
from finback.model.count import parameters
from finback.planner import tuning
from finback.planner.hardware import ASSUMPTIONS

TARGET = Path(__file__).parent.parent / "docs/reference/cards.md"
CARDS = (16, 24, 48, 80, 141)  # GB


def dense(vocab: int, hidden: int, layers: int, heads: int, width: int, kv: int, tied: bool = False) -> ModelConfig:
    """A dense model, such as Qwen's or Llama's."""
    shape: dict[str, Any] = {"num_key_value_heads": kv, "head_dim": hidden // heads, "tie_word_embeddings": tied}
    return ModelConfig(vocab, hidden, layers, heads, width, attention="gqa", max_position_embeddings=131072, **shape)


# the students of DeepSeek-R1 and one smaller, V2-Lite and V3
MODELS = {
    "Qwen2.5-0.5B": dense(151936, 896, 24, 14, 4864, 2, tied=True),
    "R1-Distill-Qwen-1.5B": dense(151936, 1536, 28, 12, 8960, 2),
    "R1-Distill-Qwen-7B": dense(152064, 3584, 28, 28, 18944, 4),
    "R1-Distill-Llama-8B": dense(128256, 4096, 32, 32, 14336, 8),
    "R1-Distill-Qwen-14B": dense(152064, 5120, 48, 40, 13824, 8),
    "DeepSeek-V2-Lite": V2_LITE,
    "R1-Distill-Qwen-32B": dense(152064, 5120, 64, 40, 27648, 8),
    "R1-Distill-Llama-70B": dense(128256, 8192, 80, 64, 28672, 8),
    "DeepSeek-V3, R1": V3,
}
SFT: dict[str, Any] = {"compute": "bf16", "batch_size": 8, "seq_len": 2048, "recompute": None, "adapter": None}
GRPO: dict[str, Any] = {
    **{"compute": "bf16", "prompts_per_step": 32, "num_generations": 8, "max_tokens": 2048, "micro_tokens": 8192},
    **{"task": "a task", "recompute": None, "adapter": None, "objective": {"beta": 0.001}},
}
METHODS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "LoRA": {"adapter": tuning.ADAPTER},
    "QLoRA": {"adapter": tuning.ADAPTER | {"base": "nf4"}},
}
SHORT = {
    'recompute="block"': "blocks",
    "adapter=LoRA()": "LoRA",
    'adapter=LoRA(base="nf4")': "QLoRA",
    "one row at a time": "one row",
}
HEAD = """# What fits which card

Written by `scripts/cards.py` (`make results`) from the planner; [Teach a 7B on one card](../guides/one-card.md) shows such training. GB are 10⁹ bytes at the
fullest moment on one card, with arithmetic in bf16, adapters of rank 16 on attention, feed-forwards and experts, and 2 GB for CUDA's context and
fragments. A model fits if a tenth of the card stays free. Otherwise the cell names what makes it fit, mildest first: `blocks` is `recompute="block"`,
`LoRA` and `QLoRA` are an adapter on a base in bf16 and NF4, `one row` is `batch_size=1`, or `micro_tokens=1` in RL; "no" means that nothing does. Nothing here is
offloaded or sharded; for several cards see [many ranks](../guides/many-ranks.md). `finback plan RECIPE --on 4090` answers for your own recipe.
"""
NOTES = {
    "SFT, 8 rows of 2,048 tokens": "",
    "GRPO, 32 questions, 8 answers of up to 2,048 tokens, `micro_tokens=8192`, `beta=0.001`": "As many answers are generated at a time as fit into half "
    "of the memory that weights and moments leave free; the figure includes them, for the largest card. The reference model is a copy if all weights learn, "
    "else the base without its adapter.\n\n",
}


def rows(knobs: dict[str, Any]) -> Iterator[str]:
    """The lines of a table: model, method, GB, and each card."""
    margin, reserve = ASSUMPTIONS["margin"].value, ASSUMPTIONS["reserve"].value
    for name, config in MODELS.items():
        for method, more in METHODS.items():
            cells, chosen = list[str](), knobs | more
            for card in CARDS:
                room = card * 1e9 * (1 - margin)
                taken, least = tuning.changes(config, chosen, reserve, room)
                fits = ", ".join(SHORT[t] for t in taken) if taken else "yes"
                cells.append(fits if least <= room else "no")
            total = tuning.memory(config, chosen, reserve, CARDS[-1] * 1e9 * (1 - margin)).total
            size = parameters(config) / 1e9
            yield f"| {name} | {size:,.1f} B | {method} | {total / 1e9:,.1f} | {' | '.join(cells)} |"


def render() -> str:
    """The page."""
    lines = [HEAD]
    for (title, note), knobs in zip(NOTES.items(), (SFT, GRPO), strict=True):
        head = f"| model | parameters | what learns | GB | {' | '.join(f'{c} GB' for c in CARDS)} |"
        lines += [f"## {title}\n", note + head, "|---" * (4 + len(CARDS)) + "|", *rows(knobs), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else TARGET).write_text(render(), encoding="utf-8")
