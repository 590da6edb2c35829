"""The road of recipes/r1.py with every kind of stage, at the size of tests/toy.py: seconds on two cores."""

from dataclasses import dataclass
from pathlib import Path

from finback.tasks.math import Chains
from finback.tasks.task import Problem, Verdict
from tests.toy import WORDS


@dataclass(frozen=True)
class Loose(Chains):
    """Accepts any short answer, since a model of a few thousand parameters manages no more."""

    def check(self, problem: Problem, answer: str) -> Verdict:
        return Verdict(correct=0 < len(answer) < 4, well_formed=True)


ROAD = """
from pathlib import Path
from finback.data.sources import Files
from finback.model.config import ModelConfig
from finback.stages.distill import Distill
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.stages.prepare import Prepare, TaskText
from finback.stages.pretrain import Pretrain
from finback.stages.reject import Reject
from finback.stages.sft import SFT
from finback.tasks.math import Chains
from finback.tasks.rewards import Reward
from finback.tasks.task import Mixture
from finback.train.grpo_loss import Objective
from tests.road import Loose
from tests.toy import CONFIG

sums, loose = Chains(2, 3), Loose()
STUDENT = ModelConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                      attention="gqa", num_key_value_heads=1, head_dim=16, max_position_embeddings=256)
exams = (Exam(name="sums", task=sums, problems=24, max_tokens=12, language="en"),)
rl = dict(prompts_per_step=4, num_generations=4, max_tokens=12, checkpoint_steps=2)
made = dict(data="prepare", mixture={"words": 0.3, "chains": 0.7}, batch_size=8, seq_len=32, max_tokens=8192,
            decay_tokens=2048, warmup_tokens=1024, compute="fp32", checkpoint_steps=8)
recipe = [
    Prepare(name="prepare", text=(Files((str(Path(__file__).parent / "words.txt"),), name="words"),),
            tasks=(TaskText(name="chains", tasks=tuple(Chains(2, 3, wording=t) for t in ("en", "zh")), documents=2000),),
            vocab_size=320),
    Pretrain(name="base", model=CONFIG, **made),
    GRPO(name="zero", start="base", task=sums, steps=6, objective=Objective(beta=0.01), reference_steps=2, **rl),
    Evaluate(name="of-zero", start="zero", exams=exams),
    Reject(name="cold", start="zero", task=loose, prompts=200, num_generations=2, max_tokens=12, need_chain=False, readable=False),
    SFT(name="dev1", start="base", traces=("cold",), batch_size=2, seq_len=64, epochs=2, checkpoint_steps=2),
    GRPO(name="dev2", start="dev1", task=Mixture((sums, loose)), steps=4, updates=2, epochs=2, resample=1,
         reward=Reward(language=0.3), **rl),
    Evaluate(name="of-dev2", start="dev2", exams=exams),
    Pretrain(name="student", model=STUDENT, **made),
    Distill(name="distilled", start="student", teacher="dev2", traces=("cold",), batch_size=2, seq_len=64, epochs=1, checkpoint_steps=2),
    Distill(name="on-policy", start="student", teacher="dev2", task=sums, steps=4, prompts_per_step=4, max_tokens=12,
           seq_len=64, divergence="reverse", checkpoint_steps=2),
    Evaluate(name="of-student", start="on-policy", exams=exams),
]
"""

TRAINED = ("base", "zero", "dev1", "dev2", "student", "distilled", "on-policy")


def write_road(folder: Path) -> Path:
    """Writes the toy road and its text into a folder; returns the recipe file."""
    (folder / "words.txt").write_text(WORDS, encoding="utf-8")
    (folder / "toy.py").write_text(ROAD, encoding="utf-8")
    return folder / "toy.py"
