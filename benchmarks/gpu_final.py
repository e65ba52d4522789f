"""The decoder's last convolution on the GPU, with its sigmoid: correctness, and speed beside PyTorch's operators."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_records import Record
from benchmarks.gpu_timing import captured, measure
from benchmarks.gpu_work import Bench
from lfdm_export.ops.final_conv.gpu import final_conv_on_gpu
from lfdm_export.ops.final_conv.reference import final_conv_in_torch, lay_out_kernel
from lfdm_export.rewrite.lfae import conv_in_columns, dephase_kernel

#: Frames, channels and side of the pictures; the last are no multiple of a tile or a strip.
_PUBLISHED = (40, 64, 128)
_ODD = ((3, 64, 18), (2, 16, 134), (1, 64, 2))
_TOYS = ((2, 16, 20), (1, 64, 6))
_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
_OUTPUTS, _SIZE = 3, 7
#: Largest allowed error of a picture in [0, 1] against float64, for the kernel, whose sums are float32.
_LIMIT = 1e-5
#: Sets of phases in turn: together they exceed the L2 cache.
_TURNS = 4


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of the convolution.

    Attributes:
        sets: sets of four phases, (N, C, side / 2, side / 2) each, channels last.
        weight: (3, C, 7, 7).
        bias: (3,).
    """

    sets: list[list[Tensor]]
    weight: Tensor
    bias: Tensor

    @property
    def expected(self) -> Tensor:
        """The pictures of the first set in float64."""
        return final_conv_in_torch([one.double() for one in self.sets[0]], self.weight.double(), self.bias.double())


def final_checks(device: torch.device, *, toy: bool) -> Record:
    """The kernel's errors against float64, and their limits."""
    found: Record = {}
    for name, dtype in _DTYPES.items():
        for frames, channels, side in _TOYS if toy else (_PUBLISHED, *_ODD):
            case = _make_case(frames, channels, side, dtype, device)
            result = final_conv_on_gpu(case.sets[0], lay_out_kernel(case.weight), case.bias)
            key = f"final conv {frames}x{side}x{side}x{channels} {name}"
            found[key] = {"error": _error(result, case.expected), "limit": _LIMIT}
    return found


def final_once(device: torch.device, *, toy: bool) -> int:
    """Launch the kernel once in float16; returns the number of launches."""
    case = _make_case(*(_TOYS[0] if toy else _PUBLISHED), torch.float16, device)
    final_conv_on_gpu(case.sets[0], lay_out_kernel(case.weight), case.bias)
    return 1


def final_speed(bench: Bench) -> Record:
    """Seconds and error of the kernel and of the convolution in columns, compiled, in float16.

    Bytes and FLOPs are the necessary ones.
    """
    frames, channels, side = _TOYS[0] if bench.tiny else _PUBLISHED
    case = _make_case(frames, channels, side, torch.float16, bench.device, 2 if bench.tiny else _TURNS)
    pixels = frames * side * side
    bench.keep({"bytes": pixels * (2 * channels + 4 * _OUTPUTS), "flops": 2 * pixels * channels * _OUTPUTS * _SIZE**2})
    kernel, dephased = lay_out_kernel(case.weight), dephase_kernel(case.weight)

    def by_columns(phases: list[Tensor]) -> Tensor:
        return torch.sigmoid(conv_in_columns(phases, dephased, case.bias, _SIZE)).contiguous()

    compiled = torch.compile(by_columns, dynamic=False, backend="inductor" if bench.device.type == "cuda" else "eager")
    ways: dict[str, Callable[[list[Tensor]], Tensor]] = {
        "kernel": lambda phases: final_conv_on_gpu(phases, kernel, case.bias),
        "columns, compiled": compiled,
    }
    expected = case.expected
    for name, way in ways.items():
        bench.budget.need(12 if "compiled" in name else 3, f"the last convolution by {name}")
        with torch.inference_mode():
            error = _error(way(case.sets[0]), expected)
            run = captured(lambda w=way: [w(phases) for phases in case.sets], bench.device)  # type: ignore[misc]
            timing = measure(run, bench.device, seconds=0.2).divided(len(case.sets))
        bench.keep({name: {"seconds": timing.plain(), "error": error}})
    torch.compiler.reset()
    return {}


def _make_case(frames: int, channels: int, side: int, dtype: torch.dtype, device: torch.device, sets: int = 1) -> Case:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    half = side // 2
    phases = [
        [random(frames, channels, half, half).to(memory_format=torch.channels_last) for _ in range(4)]
        for _ in range(sets)
    ]
    weight = random(_OUTPUTS, channels, _SIZE, _SIZE) * (2 / math.sqrt(channels * _SIZE**2))
    return Case(phases, weight, random(_OUTPUTS))


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest error; a value that was not written counts as infinite."""
    return float((found.double() - expected).abs().nan_to_num(nan=math.inf).max())
