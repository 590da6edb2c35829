"""Signals to a server in a separate process."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest

from tests.serving import CHAT, HELLO, events, summed, wait_for
from tests.toy import ROOT, environment

LONG = HELLO | {"max_tokens": 800, "ignore_eos": True}

PROGRAM = """
import sys, threading
from pathlib import Path
from finback.serve import http, server
from finback.serve.options import ServeOptions
from tests.serving import Scripted, small_tokenizer
options = ServeOptions(model=Path("toy"), page=False, drain=float(sys.argv[1]))
engine = Scripted()
engine.hold_at = 20

def go_on():
    sys.stdin.readline()
    engine.hold_at = None

threading.Thread(target=go_on, daemon=True).start()
app = server.build(engine, small_tokenizer(), options)
listener = http.listen("127.0.0.1", 0)
server.serve(app, listener)
"""


@contextmanager
def process(drain: float) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server in a process, which answers with 20 tokens and goes on when it reads a line, and a client for it."""
    command = [sys.executable, "-c", PROGRAM, str(drain)]
    child = subprocess.Popen(
        command, env=environment(), cwd=ROOT, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stderr is not None
        line = child.stderr.readline()
        assert line.startswith("serving toy at http://127.0.0.1:"), line + child.stderr.read()
        with httpx.Client(base_url=line.split()[-1].removesuffix("/v1"), timeout=60, trust_env=False) as client:
            wait_for(lambda: client.get("/health").is_success)
            yield child, client
    finally:
        child.kill()
        child.communicate()


def test_sigterm_drains() -> None:
    with process(drain=600) as (child, client):
        request = HELLO | {"max_tokens": 40, "ignore_eos": True, "stream": True}
        with client.stream("POST", CHAT, json=request) as response:
            lines = response.iter_lines()
            first = next(lines)
            child.send_signal(signal.SIGTERM)
            wait_for(lambda: client.get("/ready").status_code == 503)
            assert client.post(CHAT, json=HELLO).status_code == 503
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
            chunks = events(iter([first, *lines]))
        assert chunks[-1] == "[DONE]" and summed(chunks)["finish_reason"] == "length"
        assert child.wait(timeout=60) == 0


@pytest.mark.slow
def test_sigterm_ends_what_takes_too_long_and_a_second_signal_everything() -> None:
    with process(drain=0.5) as (child, client):
        with client.stream("POST", CHAT, json=LONG | {"stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            child.send_signal(signal.SIGTERM)
            *_, last = events(lines)
        assert last["error"]["code"] == "shutting_down"
        assert child.wait(timeout=60) == 0

    with process(drain=600) as (child, client), client.stream("POST", CHAT, json=LONG | {"stream": True}) as response:
        next(response.iter_lines())
        child.send_signal(signal.SIGTERM)
        wait_for(lambda: client.get("/ready").status_code == 503)
        os.kill(child.pid, signal.SIGTERM)
        assert child.wait(timeout=60) == 128 + signal.SIGTERM
