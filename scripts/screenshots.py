"""Takes the documentation's screenshots of the page, docs/screens/*.png, with a model and runs of this machine.

    python scripts/screenshots.py MODEL RUNS [--run NAME] [--out docs/screens] [--parts PART ...] [--all] [--chromium PATH]

MODEL is a stage of a run that has learned to think, such as runs/r1/r1; RUNS holds the run folders. `languages` shows
the chats of languages.json; fonts for their scripts must be installed (Debian: fonts-noto-core and fonts-noto-cjk).
Without --all only those in the documentation are taken.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

from playwright.sync_api import Browser, Page, sync_playwright

DESKTOP: dict[str, Any] = {"viewport": {"width": 1280, "height": 800}}
TABLET: dict[str, Any] = {"viewport": {"width": 834, "height": 1112}, "has_touch": True}
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
DEVICES = (("desktop", DESKTOP), ("tablet", TABLET), ("phone", PHONE))
LANGUAGES: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("languages.json").read_text(encoding="utf-8")
)
SHOWN = (
    "ar-phone-dark",
    "zh-desktop-light",
    "ja-tablet-light",
    "hi-phone-light",
    "de-tablet-dark",
)  # in the documentation
QUESTIONS = ("8-3+5+4-6=?", "5+9-4+7=?")
PARTS = ("languages", "chat", "runs")
STAGES = "zero,dev2,r1"  # shown in the curves if the run has them


@contextmanager
def served(model: Path, runs: Path, port: int) -> Iterator[str]:
    """Runs `finback serve` within the context; yields its address."""
    command = [
        sys.executable,
        "-m",
        "finback",
        "serve",
        str(model),
        "--runs",
        str(runs),
        "--port",
        str(port),
        "--tokens",
        "8192",
        "--rows",
        "4",
    ]
    process = subprocess.Popen(
        [*command, "--drain", "1"], stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            try:
                urlopen(f"{address}/health").close()
                break
            except URLError:
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait()


def chat(page: Page, address: str, name: str, out: Path) -> None:
    """A chat with its chain folded, then open."""
    page.goto(address)
    page.locator("h1:has-text('Talk to')").wait_for()
    page.click("[aria-label=Settings]")
    page.click("text=Precise")
    page.click("[aria-label=Close]")
    for i, question in enumerate(QUESTIONS):
        page.fill("#say", question)
        page.press("#say", "Enter")
        page.locator(".assistant .timings").nth(i).wait_for()
    page.wait_for_timeout(400)
    page.screenshot(path=out / f"chat-folded-{name}.png")
    page.locator(".summary").last.click()
    page.mouse.move(0, 0)
    page.wait_for_timeout(400)
    page.screenshot(path=out / f"chat-open-{name}.png")


def runs_page(page: Page, address: str, run: str, name: str, out: Path) -> None:
    """The list, one run's stages and curves, the rollouts, one prompt across training."""
    page.goto(f"{address}/runs")
    page.locator(".card").first.wait_for()
    if not run:
        run = page.locator(".card h2").first.inner_text()
    views: tuple[tuple[str, dict[str, str], str], ...] = (
        ("runs", {}, ".card"),
        ("run", {"run": run, "view": "stages"}, ".stages"),
        ("curves", {"run": run, "view": "curves", "stages": STAGES}, ".chart canvas"),
        ("rollouts", {"run": run, "view": "rollouts"}, ".record"),
    )
    for view, place, wanted in views:
        page.goto(f"{address}/runs#{urlencode(place)}")
        page.locator(wanted).first.wait_for()
        page.wait_for_timeout(700)
        page.screenshot(path=out / f"{view}-{name}.png")
    exams = page.locator(".source option:has-text('exam')")
    if exams.count():
        page.select_option(".source select", exams.first.get_attribute("value"))
        changed = page.locator(".prompts button:has-text('0/1')").first
        changed.click()
    page.click("text=Follow this prompt")
    page.locator(".stop").first.wait_for()
    page.select_option(".follow select", "before")
    page.wait_for_timeout(300)
    page.screenshot(path=out / f"follow-{name}.png")


def exported(said: dict[str, str]) -> dict[str, Any]:
    """A file of one chat, as the page exports it."""
    question = {"id": "q", "parent": "root", "role": "user", "content": said["question"], "at": 1, "state": "done"}
    answer = question | {"id": "a", "parent": "q", "role": "assistant", "content": said["answer"], "at": 2}
    nodes = {"q": question, "a": answer | {"reasoning": said["thinking"]}}
    about = {"id": "shown", "title": said["title"], "namedAt": 1, "created": 1, "updated": 2}
    chat = about | {"settings": {"system": ""}, "nodes": nodes, "chosen": {}}
    return {"format": "finback-chats", "version": 1, "ai_generated": True, "notice": "", "chats": [chat]}


def languages(browser: Browser, address: str, out: Path, everything: bool) -> None:
    """One chat in each language, at each size, light and dark; only those in SHOWN unless `everything`."""
    for language, said in LANGUAGES.items():
        known = subprocess.run(["fc-list", f":lang={language}", "family"], capture_output=True, text=True, check=True)
        if not known.stdout.strip():
            raise SystemExit(f"no font for {language}: apt-get install fonts-noto-core fonts-noto-cjk")
        content = json.dumps(exported(said)).encode()
        for device, options in DEVICES:
            for scheme in ("light", "dark"):
                name = f"{language}-{device}-{scheme}"
                if not everything and name not in SHOWN:
                    continue
                context = browser.new_context(color_scheme=scheme, locale=language, **options)
                page = context.new_page()
                page.goto(address)
                page.locator("#say:not([disabled])").wait_for()
                page.set_input_files(
                    "input[type=file]", {"name": "chats.json", "mimeType": "application/json", "buffer": content}
                )
                page.locator(".assistant math").first.wait_for()
                page.evaluate("document.fonts.ready")
                page.wait_for_timeout(500)
                page.locator(".summary").click()
                page.locator(".thread").evaluate("box => box.scrollTo(0, 0)")
                page.wait_for_timeout(200)
                page.screenshot(path=out / f"chat-{name}.png")
                context.close()


def main() -> None:
    """Takes the chosen screenshots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--run", default="", help="the run that is shown; the latest if none is named")
    parser.add_argument("--out", type=Path, default=Path("docs/screens"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--all", action="store_true", help="every size and theme of the languages")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--chromium", default=os.environ.get("FINBACK_CHROMIUM") or shutil.which("chromium"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    with served(given.model, given.runs, given.port) as address, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        if "languages" in given.parts:
            languages(browser, address, given.out, given.all)
        for device, options in DEVICES[::2]:
            for scheme in ("light", "dark"):
                context = browser.new_context(
                    color_scheme=scheme, device_scale_factor=2 if device == "phone" else 1, **options
                )
                page = context.new_page()
                if "chat" in given.parts:
                    chat(page, address, f"{device}-{scheme}", given.out)
                if "runs" in given.parts and (scheme == "light" or device == "desktop"):
                    runs_page(page, address, given.run, f"{device}-{scheme}", given.out)
                context.close()
        browser.close()


if __name__ == "__main__":
    main()
