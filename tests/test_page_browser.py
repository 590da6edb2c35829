"""The chat page in Chromium: what users do with it, and that no output of a model executes.

Debian and Ubuntu: `apt-get install chromium`. Elsewhere set FINBACK_CHROMIUM to the path of a Chromium or Chrome.
"""

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from finback.serve.http import digests
from tests.serving import CHAT, KEY, Scripted, served, wait_for
from tests.test_page import served_two

playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
expect = playwright.expect
PATIENCE = 240_000  # milliseconds: the machine may be busy, and a wait ends as soon as the event comes
expect.set_options(timeout=PATIENCE)
CHROMIUM = os.environ.get("FINBACK_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome") or ""
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium: apt-get install chromium, or set FINBACK_CHROMIUM to the path of one"
)

THOUGHT = "<think>Two and two.\nThat is four.</think>"
LONG = "<think>" + "so " * 60 + "</think>" + "word " * 600  # never ends unless stopped
PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


Opened = Callable[..., Any]


@pytest.fixture
def opened(chromium: Any) -> Iterator[Opened]:
    """Opens pages; at the end no page has requested another origin or logged an error on the console."""
    contexts, said, asked = [], [], set()

    def complain(client: Any, message: Any) -> None:
        # a page lives slightly longer than its test's server and may still send it a request
        is_late = client.is_closed and "net::ERR_" in message.text
        if message.type in ("error", "warning") and not is_late:
            said.append(message.text)

    def hear(page: Any, client: Any, origin: str) -> None:
        page.on("console", lambda message: complain(client, message))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda r: None if r.url.startswith((origin, "blob:", "data:")) else asked.add(r.url))
        page.on("dialog", lambda dialog: (said.append(f"a dialog opened: {dialog.message}"), dialog.dismiss()))

    def open_(client: Any, path: str = "/", context: Any = None, allowed: str = "", **options: Any) -> Any:
        if context is None:
            context = chromium.new_context(**({"viewport": {"width": 1200, "height": 800}} | options))
            context.set_default_timeout(PATIENCE)
            contexts.append(context)
        origin = str(client.base_url).rstrip("/")
        page = context.new_page()
        hear(page, client, origin)
        if allowed:
            patterns.append(allowed)
        page.goto(origin + path)
        return page

    patterns: list[str] = []
    yield open_
    for context in contexts:
        context.close()
    assert asked == set(), "a page requested another origin"
    assert [text for text in said if not any(re.search(p, text) for p in patterns)] == []


@contextmanager
def talking(
    script: str | None = f"{THOUGHT}It is **4**.", pace: float = 0.0, after: str = "", **options: Any
) -> Iterator[Any]:
    """A server with the page, whose model answers with the script."""
    engine = Scripted(script, pace, window=4096, tokens=32768, after=after)
    engine.hold_at = 600 if script == LONG else None
    with served(engine, page=True, **options) as client:
        yield client


def say(page: Any, text: str = "2+2=?") -> None:
    page.fill("#say", text)
    page.press("#say", "Enter")


def answered(page: Any, count: int = 1) -> Any:
    """The last answer, once so many are finished."""
    expect(page.locator(".assistant .timings")).to_have_count(count)
    return page.locator(".assistant").last


def stop(page: Any) -> None:
    """Stops an answer that has begun, and waits until the server knows."""
    with page.expect_response("**/control"):
        page.keyboard.press("Escape")
    expect(page.locator(".assistant .notice")).to_contain_text("Stopped.")


