"""Progress display: done, rate, time left, money so far, for stages and comparisons. Does not import torch.

rich's live displays are not used: they start a thread, which does not survive a fork, and they hide the cursor until they
are stopped, which a killed rank cannot do.
"""

import html
import time
from typing import Any

from rich.console import Console
from rich.control import Control
from rich.progress_bar import ProgressBar
from rich.segment import ControlType
from rich.text import Text

from finback.runs.folder import StageRun
from finback.runs.ledger import DOLLARS_PER_CORE_HOUR

REDRAWN, REPEATED = 0.2, 10.0  # seconds between updates of a redrawn line, and between separate lines
LEAST_BAR, MOST_BAR = 8, 40  # columns


class ProgressLine:
    """A line on stderr that is redrawn in a terminal or notebook; elsewhere a new line every ten seconds.

    `sure`: amount that must be done before the time left is shown, since a model's first answers wait for its weights.
    """

    def __init__(self, name: str, total: float, unit: str, sure: float = 0.0) -> None:
        self.name, self.total, self.unit, self.sure = name, total, unit, sure
        self.console = Console(stderr=True)
        self.in_terminal = self.console.file.isatty() and not self.console.is_dumb_terminal
        self.began, self._last = time.monotonic(), float("-inf")
        self._output: Any = None  # the notebook's output area

    def draw(self, done: float, new: float, dollars: float | None, note: str = "", end: bool = False) -> None:
        """Reports that `done` of `total` units are finished, `new` of them since this line began; `end` ends the line."""
        now = time.monotonic()
        redrawn = self.in_terminal or self.console.is_jupyter
        if not end and not (redrawn and done >= self.total) and now - self._last < (REDRAWN if redrawn else REPEATED):
            return
        self._last = now
        text = self.text(done, new, dollars, note)
        if self.console.is_jupyter:
            self._draw_in_notebook(done, text)
        elif self.in_terminal:
            self._redraw(done, text, "\n" if end else "")
        else:
            print(text, file=self.console.file, flush=True)

    def text(self, done: float, new: float, dollars: float | None, note: str = "") -> str:
        """The line, most important parts first; rate and time left are based on `new`."""
        elapsed = time.monotonic() - self.began
        rate = new / elapsed if elapsed > 0 else 0.0
        speed = f"{short(rate)}/s" if rate > 0 else ""
        left = f"{clock(max(0.0, self.total - done) / rate)} left" if rate > 0 and new >= self.sure else ""
        money = "price NOT PROVIDED" if dollars is None else f"${dollars:.4f}"
        parts = (f"{self.name} {short(done)}/{short(self.total)} {self.unit}", speed, left, money, note)
        return ", ".join(part for part in parts if part)

    def _redraw(self, done: float, text: str, end: str) -> None:
        """Draws one column less than the terminal's width: a wrapped line could not be erased."""
        width = self.console.width - 1
        line = Text(text)
        line.truncate(width, overflow="ellipsis")
        with self.console:  # written at once
            self.console.control(Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2)))
            self.console.print(line, end="")
            if (room := width - line.cell_len - 1) >= LEAST_BAR:
                self.console.print(" ", end="")
                self.console.print(ProgressBar(max(self.total, 1), done, min(room, MOST_BAR)), end="")
            self.console.print(end, end="")

    def _draw_in_notebook(self, done: float, text: str) -> None:
        from IPython.display import display

        bar = f'<progress value="{done}" max="{self.total}"></progress> {html.escape(text)}'
        data = {"text/plain": text, "text/html": bar}
        if self._output is None:
            self._output = display(data, raw=True, display_id=True)
        else:
            self._output.update(data, raw=True)


class Progress(ProgressLine):
    """A stage's progress line, shown by rank 0; `spent`: seconds the stage took before it was resumed."""

    def __init__(self, run: StageRun, total: float, unit: str, spent: float = 0.0) -> None:
        super().__init__(run.name, total, unit)
        self.run, self.spent = run, spent
        self.first: float | None = None

    def show(self, done: float, note: str = "") -> None:
        """Reports that `done` of `total` units are finished."""
        self.first = done if self.first is None else self.first
        if self.run.is_writer and not self.run.quiet:
            seconds = self.spent + time.monotonic() - self.began
            dollars = seconds * self.run.ranks.size * DOLLARS_PER_CORE_HOUR / 3600
            self.draw(done, done - self.first, dollars, note)


def short(count: float) -> str:
    """1234567 -> 1.235M, 12345 -> 12,345, 1.2345 -> 1.23."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= max(size, 1e5):
            return f"{count / size:.4g}{letter}"
    return f"{count:,.0f}" if count >= 100 or count == int(count) else f"{count:.3g}"


def clock(seconds: float) -> str:
    """75 -> '1:15'."""
    seconds = int(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
