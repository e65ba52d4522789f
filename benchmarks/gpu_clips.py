"""Clips on a GPU: the published program's way in PyTorch, and this project's; stage by stage and end to end.

`Ours` are the deployable modules with this project's kernels, one CUDA graph per stage: the step's graph reads its
coefficients, timestep and noise by an index that it advances itself, so that a clip is encode, ten launches of one
graph, decode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu_floors import Work
from benchmarks.gpu_kernels import published_step
from benchmarks.gpu_timing import captured
from lfdm_export.ops.thresholded_step.gpu import noise_on_gpu
from lfdm_export.rewrite.precision import channels_last, in_precision
from lfdm_export.rewrite.stage_modules import stage_modules
from lfdm_export.sampling.noise import START, seeded_noise
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.sampling.tables import sampler_table
from lfdm_models.lfae import latent_to_flow
from lfdm_models.model import LfdmModel

#: Frames of all samples that `Ours` decodes at once; more do not use the GPU better, and need memory.
DECODED_AT_ONCE = 320


@dataclass(frozen=True, eq=False)
class Task:
    """The clips to make.

    Attributes:
        image: (B, 3, H, W) float32 in [0, 1], on the device.
        embedding: (B, text_width) float32.
        seeds: one per sample.
        table: table of the sampler; DDIM, the only sampler of `Published`.
        frames: T.
        latent_size: h = w.
    """

    image: Tensor
    embedding: Tensor
    seeds: tuple[int, ...]
    table: SamplerTable
    frames: int
    latent_size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of one sample's latent."""
        return 3, self.frames, self.latent_size, self.latent_size


class Clips(Protocol):
    """A way to make the clips of a task, as stages that work on its own tensors."""

    def encode(self) -> object:
        """Encode the image for the other stages."""

    def start(self) -> object:
        """Set the chain to its start."""

    def step(self) -> object:
        """One step of the chain."""

    def decode(self) -> Tensor:
        """All frames of the current latent: (B, 3, T, H, W) float32."""

    def latent(self) -> Tensor:
        """The current latent, (B, 3, T, h, w) float32."""


def make(clips: Clips, steps: int) -> Tensor:
    """A whole clip, (B, 3, T, H, W)."""
    clips.encode()
    clips.start()
    for _ in range(steps):
        clips.step()
    return clips.decode()


def make_task(model: LfdmModel, batch: int, device: torch.device, *, image_size: int, frames: int, steps: int) -> Task:
    """A task with smooth pictures, embeddings and seeds, the same for the same batch size."""
    random = np.random.default_rng(0)
    coarse = torch.from_numpy(random.random((batch, 3, 8, 8), dtype=np.float32))
    image = nn.functional.interpolate(coarse, size=(image_size, image_size), mode="bicubic").clamp(0, 1)
    embedding = random.standard_normal((batch, model.config.dm.text_width), np.float32) * np.float32(0.3)
    table = sampler_table("ddim", model.diffusion.schedule(), steps, None)
    latent_size = image_size >> model.config.lfae.down_blocks
    return Task(
        image.to(device), torch.from_numpy(embedding).to(device), tuple(range(batch)), table, frames, latent_size
    )


