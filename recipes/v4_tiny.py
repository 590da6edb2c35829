"""DeepSeek-V4's block with the quickstart's steps: compressed attention, residual streams and hash routing, then R1-Zero.

The model is as large as the quickstart's and trained on the same text. A token attends to the last 16 tokens directly,
and to earlier ones through entries of 4 tokens (CSA) or 16 (HCA). Run recipes/tiny.py first: this recipe reads its
text.
"""

from finback.model.config import CSA, HCA, SLIDING, ModelConfig
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.stages.pretrain import Pretrain, Probe
from finback.stages.validation import Validation
from finback.tasks.math import Chains

chains = Chains(min_terms=5, max_terms=7)
exams = (
    Exam(name="sampled", task=chains, problems=600),
    Exam(name="greedy", task=chains, problems=600, temperature=0.0),
)
data = "runs/tiny/prepare"

V4_TINY = ModelConfig(
    vocab_size=1024,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=64,
    attention="compressed",
    layer_types=(SLIDING, CSA, HCA, CSA),
    sliding_window=16,
    compress_rate_csa=4,
    compress_rate_hca=16,
    q_lora_rank=96,
    head_dim=64,
    qk_rope_head_dim=16,
    o_groups=2,
    o_lora_rank=64,
    index_topk=64,  # all entries of a row of 128 tokens: nothing is selected, and indexers are not trained
    index_n_heads=8,
    index_head_dim=16,
    rope_theta=40000.0,
    local_rope_theta=10000.0,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    num_hash_layers=1,
    scoring_func="sqrtsoftplus",
    swiglu_limit=10.0,
    hc_mult=4,
    num_nextn_predict_layers=1,
    max_position_embeddings=1024,
    initializer_range=0.02,
)

recipe = [
    Pretrain(
        name="base",
        data=data,
        model=V4_TINY,
        mixture={"chitchat": 0.4, "chains": 0.6},
        probe=Probe(task=chains, at_least=0.6),
        decay_tokens=500_000,
        max_tokens=6_000_000,
    ),
    Evaluate(name="before", start="base", exams=exams, data=data, sources=("chitchat",)),
    GRPO(name="zero", start="base", task=chains, steps=200, validation=Validation(task=chains, temperature=1.0)),
    Evaluate(name="after", start="zero", exams=exams, data=data, sources=("chitchat",)),
]
