"""The denoising loop with its state on the GPU. A step is one CUDA graph that finds its row of the table itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lfdm_export.engines.checks import Array
from lfdm_export.engines.interface import Float32
from lfdm_export.engines.pytorch.session import TorchSession
from lfdm_export.errors import EngineError
from lfdm_export.ops.thresholded_step.gpu import noise_on_gpu
from lfdm_export.sampling.noise import START
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.stages import COEFFICIENTS, StageSpec


class TorchLoop:
    """Chains of `step` or `step_guided` for one batch size, one after the other.

    Any thread may call any method, and waits while another uses the same session; the caller is responsible for the
    order of calls in a chain. Between `begin` and `latent` only noise from the caller is copied from the host, and
    nothing waits.
    """

    def __init__(self, session: TorchSession, spec: StageSpec, batch: int) -> None:
        """Compile and capture the step for a batch.

        Args:
            session: session of a bundle; without a GPU its kernels need a stand-in.
            spec: the stage.
            batch: number of samples per chain.

        Raises:
            EngineError: the step cannot be compiled, or there is not enough memory.
        """
        self._session, self._spec, self._batch = session, spec, batch
        self._rows = session.manifest.config.dm.training_steps
        try:
            with session.owned():
                self._make()
        except RuntimeError as error:
            raise EngineError(f"stage {spec.name!r} cannot be prepared for a batch of {batch}: {error}") from error

    def _make(self) -> None:
        device, batch = self._session.device, self._batch
        dtypes = {"float32": torch.float32, "int64": torch.int64}
        #: Inputs of the network, at fixed addresses.
        self.inputs: dict[str, Tensor] = {
            tensor.name: torch.zeros(tensor.concrete(batch=batch), dtype=dtypes[tensor.dtype], device=device)
            for tensor in self._spec.inputs
        }
        self._times = torch.zeros(self._rows, dtype=torch.int64, device=device)
        self._coefficients = torch.zeros(self._rows, COEFFICIENTS, device=device)
        self._index = torch.zeros(1, dtype=torch.int64, device=device)
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        self._next = 0
        module, inputs = self._session.module(self._spec.name), tuple(self.inputs.values())
        self._program = self._session.program(f"{self._spec.name}-{batch}", module, inputs)
        self._step, _ = self._session.captured(self._queue_step)
        self._draw, _ = self._session.captured(self._queue_noise)
        self._silent = False

    def begin(self, start: Float32, fixed: Mapping[str, Array], table: SamplerTable) -> None:
        """Queue the start of a chain, and drop an incomplete one.

        Args:
            start: (batch, 3, T, h, w).
            fixed: the inputs that no step changes, by name.
            table: the sampler; each of its rows applies to all samples.
        """
        with self._session.owned():
            self._begin(fixed, table)
            self._upload(self.inputs["noisy_latent"], start)

    def begin_seeded(self, seeds: Sequence[int], fixed: Mapping[str, Array | Tensor], table: SamplerTable) -> None:
        """Like `begin`, with a start drawn on the GPU, as is the noise of every step.

        Args:
            seeds: one per sample, 0 to 2^64 - 1.
            fixed: as for `begin`; tensors may already be on the GPU.
            table: as for `begin`.
        """
        with self._session.owned():
            self._begin(fixed, table)
            self._upload(self._seeds, np.array(list(seeds), np.uint64).view(np.int64))
            self._index.fill_(START)
            self._draw()
            self.inputs["noisy_latent"].copy_(self.inputs["noise"])
            self._index.zero_()

    def _begin(self, fixed: Mapping[str, Array | Tensor], table: SamplerTable) -> None:
        if table.steps > self._rows:
            raise EngineError(f"the sampler takes {table.steps} steps, the model was trained with {self._rows}")
        for name, values in fixed.items():
            self._upload(self.inputs[name], values)
        self._upload(self._times[: table.steps], np.ascontiguousarray(table.timesteps, np.int64))
        self._upload(self._coefficients[: table.steps], np.ascontiguousarray(table.coefficients, np.float32))
        self.inputs["history"].zero_()
        self._index.zero_()
        self._next, self._silent = 0, False

    def step(self, index: int, noise: Float32 | None) -> None:
        """Queue one step.

        Args:
            index: row of the sampler.
            noise: (batch, 3, T, h, w), which may change as soon as this returns; None for none.
        """
        with self._session.owned():
            if noise is not None:
                self._upload(self.inputs["noise"], noise)
                self._silent = False
            else:
                self._without_noise()
            self._take(index)

    def step_seeded(self, index: int, *, draws: bool) -> None:
        """Queue one step of a chain from `begin_seeded`, with noise drawn on the GPU, or without."""
        with self._session.owned():
            if draws:
                self._find(index)
                self._draw()
                self._silent = False
            else:
                self._without_noise()
            self._take(index)

    def latent(self) -> Float32:
        """Wait for all queued work; return the latent (batch, 3, T, h, w) after the last step."""
        with self._session.owned():
            latent: NDArray[np.float32] = self.inputs["noisy_latent"].cpu().clone().numpy()
            return latent

    def finish(self) -> Float32:
        """Return the `latent` of a complete chain."""
        return self.latent()

    def _without_noise(self) -> None:
        if not self._silent:
            self.inputs["noise"].zero_()
            self._silent = True

    def _take(self, index: int) -> None:
        self._find(index)
        self._step()
        self._next = index + 1

    def _find(self, index: int) -> None:
        """Set the row for the next graph; a step advances it itself."""
        if index != self._next:
            self._index.fill_(index)
            self._next = index

    def _queue_noise(self) -> tuple[()]:
        shape = self.inputs["noise"].shape[1:]
        self.inputs["noise"].copy_(noise_on_gpu(self._seeds, self._index, shape))
        return ()

    def _queue_step(self) -> tuple[()]:
        row = self._index.clamp(0, self._rows - 1)
        self.inputs["timestep"].copy_(self._times.index_select(0, row).expand(self._batch))
        self.inputs["coefficients"].copy_(self._coefficients.index_select(0, row).expand(self._batch, -1))
        _, latent, history = self._program(*self.inputs.values())
        self.inputs["noisy_latent"].copy_(latent)
        self.inputs["history"].copy_(history)
        self._index.add_(1)
        return ()

    def _upload(self, target: Tensor, values: Array | Tensor) -> None:
        """Queue a copy; one from pageable host memory has been read when this returns."""
        source = values if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
        target.copy_(source, non_blocking=source.is_cuda)
