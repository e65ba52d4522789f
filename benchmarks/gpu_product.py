"""The target torch as users run it: whole clips from a picture on the host to 8-bit frames on the host."""

from __future__ import annotations

import math
import os
import time
from types import SimpleNamespace
from typing import cast

import numpy as np
import torch

from benchmarks.gpu_records import Record
from benchmarks.gpu_timing import measure_wall
from benchmarks.gpu_work import Bench
from lfdm_export.bundle.manifest import Manifest
from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.interface import ClipRequest
from lfdm_export.engines.pytorch.clips import TorchClipMaker
from lfdm_export.engines.pytorch.compiled import VARIABLE
from lfdm_export.engines.pytorch.session import TorchSession
from lfdm_export.engines.pytorch.weights import DTYPES
from lfdm_export.export.bundle_export import geometry_of
from lfdm_export.pictures.preprocess import Preprocessing
from lfdm_export.rewrite.precision import in_precision
from lfdm_export.rewrite.stage_modules import stage_modules
from lfdm_export.stages import stage_specs


def measure_product(bench: Bench, precision: str, batches: tuple[int, ...]) -> Record:
    """Clips per second and distance from the faithful networks, by batch size; compiled as for users."""
    if bench.device.type != "cuda":  # compiling for a CPU takes minutes and says nothing about a GPU
        os.environ[VARIABLE] = "0"
    for batch in batches:
        bench.budget.need(25, f"batch {batch}")
        task = bench.task(batch)
        start = time.monotonic()
        session = _session(bench, precision, task.frames, task.image.shape[-1])
        stages = {spec.name: spec for spec in session.manifest.stages}
        maker = TorchClipMaker(session, stages["encode"], stages["step"], batch)
        record: Record = {"seconds_to_prepare": time.monotonic() - start}
        fixed = {"text_embedding": task.embedding.cpu().numpy()}
        request = ClipRequest(task.image.cpu().numpy(), fixed, task.seeds, task.table)
        made = maker.make(request)
        if batch == 1 and bench.settings.reference.is_file():
            record["psnr"] = _psnr(bench, made.frames)
        record["end_to_end"] = measure_wall(lambda m=maker, r=request: m.make(r), bench.device, seconds=0.6).plain()  # type: ignore[misc]
        bench.keep({str(batch): record})
        del maker, session
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return {}


def _session(bench: Bench, precision: str, frames: int, size: int) -> TorchSession:
    """A session of the bench's model, equal to one of its bundle."""
    assert bench.model is not None
    geometry = geometry_of(bench.model.config, frames, size)
    manifest = Manifest(
        config=bench.model.config,
        geometry=geometry,
        precision=precision,
        stages=tuple(stage_specs(geometry).values()),
        labels=(),
        preprocessing=Preprocessing(),
        provenance={},
        versions={},
    )
    stages = stage_modules(bench.model, frames)
    modules = in_precision({name: stages[name] for name in ("encode", "step", "decode")}, DTYPES[precision])
    placed = {name: module.to(bench.device) for name, module in modules.items()}
    return TorchSession(cast(Bundle, SimpleNamespace(manifest=manifest)), modules=placed)


def _psnr(bench: Bench, frames: np.ndarray) -> float | None:
    """PSNR of 8-bit frames (1, T, H, W, 3) against those of the faithful networks in float32, rounded alike."""
    reference = torch.load(bench.settings.reference, weights_only=True)["frames"]
    expected = (reference.permute(0, 2, 3, 4, 1).clamp(0, 1) * 255).to(torch.uint8).numpy()
    square = float(np.mean(((frames.astype(np.float64) - expected) / 255) ** 2))
    return None if square == 0 else -10 * math.log10(square)
