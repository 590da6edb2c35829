"""How fast an endpoint may be asked: so many requests a minute, and none while it says that it is busy. No torch here."""

import threading
import time


class Pace:
    """Shared by the threads that ask one endpoint; `rate` is requests a minute, 0 any number."""

    def __init__(self, rate: float, stop: threading.Event) -> None:
        self.gap = 60 / rate if rate else 0.0
        self.stop = stop
        self._lock = threading.Lock()
        self._next = 0.0  # when the next request may go, in monotonic time
        self._resume = 0.0

    def wait(self) -> bool:
        """Wait for this request's turn; False when it will not come because all is to stop."""
        with self._lock:
            turn = max(time.monotonic(), self._next)
            self._next = turn + self.gap
        while (left := max(turn, self._resume) - time.monotonic()) > 0:
            if self.stop.wait(left):
                break
        return not self.stop.is_set()

    def pause(self, seconds: float) -> None:
        """Let nobody ask for a while: a server that is busy for one is busy for all."""
        self._resume = max(self._resume, time.monotonic() + seconds)
