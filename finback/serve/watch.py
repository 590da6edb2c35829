"""The read-only JSON API for run folders, and `finback watch`, which serves it with its page. Does not import torch."""

import asyncio
import functools
import math
import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from finback.config import UserError
from finback.runs import reader
from finback.runs.metrics_table import MetricsTable, outline
from finback.runs.reader import StageFolder
from finback.runs.samples import MOST, SampleIndex, continued, shown
from finback.serve import curves
from finback.serve.errors import ApiError, bad
from finback.serve.http import application, configuration, listen_as, secured, url
from finback.serve.metrics import Metrics
from finback.serve.options import ListenOptions, WatchOptions
from finback.serve.page import Page
from finback.serve.runs import Runs, cores, overview

AT_ONCE = 0.5  # seconds for reading new rows per request; the page asks again for the rest
A_LOOK = 0.1  # the same for requests where curves and answers are secondary
OUTLINE = 600  # rows sampled from a file that is still being read
OPENED = 32  # files with columns or index in memory
POINTS = 4000  # most points of a curve per reply

Planned = Callable[[Path], dict[str, dict[str, float]]]  # run folder -> seconds, dollars and flops of each stage


class RunsApi:
    """The API, with a cache of what it has read of the run folders; `planned` returns a run's planned costs."""

    def __init__(self, root: Path, planned: Planned | None = None) -> None:
        self.runs, self.planned = Runs(root), planned
        self._plan = functools.lru_cache(1)(self._planned)  # recomputed when another stage has begun
        self._open = functools.lru_cache(OPENED)(lambda kind, path: kind(path))
        self._lock = threading.Lock()  # several threads answer requests

    def routes(self) -> list[Route]:
        """The JSON routes under /api."""
        found = {"runs": self.all_runs, "run": self.one_run, "series": self.series, "heat": self.heat}
        found |= {"rollouts": self.rollouts, "follow": self.follow}
        return [Route(f"/api/{name}", self._reply(answer)) for name, answer in found.items()]

    def all_runs(self, asked: "Asked") -> dict[str, Any]:
        """Every run, with its stages."""
        found, until = [], time.monotonic() + A_LOOK
        for name, folder in self.runs.folders().items():
            begun = reader.stages(folder, lenient=True)
            found.append(overview(name, folder, begun))
            for entry, stage in zip(found[-1]["stages"], begun, strict=True):
                if entry["state"] == "running" and entry["has_metrics"]:
                    entry["progress"] = curves.progress(stage, self._table(stage, until - time.monotonic()))
        return {"root": str(self.runs.root), "runs": found}

    def one_run(self, asked: "Asked") -> dict[str, Any]:
        """One run: its stages with knobs, results, logs and warnings."""
        root = self.runs.find(asked.text("run"))
        begun = reader.stages(root, lenient=True)
        found = overview(asked.text("run"), root, begun)
        until, plans = time.monotonic() + A_LOOK, self._plan(root, len(begun))
        for entry, stage in zip(found["stages"], begun, strict=True):
            results = stage.results if stage.is_finished else None
            entry |= {"config": stage.config, "results": results, "plan": plans.get(stage.name)}
            entry |= {"keys": [], "nested": [], "alerts": curves.damage(stage)}
            if entry["has_metrics"]:
                table = self._table(stage, until - time.monotonic())
                entry["keys"] = [n for n in table.columns if n != "step"]
                entry["last"] = curves.latest(table)
                entry |= {"nested": list(table.nested), "share": table.share, "rows": table.rows}
                entry["alerts"] += curves.alerts(stage, table, entry["state"] == "running")
                entry["progress"] = curves.progress(stage, table)
        return found

    def series(self, asked: "Asked") -> dict[str, Any]:
        """Curves of one stage: names in `keys` or all, axis `x`, `smooth` in [0, 1), from `from` to `to`, at most `points` each."""
        stage, name = self._stage(asked), asked.text("x", "step")
        if name not in curves.AXES:
            raise bad(f"no such axis; there are {', '.join(curves.AXES)}", "x")
        read = self._table(stage, 0 if asked.text("soon", "") else AT_ONCE)
        table, weight = read, asked.number("smooth", 0.0, 0.0, 0.9999)
        if name == "step" and not read.complete:  # an outline of the whole curve rather than its beginning
            table = outline(read.tail.path, OUTLINE)
            weight **= max(1.0, read.rows / max(1e-9, read.share) / OUTLINE)
        places = curves.axis(table, name, cores(stage.ledger()))
        begin, end = asked.bound("from"), asked.bound("to")
        points = int(asked.number("points", 1000, 10, POINTS))
        wanted = asked.text("keys", "").split(",")
        keys = [k for k in table.columns if k in wanted or (wanted == [""] and k != "step")]
        lines = [curves.curve(table, key, places, weight, begin, end, points) for key in keys[:64]]
        return {"x": name, "rows": read.rows, "share": read.share, "lines": lines}

    def heat(self, asked: "Asked") -> dict[str, Any]:
        """Nested values of one stage over its steps, such as expert_load."""
        return curves.heat(self._table(self._stage(asked)), asked.text("key", "expert_load"), 120)

    def rollouts(self, asked: "Asked") -> dict[str, Any]:
        """Answers of an RL step, to watched prompts, or of an exam; `find` selects questions that contain a text."""
        stage = self._stage(asked)
        samples = self._samples(stage, asked.text("exam", ""), A_LOOK if asked.text("soon", "") else AT_ONCE)
        newest = [] if samples.complete else [shown(r) for r in samples.newest()]
        steps = sorted({*samples.by_step, *(r["step"] for r in newest)})
        step = int(asked.number("step", steps[-1] if steps else 0, -1e15, 1e15))
        found: dict[str, Any] = {"steps": steps, "step": step, "complete": samples.complete}
        if asked.text("find", ""):
            return found | {"questions": samples.questions(asked.text("find"), 50)}
        if newest and step == newest[0]["step"]:
            return found | {"records": newest[:MOST]}
        is_watched = asked.text("exam", "") == stage.watches != ""
        after = [s for s in steps if s > step][: int(is_watched)]  # what the next look recorded about these answers
        later = {r.get("question"): r for s in after for r in samples.at_step(s)}
        return found | {"records": [continued(r, later.get(r.get("question"))) for r in samples.at_step(step)]}

    def follow(self, asked: "Asked") -> dict[str, Any]:
        """Every answer to one question in a run, over all stages: RL steps and exams."""
        question, found = asked.text("question"), []
        for stage in self.runs.stages(asked.text("run")):
            for name in [*([""] if stage.has_samples else []), *filter(None, [stage.watches]), *stage.exams]:
                answers = self._samples(stage, name).of_question(question)
                if answers:
                    exam = name if name in stage.exams else ""
                    model = str(stage.config.get("start", "")) if exam else stage.name
                    later = [*answers[1:], None] if name == stage.watches else [None] * len(answers)
                    records = [continued(*pair) for pair in zip(answers, later, strict=True)]
                    about = {"stage": stage.name, "source": name, "exam": exam, "model": model}
                    found.append(about | {"records": records})
        return {"question": question, "said": found}

    def _planned(self, root: Path, begun: int) -> dict[str, dict[str, float]]:
        """The planned costs of a run's stages. `begun`, the number of stages that have begun, only serves as a cache key."""
        with suppress(UserError):  # the recipe may be gone; the run can be shown without a plan
            return self.planned(root) if self.planned else {}
        return {}

    def _stage(self, asked: "Asked") -> StageFolder:
        return self.runs.stage(asked.text("run"), asked.text("stage"))

    def _table(self, stage: StageFolder, seconds: float = AT_ONCE) -> MetricsTable:
        table: MetricsTable = self._open(MetricsTable, stage.metrics_file)
        table.update(seconds)
        return table

    def _samples(self, stage: StageFolder, exam: str, seconds: float = AT_ONCE) -> SampleIndex:
        if exam and exam not in (stage.watches, *stage.exams):
            raise ApiError(404, "no such exam", "exam")
        samples: SampleIndex = self._open(SampleIndex, stage.answers_file(exam))
        samples.update(seconds)
        return samples

    def _reply(self, answer: Callable[["Asked"], dict[str, Any]]) -> Callable[[Request], Any]:
        def locked(asked: Asked) -> dict[str, Any]:
            with self._lock:
                return answer(asked)

        async def endpoint(request: Request) -> Response:
            found = await asyncio.to_thread(locked, Asked(request))
            content = to_json(found, inf_nan_mode="null")  # ten times as fast as json's for long curves
            return Response(content, media_type="application/json", headers={"cache-control": "no-store"})

        return endpoint


