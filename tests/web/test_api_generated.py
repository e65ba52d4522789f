"""2,000 requests that Schemathesis draws from the API's own description: each is answered as the description says."""

from __future__ import annotations

import base64
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

schemathesis = pytest.importorskip("schemathesis", reason="Schemathesis is not installed: make test-api")
uvicorn = pytest.importorskip("uvicorn", reason="the extra `web` is not installed")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
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
#: Requests in all. Rounds mix the operations: what one round makes, the next reads, downloads, cancels and removes.
REQUESTS, ROUNDS, EACH = 2000, 6, 30
#: Positive cases fit the description, negative ones do not.
MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
#: Fields whose random values fit no model.
OF_THE_MODEL = ("crop", "size", "seconds", "extra")
DRAWN = settings(
    max_examples=EACH, deadline=None, database=None, phases=(Phase.generate,), suppress_health_check=list(HealthCheck)
)


def test_every_request_is_answered_as_it_is_described(tmp_path: Path):
    bundle = write_fake_bundle(tmp_path / "fake")
    statuses: Counter[tuple[str, int]] = Counter()
    videos: list[str] = []
    whole = picture()

    def ask(case: Any) -> None:
        """Send a request; no text drawn at random is a label, a picture or an id, so that some get real ones."""
        number, body = statuses.total(), case.body
        if number % 3 and isinstance(body, dict) and {"prompt", "input_reference"} <= set(body):
            photo = whole if isinstance(body["input_reference"], bytes) else base64.b64encode(whole).decode()
            case.body = {**body, "prompt": bundle.labels[0], "input_reference": photo}
            if number % 3 == 2:  # without what has to fit the model
                case.body = {name: value for name, value in case.body.items() if name not in OF_THE_MODEL}
        if videos and "name" in case.path_parameters and number % (12 if case.method == "DELETE" else 2) == 0:
            case.path_parameters = {"name": videos[-1 - number // 12 % min(8, len(videos))]}
        headers = {"Authorization": f"Bearer {TOKEN}", "Accept": ("*/*", "image/gif", "text/html")[number % 3]}
        response = case.call_and_validate(checks=CHECKS, headers=headers, timeout=120)
        statuses[f"{case.method} {case.path}", response.status_code] += 1
        if (case.method, case.path, response.status_code) == ("POST", "/v1/videos", 200):
            videos.append(response.json()["id"])

    with serving(bundle, tmp_path / "state", WebOptions(token=TOKEN, queue=4)) as (served, _):
        operations = [
            found.ok() for found in schemathesis.openapi.from_url(f"{served.address}/openapi.json").get_all_operations()
        ]
        for number in range(ROUNDS):
            for operation in operations:
                fixed = not (operation.body or operation.path_parameters or operation.query)
                for mode in MODES[:1] if fixed else MODES:
                    drawn = given(case=operation.as_strategy(generation_mode=mode))(ask)
                    try:
                        seed(number)(DRAWN(drawn))()
                    except Exception as error:
                        error.add_note(f"{operation.label}, {mode}, round {number}")
                        raise
    for (operation, status), count in sorted(statuses.items()):
        print(f"{count:5d} × {status}  {operation}")  # noqa: T201 (with -s: what was reached)
    assert statuses.total() >= REQUESTS
    assert {200, 400, 404, 406, 409} <= {status for _, status in statuses}, "more is reached than refusals"