def test_a_chat_from_question_to_answer(opened: Opened) -> None:
    with talking(
        f"{THOUGHT}It is **4**.\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```python\nprint(4)\n```\nand $x^2$.", pace=1.0
    ) as client:
        page = opened(client, permissions=["clipboard-read", "clipboard-write"])
        expect(page.locator("h1")).to_have_text("Talk to toy")
        began = time.monotonic()
        say(page)
        summary = page.locator(".summary")
        expect(summary).to_have_attribute("aria-expanded", "true")  # open while it is written
        expect(summary).to_contain_text("Thinking…")
        client.app.state.service.engine.pace = 0.01  # slow output is no longer needed
        answer = answered(page)
        expect(summary).to_have_attribute("aria-expanded", "false")
        shown = float(re.search(r"Thought for ([\d.]+) s", summary.inner_text())[1])  # type: ignore[index]
        assert 0.1 < shown <= time.monotonic() - began + 0.1
        assert answer.locator("strong").inner_text() == "4" and answer.locator("td").count() == 2
        assert answer.locator("pre .hljs-built_in, pre .hljs-title").count() >= 1
        assert answer.locator("math").count() == 1
        answer.locator(".code button").click()
        assert page.evaluate("navigator.clipboard.readText()") == "print(4)"
        summary.click()
        expect(page.locator(".chain")).to_contain_text("That is four.")
        summary.click()
        assert re.search(r"\d+ tokens", answer.locator(".timings").inner_text()) and "tok/s" in answer.inner_text()
        expect(page.locator(".gauge")).to_have_attribute("aria-label", re.compile(r"\d+ of 4,096 tokens"))
        expect(page.locator(".beware")).to_contain_text("may be wrong")
        expect(page.locator("[role=status].sr")).to_have_text("Answer finished.")
        summary.click()
        page.reload()
        expect(summary).to_have_attribute("aria-expanded", "true")  # the choice is remembered


def test_stop_keeps_what_was_said_and_it_goes_on(opened: Opened) -> None:
    with talking(LONG, pace=0.01) as client:
        page = opened(client)
        say(page)
        expect(page.locator(".assistant .prose").last).to_contain_text("word word")
        engine = client.app.state.service.engine
        told: list[Any] = []
        page.route("**/control", lambda route: told.append(route))
        page.keyboard.press("Escape")
        expect(page.locator(".assistant .notice")).to_contain_text("Stopped.")  # it does not wait for the server
        for route in told:
            route.continue_()
        page.unroute("**/control")
        wait_for(lambda: not engine.busy)
        before = page.locator(".assistant .prose").last.inner_text()
        page.click("text=Continue")
        page.click("[aria-label=Stop]")
        expect(page.locator(".assistant .notice")).to_contain_text("Stopped.")
        after = page.locator(".assistant .prose").last.inner_text()
        assert after.startswith(before[:-1]) and len(after) >= len(before) and page.locator(".assistant").count() == 1
        last = engine.seen[-1]
        assert "word word" in engine.tokenizer.decode(last.prompt)  # the server continued from there
        wait_for(lambda: not engine.busy)


CHAIN = "document.querySelector('.chain')"
READS_UP = f"""() => {{
  const chain = {CHAIN}, [first] = chain.querySelector('p').childNodes;
  chain.scrollTop = 20;
  getSelection().setBaseAndExtent(first, 0, first, 2);
  return String(getSelection());
}}"""


def test_answer_now_closes_the_chain(opened: Opened) -> None:
    # a chain, and an answer to be stopped, that are longer than any wait
    with talking("<think>" + "so\n" * 1000, pace=0.02, after="word " * 1000) as client:
        page = opened(client, viewport={"width": 1200, "height": 300})
        page.click(".think")
        expect(page.locator(".think")).to_have_text("Thinking: on")
        say(page)
        # for a user who reads further up and has selected text, the view does not move
        wait_for(lambda: page.evaluate(f"{CHAIN}?.scrollHeight > {CHAIN}?.clientHeight + 100"), 60)
        assert page.evaluate(READS_UP) == "so"
        height = page.evaluate(f"{CHAIN}.scrollHeight")
        wait_for(lambda: page.evaluate(f"{CHAIN}.scrollHeight > {height + 100}"), 60)
        assert page.evaluate(f"[{CHAIN}.scrollTop, String(getSelection())]") == [20, "so"]
        page.click("text=Answer now")
        expect(page.locator(".summary")).to_contain_text("Thought for")
        expect(page.locator(".assistant .prose").last).to_contain_text("word")
        assert page.evaluate(f"[{CHAIN}.scrollTop, String(getSelection())]") == [20, "so"]
        stop(page)


