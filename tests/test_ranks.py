"""Ranks meet, stay in contact and end together; a folder has one run."""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousConnectionError, RendezvousTimeoutError

from finback.config import UserError
from finback.parallel import heartbeat, meeting, torchrun
from finback.parallel.heartbeat import Heartbeat, Line, wait_of
from finback.parallel.meeting import KEY, Party, meet
from finback.runs import lock, reader
from finback.runs.files import OWNER
from finback.runs.folder import Interrupted
from tests import faults
from tests.toy import environment, finback_process


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shortens the waits for late ranks and for ranks of a killed run."""
    monkeypatch.setattr(meeting, "GRACE", 0.5)
    monkeypatch.setattr(lock, "MOMENT", 0.2)


ADDRESS = ("127.0.0.1", 1)


class FakeStore(dict[str, str]):
    """The part of torch's store that meetings use."""

    def set(self, key: str, value: str, /) -> None:
        self[key] = value

    def get(self, key: str, /) -> bytes:  # type: ignore[override]
        return self[key].encode()

    def check(self, keys: list[str], /) -> bool:
        return all(key in self for key in keys)


def together(*parties: Party, store: FakeStore | None = None) -> list[Any]:
    """The result of each rank's meeting, or the error that it raises."""
    found: list[Any] = [None] * len(parties)
    shared = FakeStore() if store is None else store

    def one(place: int) -> None:
        try:
            found[place] = meet(shared, parties[place], ADDRESS)
        except (UserError, Interrupted) as error:
            found[place] = error

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(parties))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return found


def leave(*beats: Heartbeat) -> None:
    """Ends the threads and the connections."""
    for beat in beats:
        beat.leave()
        beat._thread.join(60)


def until(true: Callable[[], Any]) -> None:
    begin = time.monotonic()
    while not true():
        assert time.monotonic() - begin < 60
        time.sleep(0.01)


def test_ranks_that_agree_meet_and_end_with_the_message_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    stale = FakeStore({KEY: json.dumps(["of an earlier start", "127.0.0.1", 1])})
    found = together(*(Party(rank, 3, {"seed": 1}) for rank in range(3)), store=stale)
    assert len({name for name, _ in found}) == 1 and found[0][0] != "of an earlier start"
    beats: list[Heartbeat] = [beat for _, beat in found]
    names = [[line.who for line in beat.lines] for beat in beats]
    parties = [str(Party(rank, 3, {})) for rank in range(3)]
    assert names == [parties[1:], parties[:1], parties[:1]], "the names for a lost rank, with its machine"
    beats[2].tell("rank 2: base.batch_size = 3: odd", 2)
    for beat in beats:
        ending = beat.reason(60)
        assert ending is not None and (ending.rank, ending.text, ending.code) == (
            2,
            "rank 2: base.batch_size = 3: odd",
            2,
        )
    beats[1].tell("too late", 1)
    assert all(beat.ending == ending for beat in beats)
    leave(*beats)
    assert capsys.readouterr().err == ""


def test_ranks_that_differ_are_refused_on_all_with_both_values() -> None:
    knobs = {"base.muon_lr": 0.01, "base.steps": 5, "version of torch": "2.13"}
    found = together(Party(0, 3, knobs), Party(1, 3, knobs), Party(2, 3, knobs | {"base.muon_lr": 0.02, "base.new": 1}))
    words = (
        r"base\.muon_lr = 0\.01: on rank 0, but rank 2 \(.*, pid \d+\) has 0\.02; 1 more differ: base\.new\. Start all"
    )
    for error in found:
        with pytest.raises(UserError, match=words):
            raise error


def test_ranks_that_count_differently_are_refused() -> None:
    for sizes in ((2, 3), (3, 2)):
        for error in together(*(Party(rank, size, {}) for rank, size in enumerate(sizes))):
            with pytest.raises(UserError, match=rf"WORLD_SIZE = {sizes[0]}: on rank 0, but rank 1 .* has {sizes[1]}"):
                raise error


def test_a_rank_that_does_not_come_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(meeting, "ARRIVAL", 2)
    found = together(*(Party(rank, 4, {}, wait=1) for rank in range(2)))
    assert "ranks 2, 3 of 4 did not come in 1 s" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"WORLD_SIZE = 4: ranks 2, 3 of 4 did not come in 2 s.*FINBACK_RANK_TIMEOUT"):
        raise found[0]
    assert str(found[1]) == str(found[0])


