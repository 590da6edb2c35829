"""lm-evaluation-harness against our server or somebody's, its results as rows of our report.

The harness is a program of its own, often in an environment of its own. A model here is served to it on this machine
alone; the replies stay in the harness's cache beside our answers. Does not import torch.
"""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np

from finback import __version__
from finback.client import Client, RequestFailed
from finback.comparison.contestant import Contestant
from finback.comparison.endpoint import Endpoint
from finback.comparison.options import CompareOptions
from finback.comparison.protocol import SamplingProtocol, digest
from finback.config import UserError, as_json
from finback.runs.files import read_json
from finback.runs.folder import prepare_folder
from finback.suites.intervals import LEVEL, limits_of_moments, student

if TYPE_CHECKING:
    from finback.comparison.local import Local

INSTALL = "pip install 'lm_eval[api]'"
KEY = "OPENAI_API_KEY"  # where the harness looks for a key; it wants to find something there
NAME = "finback"  # what a model here is called while it is served
# a server must not outlive a comparison that was killed
START = "from finback.parallel import launch; launch.die_with_parent({parent}); from finback.cli import main; main()"
STARTING = 600.0  # seconds that a model may take to load


def measure(
    contestants: Sequence[Contestant],
    tasks: Sequence[str],
    rules: SamplingProtocol,
    options: CompareOptions,
    environment: Mapping[str, str],
) -> dict[str, Any]:
    """Have the harness ask each contestant its tasks; a report as `compare` makes, with the rows under "harness"."""
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
    """The interpreter that has lm_eval; UserError with the command that installs it."""
    if given is None:
        if importlib.util.find_spec("lm_eval") is not None:
            return Path(sys.executable)
        remedy = f"Run {INSTALL}, or name an environment that has it with --harness-python."
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
    """Rows from the harness's results file: each metric of each task with the interval that its error gives."""
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
    """The interval of a metric from its standard error; of a share or a score in 0..1 over n questions, as for suites here."""
    if n is not None and n > 1:
        # no scores in 0..1 vary more: 1e-9 is for rounding
        if 0 <= value <= 1 and error**2 * (n - 1) <= value * (1 - value) + 1e-9:
            low, high = limits_of_moments(np.array(value), np.array(n * error**2), n)
            return float(low), float(high)
        spread = student((1 + LEVEL) / 2, n - 1) * error
    else:
        spread = NormalDist().inv_cdf((1 + LEVEL) / 2) * error
    return value - spread, value + spread


@dataclass(frozen=True)
class _LmEval:
    """The harness's interpreter, and what is the same for all contestants."""

    python: Path
    tasks: Sequence[str]
    rules: SamplingProtocol
    options: CompareOptions
    environment: Mapping[str, str]

    def ask_endpoint(self, contestant: Endpoint, folder: Path) -> dict[str, Any]:
        if len(contestant.urls) > 1:
            remedy = "Put `finback serve --upstream` in front of them."
            raise UserError("--endpoint", contestant.url, "the harness asks one server", remedy)
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

        tokenizer = folder / "tokenizer"  # the harness cuts texts into tokens itself, to separate question and answer
        tokenizer.mkdir(exist_ok=True)
        Tokenizer(contestant.path).export(tokenizer)
        chat = self.options.harness_chat
        with serving(contestant, folder / "serve.log", self.environment) as base:
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
        """Run the harness to its end; what its results file says."""
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
            remedy = "See its output above. Check the names of the tasks, and its data sets where there is no network."
            raise UserError("--harness", "lm-eval", f"it ended with code {done.returncode}", remedy)
        return dict(read_json(max(files, key=lambda f: f.stat().st_mtime)))


@contextmanager
def serving(contestant: "Local", log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Our server for one model as a process of its own, on a free port of this machine; its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", START.format(parent=os.getpid()), "serve", str(contestant.path)]
    command += ["--port", str(port), "--name", NAME, "--dtype", contestant.dtype, "--rows", str(contestant.rows)]
    command += ["--queue", "1024", "--no-page", "--drain", "1"]
    own = {k: v for k, v in environment.items() if k != "FINBACK_API_KEY"}  # the harness would not know it
    with log.open("w", encoding="utf-8") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=own)
    try:
        _wait(server, f"http://127.0.0.1:{port}", contestant, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(server: "subprocess.Popen[bytes]", base: str, contestant: "Local", log: Path) -> None:
    began = time.monotonic()
    while time.monotonic() - began < STARTING and server.poll() is None:
        try:
            with Client(base, timeout=10) as client:
                client.reply("/ready")
            return
        except RequestFailed:
            time.sleep(0.1)
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    raise UserError("MODEL", contestant.name, "the server for it did not start", f"Its log: {lines[-1:] or 'empty'}.")
