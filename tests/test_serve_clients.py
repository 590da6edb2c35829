"""Third-party clients against a running server: lm-evaluation-harness and llm, in a separate environment.

`make test-slow` installs them in their own environment, since they pin other versions of our dependencies.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finback.serve.http import digests
from tests.serving import KEY, Scripted, served, small_tokenizer

PYTHON = Path(sys.prefix) / "clients" / "bin" / "python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no clients installed; `make test-slow` installs them"),
]

GENERATE = """
task: sums
dataset_path: json
dataset_kwargs: {data_files: FOLDER/sums.jsonl}
test_split: train
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
CHOOSE = """
task: choices
dataset_path: json
dataset_kwargs: {data_files: FOLDER/sums.jsonl}
test_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["{{answer}}", "nothing"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""


def run(code: str, *arguments: object) -> str:
    """The last line that a program prints in the clients' environment."""
    done = subprocess.run(
        [str(PYTHON), "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            "PATH": "/usr/bin:/bin",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_OFFLINE": "1",
            "OPENAI_API_KEY": KEY,
            "HOME": str(Path(str(arguments[1]))),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


EVALUATE = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
base, folder, kind, task, path, tokenizer = sys.argv[1:]
more = {"tokenizer": tokenizer, "tokenizer_backend": "huggingface"} if kind == "local-completions" else {}
found = lm_eval.simple_evaluate(
    model=kind, tasks=[task], task_manager=TaskManager(include_path=folder, include_defaults=False),
    model_args={"base_url": base + path, "model": "finback", "num_concurrent": 2, "max_retries": 1, "max_length": 256} | more,
    apply_chat_template=kind == "local-chat-completions", limit=6, bootstrap_iters=0,
)
print(json.dumps({k: v for k, v in found["results"][task].items() if isinstance(v, float)}))
"""


@pytest.mark.parametrize(
    ("kind", "task", "path"),
    [
        ("local-completions", "choices", "/v1/completions"),
        ("local-completions", "sums", "/v1/completions"),
        ("local-chat-completions", "sums", "/v1/chat/completions"),
    ],
)
def test_lm_evaluation_harness(kind: str, task: str, path: str, tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"{i}+{i}=", "answer": str(2 * i)}) for i in range(6)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, text in (("sums", GENERATE), ("choices", CHOOSE)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)), encoding="utf-8")
    (tmp_path / "tokenizer").mkdir()
    small_tokenizer().export(tmp_path / "tokenizer")
    with served(Scripted("4" if task == "sums" else None), keys=digests([KEY]), name="finback") as client:
        base = str(client.base_url).rstrip("/")
        scores = json.loads(run(EVALUATE, base, tmp_path, kind, task, path, tmp_path / "tokenizer"))
    if task == "sums":
        assert scores["exact_match,none"] == pytest.approx(1 / 6)
    else:
        assert 0 <= scores["acc,none"] <= 1


MODELS = """
- model_id: finback
  model_name: finback
  api_base: BASE/v1
  api_key_name: finback
"""


@pytest.mark.parametrize("options", [[], ["--no-stream"]])
def test_llm(options: list[str], tmp_path: Path) -> None:
    with served(Scripted("<think>hm</think>yes"), keys=digests([KEY]), name="finback") as client:
        base = str(client.base_url).rstrip("/")
        (tmp_path / "extra-openai-models.yaml").write_text(MODELS.replace("BASE", base), encoding="utf-8")
        (tmp_path / "keys.json").write_text(json.dumps({"finback": KEY}), encoding="utf-8")
        done = subprocess.run(
            [str(PYTHON), "-m", "llm", "-m", "finback", "Hello", "-o", "max_tokens", "12", "-n", *options],
            capture_output=True,
            text=True,
            timeout=120,
            env={"PATH": "/usr/bin:/bin", "LLM_USER_PATH": str(tmp_path)},
        )
    assert done.stdout.strip() == "yes", done.stderr[-2000:]
