"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import httpx

    from tests.serving import Scripted

# every run draws the same examples, and a busy machine fails none of them
settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test draws the same numbers in every run and in any order; module fixtures run after this, too."""
    import torch  # every worker imports it sooner or later

    torch.manual_seed(0)


@pytest.fixture(scope="module")
def engine() -> Scripted:
    """An engine whose answers a test scripts."""
    from tests.serving import Scripted  # most tests need no server

    return Scripted()


@pytest.fixture(scope="module")
def client(engine: Scripted) -> Iterator[httpx.Client]:
    """A client of a server on the scripted engine."""
    from tests.serving import served

    with served(engine, aliases=("toy-chat",)) as client:
        yield client


@pytest.fixture
def nothing_is_left(engine: Scripted) -> Iterator[None]:
    """Each test starts with an engine without a script, and must leave it idle."""
    from tests.serving import wait_for

    engine.script, engine.pace = None, 0.0
    engine.seen.clear()
    yield
    wait_for(lambda: not engine.busy)
    assert engine.leaked == 0
