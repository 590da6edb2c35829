"""DeepSeek-V3.2's steps on the quickstart's model: the dense model becomes sparse, then RL as before.

First an indexer in each layer learns to predict the model's attention, then training continues with each token attending
to 32 others only, then R1-Zero. Run recipes/tiny.py first.
"""

from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.stages.pretrain import Pretrain
from finback.stages.sparsify import Sparsify
from finback.stages.validation import Validation
from finback.tasks.math import Chains

chains = Chains(min_terms=5, max_terms=7)
exams = (
    Exam(name="sampled", task=chains, problems=600),
    Exam(name="greedy", task=chains, problems=600, temperature=0.0),
)
data = "runs/tiny/prepare"
mixture = {"chitchat": 0.4, "chains": 0.6}

recipe = [
    Evaluate(name="dense", start="runs/tiny/base", exams=exams, data=data, sources=("chitchat",)),
    Sparsify(
        name="indexers",
        start="runs/tiny/base",
        data=data,
        mixture=mixture,
        index_topk=32,
        index_n_heads=8,
        index_head_dim=16,
        max_tokens=400_000,
        decay_tokens=200_000,
    ),
    # at a tenth of the rates that pre-training began with
    Pretrain(
        name="sparse",
        start="indexers",
        data=data,
        mixture=mixture,
        muon_lr=8e-4,
        adam_lr=8e-4,
        max_tokens=400_000,
        decay_tokens=200_000,
    ),
    Evaluate(name="before", start="sparse", exams=exams, data=data, sources=("chitchat",)),
    GRPO(name="zero", start="sparse", task=chains, steps=200, validation=Validation(task=chains, temperature=1.0)),
    Evaluate(name="after", start="zero", exams=exams, data=data, sources=("chitchat",)),
]
