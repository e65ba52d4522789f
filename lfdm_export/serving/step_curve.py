"""The seconds of a step by batch size on this machine, measured once per bundle and engine, and the slots they give."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from lfdm_export.batching.slots import Curve, choose_slots, measure_curve
from lfdm_export.engines.compiled_cache import user_compiled_cache
from lfdm_export.engines.cuda_driver import find_gpus
from lfdm_export.engines.device import DeviceMemoryError
from lfdm_export.engines.device_batch import RowStep
from lfdm_export.errors import EngineError
from lfdm_export.files.digests import json_digest
from lfdm_export.generate.stage_runner import StageRunner
from lfdm_export.sampling.options import takes_both_branches
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.stages import COEFFICIENTS

logger = logging.getLogger(__name__)

#: Batch sizes that are measured, as far as both sampling stages run them at once.
SIZES = (1, 2, 4, 8, 16)
_CACHE, _NAME = "steps", "curve"


def measured_slots(runner: StageRunner, *, on_device: bool) -> tuple[int, Curve]:
    """The number of slots for a bundle on this machine, and the curve that it comes from.

    The curve is of the sampling stage that the bundle's defaults use. It is kept in the user's cache folder under
    everything that determines it; a missing or damaged entry is measured again (seconds).

    Args:
        runner: runs the stages.
        on_device: whether the sampler keeps clips on the device.

    Raises:
        EngineError: an engine cannot be loaded or fails.
    """
    manifest = runner.bundle.manifest
    stage = "step_guided" if takes_both_branches(manifest.sampler.scale) else "step"
    most = min(runner.bundle.stages[name].batch[2] for name in ("step", "step_guided"))
    sizes = [size for size in SIZES if size <= most]
    facts: dict[str, Any] = {
        **runner.engine_facts(),
        "bundle_id": manifest.bundle_id,
        "gpus": [f"{gpu.name}, driver {gpu.driver}" for gpu in find_gpus()[0]],
        "stage": stage,
        "on_device": on_device,
        "sizes": sizes,
    }
    key = json_digest(facts)
    cache = user_compiled_cache(_CACHE)
    curve = None if cache is None else parse_curve(cache.read(_NAME, key), sizes)
    if curve is None:
        prepare = _device_steps(runner, stage) if on_device else _host_steps(runner, stage)
        curve = measure_curve(prepare, sizes)
        if not curve:
            raise EngineError(f"stage {stage!r} has no memory for a single sample; use a smaller model, or free memory")
        if cache is not None:
            cache.write(_NAME, key, json.dumps(curve).encode())
    slots = choose_slots(curve)
    logger.info("slots: %d, of %s", slots, described(curve))
    return slots, curve


def described(curve: Curve) -> str:
    """A curve in words: "15.8 ms for 1 clip, 59.2 ms for 4"."""
    (first, seconds), *more = sorted(curve.items())
    return ", ".join(
        [f"{1e3 * seconds:.3g} ms for {first} clip", *(f"{1e3 * later:.3g} ms for {size}" for size, later in more)]
    )


def parse_curve(text: bytes | None, sizes: list[int]) -> dict[int, float] | None:
    """A stored curve; None if it is no curve of the first of these sizes."""
    try:
        stored = json.loads(text or b"")
        curve = {int(size): float(seconds) for size, seconds in stored.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    good = all(math.isfinite(seconds) and seconds > 0 for seconds in curve.values())
    return curve if good and curve and sorted(curve) == sizes[: len(curve)] else None


def _host_steps(runner: StageRunner, stage: str) -> Callable[[int], Callable[[], object]]:
    """Steps with states on the host, as the sampler runs them."""
    spec = runner.bundle.stages[stage]

    def prepare(size: int) -> Callable[[], object]:
        zeros = [np.zeros(tensor.concrete(batch=size), tensor.dtype) for tensor in spec.inputs]
        return lambda: runner.run(stage, *zeros)

    return prepare


def _device_steps(runner: StageRunner, stage: str) -> Callable[[int], Callable[[], object] | None]:
    """Steps with states on the device, with fresh noise."""
    chain, stages = runner.device_chain, runner.bundle.stages
    inputs = (*stages["encode"].inputs, *stages[stage].inputs)
    zeros = {one.name: np.zeros(one.concrete(batch=1), one.dtype) for one in inputs}
    table = SamplerTable("", np.zeros(1, np.int64), np.zeros((1, COEFFICIENTS), np.float32), np.ones(1, np.bool_))

    def prepare(size: int) -> Callable[[], object] | None:
        try:
            batch = chain.batch(stage, size, fixed=True)
            encoded = chain.encode(zeros["image"])
            rows = [RowStep(chain.sample(stage, encoded, zeros, seed, table), 0, True) for seed in range(size)]
        except DeviceMemoryError as error:
            logger.info("no memory for a step of %d clips: %s", size, error)
            return None
        for row, one in enumerate(rows):
            batch.begin(row, one.sample)

        def step() -> None:
            batch.step(rows)
            batch.settle()

        return step

    return prepare
