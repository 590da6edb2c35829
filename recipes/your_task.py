"""Train a model on your own task: a file of questions, and a function that checks an answer.

questions.jsonl holds one JSON object per line, here {"question": "cat dog", "answer": "god tac"} and any other fields that
the check needs. If answers are numbers, formulas or single words, leave out `checker`: finback compares them itself.

    finback run recipes/your_task.py --set rl.start=PATH/TO/MODEL --set before.start=PATH/TO/MODEL
"""

from pathlib import Path
from typing import Any

from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.tasks.questions import Questions

MODEL = "runs/tiny/base"  # a stage of a run, a Hugging Face folder, or a .gguf file


def check(record: dict[str, Any], answer: str) -> bool:
    """Right is the same words in the same order, whatever the case. The answer is text: never run it."""
    return answer.lower().split() == str(record["answer"]).lower().split()


task = Questions(str(Path(__file__).parent / "questions.jsonl"), checker=check, label="mirrors")
exams = (Exam(name="held out", task=task, problems=20, max_tokens=48),)

recipe = [
    Evaluate(name="before", start=MODEL, exams=exams),
    GRPO(name="rl", start=MODEL, task=task, steps=50, prompts_per_step=16, num_generations=8, max_tokens=48),
    Evaluate(name="after", start="rl", exams=exams),
]
