"""The three compared ways to make a clip: two of the published program, and the bundle."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.pictures.preprocess import to_float
from lfdm_export.sampling.loop import sample, step_from_denoiser
from lfdm_export.sampling.rows import SamplerTable
from lfdm_models.generator import Generator
from lfdm_models.lfae import latent_to_flow
from lfdm_models.model import LfdmModel

Float32: TypeAlias = NDArray[np.float32]
#: The naive export's opset: the oldest whose GridSample runs everywhere.
NAIVE_OPSET = 20


@dataclass(frozen=True, eq=False)
class Task:
    """One clip to make.

    Attributes:
        image: (1, H, W, 3) uint8.
        embedding: text embedding (1, text_width) float32.
        table: table of the sampler.
        draws: the noise: the start, then one per step that draws noise; (1, 3, T, h, w) float32 each.
    """

    image: NDArray[np.uint8]
    embedding: Float32
    table: SamplerTable
    draws: Sequence[Float32]


@dataclass(frozen=True, eq=False)
class Made:
    """A clip and how long its parts took, in seconds.

    Attributes:
        latent: (1, 3, T, h, w) float32.
        frames: (1, 3, T, H, W) float32 in [0, 1].
        clip: wall-clock time of the whole clip.
        cpu: processor time of all threads; far below clip x threads, other programs used the cores.
        encode, steps, decode: wall-clock times of the parts.
    """

    latent: Float32
    frames: Float32
    clip: float
    cpu: float
    encode: float
    steps: tuple[float, ...]
    decode: float


class Contestant(Protocol):
    """A way to make clips."""

    @property
    def name(self) -> str:
        """Name in tables and plots."""

    def make(self, task: Task) -> Made:
        """Make one clip and time its parts."""


class _Watch:
    """Wall-clock and processor time since the clip began, and times of its parts."""

    def __init__(self) -> None:
        self.laps: list[float] = []
        self._cpu = time.process_time()
        self._start = self._last = time.perf_counter()

    def lap(self) -> None:
        now = time.perf_counter()
        self.laps.append(now - self._last)
        self._last = now

    def made(self, latent: Float32, frames: Float32) -> Made:
        encode, *steps, decode = self.laps
        clip, cpu = self._last - self._start, time.process_time() - self._cpu
        return Made(latent, frames, clip, cpu, encode, tuple(steps), decode)


@dataclass(frozen=True)
class Published:
    """The published program's way: the whole feature in every step, and the encoder again for every frame.

    Attributes:
        name: name in tables and plots.
        encode: image (1, 3, H, W) -> feature.
        denoise: noisy latent, feature, text embedding, timestep -> predicted noise.
        decode_frame: image, one frame's latent (1, 3, h, w) -> frame and warped image, (1, 3, H, W) each.
    """

    name: str
    encode: Callable[[Float32], Float32]
    denoise: Callable[[Float32, Float32, Float32, NDArray[np.int64]], Float32]
    decode_frame: Callable[[Float32, Float32], tuple[Float32, ...]]

    def make(self, task: Task) -> Made:
        """Make one clip and time its parts; the sampler's update runs in NumPy."""
        watch = _Watch()
        image = to_float(task.image)
        feature = self.encode(image)
        watch.lap()
        step = step_from_denoiser(lambda latent, t: self.denoise(latent, feature, task.embedding, t))
        start, *later = task.draws
        latent = sample(step, task.table, start, later, on_step=lambda *_: watch.lap())
        decoded = [self.decode_frame(image, np.ascontiguousarray(latent[:, :, i])) for i in range(latent.shape[2])]
        frames = np.stack([frame for frame, *_ in decoded], axis=2)
        watch.lap()
        return watch.made(latent, frames)


