"""Whatever fits the interface's own document, or nearly fits it, gets an answer that the document foresees."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS

from finback.serve import openapi
from finback.serve.http import digests
from tests.serving import KEY, Scripted, served, wait_for

DOCUMENT = schemathesis.openapi.from_dict(openapi.document())
OPERATIONS = [
    (operation.path, operation.method.upper())
    for result in DOCUMENT.get_all_operations()
    for operation in [result.ok()]
]
CHECKED = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "response_headers_conformance",
)
# what breaks the document must be refused as well
NEGATIVE = (*CHECKED, "negative_data_rejection")


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    engine = Scripted(rows=32, window=128)
    with served(engine, keys=digests([KEY]), queue=200) as client:
        yield client
        wait_for(lambda: not engine.busy)
        assert engine.leaked == 0
        counted = client.get("/metrics").text
        assert 'status="5' not in counted and 'status="200"' in counted
        assert client.get("/ready").status_code == 200


def fuzz(client: httpx.Client, path: str, method: str, mode: GenerationMode, cases: int) -> None:
    """Send this many cases for one operation."""
    operation: Any = DOCUMENT[path][method]
    names = NEGATIVE if mode is GenerationMode.NEGATIVE else CHECKED
    checks = CHECKS.get_by_names(names)

    @settings(
        max_examples=cases,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def send(case: Case) -> None:
        response = case.call(base_url=str(client.base_url), headers={"authorization": f"Bearer {KEY}"}, timeout=30)
        case.validate_response(response, checks=checks)
        assert response.elapsed < 30

    send()


def modes(path: str, method: str) -> list[GenerationMode]:
    """A GET without parameters cannot be wrong."""
    is_plain = method == "GET" and "{" not in path
    return [GenerationMode.POSITIVE] if is_plain else [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]


CASES = [(path, method, mode) for path, method in OPERATIONS for mode in modes(path, method)]


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_a_few_requests_of_every_kind(client: httpx.Client, path: str, method: str, mode: GenerationMode) -> None:
    fuzz(client, path, method, mode, 20)


@pytest.mark.slow
@pytest.mark.parametrize(("path", "method", "mode"), [c for c in CASES if c[1] == "POST"])
def test_a_thousand_requests_of_every_kind(client: httpx.Client, path: str, method: str, mode: GenerationMode) -> None:
    fuzz(client, path, method, mode, 1000)
