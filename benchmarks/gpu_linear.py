"""The UNet's linear attention on the GPU: its context by fused attention, or by products and a softmax."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from benchmarks.gpu_errors import WrongResultError, relative_error
from benchmarks.gpu_profile import kernel_table
from benchmarks.gpu_records import Record
from benchmarks.gpu_timing import captured, measure
from benchmarks.gpu_work import Bench
from lfdm_export.rewrite import attention
from lfdm_models.attention import PreNorm, Residual, SpatialLinearAttention

#: Pixels and channels of the published UNet's maps, by cost.
MAPS = ((1024, 64), (64, 256), (256, 128))
TOY_MAPS = ((16, 32),)
_HEADS, _HEAD_WIDTH, _FRAMES = 8, 32, 40
#: Largest allowed error against float64, relative to the largest value.
_LIMIT = 4e-3


def linear_attention_speed(bench: Bench) -> Record:
    """Seconds, launches and error of a compiled block, per map and way.

    Raises:
        WrongResultError: a result is wrong; the message says which.
    """
    for pixels, channels in TOY_MAPS if bench.tiny else MAPS:
        found: Record = {}
        for way, width in {"fused": None, "products": 0}.items():
            bench.budget.need(5, f"linear attention of {pixels} pixels")
            found[way] = _measured(bench, pixels, channels, width)
            bench.keep({f"{pixels} pixels, {channels} channels": found})
    return {}


def _measured(bench: Bench, pixels: int, channels: int, width: int | None) -> Record:
    torch.manual_seed(0)
    block = Residual(PreNorm(channels, SpatialLinearAttention(channels, _HEADS, _HEAD_WIDTH)))
    wide = attention.FoldedLinearAttention(block).to(bench.device).double()
    dtype = torch.float16 if bench.device.type == "cuda" else torch.float32
    module = attention.FoldedLinearAttention(block).to(bench.device, dtype)
    x = torch.randn(2 if bench.tiny else _FRAMES, pixels, channels, device=bench.device).to(dtype)
    with torch.inference_mode(), _fused_up_to(width):
        run = torch.compile(module, dynamic=False, backend="inductor" if x.is_cuda else "eager")
        result = run(x)
        timing = measure(captured(lambda: run(x), bench.device), bench.device, seconds=0.1)
        table = kernel_table(lambda: run(x), bench.device)
    with torch.inference_mode(), _fused_up_to(0):
        expected = wide(x.double())
    torch.compiler.reset()
    return {"seconds": timing.plain(), "error": _error(result, expected), "launched": table}


def _error(result: Tensor, expected: Tensor) -> float:
    error = relative_error(result, expected)
    if not error <= _LIMIT:
        raise WrongResultError(f"linear attention is {error:.2e} from float64, at most {_LIMIT:.0e}")
    return error


@contextmanager
def _fused_up_to(width: int | None) -> Iterator[None]:
    """Change the largest vector width for which fused attention is used; None keeps the product's limit."""
    before = attention.FUSED_WIDTH
    if width is not None:
        attention.FUSED_WIDTH = width
    try:
        yield
    finally:
        attention.FUSED_WIDTH = before