@pytest.mark.parametrize("asked", [0, 1])
def test_a_rank_that_is_asked_to_leave_before_all_have_come_takes_the_others_with_it(asked: int) -> None:
    found = together(*(Party(rank, 3, {}, lambda rank=rank: rank == asked) for rank in range(2)))  # type: ignore[misc]
    assert all(isinstance(error, Interrupted) for error in found)


def pair() -> tuple[socket.socket, Line]:
    """A rank that only this test controls, and the line to it."""
    theirs, ours = socket.socketpair()
    return theirs, Line(ours, 1, "rank 1 (node, pid 7)")


def test_a_rank_that_goes_or_stands_still_is_named() -> None:
    theirs, line = pair()
    beat = Heartbeat(0, 1.0, [line])
    ending = beat.reason(60)
    assert ending is not None and ending.code == 1 and ending.rank == 1
    assert "rank 1 (node, pid 7) has given no sign of life for 1 s (FINBACK_RANK_TIMEOUT" in ending.text
    assert json.loads(theirs.recv(1 << 16).split(b"\n")[-2])["end"]["rank"] == 1, "it reads the reason when it wakes"
    theirs.close()
    leave(beat)
    theirs, line = pair()
    beat = Heartbeat(0, 60.0, [line])
    theirs.close()
    ending = beat.reason(60)
    assert ending is not None and "rank 1 (node, pid 7) has disconnected" in ending.text
    leave(beat)
    theirs, line = pair()
    beat = Heartbeat(0, 60.0, [line])
    theirs.sendall(b'{"bye": true}\n')
    theirs.close()
    until(lambda: line.left and line.closed)
    assert beat.reason(0.2) is None, "a rank that reports that it is done may leave"
    leave(beat)