GONE = "all => all.length > 0 && all.every(e => getComputedStyle(e).display === 'none')"


@pytest.mark.slow
def test_branches(opened: Opened) -> None:
    with talking() as client:
        page = opened(client)
        say(page, "first")
        answered(page)
        page.click("[aria-label='Answer again']")
        expect(page.locator(".branches")).to_have_text("2/2")
        answered(page)
        page.hover(".message.user")
        page.click(".message.user [aria-label=Edit]")
        page.fill(".editor textarea", "second")
        page.click("text=Save and send")
        answered(page)
        expect(page.locator(".bubble")).to_have_text("second")
        expect(page.locator(".message.user .branches")).to_have_text("2/2")
        page.mouse.move(0, 0)
        page.focus("#say")
        shown = "e => getComputedStyle(e).opacity + getComputedStyle(e.parentNode).opacity"
        assert page.locator(".message.user .branches").evaluate(shown) == "11"  # without hovering over it
        page.click(".message.user [aria-label='Earlier version']")
        expect(page.locator(".bubble")).to_have_text("first")
        expect(page.locator(".assistant .branches")).to_have_text("2/2")
        page.click(".assistant [aria-label='Earlier version']")
        page.click("[aria-label='Edit the answer']")
        page.fill(".editor textarea", "my own words")
        page.click("text=Save only")
        expect(page.locator(".assistant .branches")).to_have_text("3/3")
        page.reload()
        expect(page.locator(".assistant .prose").last).to_have_text("my own words")
        say(page, "and then?")
        answered(page)
        prompt = client.app.state.service.engine.seen[-1].prompt
        text = client.app.state.service.tokenizer.decode(prompt)
        assert "first" in text and "my own words" in text and "second" not in text
        page.locator("[aria-label='Edit the answer']").first.click()
        page.fill(".editor textarea", "other words")
        page.click("text=Save only")
        expect(page.locator(".message")).to_have_count(4)  # later messages stay
        expect(page.locator(".bubble").last).to_have_text("and then?")
        expect(page.locator("#say")).to_be_focused()
        expect(page).to_have_title("second · finback")
        page.emulate_media(media="print")
        room = "['.thread', '.room', '.chat'].map((s) => getComputedStyle(document.querySelector(s)).overflowY).join()"
        assert page.evaluate(room) == "visible,visible,visible"
        assert page.locator(".composer, .top, .sidebar, .tools").evaluate_all(GONE)


COUNTING = "<think>" + " ".join(map(str, range(60))) + "</think>" + " ".join(map(str, range(100, 200)))


@pytest.mark.slow
@pytest.mark.parametrize("said", ["8 9 10", "109 110 111"])  # in the chain, and in the answer
def test_a_reload_in_mid_stream_loses_nothing(opened: Opened, said: str) -> None:
    with talking(COUNTING, pace=0.01) as client:
        page = opened(client)
        say(page)
        expect(page.locator(".assistant")).to_contain_text(said)
        page.reload()
        expect(page.locator("[aria-label=Stop]")).to_be_visible()  # it goes on
        answer = answered(page)
        assert answer.locator(".prose").last.inner_text() == " ".join(map(str, range(100, 200)))
        page.click(".summary")
        assert page.locator(".chain").inner_text().strip() == " ".join(map(str, range(60)))
        service = client.app.state.service
        wait_for(lambda: not service.streams)
        assert len(service.engine.seen) == 1


