"""Small copies of published data sets in their original layout: the folders that a download from the hub creates."""

import base64
import csv
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'from typing import List\n\n\ndef largest(values: List[int]) -> int:\n    """ Return the largest value.\n    >>> largest([1, 3, 2])\n    3\n    """\n',
    "entry_point": "largest",
    "canonical_solution": "    return max(values)\n",
    "test": "\n\nMETADATA = {'author': 'us', 'dataset': 'test'}\n\n\ndef check(candidate):\n    assert candidate([1, 3, 2]) == 3\n    assert candidate([-5]) == -5\n    from random import randint\n    for _ in range(5):\n        some = [randint(0, 99) for _ in range(9)]\n        assert candidate(some) == max(some)\n",
}
MBPP = {
    "source_file": "ours.ipynb",
    "task_id": 2,
    "prompt": "Write a function to find the shared elements of two tuples.",
    "code": "def shared(first, second):\n  return tuple(set(first) & set(second))",
    "test_imports": ["import math"],
    "test_list": [
        "assert set(shared((3, 4, 5), (5, 7, 4))) == {4, 5}",
        "assert shared((1,), (2,)) == ()",
        "assert math.isclose(sum(shared((1.5, 2), (1.5, 3))), 1.5)",
    ],
}


def packed(tests: list[dict[str, str]]) -> str:
    """Packs tests as LiveCodeBench packs its private ones."""
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(tests)))).decode()


def contest(title: str, day: str, tests: list[dict[str, str]], starter: str = "", method: str = "") -> Any:
    return {
        "question_title": title,
        "question_content": f"{title}: add two numbers.",
        "platform": "atcoder",
        "question_id": title,
        "contest_id": "abc",
        "contest_date": f"{day}T00:00:00",
        "starter_code": starter,
        "difficulty": "easy",
        "public_test_cases": json.dumps(tests[:1]),
        "private_test_cases": packed(tests[1:]),
        "metadata": json.dumps({"func_name": method} if method else {}),
    }


def _case(given: str, expected: str, kind: str) -> dict[str, str]:
    return {"input": given, "output": expected, "testtype": kind}


LIVECODEBENCH = [
    contest("sum", "2024-08-10", [_case("1 2\n", "3\n", "stdin"), _case("17 25\n", "42", "stdin")]),
    contest(
        "method",
        "2025-01-11",
        [_case("[1, 2]\n3", "[3, 6]", "functional"), _case("[]\n1", "[]", "functional")],
        "class Solution:\n    def scale(self, values: List[int], by: int) -> List[int]:\n        ",
        "scale",
    ),
]
GPQA = {
    "Record ID": "rec1",
    "Question": "Which of these is a noble gas?\n",
    "Correct Answer": "Neon\n",
    "Incorrect Answer 1": "Iron",
    "Incorrect Answer 2": "Sodium",
    "Incorrect Answer 3": "Carbon",
    "High-level domain": "Chemistry",
    "Subdomain": "Chemistry (general)",
}
# name: (configuration, split, file, records)
COPIES: dict[str, tuple[str, str, str, list[dict[str, Any]]]] = {
    "gsm8k": (
        "main",
        "test",
        "main/test.jsonl",
        [
            {
                "question": "Ann has 3 bags of 1,000 nails. How many nails?",
                "answer": "She has 3*1000=<<3*1000=3000>>3000 nails.\n#### 3,000",
            },
            {"question": "Ben owes 5 dollars and pays 7. What is left?", "answer": "5-7=<<5-7=-2>>-2\n#### -2"},
        ],
    ),
    "math500": (
        "default",
        "test",
        "test.jsonl",
        [
            {
                "problem": "Factor $x^2-1$.",
                "solution": "It is $\\boxed{(x-1)(x+1)}$.",
                "answer": "(x-1)(x+1)",
                "subject": "Algebra",
                "level": 2,
                "unique_id": "test/algebra/1.json",
            },
            {
                "problem": "What is a half of a third?",
                "solution": "$\\boxed{\\frac{1}{6}}$",
                "answer": "\\frac{1}{6}",
                "subject": "Prealgebra",
                "level": 1,
                "unique_id": "test/prealgebra/2.json",
            },
        ],
    ),
    "aime24": (
        "default",
        "train",
        "train.jsonl",
        [
            {
                "ID": "2024-I-1",
                "Problem": "Find the remainder of $2^{10}$ by 991.",
                "Solution": "1024-991=33",
                "Answer": "033",
            }
        ],
    ),
    "aime25": ("default", "test", "test.jsonl", [{"problem": "Find the sum of 35 and 35.", "answer": "70", "id": "0"}]),
    "gpqa": ("gpqa_diamond", "train", "gpqa_diamond.csv", [GPQA]),
    "mmlu": (
        "all",
        "test",
        "all/test.jsonl",
        [
            {
                "question": "What does 2 + 2 give?",
                "subject": "elementary_mathematics",
                "choices": ["3", "4", "5", "22"],
                "answer": 1,
            },
            {
                "question": "Which is a fish?",
                "subject": "zoology",
                "choices": ["Whale", "Cod", "Crab", "Squid"],
                "answer": 1,
            },
        ],
    ),
    "mmlu-pro": (
        "default",
        "test",
        "test.jsonl",
        [
            {
                "question_id": 70,
                "question": "Which is the tenth letter?",
                "options": list("abcdefghij"),
                "answer": "J",
                "answer_index": 9,
                "cot_content": "",
                "category": "other",
                "src": "ours",
            },
            {
                "question_id": 71,
                "question": "Which is blue?",
                "options": ["grass", "the sky", "snow"],
                "answer": "B",
                "answer_index": 1,
                "cot_content": "",
                "category": "other",
                "src": "ours",
            },
        ],
    ),
    "ceval": (
        "computer_network",
        "val",
        "computer_network/val.jsonl",
        [
            {
                "id": 0,
                "question": "下列哪一个是传输层协议？",
                "A": "IP",
                "B": "TCP",
                "C": "ARP",
                "D": "HTTP",
                "answer": "B",
                "explanation": "",
            }
        ],
    ),
    "humaneval": ("openai_humaneval", "test", "openai_humaneval/test.jsonl", [HUMANEVAL]),
    "mbpp": ("sanitized", "test", "sanitized/test.jsonl", [MBPP]),
    "livecodebench": ("release_latest", "test", "test6.jsonl", LIVECODEBENCH),
}
GOOD = {
    "HumanEval/0": "```python\ndef largest(values):\n    return sorted(values)[-1]\n```",
    "2": "```python\ndef shared(a, b):\n    return tuple(x for x in a if x in b)\n```",
    "2024-08-10": "```python\nprint(sum(map(int, input().split())))\n```",
    "2025-01-11": "```python\nclass Solution:\n    def scale(self, values: List[int], by: int) -> List[int]:\n        return [by * v for v in values]\n```",
}


def lay(folder: Path, name: str) -> Path:
    """Writes a copy of the data set's repository, with a card that lists its configurations."""
    subset, split, file, records = COPIES[name]
    path = folder / name / file
    path.parent.mkdir(parents=True)
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    card = f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n  - split: {split}\n    path: {file}\n---\n"
    (folder / name / "README.md").write_text(card)
    return folder / name
