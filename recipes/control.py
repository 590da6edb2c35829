"""The control experiment for recipes/tiny.py: the same RL from the same base, but each answer gets another answer's reward.

If this gained anything, the gain would come from more training, not from the reward. Run recipes/tiny.py first.
"""

from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.tasks.math import Chains

chains = Chains(min_terms=5, max_terms=7)
exams = (Exam(name="sampled", task=chains), Exam(name="greedy", task=chains, temperature=0.0))

recipe = [
    GRPO(name="zero", start="runs/tiny/base", task=chains, steps=200, shuffle_rewards=True),
    Evaluate(name="after", start="zero", exams=exams),
]
