"""The core of temporal attention by this project's kernel and by every PyTorch backend: correctness and speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu_errors import WrongResultError, relative_error
from benchmarks.gpu_records import Record
from benchmarks.gpu_timing import captured, measure
from benchmarks.gpu_work import Bench
from lfdm_export.ops.temporal_attention.gpu import core_on_gpu, suits_core
from lfdm_export.ops.temporal_attention.reference import core_in_torch, rotate
from lfdm_export.ops.temporal_attention.tables import lay_out_bias, lay_out_turns

#: Pixels of the maps of the published UNet's temporal attention.
PIXELS = (1024, 256, 64, 16)
_BACKENDS = ("CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH")
#: Largest allowed errors against float64, relative to the largest value: from rounding of queries and keys after
#: rotation, of weights, and of the result.
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True)
class Shape:
    """Sizes of a core.

    Attributes:
        pixels: P.
        frames: T.
        heads: H.
        width: D, channels of a head.
        rotary_width: R, the rotated channels of a head.
        batch: B.
    """

    pixels: int
    frames: int = 40
    heads: int = 8
    width: int = 32
    rotary_width: int = 32
    batch: int = 1


_TINY = Shape(4, frames=5, heads=2, width=16, rotary_width=16)
#: Shapes of the check: the published network's maps, and special cases.
_PUBLISHED = (*(Shape(pixels) for pixels in PIXELS), Shape(16, batch=8))
_SPECIAL = (
    Shape(5, frames=39, heads=3, rotary_width=20, batch=2),
    *(Shape(7, frames=frames) for frames in (1, 8, 9, 16, 33, 64)),
    Shape(9, frames=16, heads=4, width=16, rotary_width=16),
    Shape(9, frames=64, heads=4, width=64, rotary_width=64),
)
#: Shapes for which the host build has kernels.
_TOYS = (Shape(3), Shape(2, frames=37, heads=3, rotary_width=20, batch=2), _TINY)


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of a core.

    Attributes:
        qkv: (B, T, P, 3·H·D): queries, keys and values from one product, not rotated.
        cos: (T, R / 2) float32.
        sin: (T, R / 2) float32.
        bias: (1, H, T, T) float32.
        heads: H.
        expected: (B, T, P, H·D) float64.
    """

    qkv: Tensor
    cos: Tensor
    sin: Tensor
    bias: Tensor
    heads: int
    expected: Tensor

    def tables(self) -> tuple[Tensor, Tensor]:
        """The kernel's inputs besides `qkv`."""
        width = self.qkv.shape[-1] // (3 * self.heads)
        return lay_out_turns(self.cos, self.sin, width), lay_out_bias(self.bias[0])

    def rotated(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B·P, H, T, D), rotated, for PyTorch's backends."""
        q, k, v = (_by_head(part, self.heads) for part in self.qkv.chunk(3, dim=-1))
        turned = (rotate(x.float(), self.cos, self.sin).to(x.dtype) for x in (q, k))
        return (*turned, v.contiguous())  # type: ignore[return-value]


def make_case(shape: Shape, dtype: torch.dtype, device: torch.device) -> Case:
    """Random inputs."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=device, generator=generator)

    qkv = random(shape.batch, shape.frames, shape.pixels, 3 * shape.heads * shape.width).to(dtype)
    angles = random(shape.frames, shape.rotary_width // 2)
    cos, sin, bias = angles.cos(), angles.sin(), random(1, shape.heads, shape.frames, shape.frames)
    wide = (table.double() for table in (cos, sin, bias))
    return Case(qkv, cos, sin, bias, shape.heads, core_in_torch(qkv.double(), *wide, heads=shape.heads))


def check_cores(device: torch.device, *, toy: bool) -> Record:
    """The kernel's errors against float64, and their limits."""
    found: Record = {}
    for dtype, name in _NAMES.items():
        # One type is enough on the host, where every shape needs its own kernel build.
        special = _SPECIAL if dtype == torch.float16 else ()
        for shape in _TOYS if toy else (*_PUBLISHED, *special):
            case = make_case(shape, dtype, device)
            key = f"temporal core {shape.batch}x{shape.frames}x{shape.pixels}x{shape.heads}x{shape.width} {name}"
            found[key] = {
                "error": relative_error(_by_kernel(case, *case.tables()), case.expected),
                "limit": LIMITS[dtype],
            }
    return found


def run_cores_once(device: torch.device, *, toy: bool) -> int:
    """Launch the kernel once per size in float16; returns the number of launches."""
    shapes = [_TINY] if toy else [Shape(pixels) for pixels in PIXELS]
    for shape in shapes:
        case = make_case(shape, torch.float16, device)
        _by_kernel(case, *case.tables())
    return len(shapes)


def attention(bench: Bench) -> Record:
    """Seconds and error of the kernel and of PyTorch's backends, at the sizes of the published network in float16.

    The kernel takes the product's result and rotates it; the backends take rotated inputs laid out by head. A backend
    may refuse a shape. The kernel's bytes are the necessary transfers.

    Raises:
        WrongResultError: a result is wrong; the message says which.
    """
    names = _BACKENDS if bench.device.type == "cuda" else ("MATH",)
    for pixels in (_TINY.pixels,) if bench.tiny else PIXELS:
        bench.budget.need(3, f"attention of {pixels} pixels")
        case = make_case(_TINY if bench.tiny else Shape(pixels), torch.float16, bench.device)
        found = {"kernel": _kernel_timed(bench, case)}
        for name in names:
            found[name] = _by_backend(bench, case, getattr(SDPBackend, name))
        bench.keep({f"{pixels} pixels": found})
    return {}


def _by_kernel(case: Case, turns: Tensor, bias: Tensor) -> Tensor:
    if not suits_core(case.qkv, case.heads):
        raise WrongResultError(f"there is no kernel for {tuple(case.qkv.shape)} {case.qkv.dtype} here")
    return core_on_gpu(case.qkv, turns, bias, heads=case.heads)


def _kernel_timed(bench: Bench, case: Case) -> Record:
    tables = case.tables()
    record = _timed(bench, lambda: _by_kernel(case, *tables), lambda x: x, case)
    size = (case.qkv.numel() + case.expected.numel()) * case.qkv.element_size()
    return {**record, "bytes": size, "bytes_per_second": size / record["seconds"]["median"]}


def _by_backend(bench: Bench, case: Case, backend: SDPBackend) -> Record:
    q, k, v = case.rotated()
    bias = case.bias.to(q.dtype)

    def run() -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def by_frame(x: Tensor) -> Tensor:
        tokens: Tensor = x.unflatten(0, (len(case.qkv), -1)).permute(0, 3, 1, 2, 4).flatten(3)
        return tokens

    try:
        return _timed(bench, run, by_frame, case)
    except torch.AcceleratorError:  # the GPU's context is lost: nothing more can run
        raise
    except RuntimeError as error:
        return {"refused": f"{type(error).__name__}: {error}"[:300]}


def _by_head(x: Tensor, heads: int) -> Tensor:
    """(B, T, P, H·D) to (B·P, H, T, D)."""
    split: Tensor = x.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1)
    return split


def _timed(bench: Bench, run: Callable[[], Tensor], by_frame: Callable[[Tensor], Tensor], case: Case) -> Record:
    error, limit = relative_error(by_frame(run()), case.expected), LIMITS[case.qkv.dtype]
    if not error <= limit:
        raise WrongResultError(f"{error:.2e} from float64, at most {limit:.0e}")
    timing = measure(captured(run, bench.device), bench.device, seconds=0.1)
    return {"seconds": timing.plain(), "error": error}
