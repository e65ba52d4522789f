"""GroupNormSilu on the GPU: correctness, and speed compared with PyTorch's operators, compiled and eager."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_errors import relative_error
from benchmarks.gpu_records import Record
from benchmarks.gpu_timing import Budget, captured, measure
from lfdm_export.ops.group_norm_silu.reference import (
    folded_group_norm_silu,
    group_norm_silu,
    group_norm_silu_in_torch,
)

#: Maps of the published UNet: channels, side.
MAPS = {"32x32x64": (64, 32), "16x16x128": (128, 16), "8x8x256": (256, 8), "4x4x512": (512, 4)}
TOY_MAPS = {"8x8x64": (64, 8), "3x3x24": (24, 3)}
GROUPS = 8
#: Number of results in turn, so that a CUDA graph has many launches.
_TURNS = 24

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def norm_checks(device: torch.device, *, toy: bool) -> Record:
    """Error of the kernels against float64 per map and type, relative to the largest value."""
    found: Record = {}
    maps = TOY_MAPS if toy else MAPS | {"5x7x24": (24, 5)}
    for dtype_name, dtype in _DTYPES.items():
        for name, (channels, side) in maps.items():
            for batch in (1, 3):
                arguments = _arguments(channels, side, 3 if toy else 40, batch, dtype, device)
                found[f"norm {name} {dtype_name} batch {batch}"] = _check(arguments)
    return found


def norms_once(device: torch.device, *, toy: bool) -> int:
    """Run the norm of each map once in float16; returns the number of runs."""
    maps = TOY_MAPS if toy else MAPS
    for channels, side in maps.values():
        group_norm_silu(**_arguments(channels, side, 2 if toy else 40, 1, torch.float16, device))
    return len(maps)


def _check(arguments: dict[str, Any]) -> Record:
    """Errors with modulation and residual; a value that was not written counts as infinite."""
    errors = {}
    for kind in ("whole", "plain"):
        some = dict(arguments) if kind == "whole" else {**arguments, "scale_shift": None, "residual": None}
        result = group_norm_silu(**some)
        residual = some.pop("residual")
        wide = {key: _wide(value) for key, value in some.items()}
        expected = group_norm_silu_in_torch(**wide)
        if residual is not None:
            expected = expected + residual.double()
        errors[kind] = relative_error(result, expected)
    again = [group_norm_silu(**arguments) for _ in range(2)]
    if not torch.equal(*again):
        errors["not the same twice"] = math.inf
    return {"error": max(errors.values()), **errors}


def _wide(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_wide, value))
    return value.double() if isinstance(value, Tensor) else value


def _arguments(
    channels: int, side: int, frames: int, batch: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    x, residual = (
        (1 + random(batch * frames, channels, side, side)).to(dtype).to(memory_format=torch.channels_last)
        for _ in range(2)
    )
    rows = random(batch, 3 * channels).to(dtype).split(channels, dim=1)
    return {
        "x": x,
        "gamma": random(channels).to(dtype),
        "beta": random(channels).to(dtype),
        "scale_shift": (rows[0], rows[2]),
        "residual": residual,
        "frames": frames,
        "groups": GROUPS,
    }


def norm_speed(device: torch.device, budget: Budget, keep: Callable[[Record], None], *, toy: bool) -> Record:
    """Seconds of the kernels at batch 1 and 8 in float16, compared with a copy and PyTorch's operators.

    The compiled operators, which the kernels replace, come last: compiling takes seconds per map.
    """
    maps = TOY_MAPS if toy else MAPS
    found: dict[str, Record] = {}
    for batch in (1,) if toy else (1, 8):
        for name, (channels, side) in maps.items():
            budget.need(2, "timing a norm")
            arguments = _arguments(channels, side, 2 if toy else 40, batch, torch.float16, device)
            size = arguments["x"].numel() * 2
            runs = {
                "kernels": lambda a=arguments: group_norm_silu(**a),
                "kernels, nothing added": lambda a=arguments: group_norm_silu(**{**a, "residual": None}),
                "copy": lambda a=arguments: a["x"].clone(),
                "our operators": lambda a=arguments: _by_operators(**a),
            }
            record = {what: _in_turns(run, device) for what, run in runs.items()}
            key = f"{name} batch {batch}"
            found[key] = {"bytes": 4 * size, **record}
            keep({key: found[key]})
    if device.type != "cuda":
        return {}
    compiled = torch.compile(_by_operators, dynamic=False)
    for name, (channels, side) in maps.items():
        budget.need(8, "compiling a norm")
        arguments = _arguments(channels, side, 2 if toy else 40, 1, torch.float16, device)
        key = f"{name} batch 1"
        found[key]["our operators, compiled"] = _in_turns(lambda a=arguments: compiled(**a), device)  # type: ignore[misc]
        keep({key: found[key]})
    torch.compiler.reset()
    return {}


def _by_operators(residual: Tensor, **arguments: Any) -> Tensor:
    return folded_group_norm_silu(**arguments) + residual


def _in_turns(run: Callable[[], Tensor], device: torch.device) -> Record:
    run()

    def all_of_them() -> list[Tensor]:
        return [run() for _ in range(_TURNS if device.type == "cuda" else 1)]

    timing = measure(captured(all_of_them, device), device, seconds=0.06)
    return timing.divided(_TURNS if device.type == "cuda" else 1).plain()
