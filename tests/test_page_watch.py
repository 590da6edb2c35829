"""The page of the runs in Chromium, and the accessibility of both pages in both themes."""

import json
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from finback.serve import http, watch
from finback.serve.http import digests
from finback.serve.options import ListenOptions
from finback.serve.page import Page
from tests.serving import KEY, wait_for
from tests.test_page import HOSTILE, make_run, write
from tests.test_page_browser import (
    CHROMIUM,
    PHONE,
    Opened,
    answered,
    bring,
    chromium,
    expect,
    history,
    opened,
    say,
    talking,
)

__all__ = ["chromium", "opened"]  # fixtures
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: see tests/test_page_browser.py")
AXE = (Path(__file__).parent / "data/axe.min.js").read_text(encoding="utf-8")


ODD = "odd|name, 100 %"
LOOK = "() => document.dispatchEvent(new Event('visibilitychange'))"  # a user returns to the page


@contextmanager
def watching(root: Path) -> Iterator[Any]:
    """`finback watch` on a real socket."""
    listener = http.listen("127.0.0.1", 0)
    app = watch.build(root, ListenOptions())
    runner = uvicorn.Server(uvicorn.Config(app, ws="none", lifespan="off", log_config=None, access_log=False))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    wait_for(lambda: runner.started)
    with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", trust_env=False) as client:
        yield client
    runner.should_exit = True
    thread.join(10)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    run = make_run(tmp_path)
    make_run(tmp_path, "second")
    make_run(tmp_path, ODD)
    write(tmp_path / HOSTILE / "recipe.json", {"recipe": HOSTILE, "seed": HOSTILE})
    write(tmp_path / HOSTILE / HOSTILE / "config.json", {"type": HOSTILE, "name": HOSTILE, HOSTILE: HOSTILE})
    write(tmp_path / HOSTILE / HOSTILE / "metrics.jsonl", *({"step": i, HOSTILE: 1.0} for i in range(5)))
    write(
        tmp_path / HOSTILE / HOSTILE / "samples.jsonl",
        {"step": 1, "question": HOSTILE, "answer": HOSTILE, "thinking": HOSTILE, "reward": {HOSTILE: 1}},
    )
    assert run.is_dir()
    return tmp_path


def chip(page: Any, name: str) -> Any:
    """The chip in the colour of a stage's curves."""
    return page.locator(".chip", has_text=name).locator(".mark")


