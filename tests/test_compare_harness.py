"""lm-evaluation-harness as a client: how finback calls it and reads its results; the real one too, if installed."""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finback.checkpoint.export import export
from finback.comparison import harness, table
from finback.comparison.endpoint import Endpoint
from finback.comparison.options import CompareOptions
from finback.comparison.protocol import SamplingProtocol
from finback.comparison.served import serving
from finback.config import UserError
from finback.model.transformer import Transformer
from finback.suites import statistics
from tests.serving import small_tokenizer
from tests.test_serve_clients import CHOOSE, GENERATE
from tests.toy import CONFIG, ROOT, environment

CLIENTS = Path(sys.prefix) / "clients" / "bin" / "python"

# writes what the harness writes, and nothing more
STAND_IN = """
import json, os, sys
from pathlib import Path
words = sys.argv[1:]
if words[:1] == ["-c"]:
    sys.exit(0)
assert words[:3] == ["-m", "lm_eval", "run"], words
out = Path(words[words.index("--output_path") + 1]) / "model"
out.mkdir(parents=True, exist_ok=True)
(out / "asked.json").write_text(json.dumps({"words": words, "key": os.environ.get("OPENAI_API_KEY")}))
if "broken" in words[words.index("--tasks") + 1]:
    sys.exit(3)
results = {"sums": {"alias": "sums", "exact_match,none": 0.25, "exact_match_stderr,none": 0.05, "f1,strict": 0.5, "f1_stderr,strict": "N/A"}}
(out / "results_2026-01-01.json").write_text(json.dumps(
    {"results": results, "n-samples": {"sums": {"original": 90, "effective": 75}}, "n-shot": {"sums": 5}, "lm_eval_version": "0.4.13"}))
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {tmp_path / "stand_in.py"} "$@"\n')
    path.chmod(0o755)
    return path


def test_an_endpoint(stand_in: Path, tmp_path: Path) -> None:
    endpoint = Endpoint("http://127.0.0.1:1/v1", "m", key="top-secret", concurrency=5)
    options = CompareOptions(
        endpoints=("http://a/v1#m",),
        tasks=("sums",),
        out=tmp_path / "out",
        harness="lm-eval",
        harness_python=stand_in,
        problems=75,
    )
    report = harness.measure([endpoint], ["sums", "more"], SamplingProtocol(), options, dict(os.environ))
    one, two = report["harness"]
    assert (one["contestant"], one["task"], one["metric"], one["value"]) == ("m", "sums", "exact_match", 0.25)
    assert one["interval"] == pytest.approx(
        statistics.interval([1] * 19 + [0] * 56), abs=0.005
    )  # 75 questions, 25 % right
    assert (one["n"], one["shots"], one["by"]) == (75, 5, "lm-eval 0.4.13")
    assert (two["metric"], two["interval"]) == ("f1,strict", None)
    (file,) = (tmp_path / "out").rglob("asked.json")
    asked = json.loads(file.read_text())
    assert asked["key"] == "top-secret" and "top-secret" not in " ".join(asked["words"])
    assert {"local-chat-completions", "--apply_chat_template", "sums,more", "num_concurrent=5"} <= set(asked["words"])
    assert "base_url=http://127.0.0.1:1/v1/chat/completions" in asked["words"]
    text = table.render(report)
    assert "exact_match" in text and "0.25 (0.1619 to 0.357)" in text and "lm-eval 0.4.13" in text


def test_a_harness_that_fails(stand_in: Path, tmp_path: Path) -> None:
    options = CompareOptions(
        endpoints=("http://a/v1#m",), tasks=("sums",), out=tmp_path / "out", harness="lm-eval", harness_python=stand_in
    )
    with pytest.raises(UserError, match="exited with code 3"):
        harness.measure(
            [Endpoint("http://127.0.0.1:1/v1", "m")], ["broken"], SamplingProtocol(), options, dict(os.environ)
        )


def test_no_harness() -> None:
    with pytest.raises(UserError, match=r"not installed here\. Run pip install 'lm_eval\[api\]'"):
        harness.find_python(None)
    with pytest.raises(UserError, match="has no lm_eval"):
        harness.find_python(Path(sys.executable))
    with pytest.raises(UserError, match="has no lm_eval"):
        harness.find_python(Path("/no/such/python"))


@pytest.mark.slow
def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="did not start"),
        serving(tmp_path / "nothing", "nothing", [], tmp_path / "log", environment()),
    ):
        pass


@pytest.mark.slow
@pytest.mark.skipif(not CLIENTS.is_file(), reason="no clients installed; `make test-slow` installs them")
@pytest.mark.parametrize("chat", [False, True])
def test_the_real_one_through_the_command(chat: bool, tmp_path: Path) -> None:
    lines = [json.dumps({"question": f"{i}+{i}=", "answer": str(2 * i)}) for i in range(6)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, text in (("sums", GENERATE), ("choices", CHOOSE)):
        (tmp_path / f"{name}.yaml").write_text(text.replace("FOLDER", str(tmp_path)), encoding="utf-8")
    config = dataclasses.replace(CONFIG, vocab_size=small_tokenizer().vocab_size, num_nextn_predict_layers=0)
    export(Transformer(config).initialise(0).eval(), tmp_path / "toy", "fp32", small_tokenizer().export)
    tasks = [tmp_path / "sums.yaml"] if chat else [tmp_path / "sums.yaml", tmp_path / "choices.yaml"]
    more: dict[str, Any] = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "finback",
            "compare",
            str(tmp_path / "toy"),
            "--harness",
            "lm-eval",
            *map(str, tasks),
            "--harness-python",
            str(CLIENTS),
            "--out",
            str(tmp_path / "out"),
            "--rows",
            "2",
            "--json",
            *(["--harness-chat"] if chat else []),
        ],
        cwd=ROOT,
        env=environment() | more,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = {row["task"]: row for row in json.loads(done.stdout)["harness"]}
    assert rows["sums"]["metric"] == "exact_match" and rows["sums"]["n"] == 6
    assert chat or 0 <= rows["choices"]["value"] <= 1


PARITY = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: FOLDER/quiz.jsonl}
test_split: train
fewshot_split: train
num_fewshot: SHOTS
output_type: multiple_choice
doc_to_text: "TEXT"
doc_to_choice: CHOICES
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
TEXTS = {
    "texts": ("Question: {{question}}\\nAnswer:", '"{{choices}}"'),
    "letters": (
        "{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nAnswer:",
        '["A", "B", "C"]',
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not CLIENTS.is_file(), reason="no clients installed; `make test-slow` installs them")
@pytest.mark.parametrize("shots", [0, 3])
def test_the_real_one_scores_choices_as_we_do(shots: int, tmp_path: Path) -> None:
    """acc and acc_norm of the harness and of `?score=` on the same questions, to the digit."""
    rng = random.Random(5)
    words = ["4", "5", "whale", "the whale", "sang 4+5", "9=9", "The whale sang.", "whales", "+ 5"]
    records = [
        {"question": f"Which of {i}?", "choices": rng.sample(words, 3), "answer": rng.randrange(3)} for i in range(40)
    ]
    (tmp_path / "quiz.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    for form, (text, choices) in TEXTS.items():
        filled = PARITY.replace("NAME", form).replace("FOLDER", str(tmp_path)).replace("SHOTS", str(shots))
        (tmp_path / f"{form}.yaml").write_text(filled.replace("TEXT", text).replace("CHOICES", choices))
    config = dataclasses.replace(CONFIG, vocab_size=small_tokenizer().vocab_size, initializer_range=0.3)
    config = dataclasses.replace(config, num_nextn_predict_layers=0)
    export(Transformer(config).initialise(4).eval(), tmp_path / "toy", "fp32", small_tokenizer().export)
    more = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-m", "finback", "compare", str(tmp_path / "toy"), "--dtype", "fp32", "--json"]

    def report(*words: str) -> Any:
        done = subprocess.run(
            [*command, *words], cwd=ROOT, env=environment() | more, capture_output=True, text=True, timeout=400
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    asked = [str(tmp_path / f"{form}.yaml") for form in TEXTS]
    harness = ["--harness", "lm-eval", *asked, "--harness-python", str(CLIENTS), "--seed", "1234"]
    theirs = {
        (row["task"], row["metric"]): row["value"]
        for row in report(*harness, "--out", str(tmp_path / "theirs"))["harness"]
    }
    forms = {"texts": ("texts", "acc"), "texts-normalized": ("texts", "acc_norm"), "letters": ("letters", "acc")}
    specs = [f"{tmp_path}/quiz.jsonl?score={form}&shots={shots}&shuffle=false" for form in forms]
    scores = report("--tasks", *specs, "--out", str(tmp_path / "ours"))["scores"]
    assert [s["accuracy"] for s in scores] == [pytest.approx(theirs[key], abs=1e-12) for key in forms.values()]
    assert theirs["texts", "acc"] != theirs["texts", "acc_norm"]
