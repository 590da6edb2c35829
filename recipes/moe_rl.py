"""RL of a mixture of experts that is sharded over ranks: its weights, experts, optimizer and reference model.

As it stands it trains a toy base, on two ranks of this machine:

    finback run recipes/moe_rl.py --ranks 2

For your own checkpoint remove `prepare` and `base`, start `cold` from it, and write a layout for your GPUs:
`Layout(dp=64, ep=32, nodes=4)` is 64 GPUs on 8 machines, of which 32 share one set of experts. Every rank gathers a whole
copy for generation; if there is no room for it, an adapter on a base in bf16 reduces the rest to an eighth.
"""

from finback.data.sources import Chitchat
from finback.model.config import TINY
from finback.parallel.layout import Layout
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.stages.prepare import Prepare, TaskText
from finback.stages.pretrain import Pretrain
from finback.stages.sft import SFT
from finback.tasks.math import Chains
from finback.train.grpo_loss import Objective

task = Chains(min_terms=2, max_terms=3)
exams = (Exam(name="sums", task=task, problems=80, max_tokens=32),)
layout = Layout(dp=2, ep=2)

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
        layout=layout,
    ),
    SFT(
        name="cold",
        start="base",
        text=(TaskText(name="examples", tasks=(task,), documents=400, think=1.0),),
        epochs=1,
        batch_size=8,
        seq_len=256,
        lr=2e-3,
        layout=layout,
    ),
    Evaluate(name="before", start="cold", exams=exams),
    GRPO(
        name="rl",
        start="cold",
        task=task,
        steps=20,
        prompts_per_step=16,
        num_generations=8,
        max_tokens=32,
        objective=Objective(beta=0.001),
        routing_replay=True,
        layout=layout,
    ),
    Evaluate(name="after", start="rl", exams=exams),
]
