"""Trains a model on a task by LoRA adapters only, as for a 7B on one card: SFT on a few gold answers, then RL.

As it stands it trains a toy base and takes minutes on two CPU cores. For your own checkpoint remove `prepare` and
`base`, and start `cold` from it:

    finback plan recipes/lora.py --set cold.start=PATH/TO/7B --on 4090         # does it fit, and what to change
    finback run recipes/lora.py --set cold.start=PATH/TO/7B
"""

from finback.data.sources import Chitchat
from finback.model.config import TINY
from finback.model.lora import LoRA
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.stages.prepare import Prepare, TaskText
from finback.stages.pretrain import Pretrain
from finback.stages.sft import SFT
from finback.tasks.math import Chains
from finback.train.grpo_loss import Objective

task = Chains(min_terms=2, max_terms=3)
exams = (Exam(name="sums", task=task, problems=80, max_tokens=32),)
adapter = LoRA(rank=16, base="nf4")

recipe = [
    Prepare(
        name="prepare",
        text=(Chitchat(),),
        tasks=(TaskText(name="chains", tasks=(task,), documents=20_000, think=0.5),),
        vocab_size=1024,
    ),
    Pretrain(
        name="base",
        data="prepare",
        model=TINY,
        mixture={"chitchat": 0.6, "chains": 0.4},
        max_tokens=1_000_000,
        decay_tokens=200_000,
    ),
    SFT(
        name="cold",
        start="base",
        text=(TaskText(name="examples", tasks=(task,), documents=400, think=1.0),),
        epochs=1,
        batch_size=4,
        seq_len=256,
        lr=2e-3,
        mtp_weight=0.0,
        adapter=adapter,
    ),
    Evaluate(name="before", start="cold", exams=exams, dtype="auto"),
    # continues the same adapter; the reference model is the result of SFT
    GRPO(
        name="rl",
        start="cold",
        task=task,
        steps=20,
        prompts_per_step=16,
        num_generations=8,
        max_tokens=32,
        objective=Objective(beta=0.001),
        adapter=adapter,
    ),
    Evaluate(name="after", start="rl", exams=exams, dtype="auto"),
]