@pytest.mark.slow
def test_stop_works_after_a_reload(opened: Opened) -> None:
    with talking(LONG, pace=0.01) as client:
        page = opened(client)
        say(page)
        expect(page.locator(".assistant .prose").last).to_contain_text("word word")
        before = page.locator(".assistant .prose").last.inner_text()
        page.reload()
        expect(page.locator("[aria-label=Stop]")).to_be_visible()  # it continues from where it was
        stop(page)
        after = page.locator(".assistant .prose").last.inner_text()
        assert after.startswith(before) and set(after.split()) <= {"word", after.split()[-1]}
        wait_for(lambda: not client.app.state.service.engine.busy)
        page.reload()
        expect(page.locator(".assistant .notice")).to_contain_text("Stopped.")


# the disk stores the first write only, which the previous page has left, and never completes the others
SLOW_DISK = """
  const put = IDBObjectStore.prototype.put;
  let left = 1;
  IDBObjectStore.prototype.put = function (...what) { return left-- > 0 ? put.apply(this, what) : {}; };
"""


@pytest.mark.slow
def test_a_stop_that_is_not_yet_on_the_disk_outlives_a_reload(opened: Opened) -> None:
    with talking(LONG, pace=0.01) as client:
        page = opened(client)
        say(page)
        expect(page.locator(".assistant .prose").last).to_contain_text("word word")
        page.add_init_script(SLOW_DISK)
        page.reload()
        expect(page.locator("[aria-label=Stop]")).to_be_visible()
        stop(page)
        said = page.locator(".assistant .prose").last.inner_text()
        page.reload()
        expect(page.locator(".assistant .notice")).to_contain_text("Stopped.")
        assert page.locator(".assistant .prose").last.inner_text() == said


@pytest.mark.slow
def test_nobody_comes_back(opened: Opened) -> None:
    with talking(LONG, pace=0.01, resume_timeout=0.2) as client:
        page = opened(client, allowed="404")
        say(page)
        expect(page.locator(".assistant .prose").last).to_contain_text("word word")
        address = page.url
        page.goto("about:blank")
        service = client.app.state.service
        wait_for(lambda: not service.engine.busy and not service.streams)
        page.goto(address)
        expect(page.locator(".assistant .notice")).to_contain_text("Interrupted")
        assert "word word" in page.locator(".assistant .prose").last.inner_text()
        expect(page.locator("text=Continue")).to_be_enabled()


@pytest.mark.slow
def test_two_tabs(opened: Opened) -> None:
    with talking(LONG, pace=0.01) as client:
        one = opened(client)
        say(one, "from the first")
        expect(one.locator(".summary")).to_be_visible()
        two = opened(client, context=one.context)
        two.click("text=from the first")
        expect(two.locator(".assistant .notice")).to_contain_text("another tab")
        one.keyboard.press("Escape")
        expect(two.locator(".assistant .notice")).to_contain_text("Stopped.")
        two.keyboard.press("Control+Shift+O")
        say(two, "from the second")
        expect(one.locator(".sidebar .name")).to_have_text(["from the second", "from the first"])
        expect(two.locator(".summary")).to_be_visible()
        delete(one, "from the second")  # while the other tab is being written to
        expect(two.locator("h1")).to_have_text("Talk to toy")
        engine = client.app.state.service.engine
        wait_for(lambda: not engine.busy)
        two.reload()
        expect(two.locator(".sidebar .name")).to_have_text(["from the first"])


def history(turns: int, text: str = "Say {}", title: str = "A long talk") -> dict[str, Any]:
    """An exported file of one chat with so many turns."""
    nodes: dict[str, Any] = {}
    parent = "root"
    for i in range(turns):
        for role in ("user", "assistant"):
            ident = f"{role}{i}"
            content = text.format(i) if role == "user" else f"Answer **{i}**. " + text.format(i)
            nodes[ident] = {"id": ident, "parent": parent, "role": role, "content": content, "at": i, "state": "done"}
            parent = ident
    chat = {
        "id": "imported",
        "title": title,
        "namedAt": 1,
        "created": 1,
        "updated": 2,
        "settings": {"system": ""},
        "nodes": nodes,
        "chosen": {},
    }
    return {"format": "finback-chats", "version": 1, "ai_generated": True, "notice": "", "chats": [chat]}


