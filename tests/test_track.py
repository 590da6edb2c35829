"""Curves for other viewers: they get what a run has logged, once, also while it runs."""

import json
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest

from finback.config import UserError
from finback.report.track import track
from finback.runs.files import write_json, write_lines
from tests.toy import finback


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of two stages, the second unfinished and with an incomplete line."""
    root = tmp_path / "runs" / "tiny"
    for number, name in enumerate(("base", "zero")):
        (root / name).mkdir(parents=True)
        write_json(root / name / "config.json", {"type": "Pretrain", "rows": 4, "order": number})
    write_json(root / "recipe.json", {"recipe": "tiny", "seed": 0})
    lines = [{"step": s, "loss": 4.0 / s, "note": "x", "bad": float("inf")} for s in (1, 2, 3)]
    write_lines(root / "base" / "metrics.jsonl", lines)
    write_json(root / "base" / "manifest.json", {})
    (root / "zero" / "metrics.jsonl").write_text('{"step": 1, "accuracy": 0.5}\n{"step": 2, "accu')
    return root


def test_tensorboard_reads_every_number(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert track(run, "tensorboard", tmp_path / "tb") == {"base": 3, "zero": 1}
    events = EventAccumulator(str(tmp_path / "tb" / "tiny" / "base"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(s, pytest.approx(4.0 / s)) for s in (1, 2, 3)]


class Fake(types.ModuleType):
    """The common interface of trackio and wandb, which records its calls."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.told: list[Any] = []

    def init(self, **knobs: Any) -> None:
        self.told.append(("init", knobs))

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.told.append((step, numbers))

    def finish(self) -> None:
        self.told.append("finish")


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_loggers_get_one_run_per_stage(name: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake(name)
    monkeypatch.setitem(sys.modules, name, fake)
    track(run, name, tmp_path)  # type: ignore[arg-type]
    (_, first), *_ = fake.told
    assert first["project"] == "tiny" and first["name"] == "base" and first["config"]["rows"] == 4
    assert first.get("mode") == ("offline" if name == "wandb" else None), "nothing may leave the machine by default"
    assert fake.told[1:5] == [(1, {"loss": 4.0}), (2, {"loss": 2.0}), (3, {"loss": 4 / 3}), "finish"]


def test_a_run_is_followed_to_its_end(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake("trackio")
    monkeypatch.setitem(sys.modules, "trackio", fake)

    def go_on() -> None:
        time.sleep(0.2)
        log = run / "zero" / "metrics.jsonl"
        with log.open("a") as handle:
            handle.write('racy": 0.6}\n')  # the other half of the line
        time.sleep(0.2)
        write_json(run / "zero" / "manifest.json", {})
        write_json(run / "summary.json", {})

    thread = threading.Thread(target=go_on)
    thread.start()
    sent = track(run, "trackio", tmp_path, follow=True, every=0.05)
    thread.join()
    assert sent == {"base": 3, "zero": 2}
    assert fake.told[-3:] == [(1, {"accuracy": 0.5}), (2, {"accuracy": 0.6}), "finish"]


def test_what_cannot_be_tracked_is_said(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(
        UserError, match=r"--to = 'trackio': the package is not installed\. Run: .* -m pip install trackio"
    ):
        track(run, "trackio", tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        track(tmp_path, "trackio", tmp_path)
    refused = finback("track", run, "--to", "tensorbord")
    assert refused.returncode == 2 and "Did you mean 'tensorboard'?" in refused.stderr


def test_the_command_says_what_it_sent(run: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    said = finback("track", run, "--out", tmp_path / "tb", "--json")
    assert json.loads(said.stdout) == {"to": "tensorboard", "lines": {"base": 3, "zero": 1}}, said.stderr
