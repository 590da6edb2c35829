"""How far a stage is: done, rate, time left, money so far."""

import sys
import time

from finback.runs.folder import StageRun
from finback.runs.ledger import DOLLARS_PER_CORE_HOUR


class Progress:
    """A line that says how far a stage is: done, rate, time left, money so far; one line per 10 s without a terminal."""

    def __init__(self, run: StageRun, total: float, unit: str, spent: float = 0.0) -> None:
        self.run, self.total, self.unit, self.spent = run, total, unit, spent
        self.started, self.last = time.perf_counter(), 0.0
        self.first: float | None = None

    def show(self, done: float, note: str = "") -> None:
        """Report that `done` of `total` units are finished."""
        now = time.perf_counter()
        self.first = done if self.first is None else self.first
        terminal = sys.stderr.isatty()
        if self.run.quiet or not self.run.is_writer or now - self.last < (0.2 if terminal else 10):
            return
        self.last = now
        elapsed = now - self.started
        rate = (done - self.first) / elapsed if elapsed > 0 else 0.0
        left = clock(max(0.0, self.total - done) / rate) if rate > 0 else "?"
        money = (self.spent + elapsed) * self.run.ranks.size * DOLLARS_PER_CORE_HOUR / 3600
        text = (
            f"{self.run.name:10} {done:,.0f}/{self.total:,.0f} {self.unit}  {rate:,.1f}/s  "
            f"{left} left at most  ${money:.4f}  {note}"
        )
        print(f"\r\033[K{text}" if terminal else text, end="" if terminal else "\n", file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """75 -> '1:15'."""
    seconds = int(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