@dataclass(frozen=True)
class Exported:
    """The bundle, run by the pipeline."""

    name: str
    pipeline: Pipeline

    def make(self, task: Task) -> Made:
        """See `Contestant`."""

        def progress(_stage: str, done: int, _total: int) -> None:
            if done:
                watch.lap()

        watch = _Watch()
        encoded = self.pipeline.encode(task.image)
        watch.lap()
        latent = self.pipeline.sample(
            encoded, task.embedding, sampler=task.table.name, steps=task.table.steps,
            guidance_scale=1.0, noise=iter(task.draws), progress=progress,
        )  # fmt: skip
        frames, _ = self.pipeline.decode(encoded, latent)
        watch.lap()
        return watch.made(latent, frames)


class _DecodeFrame(nn.Module):
    """One frame from the image, including the encoder, as in the published program."""

    def __init__(self, generator: Generator, residual_flow: bool) -> None:
        super().__init__()
        self.generator, self.residual_flow = generator, residual_flow

    def forward(self, image: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        flow = latent_to_flow(latent, residual_flow=self.residual_flow)
        decoded = self.generator.decode(image, self.generator.encode(image), flow)
        return decoded.frame, decoded.warped


class _Encode(nn.Module):
    """Image -> feature."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, image: Tensor) -> Tensor:
        return self.generator.encode(image)[-1]


def eager(model: LfdmModel) -> Published:
    """The faithful networks in PyTorch, eager, float32; threads are torch's own setting."""
    generator = model.lfae.generator
    encode, decode = _Encode(generator).eval(), _DecodeFrame(generator, model.config.residual_flow).eval()
    unet = model.diffusion.denoise_fn

    def run(module: nn.Module, *arrays: NDArray[Any]) -> Any:
        with torch.inference_mode():
            return module(*map(torch.from_numpy, arrays))

    return Published(
        "PyTorch",
        lambda image: run(encode, image).numpy(),
        lambda *inputs: run(unet, *inputs).numpy(),
        lambda image, latent: tuple(t.numpy() for t in run(decode, image, latent)),
    )


def naive(model: LfdmModel, task: Task, folder: Path, threads: int) -> Published:
    """The faithful networks exported one to one with a dynamic batch, under ONNX Runtime's default options.

    Args:
        model: the networks.
        task: determines the shapes.
        folder: an empty folder for the graphs.
        threads: threads per session.
    """
    generator = model.lfae.generator
    image = torch.from_numpy(to_float(task.image))
    latent, embedding = torch.from_numpy(task.draws[0]), torch.from_numpy(task.embedding)
    with torch.no_grad():
        feature = generator.encode(image)[-1]
    decode = _DecodeFrame(generator, model.config.residual_flow)
    graphs: dict[str, tuple[nn.Module, tuple[Tensor, ...]]] = {
        "encode": (_Encode(generator), (image,)),
        "denoise": (model.diffusion.denoise_fn, (latent, feature, embedding, torch.tensor([500]))),
        "decode": (decode, (image, latent[:, :, 0])),
    }
    sessions = {}
    for name, (module, inputs) in graphs.items():
        path = folder / f"{name}.onnx"
        _export_one_to_one(module.eval(), inputs, path)
        sessions[name] = _default_session(path, threads)

    def run(name: str, *arrays: NDArray[Any]) -> list[Float32]:
        session = sessions[name]
        feeds = dict(zip((value.name for value in session.get_inputs()), arrays, strict=True))
        outputs: list[Float32] = session.run(None, feeds)
        return outputs

    return Published(
        "naive ONNX",
        lambda image: run("encode", image)[0],
        lambda *inputs: run("denoise", *inputs)[0],
        lambda image, latent: tuple(run("decode", image, latent)),
    )


def _export_one_to_one(module: nn.Module, inputs: tuple[Tensor, ...], path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    # The exporter warns of its own internals, and if torchvision is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(torch.cat([tensor, tensor]) for tensor in inputs),
            dynamo=True,
            opset_version=NAIVE_OPSET,
            dynamic_shapes=tuple({0: batch} for _ in inputs),
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=True)


def _default_session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Not a default, but needed for a fair comparison: idle threads would slow the other contestants.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