def bring(page: Any, content: Any) -> None:
    expect(page.locator("[aria-label='Import chats']")).to_be_enabled()
    buffer = json.dumps(content).encode() if not isinstance(content, bytes) else content
    page.set_input_files("input[type=file]", {"name": "chats.json", "mimeType": "application/json", "buffer": buffer})


def test_a_hundred_turns(opened: Opened) -> None:
    with talking() as client:
        page = opened(client)
        bring(page, history(100))
        expect(page.locator(".message")).to_have_count(200)
        expect(page.locator(".assistant").last).to_be_in_viewport()
        assert page.locator(".assistant .prose").last.inner_text() == "Answer 99. Say 99"
        page.reload()
        expect(page.locator(".message")).to_have_count(200)
        page.fill("[aria-label='Search the chats']", "say 57")
        expect(page.locator(".sidebar .name")).to_have_count(1)
        page.fill("[aria-label='Search the chats']", "no such words")
        expect(page.locator(".sidebar .none")).to_contain_text("Nothing holds this")


def test_files_out_and_in_are_the_same(opened: Opened, tmp_path: Path) -> None:
    with talking() as client:
        page = opened(client)
        say(page, "keep this")
        answered(page)
        page.click("[aria-label='Answer again']")
        expect(page.locator(".branches")).to_have_text("2/2")
        answered(page)

        def export() -> dict[str, Any]:
            with page.expect_download() as download:
                page.click("[aria-label='Export all chats']")
            found: dict[str, Any] = json.loads(Path(download.value.path()).read_text())
            return found

        first = export()
        assert first["ai_generated"] is True and "AI" in first["notice"] and len(first["chats"][0]["nodes"]) == 3
        page.click("[aria-label='More for keep this']")
        with page.expect_download() as download:
            page.click("text=Export Markdown")
        text = Path(download.value.path()).read_text()
        assert "(AI-generated)" in text and "may be wrong" in text and "It is **4**." in text and "Two and two." in text
        page.click("[aria-label='Delete all chats']")
        page.click("dialog button.danger")
        expect(page.locator(".sidebar .name")).to_have_count(0)
        bring(page, first)
        expect(page.locator(".sidebar .name")).to_have_text("keep this")
        assert export() == first
        page.fill("#say", "half a thou")
        page.reload()
        expect(page.locator("#say")).to_have_value("half a thou")
        for wrong, words in (
            *((json.dumps(crafted(node)).encode(), "damaged") for node in CRAFTED),
            (b"{", "not JSON"),
            (b"{}", "contains no finback chats"),
            (json.dumps(first | {"chats": [{}]}).encode(), "damaged"),
        ):
            bring(page, wrong)
            expect(page.locator(".foot .notice.bad")).to_contain_text(words)


# replacements for a message of a file: cycles, no tree, and values that cannot be drawn
CRAFTED: list[dict[str, Any]] = [
    {"parent": "user1"},
    {"parent": "assistant0"},
    {"parent": "nobody"},
    {"parent": "__proto__"},
    {"id": "root"},
    {"reasoning": {"a": 1}},
    {"state": "dreaming"},
    {"tokens": [["a", -1, "b"]]},
    {"timings": {"predicted_n": "many"}},
    {"usage": 3},
]


def crafted(change: dict[str, Any]) -> dict[str, Any]:
    """A file of two turns with a changed second message."""
    content = history(2)
    (chat,) = content["chats"]
    node = chat["nodes"].pop("assistant0") | change
    chat["nodes"][node["id"]] = node
    return content


# faults of IndexedDB, one per page
BROKEN_DISKS = (
    "IDBObjectStore.prototype.getAll = () => { throw new Error('no'); }",
    "IDBFactory.prototype.open = () => { throw new DOMException('no', 'SecurityError'); }",
    "Object.defineProperty(window, 'indexedDB', { value: undefined })",
)


