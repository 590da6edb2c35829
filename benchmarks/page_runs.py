"""The page of runs, opened cold: a run with many metric points, and one with many rollouts."""

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from chromium import CATEGORIES, frames, serving, told
from playwright.sync_api import Browser, Page

from finback.serve import watch
from finback.serve.options import ListenOptions


def make_run(root: Path, points: int) -> None:
    """A run whose one stage has logged `points` values under ten names."""
    stage = root / "long/base"
    stage.mkdir(parents=True)
    (root / "long/recipe.json").write_text('{"recipe": "long", "seed": 0}')
    (stage / "config.json").write_text('{"type": "Pretrain", "name": "base"}')
    rng = np.random.default_rng(0)
    names = (
        "tokens",
        "loss",
        "mtp_loss",
        "balance",
        "grad_norm",
        "lr",
        "max_violation",
        "tokens_per_second",
        "mfu",
        "memory",
    )
    with (stage / "metrics.jsonl").open("w") as handle:
        for step in range(points // len(names)):
            values = rng.random(len(names) - 1) * 0.1 + 3 / (1 + step) ** 0.1
            handle.write(
                json.dumps({"step": step, "tokens": 4096 * step} | dict(zip(names[1:], values.tolist(), strict=True)))
                + "\n"
            )


@contextmanager
def opened(browser: Browser, root: Path, view: str) -> Iterator[tuple[Page, float, float]]:
    """A view of the long run's page, and the wall and processor clocks at the request."""
    with serving(watch.build(root, ListenOptions())) as address:
        context = browser.new_context(viewport={"width": 1200, "height": 800})
        page = context.new_page()
        began, worked = time.perf_counter(), time.process_time()
        page.goto(f"{address}/#run=long&view={view}")
        yield page, began, worked
        context.close()


def run_page(browser: Browser, points: int) -> dict[str, Any]:
    """Seconds until a long run's curves are complete, and the cost per frame of panning them."""
    with tempfile.TemporaryDirectory() as folder:
        make_run(Path(folder), points)
        size = (Path(folder) / "long/base/metrics.jsonl").stat().st_size
        with opened(browser, Path(folder), "curves") as (page, began, worked):
            page.locator(".chart canvas").first.wait_for()
            first = time.perf_counter() - began
            page.locator("text=Reading:").wait_for(state="detached")
            whole, busy = time.perf_counter() - began, time.process_time() - worked
            again = time.perf_counter()
            page.reload()
            page.locator(".chart canvas").first.wait_for()
            second = time.perf_counter() - again
            page.wait_for_timeout(300)
            box = page.locator(".chart .u-over").first.bounding_box()
            assert box is not None
            browser.start_tracing(page=page, categories=CATEGORIES)
            page.keyboard.down("Shift")
            page.mouse.move(box["x"] + 40, box["y"] + 60)
            page.mouse.down()
            for i in range(60):
                page.mouse.move(box["x"] + 40 + 3 * i, box["y"] + 60)
                page.wait_for_timeout(16)
            page.mouse.up()
            spent = frames(json.loads(browser.stop_tracing()))
    return {
        "points": points,
        "bytes": size,
        "seconds_to_first_curves": first,
        "seconds_to_whole_curves": whole,
        "seconds_when_read_before": second,
        "server_cpu_seconds": busy,
        **told(spent, "pan_scripting"),
    }


def make_rollouts(root: Path, count: int) -> None:
    """A run whose one stage of RL has written `count` answers of about 550 characters, 200 per step."""
    stage = root / "long/rl"
    stage.mkdir(parents=True)
    (root / "long/recipe.json").write_text('{"recipe": "long", "seed": 0}')
    (stage / "config.json").write_text('{"type": "GRPO", "name": "rl"}')
    rng = np.random.default_rng(0)
    with (stage / "samples.jsonl").open("w") as handle:
        for i in range(count):
            said = {
                "step": i // 200 + 1,
                "question": f"{i // 8 % 5000}+17=?",
                "gold": "3",
                "thinking": " ".join(map(str, rng.integers(0, 999, 100))),
                "answer": "The answer is 3.",
                "thinks": True,
                "correct": i % 3 == 0,
                "tokens": 120,
                "finish": "stop",
                "reward": {"accuracy": 1.0, "form": 0.1},
                "advantage": 0.5,
            }
            handle.write(json.dumps(said) + "\n")


def rollouts_page(browser: Browser, count: int) -> dict[str, Any]:
    """Seconds until the last step's answers are shown, and until every step can be selected."""
    with tempfile.TemporaryDirectory() as folder:
        make_rollouts(Path(folder), count)
        size = (Path(folder) / "long/rl/samples.jsonl").stat().st_size
        with opened(browser, Path(folder), "rollouts") as (page, began, worked):
            page.locator(".record").first.wait_for()
            first = time.perf_counter() - began
            page.locator("text=Still reading").wait_for(state="detached")
            whole, busy = time.perf_counter() - began, time.process_time() - worked
            last = page.locator(".steps output").inner_text()
    assert last == f"Step {(count - 1) // 200 + 1} of {(count - 1) // 200 + 1}", last
    return {
        "rollouts": count,
        "bytes": size,
        "seconds_to_last_step": first,
        "seconds_to_all_steps": whole,
        "server_cpu_seconds": busy,
    }
