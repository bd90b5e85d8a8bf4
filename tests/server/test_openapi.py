"""The server keeps to its own OpenAPI document; schemathesis makes up the requests."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from server_harness import Server

LIMITS = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def document() -> Iterator[Any]:
    # Bodies are refused for what is in them here, and some that are made up are large.
    server = Server({"server": {"max_body_bytes": 2**26}})
    yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    code, errors = server.stop()
    assert code == 0 and "Traceback" not in errors, errors


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_responses_are_as_documented(document: Any, mode: GenerationMode) -> None:
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) >= 22
    tried = 0
    for operation in operations:

        @LIMITS
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Case) -> None:
            nonlocal tried
            tried += 1
            # Limits that depend on the model, and 2.0 as an integer, are beyond a schema's words.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        try:
            check()
        except Unsatisfiable:  # a route without a body or parameters cannot be called wrongly
            assert mode is GenerationMode.NEGATIVE and not operation.body
    assert tried > 60
