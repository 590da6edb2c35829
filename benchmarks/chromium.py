"""Shared by the page's benchmarks: a server in a thread, and Chromium's trace as milliseconds per frame."""

import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette

SCRIPTING = {
    "FunctionCall",
    "RunMicrotasks",
    "TimerFire",
    "FireAnimationFrame",
    "EventDispatch",
    "EvaluateScript",
    "V8.GCScavenger",
}
CATEGORIES = ["devtools.timeline", "disabled-by-default-devtools.timeline.frame"]


@contextmanager
def serving(app: Starlette) -> Iterator[str]:
    """The address of an application that runs in a thread."""
    runner = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, lifespan="off"))
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    while not runner.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{runner.servers[0].sockets[0].getsockname()[1]}"
    runner.should_exit = True
    thread.join(10)


def frames(trace: dict[str, Any]) -> dict[str, list[float]]:
    """Milliseconds of scripting between each frame's beginning and the next, on the thread that draws the page.

    `wall` includes time in which other programs had the processor, `cpu` does not.
    """
    events = trace["traceEvents"]
    threads = [(e["pid"], e["tid"]) for e in events if e["name"] == "FunctionCall"]
    main = max(set(threads), key=threads.count)
    own = [e for e in events if (e["pid"], e["tid"]) == main]
    starts = sorted(e["ts"] for e in own if e["name"] == "BeginMainThreadFrame")
    scripts = [e for e in own if e["name"] in SCRIPTING and e.get("ph") == "X"]
    found = {"wall": [0.0] * len(starts), "cpu": [0.0] * len(starts)}
    until = 0.0
    for begin, wall, cpu in sorted((e["ts"], -e.get("dur", 0), e.get("tdur", 0)) for e in scripts):
        place = int(np.searchsorted(starts, begin, side="right")) - 1
        if begin >= until and place >= 0:  # else it is part of the previous script
            until = begin - wall
            found["wall"][place] -= wall / 1000
            found["cpu"][place] += cpu / 1000
    return found


def told(spent: dict[str, list[float]], prefix: str) -> dict[str, float]:
    """Summary statistics of the frames."""
    found = {f"{prefix}_ms_median": statistics.median(spent["wall"])}
    for kind, values in spent.items():
        found |= {f"{prefix}_{kind}_ms_p95": float(np.percentile(values, 95)), f"{prefix}_{kind}_ms_max": max(values)}
    return found