class Published:
    """The faithful networks: the whole feature in every step, and encoder and decoder for every frame.

    Args:
        model: the networks, on the device.
        task: the clips to make.
        lower: dtype of autocast; None for float32.
        graphs: capture the network and the decoding of a frame as CUDA graphs.
        compiled: compile the network and the decoding by torch.compile.
    """

    def __init__(
        self,
        model: LfdmModel,
        task: Task,
        *,
        lower: torch.dtype | None = None,
        graphs: bool = False,
        compiled: bool = False,
    ) -> None:
        self._task, self._lower = task, lower
        self._device = device = task.image.device
        self._generator, self._residual = model.lfae.generator, model.config.residual_flow
        unet: Callable[..., Tensor] = model.diffusion.denoise_fn
        decode: Callable[..., Tensor] = self._decode_frame
        if compiled:
            unet, decode = _compiled(unet, device), _compiled(decode, device)
        batch, table = len(task.image), task.table
        source = seeded_noise(task.seeds, task.shape)
        draws = [source(START), *(source(i) for i in range(table.steps))]
        self._draws = torch.from_numpy(np.stack(draws)).to(device)
        rows = torch.from_numpy(table.coefficients).to(device)
        self._rows = rows[:, None].expand(-1, batch, -1).reshape(table.steps, batch, 11, 1, 1, 1, 1).contiguous()
        self._times = torch.from_numpy(np.ascontiguousarray(table.timesteps)).to(device)[:, None].expand(-1, batch)
        self._times = self._times.contiguous()
        self._x, self._index = torch.empty_like(self._draws[0]), 0
        self._row, self._time = torch.empty_like(self._rows[0]), torch.empty_like(self._times[0])
        self._feature = torch.empty(0)
        self._plane = torch.zeros(batch, 3, task.latent_size, task.latent_size, device=device)
        self.encode()
        prepare = captured if graphs else _as_it_is
        self._predict = prepare(lambda: self._predicted_noise(unet), device)
        self._frame = prepare(lambda: decode(task.image, self._plane), device)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        if self._lower is None:
            return contextlib.nullcontext()
        # Cached casts of weights would be freed before a captured graph reads them again.
        return torch.autocast(self._device.type, dtype=self._lower, cache_enabled=False)

    def _predicted_noise(self, unet: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad(), self._precision():
            return unet(self._x, self._feature, self._task.embedding, self._time)

    def _decode_frame(self, image: Tensor, latent: Tensor) -> Tensor:
        with torch.no_grad(), self._precision():
            flow = latent_to_flow(latent, residual_flow=self._residual)
            return self._generator.decode(image, self._generator.encode(image), flow).frame

    def encode(self) -> None:
        """See `Clips`."""
        with torch.no_grad(), self._precision():
            feature = self._generator.encode(self._task.image)[-1].float()
        if self._feature.numel():
            self._feature.copy_(feature)
        else:
            self._feature = feature

    def start(self) -> None:
        """See `Clips`."""
        self._index = 0
        self._x.copy_(self._draws[0])

    def step(self) -> None:
        """See `Clips`."""
        i = self._index % self._task.table.steps
        self._row.copy_(self._rows[i])
        self._time.copy_(self._times[i])
        predicted = self._predict().float()
        self._x.copy_(published_step(self._x, predicted, self._draws[i + 1], self._row))
        self._index += 1

    def decode(self) -> Tensor:
        """See `Clips`."""
        frames = []
        for i in range(self._task.frames):
            self._plane.copy_(self._x[:, :, i])
            frames.append(self._frame().float().clone())
        return torch.stack(frames, dim=2)

    def latent(self) -> Tensor:
        """See `Clips`."""
        return self._x.clone()


class Ours:
    """The deployable modules with this project's kernels.

    Args:
        model: the networks, on any device, float32.
        task: the clips to make.
        dtype: dtype of weights and activations.
        graphs: capture every stage as a CUDA graph.
        compiled: compile step and decoder by torch.compile.
        last: use the channels-last memory format.
    """

    def __init__(
        self,
        model: LfdmModel,
        task: Task,
        dtype: torch.dtype,
        *,
        graphs: bool = True,
        compiled: bool = False,
        last: bool = True,
    ) -> None:
        device, batch, table = task.image.device, len(task.image), task.table
        stages = stage_modules(model, task.frames)
        modules = in_precision({name: stages[name] for name in ("encode", "step", "decode")}, dtype)
        if last:
            channels_last(modules)
        modules = {name: module.to(device) for name, module in modules.items()}
        self.modules = dict(modules)
        if compiled:
            for name in ("step", "decode"):
                modules[name] = _compiled(modules[name], device)
        self._task = task
        self._seeds = torch.tensor(np.array(task.seeds, np.uint64).view(np.int64), device=device)
        self._rows = torch.from_numpy(table.coefficients).to(device)
        self._times = torch.from_numpy(np.ascontiguousarray(table.timesteps)).to(device)
        self._index = torch.zeros(1, dtype=torch.int64, device=device)
        self._first = torch.full((1,), START, dtype=torch.int64, device=device)
        self._x = torch.zeros(batch, *task.shape, device=device)
        self._history = torch.zeros(batch, 2, *task.shape, device=device)
        self.chunk = _chunk(task.frames, batch)
        self._part = torch.zeros(batch, 3, self.chunk, task.latent_size, task.latent_size, device=device)
        prepare = captured if graphs else _as_it_is
        self._encode = prepare(lambda: _run(modules["encode"], task.image), device)
        self._encoded: tuple[Tensor, ...] = self._encode()
        self._start = prepare(self._set_start, device)
        self._step = prepare(lambda: self._one_step(modules["step"]), device)
        *skips, _ = self._encoded
        self._decode = prepare(lambda: _run(modules["decode"], task.image, *skips, self._part), device)

    def _set_start(self) -> None:
        self._index.zero_()
        self._history.zero_()
        self._x.copy_(noise_on_gpu(self._seeds, self._first, self._task.shape))

    def _one_step(self, step: nn.Module) -> None:
        batch = len(self._x)
        index = self._index.clamp(max=len(self._times) - 1)
        row = self._rows.index_select(0, index).expand(batch, -1)
        time = self._times.index_select(0, index).expand(batch)
        noise = noise_on_gpu(self._seeds, index, self._task.shape)
        inputs = (self._x, self._encoded[-1], self._task.embedding, time, self._history, noise, row)
        _, latent, history = _run(step, *inputs)
        self._x.copy_(latent)
        self._history.copy_(history)
        self._index.add_(1)

    def encode(self) -> None:
        """See `Clips`."""
        encoded = self._encode()
        if encoded is not self._encoded:  # not captured: later stages read the first run's tensors
            for old, new in zip(self._encoded, encoded, strict=True):
                old.copy_(new)

    def start(self) -> None:
        """See `Clips`."""
        self._start()

    def step(self) -> None:
        """See `Clips`."""
        self._step()

    def decode(self) -> Tensor:
        """See `Clips`."""
        frames = []
        for first in range(0, self._task.frames, self.chunk):
            self._part.copy_(self._x[:, :, first : first + self.chunk])
            frames.append(self._decode()[0].clone())
        return torch.cat(frames, dim=2)

    def latent(self) -> Tensor:
        """See `Clips`."""
        return self._x.clone()

    def work(self) -> dict[str, Work]:
        """Minimum cost of a step and of decoding all frames, for the batch; multiply-adds count as two."""
        from torch.utils.flop_counter import FlopCounterMode

        batch = len(self._x)
        row, time = self._rows[:1].expand(batch, -1), self._times[:1].expand(batch)
        *skips, feature = self._encoded
        found = {}
        for name, arguments, runs in (
            ("step", (self._x, feature, self._task.embedding, time, self._history, self._x, row), 1),
            ("decode", (self._task.image, *skips, self._part), self._task.frames // self.chunk),
        ):
            module = self.modules[name]
            with FlopCounterMode(display=False) as counter:
                results = _run(module, *arguments)
            moved = runs * (_size(arguments) + _size(results)) + _size((*module.parameters(), *module.buffers()))
            found[name] = Work(float(runs * counter.get_total_flops()), float(moved))
        return found


def _chunk(frames: int, batch: int) -> int:
    """Frames decoded at once: a divisor of `frames`."""
    most = max(1, DECODED_AT_ONCE // batch)
    return max(part for part in range(1, frames + 1) if frames % part == 0 and part <= most)


def _run(module: nn.Module, *inputs: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        results: tuple[Tensor, ...] = module(*inputs)
    return results


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _compiled(module: Any, device: torch.device) -> Any:
    """Compile by torch.compile; in a trial on a CPU only trace, because CPU code says nothing about GPU code."""
    return torch.compile(module, dynamic=False, backend="inductor" if device.type == "cuda" else "eager")


def _as_it_is(run: Callable[[], Any], _device: torch.device) -> Callable[[], Any]:
    return run