def test_from_the_list_to_one_prompt_across_training(opened: Opened, root: Path) -> None:
    with watching(root) as client:
        page = opened(client)
        expect(page.locator(".card")).to_have_count(4)
        page.fill("[aria-label='Find a run']", "toy")
        expect(page.locator(".card")).to_have_count(3)  # by name and by recipe
        page.select_option(".finding select", "name")
        expect(page.locator(".card h2")).to_have_text([ODD, "second", "toy"])
        assert page.locator("text=Chat").count() == 0  # this server has no model
        page.locator(".card", has=page.locator("h2", has_text=re.compile("^toy$"))).click()
        expect(page.locator(".stages tbody > tr")).to_have_count(3)
        expect(page.locator(".stages")).to_contain_text("4 of 10 steps")
        results = page.locator("td[data-label=Result]")
        expect(results.nth(0)).to_have_text("probe 90.0 %bits per byte, text 1.25")
        expect(results.nth(1)).to_have_text("sums 25.0 % 10.0 % to 40.0 %")
        expect(results.nth(2)).to_have_text("reward, last 0.4")
        assert "planned" not in page.locator(".stages").inner_text()
        page.click(".fold >> text=base")
        expect(page.locator(".details")).to_contain_text('"max_tokens": 4000')
        page.click(".tabs >> text=Curves")
        expect(page.locator(".chart h2").first).to_have_text("Reward")
        expect(page.locator(".heat canvas")).to_have_count(2)
        page.click(".chip >> text=base")
        expect(page.locator(".chart h2")).to_contain_text(["Reward", "Loss", "Tokens per second"])
        page.select_option(".others", label="second · base")
        expect(page.locator(".chip[aria-pressed=true]")).to_have_count(3)
        expect(chip(page, "toy · base")).to_have_class("mark series-2")
        page.click(".chip >> text=toy · zero")  # the others keep their colours
        expect(page.locator(".chip[aria-pressed=true]")).to_have_count(2)
        page.reload()
        expect(page.locator(".chip[aria-pressed=true]")).to_have_count(2)
        expect(chip(page, "toy · base")).to_have_class("mark series-2")
        expect(chip(page, "second · base")).to_have_class("mark series-3")
        page.locator(".chart .u-over").first.hover()
        values = page.locator(".chart .values").first
        expect(values).to_contain_text(re.compile(r"step \d+toy · base [\d.]+second · base [\d.]+"))
        expect(values.locator(".series-3")).to_have_count(1)
        page.fill("[aria-label='Find a metric']", "tokens per")
        expect(page.locator(".chart h2")).to_have_text(["Tokens per second"])
        with page.expect_download() as download:
            page.click("[aria-label='Tokens per second as CSV']")
        lines = Path(download.value.path()).read_text().splitlines()
        assert lines[:2] == ['"step","toy · base","second · base"', "1,20,20"] and len(lines) == 101
        with page.expect_download() as download:
            page.click("[aria-label='Tokens per second as PNG']")
        assert Path(download.value.path()).read_bytes()[:4] == b"\x89PNG"
        page.select_option(".others", label=f"{ODD} · zero")
        expect(chip(page, f"{ODD} · zero")).to_have_class("mark series-1")
        page.reload()
        expect(chip(page, f"{ODD} · zero")).to_have_class("mark series-1")
        page.click(".tabs >> text=Rollouts")
        expect(page.locator(".record")).to_have_count(2)
        expect(page.locator(".record").first).to_contain_text("step 4")
        expect(page.locator(".parts").first).to_contain_text("accuracy 1")
        page.click("[aria-label='Step before']")
        expect(page.locator(".record").first).to_contain_text("step 3")
        page.click("text=Follow this prompt")
        expect(page.locator(".stop h3")).to_have_text(["base", *["zero"] * 6])
        page.go_back()
        page.select_option(".source select", "zero/watched")
        expect(page.locator(".prompts .q")).to_have_text(["1+1=?", "Who?"])
        expect(page.locator(".record .verdict")).to_have_text(["2 tokensBy tokens"])  # watched answers have no verdict
        page.fill("[aria-label='Find a prompt']", "1+1")
        page.click(".found a")
        expect(page.locator(".follow h2")).to_have_text("1+1=?")
        page.select_option(".follow select", "before")
        watched = page.locator(".stop").last
        expect(watched.locator("del")).to_have_text(["2"])
        expect(watched.locator("ins")).to_have_text(["two"])
        expect(page.locator(".stop").first.locator("del, ins")).to_have_count(0)
        page.select_option(".follow select", label="zero, step 2, watched")
        page.reload()  # the address has the selection
        first = page.locator(".stop").nth(5)
        expect(first.locator("header")).to_contain_text("changes since zero, step 2, watched")
        expect(first.locator("del")).to_have_text(["two"])
        expect(watched.locator("del, ins")).to_have_count(0)
        first.locator("text=By tokens").click()
        expect(first.locator(".tokens .text span")).to_have_class(["", "down3"])
        first.locator(".tokens .text").press("ArrowRight")
        odds = first.locator(".odds")
        expect(odds).to_contain_text("61 % → 61 % at the next look (±0.0 points)")
        expect(odds).to_contain_text("experts, layer 2: 1, 3; layer 4: 2, 4")
        first.locator(".tokens .text span").last.hover()
        expect(odds).to_contain_text("37 % → 14 % at the next look (−23.3 points)")
        assert "advantage" not in odds.inner_text()
        page.goto(str(client.base_url).rstrip("/") + "/#run=toy&view=rollouts&step=4")
        page.locator("text=By tokens").first.click()
        page.locator(".tokens .text span").first.hover()
        expect(page.locator(".odds").first).to_contain_text("50 % → 90 % after the step (+40.8 points)advantage +0.5")


