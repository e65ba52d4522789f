"""PyTorch's device as a `lfdm_export.engines.device.Device`: tensors, and compiled programs as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.checks import Array
from lfdm_export.engines.device import PICTURES, DeviceMemoryError, Layout
from lfdm_export.engines.device_chain import DeviceChain
from lfdm_export.engines.pytorch.interfaces import PictureDecode
from lfdm_export.engines.pytorch.session import TorchSession, torch_session
from lfdm_export.engines.target_spec import Target
from lfdm_export.errors import EngineError
from lfdm_export.ops.cuda.dispatch import on_gpu
from lfdm_export.ops.thresholded_step.gpu import noise_on_gpu
from lfdm_export.rewrite.lfae import Decode
from lfdm_export.sampling.noise import noise_for
from lfdm_export.stages import StageSpec
from lfdm_export.wording import one_line


class TorchDevice:
    """Implements `lfdm_export.engines.device.Device`, on a GPU or on the CPU."""

    def __init__(self, session: TorchSession, stages: Mapping[str, StageSpec]) -> None:
        """Use a session.

        Args:
            session: session of a bundle.
            stages: its stages.
        """
        self._session, self._specs = session, stages
        self._results: dict[str, Tensor] | None = None

    def owned(self) -> AbstractContextManager[None]:
        """Reserve the session for this thread."""
        return self._session.owned()

    def zeros(self, shape: Sequence[int], dtype: str) -> Tensor:
        """New memory, filled with zeros."""
        try:
            return torch.zeros(tuple(shape), dtype=getattr(torch, dtype), device=self._session.device)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(f"PyTorch has no memory for {dtype} {tuple(shape)}: {one_line(error)}") from error

    def results(self, stage: str, batch: int) -> dict[str, Tensor]:
        """New memory for the outputs of a stage; those of the encoder have the dtype and layout of its weights."""
        spec = self._specs[stage]
        if stage != "encode":
            return {one.name: self.zeros(one.concrete(batch=batch), one.dtype) for one in spec.outputs}
        assert batch == 1
        if self._results is None:
            image = self.zeros(spec.inputs[0].concrete(batch=1), "float32")
            made = self._program(stage, {"image": image})()
            self._results = {one.name: tensor for one, tensor in zip(spec.outputs, made, strict=True)}
        return {name: torch.zeros_like(tensor) for name, tensor in self._results.items()}

    def upload(self, target: Tensor, values: Array) -> None:
        """Copy from the host."""
        source = torch.from_numpy(np.array(values)).reshape(target.shape)
        if self._session.on_gpu:
            # PyTorch keeps pinned memory until its copies are done.
            target.copy_(source.pin_memory(), non_blocking=True)
        else:
            target.copy_(source)

    def download(self, sources: Sequence[Tensor]) -> list[Array]:
        """Wait for all queued work; return copies of the arrays."""
        on_gpu = self._session.on_gpu
        found = [torch.empty(one.shape, dtype=one.dtype, pin_memory=on_gpu) for one in sources]
        for target, source in zip(found, sources, strict=True):
            target.copy_(source, non_blocking=True)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return [tensor.numpy() for tensor in found]

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy between arrays of one shape, also of two dtypes."""
        target.copy_(source)

    def clear(self, target: Tensor) -> None:
        """Fill with zeros."""
        target.zero_()

    def draw(self, noise: Tensor, seeds: Tensor, steps: Tensor) -> None:
        """Fill noise with the values of `noise_for`."""
        if on_gpu(noise):
            noise.copy_(noise_on_gpu(seeds, steps, noise.shape[1:]))
            return
        for row, seed, step in zip(noise, seeds.numpy().view(np.uint64), steps.tolist(), strict=True):
            row.copy_(torch.from_numpy(noise_for([int(seed)], step, row.shape)[0]))

    def flag_not_finite(self, values: Tensor, flag: Tensor) -> None:
        """Set the flag to 1 if a value is not finite."""
        flag.logical_or_((~values.isfinite()).any())

    def program(
        self, stage: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], flag: Tensor | None = None
    ) -> Callable[[], None]:
        """Prepare a stage; see `Device.program`. 8-bit pictures are made inside the decoder, so `flag` stays."""
        del flag
        compute = self._program(stage, inputs)
        spec = self._specs["decode" if stage == PICTURES else stage]
        names = [one.name for one in spec.outputs]

        def queue() -> tuple[()]:
            # A sampling stage also returns the predicted noise, first.
            for name, result in zip(names, compute()[-len(names) :], strict=True):
                outputs[name].copy_(result)
            return ()

        try:
            run, _ = self._session.captured(queue)
        except torch.OutOfMemoryError as error:
            raise DeviceMemoryError(f"PyTorch has no memory for {stage}: {one_line(error, 300)}") from error
        except RuntimeError as error:
            raise EngineError(f"stage {stage!r} cannot be prepared: {one_line(error, 300)}") from error

        def queued() -> None:
            try:
                run()
            except RuntimeError as error:  # the exceptions of torch, out of memory too, derive from it
                raise EngineError(f"stage {stage!r} failed in PyTorch: {one_line(error, 300)}") from error

        return queued

    def mark(self) -> Callable[[], None]:
        """A function that waits for the work queued until now."""
        if not self._session.on_gpu:
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        return event.synchronize

    def layouts(self, frames: int) -> Sequence[Layout]:
        """One row with all frames, or with a divisor of their number."""
        return [Layout(1, part) for part in range(frames, 0, -1) if frames % part == 0]

    def _program(self, stage: str, inputs: Mapping[str, Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        spec = self._specs["decode" if stage == PICTURES else stage]
        tensors = [inputs[one.name] for one in spec.inputs]
        module: nn.Module = self._session.module(spec.name)
        if stage == PICTURES:
            module = PictureDecode(cast(Decode, module))
        compiled = self._session.program(f"{stage}-{len(tensors[0])}", module, tensors)
        return lambda: compiled(*tensors)


def device_chain(bundle: Bundle, _target: Target, threads: int | None) -> DeviceChain[Tensor]:
    """Whole clips of a bundle on PyTorch's device.

    Args:
        bundle: a bundle exported for the target torch.
        threads: threads of the session, which the engines of the bundle share; None for all cores.

    Raises:
        EngineError: a stage cannot be compiled, or there is not enough memory.
    """
    device = TorchDevice(torch_session(bundle, threads=threads), bundle.stages)
    manifest = bundle.manifest
    return DeviceChain(device, bundle.stages, manifest.geometry, manifest.config.dm.training_steps)