def test_a_browser_that_keeps_nothing_says_so(opened: Opened) -> None:
    with talking() as client:
        page = opened(client)
        for script in BROKEN_DISKS:
            page.add_init_script(script)
            page.reload()
            expect(page.locator(".welcome .notice")).to_contain_text("This browser keeps nothing")
        say(page)
        answered(page)
        expect(page.locator(".sidebar .notice")).to_contain_text("This browser keeps nothing")
        delete(page, "2+2=?")
        expect(page.locator(".sidebar .name")).to_have_count(0)


def rename(page: Any, old: str, new: str) -> None:
    page.click(f"[aria-label='More for {old}']")
    page.click(".menu >> text=Rename")
    page.fill("#title", new)
    page.keyboard.press("Enter")


def delete(page: Any, name: str) -> None:
    page.click(f"[aria-label='More for {name}']")
    page.click(".menu >> text=Delete")
    page.click("dialog button.danger")


def test_rename_and_delete(opened: Opened) -> None:
    with talking() as client:
        page = opened(client)
        say(page, "old name")
        answered(page)
        rename(page, "old name", "new name")
        expect(page.locator(".sidebar .name")).to_have_text("new name")
        page.reload()
        expect(page.locator(".sidebar .name")).to_have_text("new name")
        page.keyboard.press("Control+b")
        page.keyboard.press("Control+b")
        more = page.locator("[aria-label='More for new name']")
        more.click()
        page.click(".menu >> text=Rename")
        page.keyboard.press("Escape")
        expect(more).to_be_focused()
        delete(page, "new name")
        expect(page.locator(".sidebar .name")).to_have_count(0)
        expect(page.locator("h1")).to_have_text("Talk to toy")
        expect(page.locator("#say")).to_be_focused()


# from here on nothing reaches the disk before the tab closes
NO_DISK = "for (const way of ['put', 'delete']) IDBObjectStore.prototype[way] = () => ({})"


@pytest.mark.slow
def test_what_is_not_yet_on_the_disk_outlives_a_reload(opened: Opened) -> None:
    with talking() as client:
        page = opened(client)
        for count, text in enumerate(("one", "two", "three")):
            page.click(".sidebar >> text=New chat")
            say(page, text)
            answered(page)
            expect(page.locator(".sidebar .name")).to_have_count(count + 1)
        page.evaluate(NO_DISK)
        rename(page, "two", "second")
        delete(page, "one")
        expect(page.locator(".sidebar .name")).to_have_text(["three", "second"])
        say(page, "and then?")
        answered(page, 2)
        page.reload()
        expect(page.locator(".bubble")).to_have_text(["three", "and then?"])
        answered(page, 2)
        expect(page.locator(".sidebar .name")).to_have_text(["three", "second"])
        page.evaluate(NO_DISK)
        page.click("[aria-label='Delete all chats']")
        page.click("dialog button.danger")
        page.reload()
        expect(page.locator("h1")).to_have_text("Talk to toy")
        expect(page.locator(".sidebar .name")).to_have_count(0)


@pytest.mark.slow
def test_a_long_chat_leaves_its_end_behind(opened: Opened) -> None:
    with talking(LONG, pace=0.01) as client:
        page = opened(client)
        bring(page, history(6, "word " * 100_000, title="long"))
        expect(page.locator(".bubble")).to_have_count(6)
        page.evaluate(NO_DISK)
        rename(page, "long", "six megabytes")
        expect(page.locator(".sidebar .name")).to_have_text("six megabytes")
        page.reload()
        expect(page.locator(".sidebar .name")).to_have_text("six megabytes")
        expect(page.locator(".bubble")).to_have_count(6)


