"""R1-Zero on a model of your own: RL on checkable rewards, directly from a base, with the objective that R1 published.

It starts from the base that recipes/tiny.py made (`make quickstart`, or --set zero.start=PATH for any Hugging Face
folder). The KL term's reference model is refreshed every 40 steps, the loss averages over answers, not tokens, and a
batch gives two updates.
"""

from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.tasks.math import Chains
from finback.tasks.rewards import Reward
from finback.train.grpo_loss import Objective

sums = Chains(min_terms=5, max_terms=7)
exams = (Exam(name="sampled", task=sums), Exam(name="greedy", task=sums, temperature=0.0))
published = Objective(epsilon_low=10.0, epsilon_high=10.0, average="answer", beta=0.001)

recipe = [
    Evaluate(name="before", start="runs/tiny/base", exams=exams),
    GRPO(
        name="zero",
        start="runs/tiny/base",
        task=sums,
        steps=100,
        prompts_per_step=32,
        num_generations=16,
        updates=2,
        objective=published,
        reference_steps=40,
        reward=Reward(accuracy=1.0, form=0.1),
    ),
    Evaluate(name="after", start="zero", exams=exams),
]
