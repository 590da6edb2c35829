"""The page without a browser: its files and their rules, the JSON of run folders, and what requests cannot reach."""

import gzip
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from starlette.testclient import TestClient

from finback.config import UserError
from finback.report.summary import _alerts
from finback.runs.metrics_table import MetricsTable
from finback.runs.reader import StageFolder
from finback.runs.samples import SampleIndex, shown
from finback.runs.thinning import smooth, thin
from finback.serve import curves, server, watch
from finback.serve.http import digests
from finback.serve.options import ListenOptions, ServeOptions
from finback.serve.page import POLICY, WEB, Page
from finback.serve.runs import Runs
from tests.serving import CHAT, HELLO, KEY, Scripted, events, served
from tests.toy import ROOT, finback

HOSTILE = "<img src=x onerror=alert(1)>"


def write(path: Path, *records: Any, end: str = "\n") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, records)) + end)


def make_run(root: Path, name: str = "toy") -> Path:
    """A run with a finished pre-training, a finished exam and an RL stage that has stopped."""
    run = root / name
    write(run / "recipe.json", {"recipe": "toy", "seed": 3})
    write(
        run / "base/config.json",
        {"type": "Pretrain", "name": "base", "max_tokens": 4000, "declaration": {"length": "max_tokens"}},
    )
    steps = range(1, 101)
    write(
        run / "base/metrics.jsonl",
        *({"step": i, "tokens": 40 * i, "loss": 5 / i, "tokens_per_second": 20.0} for i in steps),
    )
    write(
        run / "base/ledger.jsonl",
        {"seconds": 10.0, "cores": 2, "tokens_trained": 3000},
        {"seconds": 5.0, "cores": 2, "tokens_trained": 1000},
    )
    results: dict[str, Any] = {"steps": 100, "probe_reached": True, "probe_best": 0.9, "bits_per_byte": {"text": 1.25}}
    write(run / "base/manifest.json", {"stage": "base", "files": [], "results": results})
    write(run / "exam/config.json", {"type": "Evaluate", "name": "exam", "start": "base", "exams": [{"name": "sums"}]})
    write(
        run / "exam/sums.jsonl",
        {"question": "1+1=?", "gold": "2", "thinking": "", "answer": "3", "correct": False, "tokens": 2},
    )
    scores = [{"exam": "sums", "accuracy": 0.25, "interval": [0.1, 0.4]}]
    write(run / "exam/manifest.json", {"stage": "exam", "files": [], "results": {"evaluations": scores}})
    write(run / "summary.json", {"stages": {"base": {}, "exam": {}}})
    write(run / "zero/config.json", {"type": "GRPO", "name": "zero", "steps": 10, "max_gap": 0.01, "group": 2})
    load = [[0.5, 0.5], [0.25, 0.75]]
    write(
        run / "zero/metrics.jsonl",
        *(
            {"step": i, "reward": i / 10, "seconds": 2.0, "gap_max": 0.001 * i, "expert_load": load}
            for i in range(1, 5)
        ),
    )
    said = [
        {
            "step": step,
            "question": q,
            "gold": "2",
            "thinking": f"step {step}",
            "answer": "2",
            "correct": True,
            "reward": {"accuracy": 1.0, "form": 0.1},
            "advantage": 0.5,
            "tokens": 9,
            "finish": "stop",
        }
        for step in range(1, 5)
        for q in ("1+1=?", HOSTILE)
        for _ in range(2)
    ]
    said[-4] |= {"pieces": ["2"], "logprobs": [-0.7], "new_logprobs": [-0.1]}
    write(run / "zero/samples.jsonl", *said)
    watched = {"gold": "", "thinking": "", "correct": None, "tokens": 2, "finish": "stop"}
    looks: list[tuple[int, dict[str, Any]]] = [
        (0, {"answer": "I see 2 cats", "pieces": ["I see", " 2 cats"], "logprobs": [-0.5, -1.0]}),
        (2, {"answer": "I see two cats", "pieces": ["I see two cats"], "logprobs": [-2.0]}),
    ]
    looks[0][1].update(expert_layers=[1, 3], experts=[[[0, 2], [1, 3]]])
    looks[1][1].update(former_logprobs=[-0.5, -2.0])
    write(
        run / "zero/watched.jsonl",
        *({"step": i, "question": q} | watched | said for i, said in looks for q in ("1+1=?", "Who?")),
    )
    return run


