"""Pre-trains a V3 of 97 M parameters, 18 M of them active, on real text: about an hour on two CPU cores.

    make corpora
    apt install wordnet-base python3-doc postgresql-doc
    finback run recipes/base100m.py
    python benchmarks/text_bits.py runs/base100m/base

Dialogues, the documentation of two cloud APIs, WordNet and two manuals: a hundred megabytes whose licences allow it. The
result continues such text, but does not answer questions. More tokens improve it: --set base.max_tokens=...
"""

from finback.data.clean import Quality
from finback.data.package_sources import AWS, GOOGLE, POSTGRES, PYTHON, WORDNET
from finback.data.sources import Chitchat
from finback.model.config import ModelConfig
from finback.stages.prepare import Prepare
from finback.stages.pretrain import Pretrain

MODEL = ModelConfig(
    vocab_size=8192,
    hidden_size=384,
    num_hidden_layers=6,
    num_attention_heads=6,
    intermediate_size=1024,
    q_lora_rank=192,
    kv_lora_rank=96,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    n_routed_experts=64,
    n_shared_experts=1,
    num_experts_per_tok=4,
    moe_intermediate_size=192,
    first_k_dense_replace=1,
    routed_scaling_factor=1.0,
    num_nextn_predict_layers=1,
    max_position_embeddings=1024,
    initializer_range=0.02,
)

recipe = [
    Prepare(
        name="prepare",
        text=(Chitchat(), AWS, GOOGLE, WORDNET, PYTHON, POSTGRES),
        vocab_size=8192,
        quality=Quality(min_words=5, min_letters=0.5),
    ),
    Pretrain(
        name="base",
        data="prepare",
        model=MODEL,
        mixture={"chitchat": 0.25, "aws": 0.2, "google": 0.15, "wordnet": 0.1, "python": 0.15, "postgres": 0.15},
        batch_size=32,
        seq_len=256,
        muon_lr=4e-3,
        adam_lr=4e-3,
        warmup_tokens=200_000,
        max_tokens=3_000_000,
        decay_tokens=1_000_000,
        valid_tokens=1_500_000,
    ),
]