def test_a_rank_that_computes_on_is_ended_from_outside(tmp_path: Path) -> None:
    program = (
        "import socket, sys, time\n"
        "from finback.parallel import heartbeat\n"
        "heartbeat.GRACE = 0.2\n"
        "theirs, ours = socket.socketpair()\n"
        "beat = heartbeat.Heartbeat(0, 60.0, [heartbeat.Line(ours)])\n"
        f"beat.at_end = lambda: open({str(tmp_path / 'ended')!r}, 'w').close()\n"
        'theirs.sendall(b\'{"end": {"rank": 1, "text": "rank 1: base.lr = 0: odd", "code": 2}}\\n\')\n'
        "time.sleep(100)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=90)
    assert (done.returncode, done.stderr) == (2, "error: rank 1: base.lr = 0: odd\n") and (tmp_path / "ended").is_file()


def test_the_wait_is_a_number() -> None:
    assert wait_of({}) == heartbeat.DEFAULT_WAIT and wait_of({heartbeat.WAIT: "7.5"}) == 7.5
    for wrong in ("soon", "0", "nan", "-1"):
        with pytest.raises(UserError, match=r"FINBACK_RANK_TIMEOUT = '.*': not a number of seconds"):
            wait_of({heartbeat.WAIT: wrong})


def test_torchrun_ends_with_its_ranks_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")

    def ending(error: BaseException | None) -> int:
        def main() -> None:
            if error is not None:
                raise error

        monkeypatch.setattr("torch.distributed.run.main", main)
        return torchrun.main()

    def failed(code: int) -> ChildFailedError:
        return ChildFailedError("finback", {1: ProcessFailure(1, 7, code, "none")})

    codes = [ending(e) for e in (None, SignalException("asked", signal.SIGTERM), failed(2), failed(130), failed(-9))]
    assert codes == [0, 130, 2, 130, 1] and capsys.readouterr().err == "rank 1 was killed (signal 9)\n"
    assert [ending(RendezvousTimeoutError()), ending(RendezvousConnectionError("no"))] == [1, 1]
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: the agents did not meet (RendezvousTimeoutError). Run the same command on every")
    assert said[1].startswith("error: no answer from --rdzv-endpoint. ") and len(said) == 2


# ---- one run in a folder -----------------------------------------------------------------------------------------------


def owned(root: Path, age: float = 0.0, **theirs: Any) -> None:
    """Another run's claim, with a last heartbeat so many seconds ago."""
    found = {"host": "elsewhere", "pid": 7, "started": 1.0, "since": "2026-11-29 10:00:00+00:00", "job": ""} | theirs
    (root / OWNER).write_text(json.dumps(found))
    then = time.time() - age
    os.utime(root / OWNER, (then, then))


def test_a_folder_has_one_run_and_is_free_afterwards(tmp_path: Path) -> None:
    me = rf"process {os.getpid()} on {platform.node()}, since 20\d\d-"
    with lock.locked(tmp_path):
        assert not lock.is_busy_elsewhere(tmp_path) and reader.is_locked(tmp_path)
        with pytest.raises(UserError, match="another run is at work in this folder: " + me), lock.locked(tmp_path):
            pass
        (tmp_path / ".lock").unlink()  # as on a file system without locks
        with pytest.raises(UserError, match="another run is at work in this folder: " + me), lock.locked(tmp_path):
            pass
    assert lock.owner(tmp_path) is None and not reader.is_locked(tmp_path)


def test_what_a_dead_process_of_this_machine_has_left_is_taken_over(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(child.pid).create_time()
    here = {"host": platform.node(), "pid": child.pid}
    owned(tmp_path, **here, started=started)
    with pytest.raises(UserError, match=f"process {child.pid} on"), lock.locked(tmp_path):
        pass
    owned(tmp_path, **here, started=started - 1)  # another process with the same number
    with lock.locked(tmp_path):
        pass
    owned(tmp_path, **here, started=started)
    child.communicate()
    with lock.locked(tmp_path):
        pass
    (tmp_path / OWNER).write_text('{"host"')
    os.utime(tmp_path / OWNER, (1.0, 1.0))
    with pytest.raises(UserError, match=rf"delete {tmp_path / OWNER}"), lock.locked(tmp_path):
        pass


def test_another_machine_s_claim_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.1)
    owned(tmp_path)
    assert lock.is_busy_elsewhere(tmp_path) and reader.is_locked(tmp_path)
    with (
        pytest.raises(UserError, match=r"another run .* process 7 on elsewhere, .* sign of life"),
        lock.locked(tmp_path),
    ):
        pass
    owned(tmp_path, age=600.0)
    assert not reader.is_locked(tmp_path)
    with (
        pytest.raises(
            UserError, match=r"no sign of life for 6\d\d s from process 7 on elsewhere.* delete .*owner\.json"
        ),
        lock.locked(tmp_path, "torchrun b"),
    ):
        pass
    owned(tmp_path, age=600.0, job="torchrun a")
    with lock.locked(tmp_path, "torchrun a"):  # its own predecessor, on a machine that is gone
        found = lock.owner(tmp_path)
    assert found is not None and found["job"] == "torchrun a"


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_broken_again_and_again_over_two_agents_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Each kind of fault once; `python -m tests.faults` runs thirty."""
    found = faults.main(tmp_path / "faults", len(faults.KINDS), 0)
    assert found["wrong"] == [] and set(found["events"]) == set(faults.KINDS)


def limited(child: subprocess.Popen[str], rank: str) -> None:
    """Limits a rank to files of 8 KB from now on, like a full disk."""
    until(lambda: [p for p in psutil.Process(child.pid).children() if p.environ().get("RANK") == rank])
    process = next(p for p in psutil.Process(child.pid).children() if p.environ().get("RANK") == rank)
    process.rlimit(psutil.RLIMIT_FSIZE, (8192, psutil.RLIM_INFINITY))


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "rank"), [("None", "0"), ("Layout(dp=2, ep=2)", "1")])
def test_a_full_disk_on_one_rank_ends_all_with_a_word(tmp_path: Path, layout: str, rank: str) -> None:
    faults.write(tmp_path / "full", 40)
    recipe = tmp_path / "full" / "faults.py"
    recipe.write_text(recipe.read_text().replace("Layout(dp=2, ep=2)", layout))
    command = [sys.executable, "-m", "finback", "run", str(recipe), "--runs", str(tmp_path), "--ranks", "2"]
    child = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    until(lambda: (tmp_path / "faults/base/metrics.jsonl").is_file())
    limited(child, rank)
    _, said = child.communicate(timeout=100)
    assert child.returncode == 2 and "Traceback" not in said and "File too large. No file is incomplete" in said
    left = [p.name for p in (tmp_path / "faults/base").rglob("*") if ".part" in p.name or p.name.startswith(".tmp")]
    assert left == []
    assert finback_process("run", recipe, "--runs", tmp_path, "--ranks", 2).returncode == 0
