"""Engines are loaded before the first request, at the same time if the target allows it."""

from __future__ import annotations

import dataclasses
import threading
from typing import Any

import pytest

from lfdm_export import Bundle, Pipeline
from lfdm_export.engines.targets import spec_of
from lfdm_export.errors import EngineError
from lfdm_export.serving.models import warm_up as module
from lfdm_export.serving.models.warm_up import step_batches, warm_up

MINUTE = 60.0


@pytest.fixture
def pipeline(small_bundle: Bundle) -> Pipeline:
    return Pipeline.open(small_bundle, threads=1, target="onnxruntime", self_check=False)


def test_stages_are_loaded_and_run_with_their_batches(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    ran: list[tuple[str, int]] = []
    real = pipeline.stages.run

    def run(stage: str, *tensors: Any) -> Any:
        ran.append((stage, len(tensors[0])))
        return real(stage, *tensors)

    monkeypatch.setattr(pipeline.stages, "run", run)
    warm_up(pipeline, {**step_batches(2), "encode": [1]})
    assert sorted(ran) == [("encode", 1), *((name, batch) for name in ("step", "step_guided") for batch in (1, 2))]
    assert set(pipeline.stages.loaded) == {"step", "step_guided", "encode"}


def test_stages_are_loaded_at_the_same_time(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    meeting = threading.Barrier(2, timeout=MINUTE)  # breaks if one waits for the other
    monkeypatch.setattr(pipeline.stages, "run", lambda *_: meeting.wait())
    warm_up(pipeline, {"encode": [1], "decode": [1]})


def test_a_target_that_does_not_allow_it_loads_one_after_the_other(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    threads = set()
    monkeypatch.setattr(module, "spec_of", lambda name: dataclasses.replace(spec_of(name), loads_together=False))
    monkeypatch.setattr(pipeline.stages, "run", lambda *_: threads.add(threading.get_ident()))
    warm_up(pipeline, {"encode": [1], "decode": [1], "step": [1]})
    assert len(threads) == 1


def test_an_engine_that_cannot_be_loaded_is_an_error(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    def run(stage: str, *_: Any) -> None:
        if stage == "decode":
            raise EngineError("decode cannot be loaded")

    monkeypatch.setattr(pipeline.stages, "run", run)
    with pytest.raises(EngineError, match="decode cannot be loaded"):
        warm_up(pipeline, {"encode": [1], "decode": [1]})
