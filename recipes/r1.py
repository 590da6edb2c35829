"""DeepSeek-R1's whole pipeline at laptop size: R1-Zero, cold start, RL, rejection sampling, SFT, RL, distillation.

The base has read sums worded in English, in Chinese and in both mixed, so pure RL (`zero`) reasons in mixed
languages, as R1-Zero did. The later stages correct that and restore small talk. At the end a dense student a third as
large learns from the kept traces; for comparison, the same student learns by RL alone and from gold answers alone.
"""

from finback.data.sources import Chitchat
from finback.model.config import TINY, ModelConfig
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.stages.prepare import Prepare, TaskText
from finback.stages.pretrain import Pretrain, Probe
from finback.stages.reject import Reject
from finback.stages.sft import SFT
from finback.stages.validation import Validation
from finback.tasks.math import Chains
from finback.tasks.rewards import Reward
from finback.tasks.small_talk import SmallTalk
from finback.tasks.task import Mixture

sums = Chains(min_terms=4, max_terms=6)
small_talk = SmallTalk()
worded = tuple(Chains(2, 6, wording=t) for t in ("mixed", "en", "zh", "mixed"))

STUDENT = ModelConfig(
    vocab_size=1024,
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=288,
    attention="gqa",
    num_key_value_heads=2,
    head_dim=24,
    max_position_embeddings=1024,
    initializer_range=0.02,
)

exams = (
    Exam(name="sums", task=sums, problems=600, max_tokens=128, language="en"),
    Exam(name="talk", task=small_talk, problems=200, max_tokens=48),
)
in_english = Reward(language=0.3, form=0.1)


def rl(name: str, start: str, **knobs: object) -> GRPO:
    """GRPO with the settings of all stages here: until the validation score stops rising."""
    given = {"task": sums, "max_tokens": 128, "steps": 120, "lr": 2e-4, "warmup": 5} | knobs
    validation = Validation(task=given["task"], temperature=1.0, patience=2, max_tokens=128)  # type: ignore[arg-type]
    return GRPO(name=name, start=start, validation=validation, **given)  # type: ignore[arg-type]


def exam(name: str, start: str) -> Evaluate:
    """The exams of every model."""
    return Evaluate(name=name, start=start, exams=exams)


recipe = [
    Prepare(
        name="prepare",
        text=(Chitchat(),),
        tasks=(TaskText(name="chains", tasks=worded, documents=120_000, think=0.4, follow_up=0.2),),
        interleave=0.5,
    ),
    Pretrain(
        name="base",
        data="prepare",
        model=TINY,
        mixture={"chitchat": 0.25, "chains": 0.75},
        probe=Probe(task=sums, at_least=0.7, max_tokens=128),
        decay_tokens=700_000,
        max_tokens=5_000_000,
    ),
    exam("of-base", "base"),
    # R1-Zero: RL directly on the base
    rl("zero", "base"),
    exam("of-zero", "zero"),
    # cold start: chains of R1-Zero that are right and in one language
    Reject(
        name="cold", start="zero", task=sums, prompts=2000, num_generations=4, language="en", keep=1, max_tokens=128
    ),
    SFT(name="dev1", start="base", traces=("cold",), epochs=2),
    exam("of-dev1", "dev1"),
    # RL on reasoning, with the language reward
    rl("dev2", "dev1", reward=in_english),
    exam("of-dev2", "dev2"),
    # rejection sampling, and SFT of the base on reasoning and talk
    Reject(name="kept", start="dev2", task=sums, prompts=3000, num_generations=2, language="en", max_tokens=128),
    SFT(name="dev3", start="base", traces=("kept",), text=(Chitchat(),), limits={"chitchat": 1000}, epochs=2),
    exam("of-dev3", "dev3"),
    # RL over all scenarios
    rl("r1", "dev3", task=Mixture((sums, small_talk), (0.7, 0.3)), reward=in_english, temperature=0.9),
    exam("of-r1", "r1"),
    # distillation, and what it is compared with
    Pretrain(
        name="student-base",
        data="prepare",
        model=STUDENT,
        mixture={"chitchat": 0.4, "chains": 0.6},
        probe=Probe(task=sums, at_least=0.6, max_tokens=128),
        decay_tokens=500_000,
        max_tokens=7_000_000,
    ),
    exam("of-student-base", "student-base"),
    SFT(name="distilled", start="student-base", traces=("kept",), epochs=3),
    exam("of-distilled", "distilled"),
    rl("student-rl", "student-base"),
    exam("of-student-rl", "student-rl"),
    SFT(name="student-gold", start="student-base", traces=("kept",), chains=False, epochs=3),
    exam("of-student-gold", "student-gold"),
]
