"""Long texts, dense against sparse: a number appears once in a text eight times as long as pre-training's rows, and is asked for last.

The steps of V3.2 and V4 at toy size: short rows with dense attention first, then longer ones (YaRN), then a warm-up of indexers
at dense attention, then sparse attention for the rest. Both models, the dense one and the sparse one, take the same exams.
"""

import dataclasses
import random
from dataclasses import dataclass

from finback.data.sources import Chitchat
from finback.model.config import TINY
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.extend import Extend
from finback.stages.prepare import Prepare, TaskText
from finback.stages.pretrain import Pretrain
from finback.stages.sparsify import Sparsify
from finback.suites import dialogues
from finback.tasks.math import integer
from finback.tasks.task import Problem, Verdict

ROW = 64  # tokens of pre-training's rows
TIMES = 8
WORDS = {1: 15, 2: 40, 4: 90, TIMES: 190}  # words that fit into so many rows, question included


@dataclass(frozen=True)
class Needle:
    """A two-digit number, stated once within `least` to `most` words of dialogues."""

    least: int
    most: int

    @property
    def name(self) -> str:
        return f"needle-{self.most}"

    def draw(self, rng: random.Random) -> Problem:
        text = rng.choice(dialogues.texts()).split()
        length = rng.randint(self.least, self.most)
        while len(text) < length:
            text += rng.choice(dialogues.texts()).split()
        place, number = rng.randint(0, length), rng.randint(10, 99)
        told = " ".join([*text[:place], f"The number is {number}.", *text[place:length]])
        return Problem(f"{told} What is the number?", str(number), f"needle: {told}", tags={"words": length})

    def check(self, problem: Problem, answer: str) -> Verdict:
        value = integer(answer)
        return Verdict(correct=value == int(problem.answer), well_formed=value is not None)


near, far = Needle(3, WORDS[1]), Needle(WORDS[1], WORDS[TIMES])
exams = tuple(
    Exam(name=f"{rows} x", task=Needle(words, words), problems=100, temperature=0.0, max_tokens=8)
    for rows, words in WORDS.items()
)
long_mixture = {"chitchat": 0.2, "far": 0.8}

recipe = [
    Prepare(
        name="prepare",
        text=(Chitchat(),),
        tasks=(
            TaskText(name="near", tasks=(near,), documents=40_000, think=0.0),
            TaskText(name="far", tasks=(far,), documents=8_000, think=0.0),
        ),
        vocab_size=1024,
    ),
    Pretrain(
        name="base",
        data="prepare",
        model=dataclasses.replace(TINY, max_position_embeddings=ROW),
        mixture={"chitchat": 0.3, "near": 0.7},
        seq_len=ROW - 2,  # MTP reads two tokens more
        packing="best_fit",
        max_tokens=1_200_000,
        decay_tokens=250_000,
    ),
    # dense attention on longer rows, as in V3 and V4, before attention becomes sparse
    Extend(
        name="longer",
        start="base",
        data="prepare",
        window=TIMES * ROW,
        factor=float(TIMES),
        mixture=long_mixture,
        seq_len=TIMES * ROW - 2,
        packing="best_fit",
        batch_size=8,
        muon_lr=2e-3,
        adam_lr=2e-3,
        max_tokens=300_000,
        decay_tokens=150_000,
        warmup_tokens=20_000,
    ),
    Sparsify(
        name="indexers",
        start="longer",
        data="prepare",
        mixture=long_mixture,
        seq_len=TIMES * ROW - 2,
        packing="best_fit",
        batch_size=8,
        index_topk=32,
        index_n_heads=8,
        index_head_dim=16,
        adam_lr=5e-3,
        max_tokens=80_000,
        decay_tokens=50_000,
        warmup_tokens=10_000,
    ),
    Pretrain(
        name="sparse",
        start="indexers",
        data="prepare",
        mixture=long_mixture,
        seq_len=TIMES * ROW - 2,
        packing="best_fit",
        batch_size=8,
        muon_lr=8e-4,
        adam_lr=8e-4,
        max_tokens=80_000,
        decay_tokens=50_000,
        warmup_tokens=10_000,
    ),
    Evaluate(name="dense-exam", start="longer", exams=exams),
    Evaluate(name="sparse-exam", start="sparse", exams=exams),
]