DIFFERENCES = """async (file) => {
  const { difference } = await import(file);
  const texts = TEXTS;
  return texts.map(([a, b]) => difference(a, b));
}"""
TOLD = [
    ("12 + 30 = 41", "12 + 30 = 42", [["same", "12 + 30 = "], ["gone", "41"], ["fresh", "42"]]),
    ("", "new words", [["fresh", "new words"]]),
    ("the same", "the same", [["same", "the same"]]),
    ("我们先加", "我们再加", [["same", "我们"], ["gone", "先"], ["fresh", "再"], ["same", "加"]]),
    ("a b c d", "b c e d", [["gone", "a "], ["same", "b c"], ["fresh", " e"], ["same", " d"]]),
]


def test_differences_word_by_word(opened: Opened, root: Path) -> None:
    rng = random.Random(5)
    texts = [(a, b) for a, b, _ in TOLD]
    texts += [tuple(" ".join(rng.choices("abc", k=rng.randint(0, 30))) for _ in range(2)) for _ in range(60)]
    texts.append(("x " * 4000, "y " * 4000))
    with watching(root) as client:
        page = opened(client)
        script = DIFFERENCES.replace("TEXTS", json.dumps(texts))
        found = page.evaluate(script, f"/web/{Page().digest}/runs/difference.js")
    assert found[: len(TOLD)] == [wanted for *_, wanted in TOLD]
    for (a, b), parts in zip(texts, found, strict=True):
        assert "".join(text for kind, text in parts if kind != "fresh") == a
        assert "".join(text for kind, text in parts if kind != "gone") == b
    for (a, b), parts in list(zip(texts, found, strict=True))[len(TOLD) : -1]:
        # letters and blanks are words here, and no more than necessary are marked
        assert sum(len(text) for kind, text in parts if kind == "same") == common(a, b)


def common(a: str, b: str) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = row
        row = [0]
        for j, other in enumerate(b):
            row.append(before[j] + 1 if word == other else max(row[j], before[j + 1]))
    return row[-1]


def test_curves_zoom_move_and_change_their_axis(opened: Opened, root: Path) -> None:
    with watching(root) as client:
        page = opened(client, "/#run=toy&view=curves&stages=base")
        asked: list[str] = []
        page.on("request", lambda r: asked.append(r.url) if "/api/series" in r.url else None)
        box = page.locator(".chart .u-over").first
        box.wait_for()
        place = box.bounding_box()
        x, y = place["x"], place["y"] + 40

        def drag(begin: float, end: float) -> None:
            page.mouse.move(x + begin * place["width"], y)
            page.mouse.down()
            page.mouse.move(x + end * place["width"], y, steps=4)
            page.mouse.up()

        drag(0.25, 0.5)
        expect(page.get_by_role("button", name="Show all")).to_be_visible()
        wait_for_query(page, asked, "from=")
        first = float(re.findall(r"from=([\d.]+)", asked[-1])[0])
        assert 20 < first < 32
        before = asked[-1]
        page.keyboard.down("Shift")
        drag(0.2, 0.7)
        page.keyboard.up("Shift")
        wait_for_query(page, asked, "from=", other=before)
        assert float(re.findall(r"from=(-?[\d.]+)", asked[-1])[0]) < first - 5
        page.reload()  # the address has the range
        wait_for_query(page, asked, "from=", other=before)
        page.get_by_role("button", name="Show all").click()
        page.click(".segments >> text=Cost")
        wait_for_query(page, asked, "x=cost")
        page.check("text=Log scale")
        page.mouse.move(x + 100, y)
        expect(page.locator(".chart .values").first).to_contain_text("cost $")
        page.click(".segments >> text=Steps")
        chart, at = page.locator(".chart .plot").first, page.locator(".chart .values").first.locator("span").first
        page.mouse.move(0, 0)
        chart.focus()
        for key, wanted in (
            ("End", "step 100"),
            ("ArrowLeft", "step 99"),
            ("Home", "step 1"),
            ("ArrowRight", "step 2"),
            ("PageDown", "step 12"),
        ):
            chart.press(key)
            expect(at).to_have_text(wanted)
        chart.press("+")  # half as wide, around the cursor
        wait_for_query(page, asked, "from=")
        assert re.findall(r"from=(-?[\d.]+)&to=([\d.]+)", asked[-1]) == [("-12.75", "36.75")]
        before = asked[-1]
        chart.press("Shift+ArrowRight")
        wait_for_query(page, asked, "from=-0.375&to=49.125", other=before)
        chart.press("0")
        expect(page.get_by_role("button", name="Show all")).to_have_count(0)


