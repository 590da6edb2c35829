"""Three ways to distill one teacher into one student. Uses the results of recipes/r1.py: run that first.

Traces only, as in R1; the teacher's probabilities on the same traces; and its probabilities on the student's own
answers. All three see about as many tokens.
"""

from finback.stages.distill import Distill
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.sft import SFT
from finback.tasks.math import Chains

sums = Chains(min_terms=4, max_terms=6)
exams = (Exam(name="sums", task=sums, problems=600, max_tokens=128, language="en"),)
student, teacher, traces = "runs/r1/student-base", "runs/r1/dev2", ("runs/r1/kept",)


def exam(name: str) -> Evaluate:
    """The exam of every student."""
    return Evaluate(name=f"of-{name}", start=name, exams=exams)


recipe = [
    SFT(name="traces", start=student, traces=traces, epochs=3),
    exam("traces"),
    Distill(name="probabilities", start=student, teacher=teacher, traces=traces, epochs=3),
    exam("probabilities"),
    Distill(
        name="on-policy",
        start=student,
        teacher=teacher,
        divergence="reverse",
        task=sums,
        steps=120,
        prompts_per_step=64,
        max_tokens=128,
    ),
    exam("on-policy"),
]
