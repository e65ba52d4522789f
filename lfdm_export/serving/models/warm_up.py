"""Engines loaded before the first request."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from lfdm_export.engines.targets import spec_of
from lfdm_export.generate.pipeline import Pipeline


def warm_up(pipeline: Pipeline, batches: Mapping[str, Collection[int]]) -> None:
    """Load the engines of stages and run each on zeros; all stages at once, if the target allows it.

    Args:
        pipeline: the bundle's pipeline.
        batches: the batches to run, by stage.

    Raises:
        EngineError: an engine cannot be loaded, or fails.
    """
    stages, specs = pipeline.stages, pipeline.bundle.stages

    def run(name: str) -> None:
        for batch in batches[name]:
            stages.run(name, *(np.zeros(tensor.concrete(batch=batch), tensor.dtype) for tensor in specs[name].inputs))

    together = spec_of(stages.target).loads_together
    with ThreadPoolExecutor(len(batches) if together else 1, "lfdm-load") as threads:
        for _ in threads.map(run, batches):
            pass


def step_batches(slots: int) -> dict[str, list[int]]:
    """The batches of both sampling stages that a sampler runs first: one sample, and all slots."""
    batches = sorted({1, slots})
    return {"step": batches, "step_guided": batches}