def test_keyboard_only(opened: Opened) -> None:
    with talking(LONG, pace=0.005) as client:
        page = opened(client)
        expect(page.locator("#say")).to_be_focused()
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        page.keyboard.press("Enter")
        expect(page.locator(".bubble")).to_have_text("one\ntwo")
        expect(page.locator(".summary")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator(".assistant .notice")).to_contain_text("Stopped.")
        expect(page.locator("#say")).to_be_focused()  # nothing has taken the focus away
        page.keyboard.press("Control+b")
        expect(page.locator(".sidebar")).to_be_hidden()
        page.keyboard.press("Control+k")
        expect(page.locator("[aria-label='Search the chats']")).to_be_focused()
        page.keyboard.press("Control+Shift+O")
        expect(page.locator(".message")).to_have_count(0)
        expect(page.locator("#say")).to_be_focused()
        page.keyboard.press("Control+,")
        expect(page.locator("dialog h2")).to_have_text("Settings")
        page.keyboard.press("Escape")
        expect(page.locator("dialog")).to_have_count(0)
        for _ in range(40):  # every control is reachable
            page.keyboard.press("Tab")
            if page.evaluate("document.activeElement.getAttribute('aria-label')") == "More for one":
                break
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        expect(page.locator(".menu button").first).to_be_focused()
        page.keyboard.press("Escape")
        expect(page.locator(".menu")).to_have_count(0)


# touch targets that are too small: less than 44 pixels wide or high, and not a link within a text
SMALL = """() => [...document.querySelectorAll('button, select, textarea, input:not([type=checkbox]), .check, a:not(p a, .prose a)')]
  .filter((e) => e.checkVisibility() && !e.closest('[inert]'))
  .map((e) => [e.getBoundingClientRect(), e.ariaLabel || e.textContent || e.id])
  .filter(([box]) => box.width > 0 && (box.width < 44 || box.height < 44))
  .map(([box, name]) => `${name} ${box.width} x ${box.height}`)"""


