"""The CUDA kernels on the GPU: correctness, and speed compared with PyTorch and with the memory bandwidth."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_attention import check_cores, run_cores_once
from benchmarks.gpu_errors import WrongResultError, relative_error
from benchmarks.gpu_final import final_checks, final_once
from benchmarks.gpu_norms import norm_checks, norms_once
from benchmarks.gpu_records import Record
from benchmarks.gpu_timing import Budget, Timing, captured, measure, synchronize
from lfdm_export.ops.thresholded_step.gpu import noise_on_gpu
from lfdm_export.ops.thresholded_step.kernels import PASSES
from lfdm_export.ops.thresholded_step.reference import thresholded_step, thresholded_step_in_torch
from lfdm_export.ops.warp.reference import warp, warp_blend, warp_blend_in_torch, warp_in_torch
from lfdm_export.sampling.loop import apply_step
from lfdm_export.sampling.noise import noise_for

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORMS = {"planar": torch.contiguous_format, "channels_last": torch.channels_last}
#: Sizes of the published decoder: channels, side of the map in pixels, stride of the phases.
LEVELS = {
    "128x128x64": (64, 128, 1),
    "64x64x128": (128, 64, 1),
    "32x32x256": (256, 32, 1),
    "phase of 128": (64, 128, 2),
}
#: Channels and side of a picture that no pack or tile divides. None of its pixels coincides with one of the motion's 8:
#: where one does (as with 24), rounding decides whether a wild neighbor weighs 0 or 1e-16 (on a GPU PyTorch's float64
#: fuses multiplication and addition, and does not give exactly 1.0), and so whether the pixel samples outside.
PICTURE = (3, 20)
TOY_LEVELS = {"16x16x8": (8, 16, 1), "phase of 16": (8, 16, 2)}
#: Largest allowed errors against float64, relative to the largest value: from rounding of the result, and from float32
#: coordinates.
LIMITS = {"fp32": 2e-5, "fp16": 1e-3, "bf16": 8e-3}


def chip(device: torch.device) -> Record:
    """Name of the GPU, and versions of its software."""
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    if device.type != "cuda":
        return {"name": "none: a trial on the CPU", "versions": versions}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": getattr(properties, "L2_cache_size", None),
        "versions": versions,
    }


def ceilings(device: torch.device, *, toy: bool) -> Record:
    """Maximum rates of the GPU: bytes per second of a copy, operations per second of a matrix product."""
    size = 1 << (22 if toy else 30)
    source = torch.empty(size, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), device)
    copy = {"bytes": 2 * size, "bytes_per_second": 2 * size / timing.median, "seconds": timing.plain()}
    side = 256 if toy else 8192
    products = {}
    for name in ("fp32", "tf32", "fp16", "bf16"):
        dtype = DTYPES.get(name, torch.float32)
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        timing = measure(lambda a=a, b=b: a @ b, device)  # type: ignore[misc]
        products[name] = {"flops_per_second": 2 * side**3 / timing.median, "side": side, "seconds": timing.plain()}
    torch.backends.cuda.matmul.allow_tf32 = False
    return {"copy": copy, "matrix_product": products}


def _random(seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(seed), device=device)


def _motion(frames: int, side: int, device: torch.device, *, wild: bool = False) -> Tensor:
    """Flows of a moving picture: the identity, perturbed; some pixels sample outside, or at no number."""
    line = torch.linspace(-1, 1, side)
    grid = torch.stack(torch.meshgrid(line, line, indexing="ij")[::-1]).to(device)
    offset = F.interpolate(_random(1, (frames, 2, 4, 4), device) * 0.2, size=(side, side), mode="bilinear")
    motion = torch.cat([grid + offset, _random(2, (frames, 1, side, side), device).sigmoid()], dim=1)
    if wild:
        values = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e9, -1.0, 1.0], device=device)
        motion[:, :2, 0, : len(values)] = values
    return motion.contiguous()


def checks(device: torch.device, *, toy: bool) -> Record:
    """Every kernel against its reference in float64 on the device.

    Raises:
        WrongResultError: a kernel is wrong; the message says which and by how much.
    """
    found: Record = {}
    levels = TOY_LEVELS if toy else LEVELS
    for dtype_name, dtype in DTYPES.items():
        for form_name, form in FORMS.items():
            for level, (channels, side, stride) in levels.items():
                name = f"warp {level} {dtype_name} {form_name}"
                found[name] = _check_warp(channels, side, stride, dtype, form, device)
            found[f"warp picture {dtype_name} {form_name}"] = _check_warp(*PICTURE, 1, dtype, form, device)
    found["noise"] = _check_noise(device, 1001 if toy else 122_880)
    for name, count in {"whole": 768 if toy else 122_880, "odd": 1007}.items():
        found[f"thresholded step {name}"] = _check_step(count, device)
    found |= check_cores(device, toy=toy)
    found |= norm_checks(device, toy=toy)
    found |= final_checks(device, toy=toy)
    limits = {name: value.get("limit", _limit(name)) for name, value in found.items()}
    wrong = [
        f"{name}: {value['error']:.2e}, at most {limits[name]:.0e}"
        for name, value in found.items()
        if not value["error"] <= limits[name]
    ]
    if wrong:
        raise WrongResultError(f"kernels differ from float64: {'; '.join(wrong)}")
    return found


def _limit(name: str) -> float:
    if not name.startswith(("warp", "norm")):
        return 0.0 if name != "noise" else 1.0
    return next(limit for dtype, limit in LIMITS.items() if f" {dtype} " in name)


def _check_warp(
    channels: int,
    side: int,
    stride: int,
    dtype: torch.dtype,
    form: torch.memory_format,
    device: torch.device,
    *,
    wild: bool = True,
) -> Record:
    """Largest error of both operators; a value that was not written counts as infinite.

    With a `wild` motion some coordinates are not numbers. It is used only if a side is a power of two times the
    motion's: elsewhere rounding decides whether such a neighbor has a weight of 0 or of 1e-16, because PyTorch's
    operator fuses multiplication and addition on a GPU.
    """
    frames, batch = 6, 2
    source = _random(3, (batch, channels, side, side), device).to(dtype).to(memory_format=form)
    motion = _motion(frames, max(side // 4, 8), device, wild=wild)
    shape = (frames, channels, side // stride, side // stride)
    previous = _random(4, shape, device).to(dtype).to(memory_format=form)
    phase = (stride - 1, 0)
    found = [warp(source, motion), warp_blend(source, motion, previous, stride=stride, phase=phase)]
    wide = (source.double(), motion.double())
    expected = [warp_in_torch(*wide), warp_blend_in_torch(*wide, previous.double(), stride=stride, phase=phase)]
    errors = [relative_error(one, other) for one, other in zip(found, expected, strict=True)]
    return {"error": max(errors), "warp": errors[0], "warp_blend": errors[1]}


def _check_step(count: int, device: torch.device) -> Record:
    """Number of values that differ from NumPy's; they should be equal to the last bit."""
    rng = np.random.default_rng(0)
    latent = np.stack([rng.standard_normal(count) * 3, rng.uniform(-0.5, 0.5, count), rng.standard_cauchy(count),
                       np.full(count, -4.25), rng.integers(-5, 6, count) * 1.5]).astype(np.float32)  # fmt: skip
    batch = len(latent)
    shape = (batch, count)
    predicted, noise = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    history = rng.standard_normal((batch, 2, count)).astype(np.float32)
    coefficients = rng.standard_normal((batch, 11)).astype(np.float32)
    arrays = (latent, predicted, history, noise, coefficients)
    expected = apply_step(*arrays)
    tensors = [torch.from_numpy(array).to(device) for array in arrays]
    found = [tensor.cpu().numpy() for tensor in thresholded_step(*tensors)]
    different = sum(int((a != b).sum()) for a, b in zip(found, expected, strict=True))
    # A float16 network gives a float16 prediction.
    half = thresholded_step(tensors[0], tensors[1].half(), *tensors[2:])
    exact = apply_step(latent, predicted.astype(np.float16).astype(np.float32), *arrays[2:])
    different += sum(int((a.cpu().numpy() != b).sum()) for a, b in zip(half, exact, strict=True))
    return {"error": float(different), "values": 6 * latent.size}


