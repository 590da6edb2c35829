"""The quickstart: a tiny DeepSeek-V3 reads real dialogues and worked sums, then RL alone teaches it to think first.

Takes minutes on two CPU cores. RL starts directly from the pre-trained base, as in R1-Zero.
"""

from finback.data.sources import Chitchat
from finback.model.config import TINY
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.stages.prepare import Prepare, TaskText
from finback.stages.pretrain import Pretrain, Probe
from finback.stages.validation import Validation
from finback.tasks.math import Chains

chains = Chains(min_terms=5, max_terms=7)
short = Chains(min_terms=2, max_terms=7)  # an easier start: two in five problems may be this short

exams = (
    Exam(name="sampled", task=chains, problems=600),
    Exam(name="greedy", task=chains, problems=600, temperature=0.0),
    Exam(name="8 terms", task=Chains(8, 8), problems=300, temperature=0.0, max_tokens=128),
    Exam(name="9 terms", task=Chains(9, 9), problems=300, temperature=0.0, max_tokens=128),
)

recipe = [
    Prepare(
        name="prepare",
        text=(Chitchat(),),
        # Some answers show their steps; the others give only the number, which a model learns to guess.
        tasks=(
            TaskText(
                name="chains",
                tasks=(chains, chains, chains, short, short),
                documents=120_000,
                think=0.33,
                follow_up=0.2,
            ),
        ),
        vocab_size=1024,
        interleave=0.5,
    ),
    Pretrain(
        name="base",
        data="prepare",
        model=TINY,
        mixture={"chitchat": 0.4, "chains": 0.6},
        probe=Probe(task=chains, at_least=0.6),
        decay_tokens=500_000,  # after a longer decay it does the sums without a chain
        max_tokens=6_000_000,
    ),
    Evaluate(name="before", start="base", exams=exams, data="prepare", sources=("chitchat",)),
    GRPO(name="zero", start="base", task=chains, steps=200, validation=Validation(task=chains, temperature=1.0)),
    Evaluate(name="after", start="zero", exams=exams, data="prepare", sources=("chitchat",)),
]