@pytest.mark.slow
def test_phone_width(opened: Opened) -> None:
    wide = (
        "| "
        + " | ".join(f"column {i}" for i in range(14))
        + " |\n|"
        + "---|" * 14
        + "\n\n```\n"
        + "x" * 300
        + "\n```\n$$"
        + "a+" * 80
        + "b$$"
    )
    with talking(wide) as client:
        page = opened(client, **PHONE)
        expect(page.locator(".sidebar")).to_be_hidden()
        say(page, "word" * 80)
        answered(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("document.querySelector('.thread').scrollWidth") <= 390
        assert page.evaluate(SMALL) == []
        page.tap("[aria-label='Show the sidebar']")
        expect(page.locator(".sidebar")).to_be_visible()
        assert page.evaluate(SMALL) == []
        page.tap(".sidebar >> text=New chat")
        expect(page.locator(".sidebar")).to_be_hidden()
        expect(page.locator(".message")).to_have_count(0)
        page.tap("[aria-label=Settings]")
        box = page.locator("dialog").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["height"] <= 844
        assert page.evaluate(SMALL) == []


def test_settings_reach_the_server(opened: Opened) -> None:
    with talking() as client:
        page = opened(client)
        sent: list[Any] = []
        page.on("request", lambda r: sent.append(r.post_data_json) if r.url.endswith(CHAT) else None)
        page.click("[aria-label=Settings]")
        page.fill("#system", "Be brief.")
        page.click("dialog >> text=On >> nth=0")
        page.fill("#budget", "50")
        page.click("text=Custom")
        page.fill("#temperature", "0.3")
        page.fill("#top_k", "20")
        page.fill("#seed", "7")
        page.fill("#most", "200")
        page.check("dialog input[type=checkbox]")
        page.click("[aria-label=Close]")
        say(page, "hello")
        answer = answered(page)
        assert sent[0] == {
            "model": "toy",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
            "stream": True,
            "stream_options": {"include_usage": True, "resumable": True},
            "thinking": {"type": "enabled"},
            "thinking_budget": 50,
            "temperature": 0.3,
            "top_k": 20,
            "seed": 7,
            "max_tokens": 200,
            "logprobs": True,
            "top_logprobs": 5,
        }
        answer.locator(".tokens [data-i='0']").hover()
        expect(answer.locator(".odds")).to_contain_text("%")
        answer.locator(".tokens .text").focus()
        page.keyboard.press("ArrowRight")
        expect(answer.locator(".tokens .at")).to_have_attribute("data-i", "1")
        assert "".join(answer.locator(".tokens .text").all_inner_texts()).startswith("It is **4**.")


def test_two_models_side_by_side(opened: Opened) -> None:
    first, second = (Scripted(text, window=4096, tokens=16384) for text in ("One.", "Two."))
    with served_two(first, second, page=True) as client:
        page = opened(client)
        page.click("[aria-label=Settings]")
        page.select_option("#beside", "other")
        page.click("[aria-label=Close]")
        say(page, "who are you?")
        expect(page.locator(".pair .timings")).to_have_count(2)
        assert page.locator(".pair .prose").all_inner_texts() == ["One.", "Two."]
        page.click("text=Go on with this")
        expect(page.locator(".pair .chosen h2")).to_have_text("other")
        say(page, "and now?")
        expect(page.locator(".pair .timings")).to_have_count(2)
        prompts = [e.tokenizer.decode(e.seen[-1].prompt) for e in (first, second)]
        assert all("Two." in p and "One." not in p for p in prompts)


def test_honest_states(opened: Opened) -> None:
    with talking("Hi.") as client:
        page = opened(client, allowed="Failed to load resource|ERR_CONNECTION_REFUSED")
        bring(page, history(60, text="many words " * 12 + "{}"))
        expect(page.locator(".message")).to_have_count(120)
        say(page, "does it fit?")
        expect(page.locator(".notice.bad")).to_contain_text("no longer fits")
        busy = {"error": {"message": "64 answers are waiting already", "type": "server_error", "code": "overloaded"}}
        page.route(f"**{CHAT}", lambda route: route.fulfill(status=503, json=busy))
        page.keyboard.press("Control+Shift+O")
        say(page, "still there?")
        expect(page.locator(".notice.bad")).to_contain_text("64 answers are waiting already")
        page.click("button:has-text('Try again')")
        expect(page.locator(".branches")).to_have_text("2/2")
        expect(page.locator(".notice.bad")).to_contain_text("64 answers are waiting already")
        page.unroute(f"**{CHAT}")
        with page.expect_request(f"**{CHAT}") as sent:
            say(page, "and now?")
        assert [m["content"] for m in sent.value.post_data_json["messages"]] == ["still there?", "and now?"]
        answered(page)
    say(page, "gone?")
    expect(page.locator("main > div > .notice")).to_contain_text("The server is gone")
    expect(page.locator("[aria-label=Send]")).to_be_disabled()


@pytest.mark.slow
def test_waiting_says_what_for(opened: Opened) -> None:
    with served(Scripted(LONG, 0.03, rows=1, window=4096, tokens=8192), page=True) as client:
        one, two = opened(client), opened(client)
        say(one)
        expect(one.locator(".summary")).to_be_visible()
        say(two)
        expect(two.locator(".waiting")).to_contain_text("Waiting for a place: 1st in line")
        stop(one)
        expect(two.locator(".summary")).to_be_visible()
        stop(two)


def test_a_key_is_asked_for_and_forgotten(opened: Opened) -> None:
    with talking(keys=digests([KEY])) as client:
        page = opened(client, allowed="401")
        page.fill("#key", "a-wrong-key-of-length")
        page.keyboard.press("Enter")
        expect(page.locator("#key-wrong")).to_be_visible()
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        expect(page.locator("h1")).to_have_text("Talk to toy")
        say(page)
        answered(page)
        assert KEY not in page.evaluate("JSON.stringify(localStorage)") and KEY in page.evaluate(
            "JSON.stringify(sessionStorage)"
        )
        page.reload()
        expect(page.locator(".sidebar .name")).to_have_count(1)
        fresh = page.context.new_page()
        fresh.goto(page.url)
        expect(fresh.locator("#key")).to_be_visible()