class Asked:
    """A request's query, validated as it is read."""

    def __init__(self, request: Request) -> None:
        self.query = request.query_params

    def text(self, name: str, default: str | None = None) -> str:
        """A text; ApiError 400 if it is required but missing."""
        found = self.query.get(name, default)
        if found is None:
            raise bad(f"{name} is missing", name)
        return found

    def number(self, name: str, default: float, least: float, most: float) -> float:
        """A number, clamped to the allowed range."""
        found = self.bound(name)
        return default if found is None else min(max(found, least), most)

    def bound(self, name: str) -> float | None:
        """A number, None if absent; ApiError 400 for anything else."""
        text = self.query.get(name)
        if not text:
            return None
        try:
            found = float(text)
        except ValueError:
            found = math.nan
        if not math.isfinite(found):
            raise bad(f"{name} is not a finite number", name)
        return found


def build(root: Path, options: ListenOptions, planned: Planned | None = None) -> Starlette:
    """The ASGI application of `finback watch`: the page of runs, their JSON, and /health."""
    return application([*Page().routes(chat=False), *RunsApi(root, planned).routes()], options, Metrics())


def run(options: WatchOptions, planned: Planned | None = None) -> None:
    """Serves the page of runs until a signal ends it."""
    if options.runs.exists() and not options.runs.is_dir():
        raise UserError("runs", str(options.runs), "not a folder", "Give a runs folder, or a run in it.")
    options = secured(options)
    listener = listen_as(options)
    later = "" if options.runs.is_dir() else " (it does not exist yet)"
    print(f"watching {options.runs}{later} at {url(listener, options)}/", file=sys.stderr, flush=True)
    if options.show:
        webbrowser.open(f"{url(listener, options)}/")
    uvicorn.Server(configuration(build(options.runs, options, planned), options)).run(sockets=[listener])