def test_what_a_kill_has_torn_is_shown_as_torn(opened: Opened, tmp_path: Path) -> None:
    run, whole = make_run(tmp_path), make_run(tmp_path, "whole")
    write(whole / "zero/manifest.json", {"stage": "zero", "files": [], "results": {}})
    for name, damaged in (("base", "manifest.json"), ("exam", "config.json")):
        content = (run / name / damaged).read_bytes()
        (run / name / damaged).write_bytes(content[: len(content) // 2])
    with (run / "zero/ledger.jsonl").open("w") as handle:
        handle.write('{"seconds": 1.0, "cores": 2}\n{"seconds": 1\n{"seconds": 2.0, "cores": 2}\n{"secon')
    with (run / "zero/metrics.jsonl").open("a") as handle:
        handle.write('{"step": 5, "rew')  # an incomplete line is not damage: a resumed run rewrites it
    with watching(tmp_path) as client:
        torn = client.get("/api/run?run=toy").json()
        assert [(s["name"], s["state"], s["torn"]) for s in torn["stages"]] == [
            ("base", "torn", "manifest.json"),
            ("exam", "torn", "config.json"),
            ("zero", "stopped", ""),
        ]
        assert torn["state"] == "torn" and client.get("/api/run?run=whole").json()["state"] == "done"
        (run / "recipe.json").write_text('{"rec')
        page = opened(client, "/#run=toy")
        expect(page.locator(".stages .state")).to_have_text(["Torn", "Torn", "Stopped"])
        expect(page.locator(".alerts li")).to_have_text(
            [
                "recipe.json is torn: delete it and run the recipe again",
                "base manifest.json is torn: delete the folder base and run the recipe again",
                "exam config.json is torn: delete the folder exam and run the recipe again",
                "zero line 2 of ledger.jsonl is torn and was ignored",
            ]
        )
        page.click(".tabs >> text=Curves")
        expect(page.locator(".chart").first).to_be_visible()
        page.goto(str(client.base_url).rstrip("/") + "/#")
        expect(page.locator(".card", has_text="toy").locator(".strip .torn").first).to_be_visible()


def wait_for_query(page: Any, asked: list[str], text: str, other: str = "") -> None:
    began = time.monotonic()
    while not asked or text not in asked[-1] or asked[-1] == other:
        assert time.monotonic() - began < 60, asked
        page.wait_for_timeout(30)


def test_a_run_that_goes_on_is_followed(opened: Opened, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    run = make_run(tmp_path)
    with (run / ".lock").open("w") as lock, watching(tmp_path) as client:
        fcntl.flock(lock, fcntl.LOCK_EX)
        page = opened(client, "/#run=toy")
        expect(page.locator(".stages")).to_contain_text("4 of 10 steps, 0:12 left at most")
        with (run / "zero/metrics.jsonl").open("a") as handle:
            handle.write(json.dumps({"step": 5, "reward": float("nan"), "seconds": 2.0}) + "\n")
        page.evaluate(LOOK)
        expect(page.locator(".stages")).to_contain_text("5 of 10 steps")
        expect(page.locator(".alerts")).to_contain_text("reward is NaN or infinite at step 5")


def test_names_of_runs_and_files_do_nothing(opened: Opened, root: Path) -> None:
    with watching(root) as client:
        page = opened(client)
        page.locator(".card", has_text=HOSTILE).first.click()
        expect(page.locator("h1")).to_have_text(HOSTILE)
        page.click(".fold")
        for view in ("Curves", "Rollouts"):
            page.click(f".tabs >> text={view}")
            expect(page.locator(".chart, .record").first).to_contain_text("onerror")
        page.click("text=Follow this prompt")
        expect(page.locator(".stop .record")).to_contain_text(HOSTILE)
        assert page.locator("main img").count() == 0


def test_empty_and_error_states(opened: Opened, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    tmp_path = tmp_path / "runs"  # a folder that does not exist yet
    with watching(tmp_path) as client:
        page = opened(client, allowed="Failed to load resource|ERR_CONNECTION_REFUSED")
        address = str(client.base_url).rstrip("/")
        expect(page.locator(".empty h1")).to_have_text("No runs yet")
        page.goto(f"{address}/#run=gone")
        expect(page.locator(".empty h1")).to_have_text("No run of this name")
        write(tmp_path / "bare/recipe.json", {"recipe": "bare", "seed": 0})
        page.goto(f"{address}/#run=bare&view=curves")
        expect(page.locator("main .notice")).to_contain_text("No stage of this run has logged anything")
        page.goto(f"{address}/#run=bare&view=rollouts")
        expect(page.locator("main .notice")).to_contain_text("kept answers")
        lock = (tmp_path / "bare/.lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)  # active runs are polled every three seconds
        page.goto(f"{address}/#")
        expect(page.locator(".card .running")).to_have_count(1)
    lock.close()
    page.evaluate(LOOK)
    expect(page.locator(".notice.bad")).to_contain_text("The server is gone")


def test_runs_at_phone_width(opened: Opened, root: Path) -> None:
    with watching(root) as client:
        page = opened(client, **PHONE)
        for place in (
            "",
            "run=toy",
            "run=toy&view=curves",
            "run=toy&view=rollouts",
            "run=toy&view=rollouts&question=1%2B1%3D%3F",
        ):
            page.goto(str(client.base_url).rstrip("/") + f"/#{place}")
            page.locator(".card, .stages, .chart canvas, .record").first.wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, place


def violations(page: Any) -> list[str]:
    """Violations of any level that axe finds: in light everything, in dark only contrast."""
    if not page.evaluate("() => 'axe' in window"):
        page.evaluate(f"() => {{ {AXE} }}")
    found = []
    for scheme, options in (("light", {}), ("dark", {"runOnly": ["color-contrast"]})):
        page.emulate_media(color_scheme=scheme)
        found += page.evaluate("(options) => axe.run(document, { resultTypes: ['violations'], ...options })", options)[
            "violations"
        ]
    return [f"{v['impact']} {v['id']}: {v['nodes'][0]['html'][:160]}" for v in found]


EVERYTHING = "# Head\n\n- [x] done\n- item\n\n> quote\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\n# remark\ndef f(x): return 'text' + str(1)\n```\n$$x^2$$ [link](http://a.b) `code`"
DEVICES = [pytest.param({}, id="desktop"), pytest.param(PHONE, id="phone", marks=pytest.mark.slow)]


@pytest.mark.parametrize("device", DEVICES)
def test_axe_finds_nothing_in_the_chat(opened: Opened, device: dict[str, Any]) -> None:
    seen: list[str] = []

    def look(state: str) -> None:
        seen.append(state)
        assert violations(page) == [], state

    def shelf() -> None:
        """Opens the sidebar, which phones hide behind a button."""
        if device:
            page.click("[aria-label='Show the sidebar']")

    with talking(f"<think>Let me see.</think>{EVERYTHING}") as client:
        page = opened(client, reduced_motion="reduce", allowed="status of 4", **device)
        expect(page.locator("h1")).to_have_text("Talk to toy")
        look("nothing said")
        say(page)
        answered(page)
        page.click(".summary")
        look("an answer")
        page.click("[aria-label='Answer again']")
        expect(page.locator(".branches")).to_have_text("2/2")
        answered(page)
        look("versions")
        page.click(".message.user [aria-label=Edit]")
        look("a message that is edited")
        page.keyboard.press("Escape")
        shelf()
        look("chats")
        page.click("[aria-label='More for 2+2=?']")
        look("a menu")
        page.click(".menu >> text=Delete")
        look("a question")
        page.click("dialog >> text=Cancel")
        if device:
            page.keyboard.press("Escape")
        page.click("[aria-label=Settings]")
        look("settings")
        page.click("text=Custom")
        page.check("dialog input[type=checkbox]")
        look("settings of one's own")
        page.click("[aria-label=Close]")
        page.keyboard.press("Control+Shift+O")
        say(page, "with odds")
        expect(page.locator(".tokens")).to_be_visible()
        page.hover(".tokens [data-i='0']")
        look("tokens")
        bring(page, history(3))
        look("a chat that was brought")
        if not device:  # phones have no keyboard
            page.click("[aria-label=Keyboard]")
            look("keys")
            page.keyboard.press("Escape")
        client.app.state.service.engine.failing = RuntimeError("out of order")
        say(page, "fail")
        expect(page.locator(".notice.bad")).to_be_visible()
        look("a failure")
    assert len(seen) == (12 if device else 13)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_axe_finds_nothing_in_the_runs(opened: Opened, root: Path, device: dict[str, Any]) -> None:
    (root / "second/zero/config.json").write_text("{")
    two = "stages=toy%257Cbase%2Csecond%257Cbase"
    follow = "view=rollouts&question=1%2B1%3D%3F"
    states: list[tuple[str, str, str]] = [
        ("", ".card", ""),
        ("run=toy", ".stages", ".fold"),
        ("run=second", ".alerts", ""),
        ("run=toy&view=curves", ".chart canvas", ""),
        (f"run=toy&view=curves&{two}&x=time&from=10&to=100", ".others", ""),
        ("run=toy&view=rollouts", ".record", "text=By tokens"),
        ("run=toy&view=rollouts&source=zero%2Fwatched", ".record", "text=By tokens"),
        ("run=toy&view=rollouts&source=exam%2Fsums", ".record.wrong", ""),
        (f"run=toy&{follow}", ".stop", ""),
        (f"run=toy&{follow}&since=before", "del", ""),
        ("run=nosuch", ".empty", ""),
        ("run=empty&view=curves", "main .notice", ""),
    ]
    write(root / "empty/recipe.json", {"recipe": "empty", "seed": 0})
    with watching(root) as client:
        page = opened(client, reduced_motion="reduce", allowed="Failed to load resource", **device)
        for place, wanted, click in states:
            page.goto(str(client.base_url).rstrip("/") + f"/#{place}")
            page.locator(wanted).first.wait_for()
            if click:
                page.locator(click).first.click()
            assert violations(page) == [], place
    page.evaluate(LOOK)
    expect(page.locator(".notice.bad")).to_contain_text("The server is gone")
    assert violations(page) == [], "with the server gone"


@pytest.mark.slow
@pytest.mark.parametrize("device", [{}, PHONE], ids=["desktop", "phone"])
def test_axe_finds_nothing_where_little_is_to_be_seen(opened: Opened, tmp_path: Path, device: dict[str, Any]) -> None:
    with watching(tmp_path) as client:
        page = opened(client, reduced_motion="reduce", **device)
        expect(page.locator(".empty h1")).to_have_text("No runs yet")
        assert violations(page) == []
    with talking(keys=digests([KEY])) as client:
        page = opened(client, reduced_motion="reduce", allowed="status of 401", **device)
        page.fill("#key", "wrong")
        page.click("text=Open")
        expect(page.locator("#key-wrong")).to_be_visible()
        assert violations(page) == []
