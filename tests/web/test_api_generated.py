"""2,000 requests that Schemathesis draws from the API's own description: each is answered as the description says."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="Schemathesis is not installed: make test-api")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `web` is not installed")

from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from lfdm_export.web.app import WebOptions  # noqa: E402
from tests.fake_bundle import write_fake_bundle  # noqa: E402
from tests.web.test_web import picture, serving  # noqa: E402

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
TOKEN = "of-the-test"
#: Requests in all, and those of one operation in one mode: positive ones fit the description, negative ones do not.
REQUESTS, EACH = 2000, 120
DRAWN = settings(
    max_examples=EACH, deadline=None, database=None, derandomize=True, phases=(Phase.generate,),
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


@pytest.fixture(scope="module")
def statuses() -> Counter[tuple[str, int]]:
    """How often each operation gave each status."""
    return Counter()


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory, statuses: Counter[tuple[str, int]]) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("generated")
    bundle = write_fake_bundle(folder / "fake")
    with serving(bundle, folder / "state", WebOptions(token=TOKEN, queue=4)) as (served, _):
        found = schemathesis.openapi.from_url(f"{served.address}/openapi.json")

        @found.hook
        def map_body(context: Any, body: Any) -> Any:
            """Give every other body that has all it needs a label and a picture: no text drawn at random is one."""
            if isinstance(body, dict) and {"prompt", "input_reference"} <= set(body) and len(str(body)) % 2:
                photo: bytes | str = picture()
                if not isinstance(body["input_reference"], bytes):  # JSON
                    photo = base64.b64encode(picture()).decode()
                return {**body, "prompt": bundle.labels[0], "input_reference": photo}
            return body

        @found.hook
        def after_call(context: Any, case: Any, response: Any) -> None:
            statuses[f"{case.method} {case.path}", response.status_code] += 1

        yield found


def ask(case: Any) -> None:
    case.call_and_validate(checks=CHECKS, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=120)


def test_every_operation_answers_as_it_is_described(schema: Any, statuses: Counter[tuple[str, int]]):
    for result in schema.get_all_operations():
        operation = result.ok()
        fixed = not (operation.body or operation.path_parameters or operation.query)
        for mode in (GenerationMode.POSITIVE,) if fixed else (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            try:
                DRAWN(given(case=operation.as_strategy(generation_mode=mode))(ask))()
            except Exception as error:
                error.add_note(f"{operation.label}, {mode}")
                raise


def test_chains_of_requests_are_answered_as_they_are_described(schema: Any, statuses: Counter[tuple[str, int]]):
    """What a request made is read, downloaded, cancelled and removed, in any order and more than once."""

    class Chain(schema.as_state_machine()):  # type: ignore[misc]
        def get_call_kwargs(self, case: Any) -> dict[str, Any]:
            return {"headers": {"Authorization": f"Bearer {TOKEN}"}, "timeout": 120}

        def validate_response(self, response: Any, case: Any, **more: Any) -> None:
            case.validate_response(response, checks=CHECKS)

    left = max(1, REQUESTS - statuses.total())
    Chain.run(settings=settings(DRAWN, max_examples=max(20, left // 10), stateful_step_count=20))
    print(statuses.total(), dict(sorted(statuses.items())))  # noqa: T201 (with -s: what was reached)
    assert statuses.total() >= REQUESTS
    met = {status for _, status in statuses}
    assert {200, 400, 404, 409} <= met, "the requests reach what the API does, not only what it refuses"
