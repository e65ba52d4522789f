"""Ways to do the same on the GPU, side by side: what is fastest here becomes the product's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_kernels import LEVELS, TOY_LEVELS
from benchmarks.gpu_records import Record
from benchmarks.gpu_timing import captured, measure
from benchmarks.gpu_work import Bench
from lfdm_export.ops.cuda.launcher import launch
from lfdm_export.ops.thresholded_step.kernels import step_kernel, step_launch
from lfdm_export.ops.thresholded_step.reference import thresholded_step
from lfdm_export.ops.warp.kernels import THREADS, warp_kernel, warp_launch
from lfdm_export.rewrite.convolution import PHASES, interleave
from lfdm_export.rewrite.lfae import dephase_kernel
from lfdm_export.sampling.loop import quantile_rank

#: Largest error of a last convolution in float16 against float64, of a result in [0, 1].
_LIMIT = 4e-3


class DifferentResultError(Exception):
    """A way gives what the others do not."""


# -- threads of a block of WarpBlend


def warp_blocks(bench: Bench) -> Record:
    """WarpBlend channels last in float16 by threads of a block: seconds for 40 frames, and that results are equal.

    Raises:
        DifferentResultError: they are not.
    """
    frames = 2 if bench.tiny else 40
    for level, (channels, side, stride) in (TOY_LEVELS if bench.tiny else LEVELS).items():
        bench.budget.need(2, "timing a warp")
        small, motion_side = side // stride, 8 if bench.tiny else 32
        shape = (frames, channels, small, small)
        source = _channels_last(bench, (1, channels, side, side))
        # Activations in turn, so that they exceed the L2 cache.
        previous = [_channels_last(bench, shape) for _ in range(1 if bench.tiny else 6)]
        motion = torch.rand(frames, 3, motion_side, motion_side, device=bench.device) * 2 - 1
        plan = warp_launch("float16", "channels_last", (channels, side, side), (motion_side, motion_side), frames,
                           frames, stride=stride)  # fmt: skip
        found: Record = {"bytes": 2 * previous[0].numel() * 2 + source.numel() * 2 + motion.numel() * 4}
        results = {}
        for threads in (None, 64, 256):
            kernel = warp_kernel("float16", "channels_last", blend=True, threads=threads)
            outputs = [torch.empty_like(one) for one in previous]

            def run(kernel: Any = kernel, outputs: list[Tensor] = outputs) -> None:
                for one, output in zip(previous, outputs, strict=True):  # noqa: B023
                    launch(kernel, plan, [source, motion, one], [output])  # noqa: B023

            run()
            name = f"{threads or THREADS['channels_last']} threads"
            results[name] = outputs[0].clone()
            timing = measure(captured(run, bench.device), bench.device, seconds=0.1)
            found[name] = timing.divided(len(previous)).plain()
        first, *others = results.values()
        if not all(torch.equal(first, other) for other in others):
            raise DifferentResultError(f"WarpBlend at {level} depends on the threads of a block")
        bench.keep({level: found})
    return {}


def _channels_last(bench: Bench, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, device=bench.device).half().to(memory_format=torch.channels_last)


# -- one kernel or four for the step


def step_kernels(bench: Bench) -> Record:
    """ThresholdedStep of the published size as one kernel, as in TensorRT's plugin, and as the operator does it."""
    shape = (3, 2, 8, 8) if bench.tiny else (3, 40, 32, 32)
    elements = math.prod(shape)
    lower, weight = quantile_rank(elements)
    for batch in (1,) if bench.tiny else (1, 8, 32):
        bench.budget.need(2, "timing a step")
        latent, noise = (torch.randn(batch, *shape, device=bench.device) * 2 for _ in range(2))
        predicted, history = noise.half(), torch.stack([latent, noise], dim=1)
        coefficients = torch.randn(batch, 11, device=bench.device)
        coefficients[:, :2] = 1.0  # so that the threshold bites
        arguments = [latent, predicted, history, noise, coefficients]
        outputs = [torch.empty_like(latent), torch.empty_like(history)]
        kernel, plan = step_kernel("float32", "float16"), step_launch(elements, lower, float(weight), batch)

        def alone(arguments: list[Tensor] = arguments, outputs: list[Tensor] = outputs, plan: Any = plan) -> None:
            launch(kernel, plan, arguments, outputs)  # noqa: B023

        def passes(arguments: list[Tensor] = arguments) -> tuple[Tensor, Tensor]:
            return thresholded_step(*arguments)

        alone()
        for one, other in zip(passes(), outputs, strict=True):
            if not torch.equal(one, other):
                raise DifferentResultError(f"the step of {batch} samples differs from its one kernel's")
        ways: dict[str, Callable[[], Any]] = {"one kernel": alone, "four kernels": passes}
        times = {
            name: measure(captured(run, bench.device), bench.device, seconds=0.1).plain() for name, run in ways.items()
        }
        bench.keep({f"step, batch {batch}": times})
    return {}


