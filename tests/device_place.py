"""A fake GPU with the fake bundle's plans loaded, and a chain on it; counts copies to and from the host."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.device_chain import DeviceChain
from lfdm_export.engines.tensorrt.device import GpuArray, GpuDevice
from lfdm_export.engines.tensorrt.engine import TensorRtEngine
from lfdm_export.ops.cuda.host import HostKernels
from tests.fake_bundle import GEOMETRY, TRAINING_STEPS
from tests.fake_gpu import FakeGpu, fake_plan

UP, DOWN = "cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2"


@dataclasses.dataclass
class Place:
    gpu: FakeGpu
    device: GpuDevice
    chain: DeviceChain[GpuArray]

    def copies(self) -> tuple[int, int]:
        """Copies to and from the host since the last call."""
        calls = Counter(self.gpu.library.calls)
        self.gpu.library.calls.clear()
        return calls[UP], calls[DOWN]


def make_place(bundle: Bundle, folder: Path, kernels: HostKernels, target: str = "tensorrt") -> Place:
    gpu = FakeGpu(target, bundle.stages)
    gpu.library.kernels = kernels
    engines = {
        stage: TensorRtEngine(fake_plan(bundle, stage, folder / f"{stage}.plan"), spec, session=gpu.session)
        for stage, spec in bundle.stages.items()
    }
    device = GpuDevice(bundle, target, engines)
    return Place(gpu, device, DeviceChain(device, bundle.stages, GEOMETRY, TRAINING_STEPS))
