"""Temporal attention's core by every backend of PyTorch, and by one Triton kernel."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_records import Record
from benchmarks.gpu_timing import OutOfTimeError, captured, measure
from benchmarks.gpu_work import Bench
from lfdm_export.ops.temporal_attention.reference import rotate

#: Pixels of the maps on which the published UNet attends over time.
PIXELS = (1024, 256, 64, 16)
_BACKENDS = ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
#: Largest error against float64, relative to the largest value, that counts as right.
_LIMITS = {torch.float16: 4e-3, torch.float32: 1e-5}


class WrongAttentionError(Exception):
    """A kernel gives what it should not."""


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of the core for P pixels, T frames and H heads of D channels.

    Attributes:
        qkv: (1, T, P, 3·H·D): queries, keys and values as one product gives them, not rotated.
        cos: (T, D / 2) float32.
        sin: likewise.
        bias: (1, H, T, T).
        heads: H.
        rotated: queries, keys and values (P, H, T, D), rotated.
        expected: (P, H, T, D) float64.
    """

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    bias: Tensor
    heads: int
    rotated: tuple[Tensor, Tensor, Tensor]
    expected: Tensor


def attention_backends(bench: Bench) -> Record:
    """Seconds and error of PyTorch's backends on rotated queries and keys; one may refuse a shape.

    Raises:
        WrongAttentionError: one is wrong; the message says which.
    """
    names = _BACKENDS if bench.device.type == "cuda" else ("MATH",)
    for pixels in _pixels(bench):
        case = _case(bench, pixels)
        found = {name: _by_backend(bench, case, getattr(SDPBackend, name)) for name in names}
        bench.keep({f"{pixels} pixels": found})
    return {}


def attention_in_triton(bench: Bench) -> Record:
    """Seconds and error of the Triton kernel, which rotates queries and keys itself.

    Raises:
        OutOfTimeError: it does not run here.
        WrongAttentionError: it is wrong.
    """
    if importlib.util.find_spec("triton") is None:
        raise OutOfTimeError("triton is not installed")
    if bench.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise OutOfTimeError("Triton's kernel runs on a GPU, or with TRITON_INTERPRET=1")
    from benchmarks.gpu_temporal_kernel import temporal_core

    for pixels in _pixels(bench):
        case = _case(bench, pixels)

        def run(case: Case = case) -> Tensor:
            return temporal_core(case.qkv, case.cos, case.sin, case.bias, case.heads)

        bench.keep({f"{pixels} pixels": _timed(bench, run, lambda x, case=case: _by_head(x, case.heads), case)})  # type: ignore[misc]
    return {}


def _pixels(bench: Bench) -> tuple[int, ...]:
    return (4,) if bench.tiny else PIXELS


def _case(bench: Bench, pixels: int) -> Case:
    bench.budget.need(3, f"attention of {pixels} pixels")
    device = bench.device
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    heads, size, frames = (2, 16, 5) if bench.tiny else (8, 32, 40)
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(1, frames, pixels, 3 * heads * size, device=device, generator=generator).to(dtype)
    angles = torch.randn(frames, size // 2, device=device, generator=generator)
    bias = torch.randn(1, heads, frames, frames, device=device, generator=generator).to(dtype)
    cos, sin = angles.cos(), angles.sin()
    q, k, v = (_by_head(part, heads).contiguous() for part in qkv.chunk(3, dim=-1))
    rotated = (rotate(q.float(), cos, sin).to(dtype), rotate(k.float(), cos, sin).to(dtype), v)
    wide_q, wide_k = (rotate(part.double(), cos.double(), sin.double()) for part in (q, k))
    expected = F.scaled_dot_product_attention(wide_q, wide_k, v.double(), attn_mask=bias.double())
    return Case(qkv, cos, sin, bias, heads, rotated, expected)


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(1, T, P, H·D) to (P, H, T, D)."""
    return x[0].unflatten(-1, (heads, -1)).permute(1, 2, 0, 3)


def _by_backend(bench: Bench, case: Case, backend: SDPBackend) -> Record:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*case.rotated, attn_mask=case.bias)

    try:
        return _timed(bench, run, lambda x: x, case)
    except torch.AcceleratorError:  # the GPU's context is lost, and with it all that would follow
        raise
    except RuntimeError as error:
        return {"refused": f"{type(error).__name__}: {error}"[:300]}


def _timed(bench: Bench, run: Callable[[], Tensor], by_head: Callable[[Tensor], Tensor], case: Case) -> Record:
    difference = (by_head(run()).double() - case.expected).abs().nan_to_num(nan=math.inf)
    error, limit = float(difference.max() / case.expected.abs().max()), _LIMITS[case.qkv.dtype]
    if not error <= limit:
        raise WrongAttentionError(f"{error:.2e} from float64, at most {limit:.0e}")
    timing = measure(captured(run, bench.device), bench.device, seconds=0.1)
    return {"seconds": timing.plain(), "error": error}
