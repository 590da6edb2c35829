"""The web page in Chromium: time to open, a long answer while it streams, runs with a million metric points or 200,000 rollouts.

    python benchmarks/page.py [--tokens 40000] [--rate 800] [--points 1000000] [--rollouts 200000] [--rounds 3]
                              [--parts open stream run rollouts] [--chromium PATH]

A Starlette server streams prepared text at a steady rate, in chunks like finback's; the cost is read from Chromium's
trace: all scripting on the page's thread between one frame and the next. The peer is parsing the whole text at each
frame, as most chat pages do. The runs are on disk and are opened cold: neither the server nor the browser has cached
any of them.
"""

import argparse
import asyncio
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from chromium import CATEGORIES, frames, serving, told
from driver import say
from page_runs import rollouts_page, run_page
from playwright.sync_api import Browser, sync_playwright
from record import header, spread, write
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from finback.serve.page import Page

PARTS = ("open", "stream", "run", "rollouts")
PARAGRAPH = (
    "Let me take **step {n}** once more: with $a_{n} = 3n + 1$ the sum is `{n}`, which is *not* what [the table](http://x.y) says, "
    "so the earlier bound has to be checked.\n\n"
)
BLOCKS = (
    "- first, the case of even $n$\n- then the odd one, where $\\frac{n(n+1)}{2}$ holds\n  - and its corner\n\n",
    "```python\ndef total(n: int) -> int:\n    return sum(3 * i + 1 for i in range(n))  # step {n}\n```\n\n",
    "| n | sum |\n|---|-----|\n| {n} | 12 |\n| 2 | 15 |\n\n",
    "## Part {n}\n\n",
    "$$\\sum_{i=1}^{n} i^2 = \\frac{n(n+1)(2n+1)}{6}$$\n\n",
)


def text_of(tokens: int) -> str:
    """Text of about `tokens` tokens of four characters: paragraphs with some lists, code, tables and equations."""
    parts: list[str] = []
    size = 0
    for n in range(tokens):
        part = PARAGRAPH.replace("{n}", str(n)) + (
            BLOCKS[n // 3 % len(BLOCKS)].replace("{n}", str(n)) if n % 3 == 0 else ""
        )
        parts.append(part)
        size += len(part)
        if size >= 4 * tokens:
            break
    return "".join(parts)[: 4 * tokens]


def talker(text: str, rate: int) -> Starlette:
    """A server that streams the text, `rate` tokens of four characters per second."""

    def chunk(delta: dict[str, str], **more: Any) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": more.pop("finish", None)}
        return b"data: " + json.dumps({"id": "chatcmpl-x", "choices": [choice], **more}).encode() + b"\n\n"

    async def said() -> AsyncIterator[bytes]:
        began, at = time.perf_counter(), 0
        yield chunk({"role": "assistant", "content": ""})
        while at < len(text):
            due = min(len(text), 4 * (int((time.perf_counter() - began) * rate) + 1))
            if due > at:
                yield b"".join(chunk({"content": text[i : i + 4]}) for i in range(at, due, 4))
                at = due
            await asyncio.sleep(1 / rate)
        yield chunk(
            {},
            finish="stop",
            timings={
                "predicted_n": len(text) // 4,
                "predicted_per_second": rate,
                "queue_ms": 0,
                "prompt_ms": 1,
                "prompt_n": 1,
                "cache_n": 0,
            },
        )
        yield b"data: [DONE]\n\n"

    async def chat(request: Request) -> StreamingResponse:
        return StreamingResponse(said(), media_type="text/event-stream")

    async def models(request: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": "talker", "max_model_len": 65536}]})

    routes = [
        *Page().routes(chat=True),
        Route("/v1/models", models),
        Route("/v1/chat/completions", chat, methods=["POST"]),
    ]
    return Starlette(routes=routes)


def stream(browser: Browser, tokens: int, rate: int) -> dict[str, Any]:
    """The cost of a long answer while it streams, and of parsing it once as a whole."""
    text = text_of(tokens)
    with serving(talker(text, rate)) as address:
        page = browser.new_page(viewport={"width": 1200, "height": 800})
        page.goto(address)
        page.locator("#say:not([disabled])").fill("go on")
        page.locator("[aria-label=Send]:not([disabled])").wait_for()
        browser.start_tracing(page=page, categories=CATEGORIES)
        began = time.perf_counter()
        page.keyboard.press("Enter")
        page.locator(".assistant .timings").wait_for(timeout=600_000)
        took = time.perf_counter() - began
        spent = frames(json.loads(browser.stop_tracing()))
        shown = page.evaluate("document.querySelector('.assistant .prose').textContent.length")
        whole = page.evaluate(
            """async ([parser, text]) => {
              const { htmlOfAll } = await import(parser);
              const times = [];
              for (let i = 0; i < 5; i++) { const t = performance.now(); htmlOfAll(text); times.push(performance.now() - t); }
              return times.sort((a, b) => a - b)[2];
            }""",
            [f"/web/{Page().digest}/markdown/parser.js", text],
        )
        page.close()
    assert shown > 2 * tokens, f"only {shown} characters were drawn"
    return {
        "tokens": tokens,
        "tokens_per_second": rate,
        "seconds": took,
        "frames": len(spent["wall"]),
        **told(spent, "scripting"),
        "whole_parse_ms": whole,
        "whole_parse_over_p95": whole / float(np.percentile(spent["wall"], 95)),
    }


# the first frame with content of the page; milliseconds since the request
PAINTED = """() => new Promise((done) => new PerformanceObserver((list) => {
  const [first] = list.getEntriesByName('first-contentful-paint');
  if (first) done(first.startTime);
}).observe({ type: 'paint', buffered: true }))"""


def opening(browser: Browser) -> dict[str, Any]:
    """Time until the page is painted and ready on its first visit, and the bytes sent."""
    with serving(talker("hello", 100)) as address:
        context = browser.new_context(viewport={"width": 1200, "height": 800})
        page = context.new_page()
        page.goto(address)
        painted = page.evaluate(PAINTED)
        page.locator("#say:not([disabled])").wait_for()
        ready = page.evaluate("performance.now()")
        sent = page.evaluate("performance.getEntries().reduce((sum, e) => sum + (e.transferSize ?? 0), 0)")
        context.close()
    return {"first_paint_ms": painted, "ready_ms": ready, "bytes": sent}


def summed(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median, minimum and maximum of every figure over the rounds."""
    return {name: spread([r[name] for r in rounds]) for name in rounds[0]}


def main() -> None:
    """Measures, and writes the results file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=40_000)
    parser.add_argument("--rate", type=int, default=800, help="tokens a second")
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--rollouts", type=int, default=200_000)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chromium", default=os.environ.get("FINBACK_CHROMIUM") or shutil.which("chromium"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results = header("page", {k: v for k, v in vars(given).items() if k not in ("out", "chromium")})
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=given.chromium, args=["--no-sandbox"])
        results["chromium"] = browser.version
        parts = {
            "open": lambda: opening(browser),
            "stream": lambda: stream(browser, given.tokens, given.rate),
            "run": lambda: run_page(browser, given.points),
            "rollouts": lambda: rollouts_page(browser, given.rollouts),
        }
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in given.parts}
        for i in range(given.rounds):
            for name, found in rounds.items():
                found.append(parts[name]())
                say(f"round {i + 1}, {name}: {found[-1]}")
        browser.close()
    results |= {name: summed(found) for name, found in rounds.items()}
    write(results, given.out)


if __name__ == "__main__":
    main()
