"""Published scores of V3, R1, its stages, the distilled students and closed rivals, each with its conditions. No torch here.

They were measured by their publishers with prompts and harnesses that are only partly described, so they stand beside a
measurement of one's own, not against it. Where two publications give two numbers, both are here.
"""

from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Published:
    """One score as it was printed. Per cent, but for "rating"s; `suite` is ours that asks the same questions, if any."""

    model: str
    benchmark: str
    score: float
    conditions: str
    source: str
    suite: str = ""


class _Table(NamedTuple):
    source: str
    conditions: str
    models: tuple[str, ...]
    # a line for each benchmark: its name, a bar, a number for each model or -
    scores: str


_R1 = "DeepSeek-R1 README (arXiv 2501.12948)"
_R1_PROTOCOL = (
    "zero-shot, at most 32,768 tokens, temperature 0.6, top-p 0.95; pass@1 as the mean over samples: 64 for all by the "
    "README, by the paper 64 for AIME and GPQA, 16 for MATH and Codeforces, 8 for LiveCodeBench"
)
_V3_CHAT = "answers of at most 8K tokens; sets under 1,000 questions several times; AIME and CNMO 16 runs at 0.7, MATH-500 greedy"
_TABLES = (
    _Table(
        _R1,
        _R1_PROTOCOL,
        ("Claude-3.5-Sonnet-1022", "GPT-4o-0513", "DeepSeek-V3", "o1-mini", "o1-1217", "DeepSeek-R1"),
        """MMLU | 88.3 87.2 88.5 85.2 91.8 90.8
        MMLU-Redux | 88.9 88.0 89.1 86.7 - 92.9
        MMLU-Pro | 78.0 72.6 75.9 80.3 - 84.0
        DROP, 3-shot F1 | 88.3 83.7 91.6 83.9 90.2 92.2
        IF-Eval, strict | 86.5 84.3 86.1 84.8 - 83.3
        GPQA Diamond | 65.0 49.9 59.1 60.0 75.7 71.5
        SimpleQA | 28.4 38.2 24.9 7.0 47.0 30.1
        FRAMES | 72.5 80.5 73.3 76.9 - 82.5
        AlpacaEval 2.0, length-controlled | 52.0 51.1 70.0 57.8 - 87.6
        Arena-Hard | 85.2 80.4 85.5 92.0 - 92.3
        LiveCodeBench 2024-08 to 2025-01 | 33.8 34.2 - 53.8 63.4 65.9
        Codeforces percentile | 20.3 23.6 58.7 93.4 96.6 96.3
        Codeforces rating | 717 759 1134 1820 2061 2029
        SWE-bench Verified | 50.8 38.8 42.0 41.6 48.9 49.2
        Aider-Polyglot | 45.3 16.0 49.6 32.9 61.7 53.3
        AIME 2024 | 16.0 9.3 39.2 63.6 79.2 79.8
        MATH-500 | 78.3 74.6 90.2 90.0 96.4 97.3
        CNMO 2024 | 13.1 10.8 43.2 67.6 - 78.8
        CLUEWSC | 85.4 87.9 90.9 89.9 - 92.8
        C-Eval | 76.7 76.0 86.5 68.9 - 91.8
        C-SimpleQA | 55.4 58.7 68.0 40.3 - 63.7""",
    ),
    _Table(
        "DeepSeek-R1 paper (arXiv 2501.12948 v1)",
        f"as printed in the paper, where the README differs; {_R1_PROTOCOL}",
        ("Claude-3.5-Sonnet-1022", "GPT-4o-0513", "DeepSeek-V3"),
        "LiveCodeBench 2024-08 to 2025-01 | 38.9 32.9 36.2",
    ),
    _Table(
        "DeepSeek-R1, Nature 645:633, table 2",
        f"stages of R1's training; {_R1_PROTOCOL}",
        ("R1-Zero", "R1-Dev1", "R1-Dev2", "R1-Dev3", "DeepSeek-R1"),
        """MMLU | 88.8 89.1 91.2 91.0 90.8
        MMLU-Redux | 85.6 90.0 93.0 93.1 92.9
        MMLU-Pro | 68.9 74.1 83.8 83.1 84.0
        DROP, 3-shot F1 | 89.1 89.8 91.1 88.7 92.2
        IF-Eval, strict | 46.6 71.7 72.0 78.1 83.3
        GPQA Diamond | 75.8 66.1 70.7 71.2 71.5
        SimpleQA | 30.3 17.8 28.2 24.9 30.1
        FRAMES | 82.3 78.5 81.8 81.9 82.5
        AlpacaEval 2.0, length-controlled | 24.7 50.1 55.8 62.1 87.6
        Arena-Hard | 53.6 77.0 73.2 75.6 92.3
        LiveCodeBench 2024-08 to 2025-01 | 50.0 57.5 63.5 64.6 65.9
        Codeforces percentile | 80.4 84.5 90.5 92.1 96.3
        Codeforces rating | 1444 1534 1687 1746 2029
        SWE-bench Verified | 43.2 39.6 44.6 45.6 49.2
        Aider-Polyglot | 12.2 6.7 25.6 44.8 53.3
        AIME 2024 | 77.9 59.0 74.0 78.1 79.8
        MATH-500 | 95.9 94.2 95.9 95.4 97.3
        CNMO 2024 | 88.1 58.0 73.9 77.3 78.8
        CLUEWSC | 93.1 92.8 92.6 91.6 92.8
        C-Eval | 92.8 85.7 91.9 86.4 91.8
        C-SimpleQA | 66.4 58.8 64.2 66.9 63.7""",
    ),
    _Table(
        "DeepSeek-R1 paper (arXiv 2501.12948 v1)",
        f"an earlier point of its training than Nature's; {_R1_PROTOCOL}",
        ("R1-Zero",),
        """AIME 2024 | 71.0
        AIME 2024, majority of 64 | 86.7
        GPQA Diamond | 73.3""",
    ),
    _Table(
        _R1,
        _R1_PROTOCOL,
        (
            "R1-Distill-Qwen-1.5B",
            "R1-Distill-Qwen-7B",
            "R1-Distill-Qwen-14B",
            "R1-Distill-Qwen-32B",
            "R1-Distill-Llama-8B",
            "R1-Distill-Llama-70B",
            "QwQ-32B-Preview",
        ),
        """AIME 2024 | 28.9 55.5 69.7 72.6 50.4 70.0 44.0
        AIME 2024, majority of 64 | 52.7 83.3 80.0 83.3 80.0 86.7 60.0
        MATH-500 | 83.9 92.8 93.9 94.3 89.1 94.5 90.6
        GPQA Diamond | 33.8 49.1 59.1 62.1 49.0 65.2 54.5
        LiveCodeBench 2024-08 to 2025-01 | 16.9 37.6 53.1 57.2 39.6 57.5 41.9
        Codeforces rating | 954 1189 1481 1691 1205 1633 1316""",
    ),
    _Table(
        _R1,
        f"of the table of distilled models; {_R1_PROTOCOL}",
        ("GPT-4o-0513", "Claude-3.5-Sonnet-1022", "o1-mini"),
        """AIME 2024, majority of 64 | 13.4 26.7 80.0
        LiveCodeBench 2024-08 to 2025-01 | 32.9 38.9 53.8""",
    ),
    _Table(
        "DeepSeek-R1 paper (arXiv 2501.12948 v1)",
        f"as printed in the paper, where the README differs; {_R1_PROTOCOL}",
        ("QwQ-32B-Preview",),
        "AIME 2024 | 50.0",
    ),
    _Table(
        "DeepSeek-R1 paper (arXiv 2501.12948 v1)",
        f"more than 10,000 steps of RL on the base model, no distillation; {_R1_PROTOCOL}",
        ("Qwen2.5-32B-Zero",),
        """AIME 2024 | 47.0
        AIME 2024, majority of 64 | 60.0
        MATH-500 | 91.6
        GPQA Diamond | 55.0
        LiveCodeBench 2024-08 to 2025-01 | 40.2""",
    ),
    _Table(
        "DeepSeek-V3 README (arXiv 2412.19437), chat models",
        _V3_CHAT,
        (
            "DeepSeek-V2.5-0905",
            "Qwen2.5-72B-Instruct",
            "Llama-3.1-405B-Instruct",
            "Claude-3.5-Sonnet-1022",
            "GPT-4o-0513",
            "DeepSeek-V3",
        ),
        """MMLU | 80.6 85.3 88.6 88.3 87.2 88.5
        MMLU-Redux | 80.3 85.6 86.2 88.9 88.0 89.1
        MMLU-Pro | 66.2 71.6 73.3 78.0 72.6 75.9
        DROP, 3-shot F1 | 87.8 76.7 88.7 88.3 83.7 91.6
        IF-Eval, strict | 80.6 84.1 86.0 86.5 84.3 86.1
        GPQA Diamond | 41.3 49.0 51.1 65.0 49.9 59.1
        SimpleQA | 10.2 9.1 17.1 28.4 38.2 24.9
        FRAMES | 65.4 69.8 70.0 72.5 80.5 73.3
        LongBench v2 | 35.4 39.4 36.1 41.0 48.1 48.7
        HumanEval-Mul | 77.4 77.3 77.2 81.7 80.5 82.6
        LiveCodeBench, with a chain | 29.2 31.1 28.4 36.3 33.4 40.5
        LiveCodeBench, without a chain | 28.4 28.7 30.1 32.8 34.2 37.6
        Codeforces percentile | 35.6 24.8 25.3 20.3 23.6 51.6
        SWE-bench Verified | 22.6 23.8 24.5 50.8 38.8 42.0
        Aider-Edit | 71.6 65.4 63.9 84.2 72.9 79.7
        Aider-Polyglot | 18.2 7.6 5.8 45.3 16.0 49.6
        AIME 2024 | 16.7 23.3 23.3 16.0 9.3 39.2
        MATH-500 | 74.7 80.0 73.8 78.3 74.6 90.2
        CNMO 2024 | 10.8 15.9 6.8 13.1 10.8 43.2
        CLUEWSC | 90.4 91.4 84.7 85.4 87.9 90.9
        C-Eval | 79.5 86.1 61.5 76.7 76.0 86.5
        C-SimpleQA | 54.1 48.4 50.4 51.3 59.3 64.8
        Arena-Hard | 76.2 81.2 69.3 85.2 80.4 85.5
        AlpacaEval 2.0, length-controlled | 50.5 49.1 40.5 52.0 51.1 70.0""",
    ),
    _Table(
        "DeepSeek-V3 README (arXiv 2412.19437), base models",
        "few-shot: 3 for BBH, DROP, MBPP, LiveCodeBench and CMath, 5 for the MMLU family and C-Eval, 8 for GSM8K and MGSM, 4 for MATH, 0 for HumanEval and AGIEval",
        ("DeepSeek-V2-Base", "Qwen2.5-72B-Base", "Llama-3.1-405B-Base", "DeepSeek-V3-Base"),
        """Pile-test, bits per byte | 0.606 0.638 0.542 0.548
        BBH | 78.8 79.8 82.9 87.5
        MMLU | 78.4 85.0 84.4 87.1
        MMLU-Redux | 75.6 83.2 81.3 86.2
        MMLU-Pro | 51.4 58.3 52.8 64.4
        DROP | 80.4 80.6 86.0 89.0
        ARC-Challenge | 92.2 94.5 95.3 95.3
        HellaSwag | 87.1 84.8 89.2 88.9
        PIQA | 83.9 82.6 85.9 84.7
        WinoGrande | 86.3 82.3 85.2 84.9
        TriviaQA | 80.0 71.9 82.7 82.9
        NaturalQuestions | 38.6 33.2 41.5 40.0
        AGIEval | 57.5 75.8 60.6 79.6
        HumanEval | 43.3 53.0 54.9 65.2
        MBPP | 65.0 72.6 68.4 75.4
        LiveCodeBench-Base | 11.6 12.9 15.5 19.4
        CRUXEval-I | 52.5 59.1 58.5 67.3
        CRUXEval-O | 49.8 59.9 59.9 69.8
        GSM8K | 81.6 88.3 83.5 89.3
        MATH | 43.4 54.4 49.0 61.6
        MGSM | 63.6 76.2 69.9 79.8
        CMath | 78.7 84.5 77.3 90.7
        C-Eval | 81.4 89.2 72.5 90.1
        CMMLU | 84.0 89.5 73.7 88.8
        MMMLU, not English | 64.0 74.8 73.8 79.4""",
    ),
)
_SUITES = {
    "MMLU": "mmlu",
    "MMLU-Pro": "mmlu-pro",
    "GPQA Diamond": "gpqa",
    "C-Eval": "ceval",
    "AIME 2024": "aime24",
    "MATH-500": "math500",
    "GSM8K": "gsm8k",
    "HumanEval": "humaneval",
    "MBPP": "mbpp",
    "LiveCodeBench 2024-08 to 2025-01": "livecodebench",
}


def rows(suite: str = "") -> tuple[Published, ...]:
    """All published scores, or those on the questions of one of our suites (its name alone, such as "math500")."""
    every = tuple(row for table in _TABLES for row in _read(table))
    return tuple(row for row in every if row.suite == suite) if suite else every


def _read(table: _Table) -> list[Published]:
    found = []
    for line in table.scores.splitlines():
        name, _, numbers = (part.strip() for part in line.partition("|"))
        values = numbers.split()
        assert len(values) == len(table.models), f"{name} in {table.source}: a number for each model"
        found += [
            Published(model, name, float(value), table.conditions, table.source, _SUITES.get(name, ""))
            for model, value in zip(table.models, values, strict=True)
            if value != "-"
        ]
    return found
