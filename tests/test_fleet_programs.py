"""Fleets of vLLM and SGLang, and sleeping engines, without Ray, vLLM and SGLang. tests/test_fleet.py has the rest."""

import gc
import os
import signal
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finback.client import RequestFailed
from finback.config import UserError
from finback.parallel import launch
from finback.parallel.launch import free_port
from finback.parallel.mesh import World
from finback.rollouts.answer_journal import AnswerJournal
from finback.rollouts.engine_process import EngineProcess, EngineProgram
from finback.rollouts.fleet import Fleet
from finback.rollouts.fleet_members import ProgramMember
from finback.rollouts.program_engine import ProgramEngine
from finback.rollouts.servers import Servers
from finback.runs import processor, provenance
from finback.runs.files import read_lines
from finback.runs.folder import StageRun
from finback.runs.ledger import cost
from finback.stages.distill import Distill
from finback.stages.grpo import GRPO
from finback.stages.reject import Reject
from finback.stages.watching import Watch
from finback.tasks.math import Chains
from tests.engine_servers import engine_server
from tests.fleets import FakeCluster, cluster  # noqa: F401
from tests.serving import wait_for
from tests.test_rollouts import OPENED, SAMPLING, Asked, agree, asked, base, closed, connected, here, learning, sampled  # noqa: F401
from tests.test_tuning import Echo, stage_folder, tune