@contextmanager
def served_two(first: Scripted, second: Scripted, **options: Any) -> Iterator[httpx.Client]:
    """A server of two models, "toy" and "other", on a real socket."""

    def build(engine: Any, words: Any, given: ServeOptions, adapters: Any = None) -> Any:
        return server.build(engine, words, given, {"other": (second, words)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.serving.build", build)
        with served(first, **options) as client:
            yield client


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    make_run(tmp_path / "runs")
    (tmp_path / "secret.jsonl").write_text('{"step": 1, "secret": 42}\n')
    app = watch.build(tmp_path / "runs", ListenOptions())
    with TestClient(app, base_url="http://127.0.0.1:8001") as found:
        yield found


def test_the_page_is_served_under_a_strict_policy(client: TestClient) -> None:
    for path in ("/", "/runs"):
        page = client.get(path)
        assert page.status_code == 200 and page.headers["content-type"] == "text/html; charset=utf-8"
        assert page.headers["content-security-policy"] == POLICY and page.headers["cache-control"] == "no-cache"
        assert page.headers["x-frame-options"] == "DENY" and page.headers["referrer-policy"] == "no-referrer"
        assert "{{" not in page.text and page.text.count("modulepreload") > 15
        linked = re.findall(r'(?:src|href)="([^"]+)"', page.text)
        assert len(linked) > 5
        for address in linked:
            file = client.get(address)
            assert file.status_code == 200 and "immutable" in file.headers["cache-control"], address
            assert file.headers["x-content-type-options"] == "nosniff"
    assert "unsafe" not in POLICY and "http" not in POLICY and "*" not in POLICY


def test_no_file_of_the_page_needs_what_the_policy_forbids() -> None:
    for path in sorted(WEB.rglob("*.html")):
        text = path.read_text()
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|https?:", text), path
    for path in sorted(p for p in WEB.rglob("*.js") if "vendor" not in p.parts):
        text = path.read_text()
        assert not re.search(
            r"innerHTML|dangerouslySetInnerHTML|outerHTML|insertAdjacentHTML|\beval\(|new Function|document\.write",
            text,
        ), path
        assert not re.search(r"https?://", text), path
        assert text.count("\n") < 300, f"{path} is too long"


def test_types_caching_and_compression(client: TestClient) -> None:
    page = Page()
    at = f"/web/{page.digest}"
    for name, kind in (
        ("lib.js", "text/javascript"),
        ("styles/base.css", "text/css"),
        ("icon.svg", "image/svg+xml"),
        ("vendor/Temml.woff2", "font/woff2"),
    ):
        reply = client.get(f"{at}/{name}", headers={"accept-encoding": "identity"})
        assert reply.headers["content-type"].startswith(kind) and reply.content == (WEB / name).read_bytes()
        again = client.get(f"{at}/{name}", headers={"if-none-match": f"W/{reply.headers['etag']}"})
        assert again.status_code == 304 and not again.content
    with client.stream("GET", f"{at}/vendor/marked.js", headers={"accept-encoding": "br, gzip;q=0.9"}) as packed:
        raw = b"".join(packed.iter_raw())
    assert (
        packed.headers["content-encoding"] == "gzip" and gzip.decompress(raw) == (WEB / "vendor/marked.js").read_bytes()
    )
    old = client.get("/web/0123456789abcdef/lib.js")  # from a tab that stayed open during an upgrade
    assert old.status_code == 200 and old.headers["cache-control"] == "no-cache"


LIMIT = 700_000  # bytes of a page, compressed and without fonts


def test_a_page_is_light() -> None:
    page = Page()
    sent = {name: len(file.packed or file.content) for name, file in page.files.items()}
    for name in ("chat.html", "runs.html"):
        linked = re.findall(r'(?:src|href)="/web/\w+/([^"]+)"', page.files[name].content.decode())
        assert len(linked) > 20 and sent[name] + sum(sent[file] for file in linked) < LIMIT / 2, name
    # includes all that it may fetch later
    assert sum(size for name, size in sent.items() if not name.endswith((".woff2", ".txt", ".json"))) < LIMIT
    assert sum(size for name, size in sent.items() if name.endswith(".woff2")) < 250_000


@pytest.mark.parametrize(
    "path",
    [
        "/web/x/../../../secret.jsonl",
        "/web/x/..%2f..%2fpage.py",
        "/web/x/%2e%2e/page.py",
        "/web/x//etc/passwd",
        "/web/x/chat.html",
        "/web/x/",
        "/web/x/vendor",
        "/web/x/lib.js%00.css",
        "/web/../v1/models",
        "/page.py",
        "/finback/serve/page.py",
        "/api/",
        "/favicon.ico",
    ],
)
def test_no_other_file_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize(
    "query",
    [
        "run=../&stage=base",
        "run=..%2f..%2f&stage=base",
        "run=toy&stage=..",
        "run=toy&stage=../../secret",
        "run=toy&stage=base%2f..%2fzero",
        "run=.&stage=base",
        "run=/&stage=etc",
        "run=toy%00&stage=base",
        "run=toy&stage=",
        "run=toy/base&stage=.",
        "run=toy&stage=base/",
    ],
)
def test_no_folder_but_a_run_is_read(client: TestClient, query: str) -> None:
    for path in ("series", "heat", "rollouts"):
        assert client.get(f"/api/{path}?{query}").status_code == 404, path
    assert client.get("/api/rollouts?run=toy&stage=exam&exam=../zero/samples").status_code == 404
    assert client.get("/api/rollouts?run=toy&stage=exam&exam=config").status_code == 404


def test_links_out_of_a_run_are_not_followed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "runs")
    (tmp_path / "secret.jsonl").write_text('{"step": 1, "secret": 42}\n')
    (run / "zero/metrics.jsonl").unlink()
    (run / "zero/metrics.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (run / "linked").symlink_to(tmp_path, target_is_directory=True)
    make_run(tmp_path / "elsewhere")
    (tmp_path / "runs/other").symlink_to(tmp_path / "elsewhere/toy", target_is_directory=True)
    with TestClient(watch.build(tmp_path / "runs", ListenOptions()), base_url="http://127.0.0.1") as client:
        assert [r["name"] for r in client.get("/api/runs").json()["runs"]] == ["toy"]
        found = client.get("/api/series?run=toy&stage=zero").json()
        assert found["lines"] == [] and "secret" not in json.dumps(client.get("/api/run?run=toy").json())


def test_a_run_as_json(client: TestClient) -> None:
    (listed,) = client.get("/api/runs").json()["runs"]
    assert listed["name"] == "toy" and listed["seed"] == 3 and listed["state"] == "stopped"
    assert [(s["name"], s["state"]) for s in listed["stages"]] == [
        ("base", "done"),
        ("exam", "done"),
        ("zero", "stopped"),
    ]
    assert listed["seconds"] == 15 and listed["money"] == pytest.approx(15 * 2 * 0.04 / 3600)
    run = client.get("/api/run?run=toy").json()
    base, exam, zero = run["stages"]
    assert (
        base["keys"] == ["tokens", "loss", "tokens_per_second"]
        and base["results"]["steps"] == 100
        and exam["exams"] == ["sums"]
    )
    assert zero["nested"] == ["expert_load"] and zero["progress"] == {
        "step": 4,
        "at": 4.0,
        "of": 10,
        "unit": "steps",
        "left": 12.0,
    }
    assert zero["alerts"] == [] and zero["config"]["max_gap"] == 0.01
    assert client.get("/api/run?run=none").status_code == 404
    missing = client.get("/api/run")
    assert missing.status_code == 400 and missing.json()["error"]["param"] == "run"


def test_the_plan_stands_beside_the_ledger(tmp_path: Path) -> None:
    run, asked = make_run(tmp_path), []

    def planned(root: Path) -> dict[str, dict[str, float]]:
        asked.append(root)
        if len(asked) > 1:
            raise UserError("recipe", "toy", "gone", "Bring it back.")
        return {"base": {"seconds": 30.0, "dollars": 0.5, "flops": 1e9}}

    app = watch.build(tmp_path, ListenOptions(), planned)
    with TestClient(app, base_url="http://127.0.0.1") as client:
        for _ in range(2):
            base, exam, _zero = client.get("/api/run?run=toy").json()["stages"]
            assert base["plan"] == {"seconds": 30, "dollars": 0.5, "flops": 1e9} and exam["plan"] is None
        assert asked == [run]  # a plan is computed once
        write(run / "late/config.json", {"type": "SFT", "name": "late"})
        for _ in range(2):
            assert [s["plan"] for s in client.get("/api/run?run=toy").json()["stages"]] == [None] * 4
        assert len(asked) == 2


@pytest.mark.parametrize(
    ("axis", "first", "last"),
    [("step", 1, 100), ("tokens", 40, 4000), ("time", 2, 200), ("cost", 2 * 2 * 0.04 / 3600, 200 * 2 * 0.04 / 3600)],
)
def test_axes(client: TestClient, axis: str, first: float, last: float) -> None:
    found = client.get(f"/api/series?run=toy&stage=base&keys=loss&x={axis}").json()
    (line,) = found["lines"]
    assert line["x"][0] == pytest.approx(first) and line["x"][-1] == pytest.approx(last)
    assert line["y"][0] == 5 and line["y"][-1] == pytest.approx(0.05) and line["n"] == 100 and "smooth" not in line


def test_a_window_of_a_curve(client: TestClient) -> None:
    ask = "/api/series?run=toy&stage=base&keys=loss,none,step"
    line = client.get(f"{ask}&from=40&to=50&smooth=0.9").json()["lines"][0]
    whole = client.get(f"{ask}&smooth=0.9").json()["lines"][0]
    assert line["x"] == list(range(39, 52))  # one neighbour on either side, so that the line reaches the edge
    assert line["smooth"] == whole["smooth"][38:51]  # zooming in does not change the smoothing
    for wrong in ("x=epoch", "from=a", "to=nan", "points=inf", "smooth=1e999"):
        assert client.get(f"{ask}&{wrong}").status_code == 400, wrong
    assert len(client.get(f"{ask}&points=0&smooth=5").json()["lines"][0]["x"]) <= 10  # clamped, not refused


def test_heat_rollouts_and_one_question_followed(client: TestClient) -> None:
    heat = client.get("/api/heat?run=toy&stage=zero").json()
    assert heat["steps"] == [1, 2, 3, 4] and heat["values"][0] == [[0.5, 0.5], [0.25, 0.75]]
    found = client.get("/api/rollouts?run=toy&stage=zero").json()
    assert found["steps"] == [1, 2, 3, 4] and found["step"] == 4 and found["complete"]
    assert [r["question"] for r in found["records"]] == ["1+1=?"] * 2 + [HOSTILE] * 2
    assert (
        found["records"][0]["reward"] == {"accuracy": 1.0, "form": 0.1} and found["records"][0]["thinking"] == "step 4"
    )
    assert client.get("/api/rollouts?run=toy&stage=zero&step=99").json()["records"] == []
    assert client.get("/api/rollouts?run=toy&stage=zero&find=ONERROR").json()["questions"] == [HOSTILE]
    said = client.get("/api/follow", params={"run": "toy", "question": "1+1=?"}).json()["said"]
    zero = "zero", "", "zero"
    assert [(s["stage"], s["exam"], s["model"]) for s in said] == [("exam", "sums", "base"), zero, zero]
    assert [r["step"] for r in said[1]["records"]] == [1, 1, 2, 2, 3, 3, 4, 4]
    assert [(r["step"], r["correct"]) for r in said[2]["records"]] == [(0, None), (2, None)]
    assert [s["source"] for s in said] == ["sums", "", "watched"] and said[0]["records"][0]["detail"] is None
    first, last = (r["detail"] for r in said[2]["records"])
    assert first["pieces"] == ["I see", " 2 cats"] and (first["before"], first["after"]) == ([-0.5, -1], [-0.5, -2])
    assert first["layers"] == [1, 3] and first["experts"] == [[[0, 2], [1, 3]]]
    assert last["after"] is None and last["layers"] == last["experts"] == []
    found = client.get("/api/rollouts?run=toy&stage=zero&exam=watched").json()
    assert found["steps"] == [0, 2] and [r["question"] for r in found["records"]] == ["1+1=?", "Who?"]
    found = client.get("/api/rollouts?run=toy&stage=zero&exam=watched&step=0").json()
    assert [r["detail"] for r in found["records"]] == [first, first]


def test_tokens_of_an_answer_are_shown_as_far_as_they_make_sense() -> None:
    whole = {"pieces": ["a", "b"], "logprobs": [-1.0, -2.0], "new_logprobs": [-1.0, -0.5]}
    detail = shown(whole)["detail"]
    assert detail["after"] == [-1, -0.5] and shown({})["detail"] is None
    for wrong in ({"pieces": "ab"}, {"logprobs": [-1.0]}, {"logprobs": [-1.0, None]}, {"logprobs": 3}):
        assert shown(whole | wrong)["detail"] is None
    for lost in ({"new_logprobs": [-1.0]}, {"new_logprobs": ["x", 1]}):
        assert shown(whole | lost)["detail"] == detail | {"after": None}
    odd = shown(whole | {"pieces": [1, None], "expert_layers": [0], "experts": [[[1, "x"]], "y"]})["detail"]
    assert odd["pieces"] == ["1", ""] and odd["layers"] == []
    assert shown(whole | {"expert_layers": [0], "experts": [[[1, "x"]], [[2]]]})["detail"]["experts"] == [[[]], [[2]]]


def test_new_lines_are_read_on_and_torn_ones_wait(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    table = MetricsTable(path)
    table.update(1)
    assert table.rows == 0 and table.complete  # the file does not exist yet
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo')
    table.update(1)
    assert table.rows == 1
    offset = table.tail.offset
    with path.open("a") as handle:
        handle.write(
            'ss": 2.0}\n{"step": 3, "loss": NaN, "mfu": null}\nnot json\n{"step": 4, "loss": 1, "probe": 0.5}\n[1]\n'
        )
    table.update(1)
    assert table.tail.offset == path.stat().st_size > offset and table.rows == 4
    rows, values = table.column("loss")
    assert rows.tolist() == [0, 1, 2, 3] and values[[0, 1, 3]].tolist() == [3, 2, 1] and np.isnan(values[2])
    assert table.column("probe")[0].tolist() == [3] and table.carried("step").tolist() == [1, 2, 3, 4]
    path.write_text('{"step": 1, "loss": 9.0}\n')  # a resumed stage rewinds and replaces the file
    table.update(1)
    assert table.rows == 1 and table.column("loss")[1].tolist() == [9]


def test_only_what_is_new_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "samples.jsonl"
    write(path, *({"step": i // 4, "question": str(i % 3)} for i in range(400)))
    samples, taken = SampleIndex(path), []
    piece = samples.tail.piece
    monkeypatch.setattr(samples.tail, "piece", lambda: taken.append(found := piece()) or found)
    samples.update(1)
    first = b"".join(taken).count(b"\n")
    with path.open("a") as handle:
        handle.write('{"step": 100, "question": "0"}\n')
    samples.update(1)
    assert first == 400 and b"".join(taken).count(b"\n") == 401 and len(samples.of_question("0")) == 135
    assert [r["step"] for r in samples.at_step(100)] == [100]


def test_a_large_file_is_read_in_turns(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as handle:
        for i in range(60000):
            handle.write(f'{{"step": {i}, "loss": {1 / (i + 1)}, "grad_norm": 1.0, "lr": 0.001}}\n')
    table, turns = MetricsTable(path), 0
    while not table.complete:
        table.update(0)
        turns += 1
        assert 0 < table.share <= 1
    assert turns > 2 and table.rows == 60000 and table.share == 1


def test_a_long_file_is_shown_in_outline_while_it_is_read(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finback.runs.metrics_table.PIECE", 1 << 14)
    monkeypatch.setattr(watch, "OUTLINE", 50)
    monkeypatch.setattr(watch, "AT_ONCE", 60)  # the second request reads all, however long that takes
    write(tmp_path / "runs/toy/base/metrics.jsonl", *({"step": i, "loss": i / 2} for i in range(5000)))
    ask = "/api/series?run=toy&stage=base&keys=loss&smooth=0.5"
    found = client.get(f"{ask}&soon=1").json()
    (line,) = found["lines"]
    assert found["share"] < 0.3 and 50 <= line["n"] <= 52
    assert line["x"][0] == 0 and line["x"][-1] == 4999 and line["y"] == [x / 2 for x in line["x"]]
    assert max(np.diff(line["x"])) < 200 and line["smooth"] == pytest.approx(line["y"])
    whole = client.get(ask).json()
    assert whole["share"] == 1 and whole["lines"][0]["n"] == 5000
    assert client.get(f"{ask}&soon=1").json() == whole


def test_the_last_step_is_there_before_all_answers_are_read(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finback.runs.metrics_table.PIECE", 1 << 12)
    monkeypatch.setattr(watch, "A_LOOK", 0)
    monkeypatch.setattr(watch, "AT_ONCE", 0)
    hard = 'a "step": 7, \\", "gold": {'  # text that could confuse an index of partial lines
    said = [{"step": i // 4, "question": hard if i % 2 else "b", "gold": hard, "answer": "x" * 50} for i in range(400)]
    write(tmp_path / "runs/toy/zero/samples.jsonl", *said)
    ask = "/api/rollouts?run=toy&stage=zero"
    found = client.get(f"{ask}&soon=1").json()
    assert not found["complete"] and found["step"] == found["steps"][-1] == 99 and len(found["steps"]) < 50
    assert [r["question"] for r in found["records"]] == ["b", hard] * 2
    while not (again := client.get(ask).json())["complete"]:
        assert again["records"] == found["records"]
    assert again["records"] == found["records"] and again["steps"] == list(range(100))
    assert [r["step"] for r in client.get(f"{ask}&step=7").json()["records"]] == [7] * 4
    assert (
        client.get("/api/follow", params={"run": "toy", "question": hard}).json()["said"][0]["records"][-1]["step"]
        == 99
    )


@given(some.lists(some.floats(allow_infinity=False, width=32), min_size=1, max_size=400), some.integers(12, 60))
@settings(max_examples=60)
def test_thinning_keeps_ends_and_extremes(values: list[float], points: int) -> None:
    y = np.array(values, dtype=np.float64)
    x = np.arange(len(y), dtype=np.float64)
    kept = thin(x, y, points)
    assert len(kept) <= points + points // 3 + 2 and (np.diff(kept) > 0).all()
    assert kept[0] == 0 and kept[-1] == len(y) - 1
    if np.isfinite(y).any():
        assert np.nanmin(y[kept]) == np.nanmin(y) and np.nanmax(y[kept]) == np.nanmax(y)
    assert np.isnan(y[kept]).any() == np.isnan(y).any()


def test_a_peak_of_one_step_in_a_million_is_seen() -> None:
    y = np.sin(np.arange(1_000_000) / 1e4)
    y[123_456], y[700_001] = 50.0, np.nan
    began = time.process_time()
    kept = thin(np.arange(len(y), dtype=np.float64), y, 1000)
    assert 123_456 in kept and 700_001 in kept and len(kept) <= 1001
    assert time.process_time() - began < 20


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.99])
def test_smoothing_by_blocks_equals_smoothing_step_by_step(weight: float) -> None:
    y = np.random.default_rng(0).normal(size=1000)
    y[[5, 300]] = np.nan
    sums = counts = 0.0
    for found, value in zip(smooth(y, weight), y, strict=True):
        known = not np.isnan(value)
        sums, counts = weight * sums + (value if known else 0), weight * counts + known
        assert np.isnan(found) if not known else found == pytest.approx(sums / counts)


def alerts_of(
    tmp_path: Path, records: list[dict[str, Any]], running: bool = False, **config: Any
) -> list[tuple[str, str, Any]]:
    write(tmp_path / "metrics.jsonl", *records)
    table = MetricsTable(tmp_path / "metrics.jsonl")
    table.update(1)
    stage = StageFolder(tmp_path, config)
    return [(a["kind"], a["name"], a["step"]) for a in curves.alerts(stage, table, running)]


def test_alerts(tmp_path: Path) -> None:
    calm = [{"step": i, "loss": 2 + 0.01 * (i % 7), "grad_norm": 0.5} for i in range(1, 200)]
    assert alerts_of(tmp_path, calm) == []
    assert alerts_of(tmp_path, [{**r, "loss": 9.0} if r["step"] == 150 else r for r in calm]) == [
        ("spike", "loss", 150)
    ]
    assert alerts_of(tmp_path, [{**r, "loss": float("nan")} if r["step"] > 180 else r for r in calm]) == [
        ("nan", "loss", 181)
    ]
    gaps = [{"step": i, "reward": 0.1, "gap_max": 0.02 if i > 7 else 1e-6} for i in range(1, 20)]
    assert alerts_of(tmp_path, gaps, max_gap=0.01) == [("gap", "gap_max", 8)]
    assert alerts_of(tmp_path, gaps, max_gap=0.1) == []
    sound = {"truncated": 0.0, "groups_with_gradient": 0.5, "accuracy": 0.5, "well_formed": 1.0, "reward": 0.5}
    idle = [{"step": s, **sound, "groups_with_gradient": 0.5 * (s < 4)} for s in range(1, 9)]
    assert alerts_of(tmp_path, idle) == [("idle", "groups_with_gradient", 8)]
    assert alerts_of(tmp_path, idle[:7]) == []
    ages = [{"step": s, "reward": 0.1, "gap_max": 3.0, "staleness_max": min(s, 4)} for s in range(1, 30)]
    old = [row | {"mismatch_kl": -0.2 * (row["step"] == 9), "weights_cut": 0.4, "trainer_idle": 0.6} for row in ages]
    uncorrected = {"objective": {"correction": {"mode": "none", "geometric_mask": None}}}
    expected = [
        ("mismatch", "mismatch_kl", 9),
        ("staleness", "staleness_max", 3),
        ("correction", "weights_cut", 1),
        ("waiting", "trainer_idle", 29),
    ]
    assert alerts_of(tmp_path, old, **uncorrected) == expected
    assert alerts_of(tmp_path, ages, max_gap=0.1) == [("gap", "gap_max", 1)], (
        "an explicit limit also applies to old tokens"
    )
    masked, weighted = {"mode": "none", "off_policy_mask_threshold": 0.1}, {"mode": "token_mask"}
    assert alerts_of(tmp_path, ages, objective={"correction": masked}) == []
    assert alerts_of(tmp_path, ages, objective={"correction": weighted}, updates=2) == []
    assert alerts_of(tmp_path, ages, objective={"correction": weighted}) == [("staleness", "staleness_max", 3)]
    stage = StageFolder(tmp_path / "zero", {"rollouts": {"type": "Fleet"}})
    stage.folder.mkdir()
    write(stage.folder / "metrics.jsonl", *({"step": s, "engines_idle": 0.8} for s in range(1, 30)))
    assert _alerts(stage) == [
        "Look at 'zero': the engines wait for the trainer 80% of the time in the last 20 steps: use fewer engines, or raise max_staleness."
    ]
    assert alerts_of(tmp_path, calm, running=True) == []
    long_ago = time.time() - 3600
    (tmp_path / "x").write_text("")
    write(tmp_path / "metrics.jsonl", *calm)
    table = MetricsTable(tmp_path / "metrics.jsonl")
    table.update(1)
    os.utime(tmp_path / "metrics.jsonl", (long_ago, long_ago))
    found = curves.alerts(StageFolder(tmp_path, {}), table, True)
    assert [a["kind"] for a in found] == ["stall"] and "60 minutes" in found[0]["text"]


def test_a_locked_run_is_running(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    run = make_run(tmp_path)
    with (run / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        with TestClient(watch.build(tmp_path, ListenOptions()), base_url="http://127.0.0.1") as client:
            (found,) = client.get("/api/runs").json()["runs"]
    assert found["state"] == "running" and [s["state"] for s in found["stages"]] == ["done", "done", "running"]
    assert found["stages"][-1]["progress"]["left"] == 12


def test_damaged_and_foreign_folders_are_shown_as_far_as_can_be(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "zero/config.json").write_text('{"type": "GR')
    (run / "base/manifest.json").write_text("\xff")
    (run / "exam/manifest.json").write_text(
        '{"results": {"loss": NaN, "worst": -Infinity, "large": 1e999, "fine": 0.5}}'
    )
    (run / "summary.json").write_text("[]")
    write(tmp_path / "deep/deeper/run/recipe.json", {"recipe": HOSTILE, "seed": HOSTILE})
    write(tmp_path / HOSTILE.replace("/", "") / "recipe.json", {})
    assert {*Runs(tmp_path).folders()} == {"toy", "deep/deeper/run", HOSTILE}
    with TestClient(watch.build(tmp_path, ListenOptions()), base_url="http://127.0.0.1") as client:
        assert len(client.get("/api/runs").json()["runs"]) == 3
        base, exam, zero = client.get("/api/run?run=toy").json()["stages"]
        assert (base["state"], base["torn"], base["results"]) == ("torn", "manifest.json", None)
        assert (zero["state"], zero["torn"], zero["kind"]) == ("torn", "config.json", "?") and exam["state"] == "done"
        assert exam["results"] == {"loss": None, "worst": None, "large": None, "fine": 0.5}
    assert list(Runs(run).folders()) == ["toy"]  # the folder may be the run itself


def test_run_data_wants_the_key_and_the_page_does_not(tmp_path: Path) -> None:
    make_run(tmp_path)
    options = ListenOptions(keys=digests([KEY]))
    with TestClient(watch.build(tmp_path, options), base_url="http://127.0.0.1") as client:
        for path in ("/", "/runs", f"/web/{Page().digest}/lib.js", "/health"):
            assert client.get(path).status_code == 200, path
        for path in (
            "/api/runs",
            "/api/run?run=toy",
            "/api/series?run=toy&stage=base",
            "/api/follow?run=toy&question=x",
            "/web",
            "/nothing",
        ):
            assert client.get(path).status_code == 401, path
        assert client.get("/api/runs", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
        assert client.get("/api/runs", headers={"host": "evil.example"}).status_code == 403


def test_the_server_shows_the_page_and_its_api_stays_as_it_was(tmp_path: Path) -> None:
    make_run(tmp_path)
    with served(Scripted("<think>so</think>Hi.")) as plain:
        assert plain.get("/").status_code == 404  # `--no-page`
        before = plain.get("/openapi.json").json()
    with served(Scripted("<think>so</think>Hi."), page=True, runs=tmp_path, keys=digests([KEY])) as client:
        assert client.get("/openapi.json").json() == before and client.post(CHAT, json=HELLO).status_code == 200
        assert client.get("/api/runs").json()["runs"][0]["name"] == "toy"
        del client.headers["authorization"]
        assert client.get("/").status_code == 200 and client.post(CHAT, json=HELLO).status_code == 401
        assert client.get("/api/runs").status_code == client.get("/metrics").status_code == 401


def test_two_models_in_one_server() -> None:
    first, second = Scripted("One."), Scripted("Two.")
    with served_two(first, second) as client:
        assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["toy", "other"]
        for name, text in (("toy", "One."), ("other", "Two."), (None, "One.")):
            reply = client.post(CHAT, json=HELLO | {"model": name, "max_tokens": 64})
            assert reply.json()["choices"][0]["message"]["content"] == text
        assert client.post(CHAT, json=HELLO | {"model": "third"}).json()["error"]["code"] == "model_not_found"
        with client.stream("POST", CHAT, json=HELLO | {"model": "other", "stream": True, "max_tokens": 64}) as response:
            ident = events(response.iter_lines())[0]["id"]
        assert client.post(f"{CHAT}/{ident}/control", json={"action": "answer_now"}).status_code == 404  # over
        assert (
            "finback_generated_tokens_total" in client.get("/metrics").text and client.get("/ready").status_code == 200
        )
    assert len(first.seen) == 2 and len(second.seen) == 2 and first.leaked == second.leaked == 0


def test_watch_says_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = finback("watch", tmp_path / "file")
    assert done.returncode == 2 and "not a folder" in done.stderr and "Traceback" not in done.stderr
    done = finback("watch", tmp_path, "--host", "0.0.0.0")
    assert done.returncode == 2 and "no API key" in done.stderr


def test_vendored_files_are_what_was_fetched() -> None:
    command = [sys.executable, str(ROOT / "scripts/vendor_web.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for entry in json.loads((WEB / "vendor/vendor.json").read_text()):
        assert entry["licence"] and len((WEB / "vendor" / entry["licence_text"]).read_text()) > 500


def test_watch_prints_where_it_is_and_ends_on_a_signal(tmp_path: Path) -> None:
    make_run(tmp_path)
    command = [sys.executable, "-m", "finback", "watch", str(tmp_path), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stderr is not None
        met = re.fullmatch(r"watching (.+) at (http://127\.0\.0\.1:\d+/)\n", process.stderr.readline())
        try:
            assert met is not None and met[1] == str(tmp_path)
            with httpx.Client(trust_env=False, timeout=20) as client:
                assert client.get(f"{met[2]}api/runs").json()["runs"][0]["name"] == "toy"
                assert client.post(f"{met[2]}api/runs").status_code == 405  # it is read-only
        finally:
            process.terminate()
    assert process.returncode in (0, -15)
