"""Runs lm-evaluation-harness against finback's server or another endpoint and reads its results into the report.

The harness is a separate program, often in a separate Python environment. A model in files is served to it on the loopback
address only. The harness caches its replies under `--out`. Does not import torch.
"""

import importlib.util
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from finback import __version__
from finback.client import Client
from finback.comparison.contestant import Contestant
from finback.comparison.endpoint import Endpoint
from finback.comparison.options import CompareOptions
from finback.comparison.protocol import SamplingProtocol, digest
from finback.comparison.served import NAME, serving
from finback.config import UserError, as_json
from finback.runs.files import read_json
from finback.runs.folder import prepare_folder
from finback.suites.intervals import LEVEL, limits_of_moments, student

if TYPE_CHECKING:
    from finback.comparison.local import Local

INSTALL = "pip install 'lm_eval[api]'"
KEY = "OPENAI_API_KEY"  # the harness reads its key from this variable and fails if it is empty


def measure(
    contestants: Sequence[Contestant],
    tasks: Sequence[str],
    rules: SamplingProtocol,
    options: CompareOptions,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Runs the harness on each contestant; returns a report like that of `compare`, with the results under "harness"."""
    harness = _LmEval(find_python(options.harness_python), tasks, rules, options, environment)
    rows: list[dict[str, Any]] = []
    for contestant in contestants:
        folder = options.out / "harness" / digest(contestant.identity)[:8]
        prepare_folder(folder)
        ask = harness.ask_endpoint if isinstance(contestant, Endpoint) else harness.ask_local
        rows += results(ask(contestant, folder), contestant.name)  # type: ignore[arg-type]
    return {
        "finback": __version__,
        "protocol": as_json(rules),
        **{part: [] for part in ("suites", "scores", "pairs", "compression", "failures")},
        "contestants": [{"name": c.name, "identity": c.identity, "price": c.price.basis} for c in contestants],
        "harness": rows,
    }


def find_python(given: Path | None) -> Path:
    """The Python interpreter that has lm_eval; if it has none, a UserError that names the install command."""
    if given is None:
        if importlib.util.find_spec("lm_eval") is not None:
            return Path(sys.executable)
        remedy = f"Run {INSTALL}, or pass the Python of an environment that has it as --harness-python."
        raise UserError("--harness", "lm-eval", "not installed here", remedy)
    try:
        probe = [str(given), "-c", "import lm_eval"]
        fine = subprocess.run(probe, capture_output=True, check=False).returncode == 0
    except OSError:
        fine = False
    if not fine:
        raise UserError("--harness-python", str(given), "has no lm_eval", f"Run {given} -m {INSTALL}.")
    return given


def results(found: dict[str, Any], contestant: str) -> list[dict[str, Any]]:
    """Rows from the harness's results file: each metric of each task, with an interval from its standard error."""
    rows = []
    for task, values in found["results"].items():
        counts = (found.get("n-samples") or {}).get(task) or {}
        for key, value in values.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            n = counts.get("effective")
            rows.append(
                {
                    "contestant": contestant,
                    "task": task,
                    "metric": metric if kind == "none" else key,
                    "value": value,
                    "interval": interval(value, error, n) if isinstance(error, int | float) else None,
                    "n": n,
                    "shots": (found.get("n-shot") or {}).get(task),
                    "by": f"lm-eval {found.get('lm_eval_version', '')}".strip(),
                }
            )
    return rows


def interval(value: float, error: float, n: int | None) -> tuple[float, float]:
    """The confidence interval of a metric from its standard error.

    A mean of n scores in 0..1 gets the interval of finback's own suites (`suites.intervals`), anything else Student's t,
    or the normal distribution if n is unknown.
    """
    if n is not None and n > 1:
        # the largest variance that scores in 0..1 can have at this mean; 1e-9 allows for rounding
        if 0 <= value <= 1 and error**2 * (n - 1) <= value * (1 - value) + 1e-9:
            low, high = limits_of_moments(np.array(value), np.array(n * error**2), n)
            return float(low), float(high)
        spread = student((1 + LEVEL) / 2, n - 1) * error
    else:
        spread = NormalDist().inv_cdf((1 + LEVEL) / 2) * error
    return value - spread, value + spread


@dataclass(frozen=True)
class _LmEval:
    """The harness's interpreter and the settings that all contestants share."""

    python: Path
    tasks: Sequence[str]
    rules: SamplingProtocol
    options: CompareOptions
    environment: Mapping[str, str]

    def ask_endpoint(self, contestant: Endpoint, folder: Path) -> dict[str, Any]:
        if len(contestant.urls) > 1:
            remedy = "Put `finback serve --upstream` in front of them."
            raise UserError("--endpoint", contestant.url, "the harness supports one server only", remedy)
        arguments = {
            "base_url": f"{contestant.url.rstrip('/')}/chat/completions",
            "model": contestant.model,
            "num_concurrent": contestant.concurrency,
            "max_retries": contestant.retries.tries,
            "timeout": int(contestant.timeout),
        }
        return self._run("local-chat-completions", arguments, folder, contestant.key)

    def ask_local(self, contestant: "Local", folder: Path) -> dict[str, Any]:
        from finback.data.tokenizer import Tokenizer

        tokenizer = folder / "tokenizer"  # the harness tokenizes texts itself to separate question and answer
        tokenizer.mkdir(exist_ok=True)
        Tokenizer(contestant.path).export(tokenizer)
        chat = self.options.harness_chat
        words = ["--dtype", contestant.dtype, "--rows", str(contestant.rows)]
        with serving(contestant.path, contestant.name, words, folder / "serve.log", self.environment) as base:
            with Client(base, timeout=10) as client:
                window = int(client.reply("/v1/models")["data"][0]["max_model_len"])
            arguments = {
                "base_url": f"{base}/v1/{'chat/completions' if chat else 'completions'}",
                "model": NAME,
                "num_concurrent": contestant.rows,
                "max_retries": 3,
                "timeout": int(self.options.timeout),
                "max_length": window,
                "max_gen_toks": min(self.rules.max_tokens, window // 2),
            }
            if not chat:
                arguments |= {"tokenizer": str(tokenizer), "tokenizer_backend": "huggingface"}
            return self._run(f"local-{'chat-' if chat else ''}completions", arguments, folder)

    def _run(self, kind: str, arguments: dict[str, Any], folder: Path, key: str = "") -> dict[str, Any]:
        """Runs the harness and returns the content of its results file; UserError if it fails."""
        began = time.time()
        command = [str(self.python), "-m", "lm_eval", "run", "--model", kind, "--tasks", ",".join(self.tasks)]
        command += ["--output_path", str(folder), "--use_cache", str(folder / "cache"), "--seed", str(self.rules.seed)]
        command += ["--model_args", *(f"{name}={value}" for name, value in arguments.items())]
        command += ["--apply_chat_template"] if "chat" in kind else []
        command += ["--limit", str(self.options.problems)] if self.options.problems else []
        environment = {**self.environment, KEY: key or "none"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=None, text=True, check=False)
        (folder / "harness.log").write_text(done.stdout, encoding="utf-8")
        files = [f for f in folder.rglob("results_*.json") if f.stat().st_mtime >= began - 1]
        if done.returncode or not files:
            remedy = "See its output above. Check the task names and, without a network, that its data sets are cached."
            raise UserError("--harness", "lm-eval", f"exited with code {done.returncode}", remedy)
        return dict(read_json(max(files, key=lambda f: f.stat().st_mtime)))