QUICK: dict[str, Any] = {"backoff": 0.01, "concurrency": 2}
PROGRAM: dict[str, Any] = {"python": sys.executable, **QUICK}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_programs_answer_sleep_and_come_back(
    engine: Any,
    cluster: FakeCluster,  # noqa: F811
    asked: Asked,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Programs get each version's weights and release memory in between; a dead one restarts with the newest ones."""
    r = connected(asked, tmp_path, fleet=Fleet(2, engine=engine, colocated=True, **PROGRAM))
    for version in range(2):
        r.update(version)
        asked.ask(r)
        r.rest()
        assert all(server.released == {"weights", "kv_cache"} for server in cluster.servers)
        with pytest.raises(AssertionError, match="`update` must come before generating"):
            r.generate(asked.prompts, SAMPLING, range(24))
    r.update(1)
    assert [server.version for server in cluster.servers] == [f"{r.token}-1"] * 2
    (first, second), failed = cluster.servers, threading.Event()
    answered = first.answered

    def drops(path: str, body: dict[str, Any]) -> str:
        failed.set()
        return "drop"

    def waits(path: str, body: dict[str, Any]) -> None:
        assert failed.wait(300), "the first engine must be asked too"

    first.fault, second.fault = drops, waits
    lost, left = sorted(cluster.actors, key=lambda actor: actor.made.server is not first)
    lost.made.well = False
    asked.ask(r)
    # it restarts in the background, and the other engine has answered meanwhile
    wait_for(lambda: len(cluster.servers) == 3 and r.members[lost.number]._server is not None and not lost.alive, 120)
    assert first.answered == answered
    r.update(2)
    asked.ask(r)
    assert cluster.servers[2].version == f"{r.token}-2" and cluster.servers[2].answered > 0
    assert not first.seen[-1][0].startswith("/update"), "the lost engine must get no requests"
    # a rank that did not start it finds it through its actor
    other = ProgramMember(r, left.number, r.served)
    other._start = lambda: left  # type: ignore[method-assign]
    assert other.answer(r._probe(2)).tokens == r.members[left.number].answer(r._probe(2)).tokens
    other.close()
    r.close()
    assert not any((tmp_path / "zero" / ".weights").iterdir())


@pytest.mark.slow
def test_grpo_with_programs_that_sleep_is_grpo_here(
    cluster: FakeCluster,  # noqa: F811
    here: Any,  # noqa: F811
    tmp_path: Path,
) -> None:
    fleet = Fleet(2, engine="vllm", colocated=True, **PROGRAM)
    r = learning(tmp_path, routing_replay=True, rollouts=fleet)
    agree(sampled(r, 3), here)
    assert all(server.released == {"weights", "kv_cache"} for server in cluster.servers), "they sleep during training"
    assert r.stage.inputs() == ("base",) and (tmp_path / "zero" / ".weights").is_dir()


def test_a_programs_server_errors_cost_no_engine(cluster: FakeCluster, asked: Asked, tmp_path: Path) -> None:  # noqa: F811
    """An engine that reports that it is busy, or fails once and is healthy, is asked again and not stopped."""
    r = connected(asked, tmp_path, fleet=Fleet(1, engine="vllm", **PROGRAM))
    r.update(0)
    faults = iter([503, 500, 503, 500])
    cluster.servers[0].fault = lambda path, body: next(faults, None)
    asked.ask(r)
    assert len(cluster.servers) == 1


def test_an_engine_that_sleeps_holds_no_weights(cluster: FakeCluster, asked: Asked, tmp_path: Path) -> None:  # noqa: F811
    """finback's own engine frees the model and rebuilds it for the next weights, even if the policy does not learn."""
    r = connected(asked, tmp_path, fleet=Fleet(1, colocated=True, **QUICK))
    r.policy = replace(r.policy, learns=False)
    r.update(0)
    asked.ask(r)
    engine = cluster.actors[0].made
    model = weakref.ref(engine.live.engine.model)
    r.rest()
    gc.collect()
    assert model() is None and engine.live is None
    r.update(0)
    asked.ask(r)
    assert engine.live is not None


def test_rejection_sampling_pays_no_answer_twice(
    cluster: FakeCluster,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A fleet keeps the answers that `Here` keeps. A resumed run reuses the answers it has; each is paid for once."""
    stage_folder(tmp_path, 1, "base")
    knobs: dict[str, Any] = {
        "start": "base",
        "task": Echo(2, 4),
        "prompts": 140,
        "num_generations": 2,
        "max_tokens": 12,
    }
    alone = Reject(name="here", need_chain=False, readable=False, **knobs)
    there = replace(alone, name="there", rollouts=Fleet(2, **QUICK))
    runs = [StageRun(tmp_path, name, 0, World(), quiet=True) for name in ("here", "there")]
    for run in runs:
        run.folder.mkdir()
        run.seed = StageRun(tmp_path, "same", 0, World()).seed  # type: ignore[method-assign]
    expected = alone.run(runs[0])
    write, seen = AnswerJournal.write, list[int]()

    def broken(journal: AnswerJournal, seed: int, completion: Any) -> None:
        if len(seen) == 200:
            raise RuntimeError("killed")
        seen.append(seed)
        write(journal, seed, completion)

    monkeypatch.setattr(AnswerJournal, "write", broken)
    with pytest.raises(RuntimeError, match="killed"):
        there.run(runs[1])
    monkeypatch.setattr(
        AnswerJournal, "write", lambda journal, *given: (seen.append(given[0]), write(journal, *given))[1]
    )
    results = there.run(runs[1])
    assert len(seen) == len({*seen}) == 140 * 2
    assert (runs[0].folder / "traces.jsonl").read_bytes() == (runs[1].folder / "traces.jsonl").read_bytes()
    spent = [sum(line.get("tokens_generated", 0) for line in read_lines(run.folder / "ledger.jsonl")) for run in runs]
    assert spent[0] == spent[1] == results["per_kept"]["tokens"] * results["kept"]
    assert results["per_kept"]["money_usd"] > 0 and {**results, "per_kept": 0} == {**expected, "per_kept": 0}
    bills = [cost(run.folder) for run in runs]
    assert bills[0]["external"] == {} and bills[0]["unknown"] == bills[1]["unknown"] == []
    assert bills[1]["external"]["external_usd"] > 0, "with the engines' cores"


def test_distillation_asks_ahead_and_goes_on_behind_a_kill(tmp_path: Path) -> None:
    """Answers may be one update old; a second run takes over the requests of the first."""
    knobs: dict[str, Any] = {"teacher": "other", "task": Chains(2, 3), "traces": (), "steps": 3, "prompts_per_step": 4}
    first = tune(tmp_path, Distill, max_tokens=6, max_staleness=1, checkpoint_steps=1, **knobs)
    looped, rows = first.loop(), []
    rows.append(looped.advance())
    looped.checkpoint()
    rows.append(looped.advance())
    first.close()
    assert [row["staleness"] for row in rows] == [0.0, 1.0] and 0 <= rows[1]["engines_idle"] <= 1
    again = tune(tmp_path, Distill, max_tokens=6, max_staleness=1, checkpoint_steps=1, **knobs)
    journaled = len(list((tmp_path / "tuned" / ".answers").iterdir()))
    looped = again.loop()
    state = looped.restore()
    assert state is not None and looped.step == 1 and journaled >= 1
    again.load_state(state)
    row = looped.advance()
    assert row["loss"] == rows[1]["loss"], "both runs must learn from the same answers"
    again.close()


@pytest.mark.parametrize("backend", ["servers", "fleet"])
def test_watched_prompts_are_answered_elsewhere_too(
    backend: str,
    cluster: FakeCluster,  # noqa: F811
    base: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Greedy, without the stage's own top_k, and while the answers for the next step are generated."""
    watch, watched = Watch(("1+1=?", "hello"), every_steps=1), []
    with engine_server(base) as (url, _):
        there = Servers((url,), **QUICK) if backend == "servers" else Fleet(2, **QUICK)
        for name, knobs in (("here", {}), ("there", {"rollouts": there, "max_staleness": 1, "max_gap": 9.0})):
            r = learning(tmp_path / name, watch=watch, top_k=8, **knobs)
            looped = r.loop()
            r.before(looped)
            looped.advance()
            lines = read_lines(r.run.folder / "watched.jsonl")
            watched.append([[line[name] for name in ("step", "question", "answer", "tokens")] for line in lines])
            r.close()
    assert watched[0][:2] == watched[1][:2] and [line[0] for line in watched[1]][:2] == [0, 0]


def test_other_versions_on_a_node_are_said(
    cluster: FakeCluster,  # noqa: F811
    asked: Asked,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skewed = provenance.software() | {"torch": "1.0"}
    monkeypatch.setattr("finback.rollouts.fleet_engine.FleetEngine.software", lambda engine: skewed)
    with pytest.raises(UserError, match=r"Ray server: has torch 1\.0, but the trainer .*Install the same version"):
        connected(asked, tmp_path, fleet=Fleet(1, **QUICK))


SERVER = """
import sys, subprocess
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
    def log_message(self, *_): pass
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("worker", child.pid, flush=True)
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_program_ends_with_whoever_started_it() -> None:
    """So do its children: the pipe to the program closes, as it does when a process is killed."""
    port = free_port()
    process = EngineProcess([sys.executable, "-c", SERVER, str(port)], dict(os.environ), f"http://127.0.0.1:{port}")
    process.wait(60)
    worker = int(process.log.read_text().split()[1])
    os.kill(worker, 0)
    assert process.is_well()
    watcher = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    assert os.getpgid(watcher) != os.getpgid(process.pid), "Ray kills a worker's whole group"
    os.kill(process.pid, signal.SIGKILL)  # as Ray does with the children of a worker that it stops
    process.close()
    assert not process.is_well() and not process.log.exists()
    stat = Path(f"/proc/{worker}/stat")
    while stat.exists() and stat.read_text().split()[2] != "Z":
        time.sleep(0.01)


def test_a_program_that_does_not_start_is_said() -> None:
    process = EngineProcess([sys.executable, "-c", "raise SystemExit('no CUDA')"], {}, "http://127.0.0.1:9")
    with pytest.raises(RequestFailed, match=r"ended with code 1: …no CUDA \(/"):
        process.wait(60)
    process.close()
    with pytest.raises(UserError, match="python = '/nowhere': no such program on this machine"):
        EngineProcess(["/nowhere"], {}, "http://127.0.0.1:9")


def test_commands_of_programs() -> None:
    given = EngineProgram("vllm", "/env/bin/python", ("--max-model-len", "99"), ("VLLM_MLA_DISABLE=1", "X=a=b"))
    command = given.command("/w/1", "10.0.0.5", 8017, ("--dtype", "float32"))
    assert " ".join(command) == (
        "/env/bin/python -m vllm.entrypoints.openai.api_server --model /w/1 --host 10.0.0.5 --port 8017 --dtype float32 "
        "--max-model-len 99"
    )
    environment = given.environment({"VLLM_SERVER_DEV_MODE": "1"})
    assert environment["X"] == "a=b" and environment["VLLM_MLA_DISABLE"] == environment["VLLM_SERVER_DEV_MODE"] == "1"
    assert "PYTHONPATH" not in environment


def test_engines_have_no_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two on one machine would otherwise take a thread per core each. The user's own number counts."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert ProgramEngine(EngineProgram("vllm", "p"), (), 3).environment()["OMP_NUM_THREADS"] == "3"
    given = EngineProgram("vllm", "p", env=("OMP_NUM_THREADS=5",))
    assert ProgramEngine(given, (), 3).environment()["OMP_NUM_THREADS"] == "5"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(launch, "gpus", lambda: 0)
    monkeypatch.setattr(processor, "usable_cores", lambda: 9)
    assert launch.share(1, 2) == {"OMP_NUM_THREADS": "4"} and launch.share(11, 12) == {"OMP_NUM_THREADS": "1"}
    assert launch.share(0, 1) == {}
    monkeypatch.setattr(launch, "gpus", lambda: 4)
    assert launch.share(1, 2) == {"CUDA_VISIBLE_DEVICES": "2,3"}


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({"engine": "vllm"}, r"rollouts\.python = '': vllm runs in its own environment"),
        ({"engine": "sglang", "python": "p", "env": ("X",)}, r"rollouts\.env = 'X': not NAME=value"),
        ({"python": "p"}, r"rollouts\.python = 'p': applies to programs"),
        ({"engine": "tgi"}, r"rollouts\.engine = 'tgi'"),
    ],
)
def test_wrong_knobs_are_said(knobs: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        Fleet(1, **knobs)


def test_engines_that_answer_while_the_trainer_learns_do_not_sleep() -> None:
    with pytest.raises(UserError, match=r"zero\.rollouts\.colocated = True: the engines answer while"):
        GRPO(name="zero", start="base", task=Chains(2, 3), max_staleness=1, rollouts=Fleet(1, colocated=True))
