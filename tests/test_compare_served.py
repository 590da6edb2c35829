"""Models in files that a comparison has served: the same answers, and processes that end with the questions."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from finback.checkpoint.export import export
from finback.comparison import served as serving
from finback.comparison.compare import compare, open_all
from finback.comparison.contestant import Answer, Failure
from finback.comparison.local import Local
from finback.comparison.options import CompareOptions
from finback.comparison.protocol import SamplingProtocol, eval_requests
from finback.comparison.served import Served
from finback.config import UserError
from finback.engine.engine import EngineConfig
from finback.engine.open import open_engine
from tests.serving import served, small_tokenizer
from tests.test_compare_local import DIVERSE, GREEDY, folder, said, whales  # noqa: F401
from tests.toy import ROOT, environment


class InThread:
    """Replaces a `finback serve` process by a server in a thread."""

    def __init__(self, model: Path, name: str, words: Any, log: Path, environment: dict[str, str]) -> None:
        self.stack, self.has_ended, self.words = ExitStack(), False, list(words)
        self.variables = environment
        engine, _ = open_engine(model, "fp32", EngineConfig(8, 8192, 64, reuse=True, speculate=True))
        client = self.stack.enter_context(served(engine, name=serving.NAME))
        self.url, self.log = str(client.base_url).rstrip("/"), log
        STARTED.append(self)

    def wait(self, key: str) -> None:
        assert self.variables["FINBACK_API_KEY"] == key and len(key) > 20

    def error(self, problem: str) -> UserError:
        return UserError("MODEL", "toy", problem, "See its log.")

    def close(self) -> None:
        self.has_ended = True
        self.stack.close()


STARTED: list[InThread] = []


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[InThread]]:
    monkeypatch.setattr(serving, "ServeProcess", InThread)
    STARTED.clear()
    yield STARTED
    assert all(server.has_ended for server in STARTED)


def contestant(folder: Path, out: Path, **more: Any) -> Served:  # noqa: F811
    given: dict[str, Any] = {"models": (folder,), "tasks": ("whales",), "out": out, "replicas": 2} | more
    options = CompareOptions(**given)
    found = Served(Local(folder, "toy", "fp32"), folder, options, dict(os.environ))
    assert not (out / "servers").exists()
    return found


@pytest.mark.parametrize("rules", [GREEDY, DIVERSE])
def test_two_of_them_answer_as_one_here(
    rules: SamplingProtocol,
    folder: Path,  # noqa: F811
    threads: list[InThread],
    tmp_path: Path,
) -> None:
    wanted = eval_requests([whales(9)], rules, {})
    here = said(list(Local(folder, "toy", "fp32").answers(wanted, rules)))
    began = time.monotonic()
    found = list(contestant(folder, tmp_path).answers(wanted, rules))
    assert said(found) == here and len(threads) == 2
    busy = sum(answer.busy for answer in found if isinstance(answer, Answer))
    assert 0 < busy <= time.monotonic() - began, "the machine's seconds add up"


def test_they_run_only_while_answers_are_missing(
    folder: Path,  # noqa: F811
    threads: list[InThread],
    tmp_path: Path,
) -> None:
    """An interrupted comparison ends them; the next one starts them for the rest, and the third not at all."""
    one = contestant(folder, tmp_path, rows=1)
    plain, kept = one.answers, 4

    def interrupted(asks: Any, rules: Any) -> Iterator[Answer | Failure]:
        for number, each in enumerate(plain(asks, rules)):
            if number == kept:
                raise KeyboardInterrupt
            yield each

    one.answers = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        compare([one], [whales(9)], GREEDY, tmp_path)
    assert len(threads) == 2 and all(server.has_ended for server in threads)
    again = contestant_again(folder, tmp_path)
    report = compare([again], [whales(9)], GREEDY, tmp_path)
    assert len(threads) == 2 + 3 and not report["failures"] and report["scores"][0]["n"] == 9
    assert compare([again], [whales(9)], GREEDY, tmp_path)["scores"] == report["scores"]
    assert len(threads) == 2 + 3


def contestant_again(folder: Path, out: Path) -> Served:  # noqa: F811
    """The same with another number of replicas, which does not change who answers."""
    options = CompareOptions(models=(folder,), tasks=("whales",), out=out, replicas=3)
    return Served(Local(folder, "toy", "fp32"), folder, options, dict(os.environ))


def test_a_question_as_long_as_the_window_fails_alone(
    folder: Path,  # noqa: F811
    threads: list[InThread],
    tmp_path: Path,
) -> None:
    suite = whales(3)
    (wanted, *rest) = eval_requests([suite], GREEDY, {})
    long = eval_requests([suite], GREEDY, {"long": 1})[0]
    object.__setattr__(long, "messages", ({"role": "user", "content": "whale " * 400},))
    rules = SamplingProtocol(samples=1, temperature=0.0, max_tokens=10_000)
    found = list(contestant(folder, tmp_path).answers([long, wanted, *rest], rules))
    (failure,) = (each for each in found if isinstance(each, Failure))
    assert failure.ask is long and "window" in failure.problem and len(found) == 4
    for answer in found:  # more tokens than the window has are not asked for
        assert answer is failure or answer.finish in ("stop", "length")  # type: ignore[union-attr]


def test_when_all_have_ended_it_is_said(
    folder: Path,  # noqa: F811
    threads: list[InThread],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answers(self: Any, asks: Any, rules: Any) -> Iterator[Failure]:
        for server in threads:
            server.has_ended = True
        yield Failure(asks[0], "ConnectionRefusedError")

    one = contestant(folder, tmp_path)
    monkeypatch.setattr(serving._Windowed, "answers", answers)
    with pytest.raises(UserError, match="its server has ended: ConnectionRefusedError"):
        list(one.answers(eval_requests([whales(1)], GREEDY, {}), GREEDY))
    for server in threads:
        server.stack.close()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"engine": "vllm"}, "--engine-python = '': vllm runs in its own environment"),
        ({"engine": "vllm", "engine_python": "/x", "dtype": "fp32"}, "--dtype = 'fp32': is for finback's own engine"),
        ({"engine_flags": ("--x",)}, "--engine-flag = .* is for --engine vllm or sglang"),
        ({"engine_env": ("X=1",)}, "--engine-env = .* is for --engine vllm or sglang"),
        ({"replicas": 0}, "--replicas = 0"),
        ({"replicas": 2, "harness": "lm-eval"}, "--replicas = 2: the harness starts its own server"),
        ({"replicas": 2, "models": (), "endpoints": ("http://a/v1#m",)}, "--replicas = 2: no model in files is named"),
    ],
)
def test_options_that_do_not_go_together(more: dict[str, Any], text: str) -> None:
    given: dict[str, Any] = {"models": (Path("m"),), "tasks": ("sums",)} | more
    with pytest.raises(UserError, match=text):
        CompareOptions(**given)


def test_who_answers_is_part_of_the_identity(folder: Path, tmp_path: Path) -> None:  # noqa: F811
    python = fake_python(tmp_path)

    def identity(**more: Any) -> dict[str, Any]:
        options = CompareOptions(models=(folder,), tasks=("sums",), **more)
        (found,) = open_all(options, {})
        return found.identity

    vllm: dict[str, Any] = {"engine": "vllm", "engine_python": python}
    alone, two, theirs = identity(), identity(replicas=2), identity(**vllm)
    assert two == identity(replicas=3) and "engine" not in alone and two["engine"] == "finback"
    assert theirs["version"] == "0.32.0" and theirs == identity(**vllm, replicas=2)
    assert theirs != identity(**vllm, engine_flags=("--x=1",)) != identity(**vllm, engine_env=("A=1",))
    with pytest.raises(UserError, match="has no vllm"):
        identity(engine="vllm", engine_python=sys.executable)


def fake_python(folder: Path) -> str:  # noqa: F811
    """Replaces the Python of an engine's environment by one with the tests' own server."""
    script = folder / "python"
    start = f'PYTHONPATH={ROOT} exec {sys.executable} -m tests.engine_servers "$@"'
    script.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo 0.32.0 && exit\n{start}\n')
    script.chmod(0o755)
    return str(script)


def running(text: str) -> list[psutil.Process]:
    """Processes with this text in their command."""
    alive = [p for p in psutil.process_iter(["cmdline", "status"]) if p.info["status"] != psutil.STATUS_ZOMBIE]
    return [process for process in alive if text in " ".join(process.info["cmdline"] or ())]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "questions"), [("finback", 100), ("vllm", 10)])
def test_ctrl_c_ends_real_processes_and_the_command_goes_on(
    engine: str,
    questions: int,
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    toy = tmp_path / "toy"
    export(open_engine(folder, "fp32", EngineConfig())[0].model, toy, "fp32", small_tokenizer().export)
    words = ["--replicas", "2"]
    if engine == "vllm":
        flags = ["--dtype", "float32", "--enable-return-routed-experts"]
        words += ["--engine", "vllm", "--engine-python", fake_python(tmp_path)]
        words += [f"--engine-flag={flag}" for flag in flags]
    lines = [f'{{"question": "{i}+{i}=", "answer": "{2 * i}"}}' for i in range(questions)]
    (tmp_path / "sums.jsonl").write_text("\n".join(lines))
    command = [sys.executable, "-m", "finback", "compare", str(toy), "--tasks", str(tmp_path / "sums.jsonl"), *words]
    command += ["--max-tokens", "24", "--samples", "2", "--rows", "2", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        command,
        env=environment(),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    answers = tmp_path / "out/answers"
    until = time.monotonic() + 300
    while not any(file.stat().st_size for file in answers.glob("*.jsonl")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    assert running(str(toy)) != []
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=120)
    assert process.returncode != 0 and "run the same command to continue" in told
    left = running(str(toy))
    assert not left, left
    kept = sum(len(file.read_text().splitlines()) for file in answers.glob("*.jsonl"))
    assert 0 < kept < 2 * questions
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert sum(len(file.read_text().splitlines()) for file in answers.glob("*.jsonl")) == 2 * questions
    assert not running(str(toy))