# -- the decoder's last convolution


def last_convolutions(bench: Bench) -> Record:
    """The 7x7 convolution of the decoder and its sigmoid in float16, compiled, by formulation.

    Raises:
        DifferentResultError: one is not what float64 gives.
    """
    frames, channels, side = (1, 8, 8) if bench.tiny else (40, 64, 64)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, channels, 7, 7, generator=generator) / math.sqrt(channels * 49)
    bias = torch.randn(3, generator=generator)
    phases = [_channels_last(bench, (frames, channels, side, side)) for _ in PHASES]
    wide = weight.double().to(bench.device), bias.double().to(bench.device)
    whole = interleave([phase[:1].double() for phase in phases])
    expected = torch.sigmoid(F.conv2d(whole, *wide, padding=3))
    ways: dict[str, Callable[[Tensor, Tensor], _Way]] = {
        "phases, as it is": lambda w, b: _in_phases(w, b, 0),
        "phases, sums of columns": _in_columns,
        "whole map, sums of columns": _in_columns_of_the_whole,
        "phases, 16 outputs": lambda w, b: _in_phases(w, b, 4),
        "whole map, 8 outputs": _on_the_whole,
    }
    for name, make in ways.items():
        bench.budget.need(5, f"the last convolution: {name}")
        way = make(weight, bias)
        tensors = [t.half().to(bench.device) for t in way.tensors]
        tensors[0] = tensors[0].to(memory_format=torch.channels_last)
        run = torch.compile(way.run, dynamic=False, backend="inductor" if bench.device.type == "cuda" else "eager")
        with torch.inference_mode():
            found = run(phases, *tensors)
            error = float((found[:1].double() - expected).abs().max())
            if not error <= _LIMIT:
                raise DifferentResultError(f"the last convolution, {name}: {error:.1e} from float64, at most {_LIMIT}")
            timing = measure(
                captured(lambda run=run, tensors=tensors: run(phases, *tensors), bench.device),  # type: ignore[misc]
                bench.device,
                seconds=0.1,
            )
        bench.keep({f"last convolution, {name}": {"seconds": timing.plain(), "error": error}})
    torch.compiler.reset()
    return {}


class _Way:
    """Weights (the convolution's first), and what makes a picture of phases and weights."""

    def __init__(self, run: Callable[..., Tensor], *tensors: Tensor) -> None:
        self.run, self.tensors = run, tensors


