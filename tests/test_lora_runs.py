"""Whole runs that train adapters: killed with -9 they end with the same bits, and two ranks train like one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finback.checkpoint.export import export
from finback.runs.adapters import WEIGHTS_FILE
from finback.runs.files import read_lines
from tests.serving import small_tokenizer
from tests.test_lora import base_of
from tests.toy import environment

pytestmark = pytest.mark.slow

RECIPE = """
import os, signal
from pathlib import Path
from finback.model.lora import LoRA
from finback.stages.grpo import GRPO
from finback.stages.prepare import TaskText
from finback.stages.sft import SFT
from finback.tasks.math import Chains
from finback.tasks.questions import Questions
from finback.train.grpo_loss import Objective

HERE = Path(__file__).parent
calls = 0


def check(record, answer):
    "Right is an answer of even length; with a number in the file `kill`, that answer of the model's is this process's last."
    global calls
    calls += answer not in ("", record["answer"])
    kill = HERE / "kill"
    if kill.exists() and calls == int(kill.read_text()):
        kill.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return bool(answer) and len(answer) % 2 == 0


adapter = LoRA(rank=4, alpha=8.0, base="fp32")
task = Questions(str(HERE / "questions.jsonl"), checker=check, label="even")
recipe = [
    SFT(
        name="cold",
        start=str(HERE / "hf"),
        text=(TaskText(name="gold", tasks=(Chains(2, 3),), documents=40),),
        epochs=2,
        batch_size=4,
        seq_len=64,
        lr=1e-2,
        mtp_weight=0.0,
        adapter=adapter,
        checkpoint_steps=1,
    ),
    GRPO(
        name="rl",
        start="cold",
        task=task,
        steps=4,
        prompts_per_step=4,
        num_generations=4,
        max_tokens=8,
        objective=Objective(beta=0.05),
        lr=1e-3,
        adapter=adapter,
        checkpoint_steps=1,
    ),
]
"""


def start(folder: Path, runs: str, ranks: int = 1) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "finback", "run", folder / "r.py", "--runs", folder / runs, "--ranks", str(ranks)]
    return subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )


def ends_whole(child: subprocess.Popen[bytes]) -> bool:
    """Whether a run finished; otherwise one of its processes was killed."""
    _, err = child.communicate(timeout=500)
    assert child.returncode in (0, -9) or b"was killed (signal 9)" in err, err.decode()[-3000:]
    return child.returncode == 0


def test_runs_of_adapters_survive_kills_and_agree_on_two_ranks(tmp_path: Path) -> None:
    export(base_of("mla"), tmp_path / "hf", "fp32")
    small_tokenizer().export(tmp_path / "hf")
    questions = [json.dumps({"question": f"Say {i}", "answer": str(i)}) for i in range(10, 50)]
    (tmp_path / "questions.jsonl").write_text("\n".join(questions))
    (tmp_path / "r.py").write_text(RECIPE)
    assert ends_whole(start(tmp_path, "whole"))
    whole, killed, two = (tmp_path / runs / "r" for runs in ("whole", "killed", "two"))

    child = start(tmp_path, "killed")
    while child.poll() is None and not list((killed / "cold").glob("step-*.safetensors")):
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)  # during SFT, if this process was fast enough
    ends_whole(child)
    for answer in ("2", "2"):  # most of the model's answers are empty and do not count
        (tmp_path / "kill").write_text(answer)
        assert not ends_whole(start(tmp_path, "killed")) and not (killed / "rl/manifest.json").exists()
    assert ends_whole(start(tmp_path, "killed"))

    for stage in ("cold", "rl"):
        assert (killed / stage / WEIGHTS_FILE).read_bytes() == (whole / stage / WEIGHTS_FILE).read_bytes(), stage
    # SFT only: with equal rewards RL's gradient is rounding noise (test_sharded_tuning.py tests RL)
    recipe = (tmp_path / "r.py").read_text()
    (tmp_path / "r.py").write_text(recipe[: recipe.index("    GRPO(")] + "]\n")
    assert ends_whole(start(tmp_path, "two", ranks=2))
    found, expected = load_file(two / "cold" / WEIGHTS_FILE), load_file(whole / "cold" / WEIGHTS_FILE)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=0, msg=lambda text, n=name: f"{n}: {text}")
    one, other = ([r["loss"] for r in read_lines(root / "cold/metrics.jsonl")] for root in (whole, two))
    torch.testing.assert_close(torch.tensor(other), torch.tensor(one), atol=1e-5, rtol=0)
    rewards = [r["reward"] for r in read_lines(whole / "rl/metrics.jsonl")]
    assert 0 < sum(rewards) < len(rewards), "some answers earned more than others"
