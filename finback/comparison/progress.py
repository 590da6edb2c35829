"""How far one contestant is: answers, rate, time left, money so far. No torch here."""

import sys
import time

from finback.runs.progress import clock

MOST_ANSWERS = 20  # after a tenth of all answers, or so many, the time left is told


class Progress:
    """A line on stderr, rewritten on a terminal, else repeated every ten seconds."""

    def __init__(self, name: str, total: int, kept: int) -> None:
        self.name, self.total, self.kept = name, total, kept
        self.done, self.failed, self.dollars, self.priced = 0, 0, 0.0, True
        self._began, self._last = time.monotonic(), 0.0

    def count(self, failed: bool, dollars: float | None) -> None:
        """One more answer, or failure."""
        self.done, self.failed = self.done + 1, self.failed + failed
        if not failed:
            self.priced = self.priced and dollars is not None
            self.dollars += dollars or 0.0
        terminal = sys.stderr.isatty()
        if time.monotonic() - self._last >= (0.2 if terminal else 10) or self.done == self.total:
            self._last = time.monotonic()
            end = "\n" if not terminal or self.done == self.total else ""
            print(f"\r\033[K{self.text()}" if terminal else self.text(), end=end, file=sys.stderr, flush=True)

    def text(self) -> str:
        """The line; rate and time left are of this run's answers alone, money too."""
        rate = self.done / max(1e-9, time.monotonic() - self._began)
        money = f"${self.dollars:.4f}" if self.priced else "price NOT PROVIDED"
        failed = f"  {self.failed} failed" if self.failed else ""
        kept = f"  {self.kept:,} kept from before" if self.kept else ""
        # the first answers wait for the model to load, or come many at once
        known = self.done >= min(MOST_ANSWERS, self.total / 10)
        left = f"{clock((self.total - self.done) / rate)} left  " if known else ""
        return f"{self.name}  {self.done:,}/{self.total:,} answers  {rate:,.2f}/s  {left}{money}{failed}{kept}"