def _in_phases(weight: Tensor, bias: Tensor, more: int) -> _Way:
    """From phases to phases; `more` outputs that nobody wants."""
    kernel, outputs = dephase_kernel(weight), 4 * len(bias)
    kernel = torch.cat([kernel, kernel.new_zeros(more, *kernel.shape[1:])])
    biases = F.pad(bias.repeat_interleave(4), (0, more))

    def run(phases: list[Tensor], kernel: Tensor, biases: Tensor) -> Tensor:
        final = F.conv2d(torch.cat(phases, dim=1), kernel, biases, padding=kernel.shape[-1] // 2)
        return F.pixel_shuffle(torch.sigmoid(final[:, :outputs].float()), 2).contiguous()

    return _Way(run, kernel, biases)


def _on_the_whole(weight: Tensor, bias: Tensor) -> _Way:
    """On the interleaved map, with outputs that nobody wants."""
    more = 8 - len(bias)

    def run(phases: list[Tensor], kernel: Tensor, biases: Tensor) -> Tensor:
        final = F.conv2d(interleave(phases), kernel, biases, padding=3)
        return torch.sigmoid(final[:, :-more].float()).contiguous()

    return _Way(run, torch.cat([weight, weight.new_zeros(more, *weight.shape[1:])]), F.pad(bias, (0, more)))


def _in_columns(weight: Tensor, bias: Tensor) -> _Way:
    """Each column of the kernel as outputs of its own: 2·3·7 for both rows of phases; then shifted sums.

    The column dx of the kernel meets the map's column 2j + qx + dx, which is column j + (qx + dx) // 2 of the phases
    (qx + dx) mod 2.
    """
    outputs, channels, size, _ = weight.shape
    reach = size // 2
    kernel = weight.new_zeros(2, outputs, size, 2, channels, 5, 1)
    for row in range(2):
        for dy in range(-reach, reach + 1):
            place, phase = divmod(row + dy, 2)
            kernel[row, :, :, phase, :, place + 2, 0] += weight[:, :, dy + reach].transpose(1, 2)
    kernel = kernel.reshape(2 * outputs * size, 2 * channels, 5, 1)
    kernel = torch.cat([kernel, kernel.new_zeros(-len(kernel) % 16, *kernel.shape[1:])])

    def run(phases: list[Tensor], kernel: Tensor, bias: Tensor) -> Tensor:
        columns = [torch.cat([phases[0], phases[2]], dim=1), torch.cat([phases[1], phases[3]], dim=1)]
        parts = F.conv2d(torch.cat(columns), kernel, padding=(2, 0))
        width = parts.shape[-1]
        parts = parts[:, : 2 * outputs * size].unflatten(1, (2, outputs, size))
        padded = F.pad(parts.float(), (2, 2)).unflatten(0, (2, -1))
        pixels = []
        for column in range(2):
            total = bias.float()[:, None, None]
            for dx in range(-reach, reach + 1):
                place, phase = divmod(column + dx, 2)
                total = total + padded[phase, :, :, :, dx + reach, :, place + 2 : place + 2 + width]
            pixels.append(total)
        # (frames, row of phases, outputs, h, w, column of phases)
        final = torch.stack(pixels, dim=-1).permute(0, 2, 3, 1, 4, 5)
        return torch.sigmoid(final).flatten(4, 5).flatten(2, 3)

    return _Way(run, kernel, bias)


def _in_columns_of_the_whole(weight: Tensor, bias: Tensor) -> _Way:
    """On the interleaved map, each column of the kernel as outputs of its own: 3·7; then shifted sums."""
    outputs, channels, size, _ = weight.shape
    reach, count = size // 2, outputs * size
    kernel = weight.permute(0, 3, 1, 2).reshape(count, channels, size, 1)
    kernel = torch.cat([kernel, kernel.new_zeros(-count % 8, *kernel.shape[1:])])

    def run(phases: list[Tensor], kernel: Tensor, bias: Tensor) -> Tensor:
        parts = F.conv2d(interleave(phases), kernel, padding=(reach, 0))
        width = parts.shape[-1]
        padded = F.pad(parts[:, :count].unflatten(1, (outputs, size)).float(), (reach, reach))
        total = bias.float()[:, None, None]
        for column in range(size):
            total = total + padded[:, :, column, :, column : column + width]
        return torch.sigmoid(total)

    return _Way(run, kernel, bias)