def _check_noise(device: torch.device, count: int) -> Record:
    """Largest difference from the host's draws in units in the last place, and the number of differences."""
    seeds = [0, 7, 2**64 - 1]
    expected = noise_for(seeds, 3, (count,))
    on_device = torch.tensor(np.array(seeds, np.uint64).view(np.int64), device=device)
    found = noise_on_gpu(on_device, torch.tensor([3], device=device), (count,)).cpu().numpy()
    steps = np.abs(found.view(np.int32).astype(np.int64) - expected.view(np.int32))
    return {"error": float(steps.max()), "different": int((steps > 0).sum()), "values": int(steps.size)}


def run_once(device: torch.device, *, toy: bool) -> int:
    """Launch the kernels at the networks' sizes in float16, the step and the noise, once each.

    Returns:
        The number of launches.
    """
    launches = run_cores_once(device, toy=toy) + final_once(device, toy=toy)
    frames = 2 if toy else 40
    for channels, side, stride in (TOY_LEVELS if toy else LEVELS).values():
        motion = _motion(frames, max(side // 4, 8) if toy else 32, device)
        for form in FORMS.values():
            small = side // stride
            source = _random(1, (1, channels, side, side), device).half().to(memory_format=form)
            previous = _random(2, (frames, channels, small, small), device).half().to(memory_format=form)
            warp_blend(source, motion, previous, stride=stride)
            launches += 1
    shape = (3, 2, 8, 8) if toy else (3, 40, 32, 32)
    latent = _random(3, (1, *shape), device) * 2
    history = torch.stack([latent, latent], dim=1)
    thresholded_step(latent, latent.half(), history, latent, _random(4, (1, 11), device))
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    noise_on_gpu(zero, zero, shape)
    norms = norms_once(device, toy=toy)
    synchronize(device)
    return launches + PASSES + 1 + 1 + 2 * norms


def torch_warp_blend(source: Tensor, motion: Tensor, previous: Tensor, stride: int, phase: tuple[int, int]) -> Tensor:
    """WarpBlend by PyTorch's operators: interpolate, grid_sample (which requires a rounded grid), blend."""
    frames = len(motion) // len(source)
    full = F.interpolate(motion, size=source.shape[2:], mode="bilinear", align_corners=False)
    resized = full[:, :, phase[0] :: stride, phase[1] :: stride].to(source.dtype)
    repeated = source[:, None].expand(-1, frames, -1, -1, -1).flatten(0, 1)
    warped = F.grid_sample(repeated, resized[:, :2].permute(0, 2, 3, 1), align_corners=False)
    occlusion = resized[:, 2:3]
    return warped * occlusion + previous * (1 - occlusion)


def warp_speed(device: torch.device, budget: Budget, keep: Callable[[Record], None], *, toy: bool) -> Record:
    """WarpBlend at the decoder's sizes: seconds, bytes per second, and PyTorch's operators for comparison.

    Bytes are the necessary transfers: `previous` in, the result out, source and motion once. Inputs and results
    alternate, so that together they exceed the L2 cache.
    """
    for dtype_name in ("fp16", "fp32", "bf16"):
        for frames in (2,) if toy else (40, 8):
            for level, (channels, side, stride) in (TOY_LEVELS if toy else LEVELS).items():
                budget.need(3, "timing a warp")
                sets = 2 if toy else 320 // frames
                timed = _time_warp(channels, side, stride, frames, DTYPES[dtype_name], device, sets)
                keep({f"{level} {dtype_name} {frames} frames": timed})
    return {}


def _time_warp(
    channels: int, side: int, stride: int, frames: int, dtype: torch.dtype, device: torch.device, sets: int
) -> Record:
    motion, phase = _motion(frames, max(side // 4, 8), device), (0, 0)
    if side >= 32:
        motion = _motion(frames, 32, device)
    small = side // stride
    source = _random(5, (1, channels, side, side), device).to(dtype)
    previous = [_random(6, (frames, channels, small, small), device).to(dtype) for _ in range(sets)]
    size = source.element_size()
    total = 2 * previous[0].numel() * size + source.numel() * size + motion.numel() * 4
    record: Record = {"bytes": total}
    for form_name, form in FORMS.items():
        first, others = source.to(memory_format=form), [p.to(memory_format=form) for p in previous]
        ours = _each(lambda p, s=first: warp_blend(s, motion, p, stride=stride, phase=phase), others, device)  # type: ignore[misc]
        theirs = _each(lambda p, s=first: torch_warp_blend(s, motion, p, stride, phase), others, device)  # type: ignore[misc]
        copy = _each(torch.clone, others, device)
        record[form_name] = {
            "seconds": ours.plain(),
            "bytes_per_second": total / ours.median,
            "pytorch_seconds": theirs.plain(),
            "times_pytorch": theirs.median / ours.median,
            "copy_seconds": copy.plain(),
        }
    return record


def _each(run: Callable[[Tensor], Tensor], inputs: list[Tensor], device: torch.device) -> Timing:
    """Time per run, of many runs in a CUDA graph, so that the host's launches do not count.

    All results are kept until the end: a result at the address of the previous one would still be in the L2 cache.
    """
    run(inputs[0])

    def all_of_them() -> list[Tensor]:
        return [run(tensor) for tensor in inputs]

    return measure(captured(all_of_them, device), device, seconds=0.15).divided(len(inputs))


def published_step(latent: Tensor, predicted: Tensor, noise: Tensor, c: Tensor) -> Tensor:
    """The published program's DDIM step after the network: `torch.quantile`, clamp, update."""
    x0 = c[:, 0] * latent + c[:, 1] * predicted
    bound = torch.quantile(x0.flatten(1).abs(), 0.9, dim=1).clamp(min=1).view(-1, *[1] * (latent.ndim - 1))
    x0 = x0.clamp(-bound, bound) / bound
    return c[:, 2] * latent + c[:, 3] * x0 + c[:, 4] * predicted + c[:, 7] * noise


def step_speed(device: torch.device, budget: Budget, keep: Callable[[Record], None], *, toy: bool) -> Record:
    """ThresholdedStep and the noise, compared with PyTorch's operators, for several batch sizes.

    The kernels run in a CUDA graph, as in a clip; PyTorch's operators run eagerly.
    """
    shape = (3, 2, 8, 8) if toy else (3, 40, 32, 32)
    for batch in (1, 2) if toy else (1, 8, 32):
        budget.need(3, "timing a step")
        latent, predicted, noise = (_random(seed, (batch, *shape), device) for seed in range(3))
        history, coefficients = torch.stack([latent, noise], dim=1), _random(4, (batch, 11), device)
        columns = coefficients.view(batch, 11, 1, 1, 1, 1)
        seeds, step = torch.arange(batch, device=device), torch.zeros(1, dtype=torch.int64, device=device)
        arguments = (latent, predicted, history, noise, coefficients)
        small = (latent * 1e-3, predicted * 1e-3, *arguments[2:])
        runs: dict[str, Callable[[], Any]] = {
            "kernel": lambda a=arguments: thresholded_step(*a),  # type: ignore[misc]
            "kernel, quantile below 1": lambda a=small: thresholded_step(*a),  # type: ignore[misc]
            "our operators": lambda a=arguments: thresholded_step_in_torch(*a),  # type: ignore[misc]
            "published operators": lambda a=(latent, predicted, noise, columns): published_step(*a),  # type: ignore[misc]
            "noise kernel": lambda a=seeds, b=step: noise_on_gpu(a, b, shape),  # type: ignore[misc]
            "torch.randn": lambda a=latent: torch.randn_like(a),  # type: ignore[misc]
        }
        times = {
            name: measure(captured(run, device) if "kernel" in name else run, device, seconds=0.15).plain()
            for name, run in runs.items()
        }
        keep({f"batch {batch}": times})
    return {}
