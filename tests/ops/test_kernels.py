"""The CUDA kernels' arithmetic, in their host build, against references in float64."""

from __future__ import annotations

import ctypes
import itertools
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from lfdm_export.ops.cuda.host import THREAD_ORDERS, HostKernels, build
from lfdm_export.ops.cuda.source import ROOT, Storage
from lfdm_export.ops.pictures.kernels import not_finite_kernel, not_finite_launch, pictures_kernel, pictures_launch
from lfdm_export.ops.thresholded_step import kernels as step_kernels
from lfdm_export.ops.thresholded_step.kernels import STORAGES, noise_kernel, noise_launch, step_kernel, step_launch
from lfdm_export.ops.thresholded_step.reference import thresholded_step_in_torch
from lfdm_export.ops.warp.kernels import Layout, warp_kernel, warp_launch
from lfdm_export.ops.warp.reference import warp_blend_in_torch, warp_in_torch
from lfdm_export.pictures.preprocess import to_uint8
from lfdm_export.sampling import rows
from lfdm_export.sampling.loop import apply_step, quantile_rank
from lfdm_export.sampling.noise import START, noise_for
from tests.kernel_arrays import KERNELS, LAYOUTS, TORCH, addresses, empty, random, stored, values_of

STORAGE_TYPES = tuple(TORCH)
#: Half of the distance between neighboring values at 1.
HALF_ULP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.fixture
def host(host_kernels: HostKernels) -> HostKernels:
    return host_kernels


# -- warp


def run_warp(
    host: HostKernels,
    storage: Storage,
    layout: Layout,
    source: Tensor,
    motion: Tensor,
    previous: Tensor | None = None,
    *,
    stride: int = 1,
    phase: tuple[int, int] = (0, 0),
    order: int = 0,
) -> Tensor:
    """The kernel's result as float64; WarpBlend if there is a previous activation."""
    channels, height, width = source.shape[1:]
    frames = len(motion)
    plan = warp_launch(
        storage, layout, (channels, height, width), (motion.shape[2], motion.shape[3]), frames, frames // len(source),
        stride=stride, phase=phase,
    )  # fmt: skip
    result = empty((frames, channels, height // stride, width // stride), storage, layout)
    inputs = [stored(source, storage, layout), stored(motion, "float32")]
    if previous is not None:
        inputs.append(stored(previous, storage, layout))
    host.run(
        warp_kernel(storage, layout, blend=previous is not None).name,
        plan,
        addresses(inputs),
        addresses([result]),
        order,
    )
    return values_of(result, storage, layout)


def rounded(tensor: Tensor, storage: Storage) -> Tensor:
    """To the storage type and on to float64: what the kernel is given."""
    return tensor.to(TORCH[storage]).double()


def random_motion(seed: int, frames: int, height: int, width: int) -> Tensor:
    """Coordinates inside and outside of the picture, and occlusions."""
    rng = np.random.default_rng(seed)
    grid = rng.uniform(-1.3, 1.3, (frames, 2, height, width))
    return torch.from_numpy(np.concatenate([grid, rng.random((frames, 1, height, width))], axis=1).astype(np.float32))


def tolerance(source: Tensor, expected: Tensor, storage: Storage) -> Tensor:
    """Half an ulp of the storage type, and what float32 coordinates cost.

    A coordinate g in [-2, 2] becomes the pixel ((g + 1) W - 1) / 2 after some 8 roundings, that are at most
    W · 2^-24 pixels each; a pixel's way changes the sample by at most twice the largest value. Weights, sums and the
    blend add another 8 roundings of values not above it.
    """
    largest = source.abs().max()
    size = max(source.shape[2:])
    return expected.abs() * HALF_ULP[storage] + largest * (16 * size + 8) * HALF_ULP["float32"]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("storage", STORAGE_TYPES)
@pytest.mark.parametrize(
    ("batch", "frames", "channels", "motion_size", "size"),
    [
        (1, 1, 3, (8, 8), (8, 8)),  # the motion's own size; a picture
        (2, 3, 16, (8, 8), (16, 16)),
        (1, 2, 8, (5, 7), (20, 28)),  # rows that are not a multiple of a tile's
        (1, 2, 9, (4, 6), (13, 17)),  # nothing is a multiple of anything
        (1, 1, 200, (4, 4), (8, 8)),  # more than one slice of channels
    ],
)
def test_warp(
    host: HostKernels,
    storage: Storage,
    layout: Layout,
    batch: int,
    frames: int,
    channels: int,
    motion_size: tuple[int, int],
    size: tuple[int, int],
) -> None:
    source = rounded(random(1, batch, channels, *size), storage)
    motion = random_motion(2, batch * frames, *motion_size)
    found = run_warp(host, storage, layout, source, motion)
    expected = warp_in_torch(source, motion.double())
    assert ((found - expected).abs() <= tolerance(source, expected, storage)).all()

    previous = rounded(random(3, *expected.shape), storage)
    found = run_warp(host, storage, layout, source, motion, previous)
    expected = warp_blend_in_torch(source, motion.double(), previous)
    limit = tolerance(torch.cat([source.flatten(), previous.flatten()]).view(1, 1, 1, -1), expected, storage)
    assert ((found - expected).abs() <= torch.maximum(limit, tolerance(source, expected, storage))).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("storage", STORAGE_TYPES)
@pytest.mark.parametrize("phase", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_phases_are_every_second_pixel_of_the_whole(
    host: HostKernels, storage: Storage, layout: Layout, phase: tuple[int, int]
) -> None:
    source, motion, previous = random(1, 2, 8, 16, 24), random_motion(2, 4, 4, 6), random(3, 4, 8, 16, 24)
    whole = run_warp(host, storage, layout, source, motion, previous)
    part = previous[:, :, phase[0] :: 2, phase[1] :: 2]
    found = run_warp(host, storage, layout, source, motion, part, stride=2, phase=phase)
    assert torch.equal(found, whole[:, :, phase[0] :: 2, phase[1] :: 2])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_source_serves_all_its_frames(host: HostKernels, layout: Layout) -> None:
    source, motion, previous = random(1, 2, 8, 8, 8), random_motion(2, 6, 4, 4), random(3, 6, 8, 8, 8)
    together = run_warp(host, "float32", layout, source, motion, previous)
    for frame in range(6):
        alone = [source[frame // 3 :][:1], motion[frame:][:1], previous[frame:][:1]]
        assert torch.equal(run_warp(host, "float32", layout, *alone), together[frame:][:1])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("storage", STORAGE_TYPES)
def test_order_of_threads_does_not_matter_to_warp(host: HostKernels, storage: Storage, layout: Layout) -> None:
    arguments = random(1, 1, 12, 12, 20), random_motion(2, 2, 3, 5), random(3, 2, 12, 12, 20)
    results = [run_warp(host, storage, layout, *arguments, order=order) for order in THREAD_ORDERS]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


#: Coordinates that are not numbers, or as far away as can be.
WILD = (np.nan, np.inf, -np.inf, 3.4e38, -3.4e38, 1e30, -1e30, 1e9, -1e9, 2.2e9, -2.2e9)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("storage", STORAGE_TYPES)
def test_no_coordinate_gives_nan(host: HostKernels, storage: Storage, layout: Layout) -> None:
    pairs = [(x, y) for wild in WILD for x, y in ((wild, 0.0), (0.0, wild), (wild, wild))]
    grid = torch.tensor(pairs, dtype=torch.float32).t().reshape(1, 2, 3, 11)
    motion = torch.cat([grid, torch.full((1, 1, 3, 11), 0.25)], dim=1)
    source, previous = random(1, 1, 8, 3, 11), random(2, 1, 8, 3, 11)
    assert not run_warp(host, storage, layout, source, motion).any()
    expected = rounded(previous, storage) * 0.75
    torch.testing.assert_close(
        run_warp(host, storage, layout, source, motion, previous), rounded(expected, storage), rtol=0, atol=0
    )
    # The references agree.
    assert not warp_in_torch(source, motion).any()


def border_coordinates(size: int) -> NDArray[np.float32]:
    """Every pixel's center, the picture's edges, what is just inside and outside of them, and one pixel further."""
    centers = (2 * np.arange(-1, size + 1) + 1) / size - 1
    marks = np.concatenate([centers, [-1.0, 1.0]]).astype(np.float32)
    low, high = (np.nextafter(marks, np.float32(end)) for end in (-9, 9))
    return np.concatenate([marks, low, high]).astype(np.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 10), (1, 4), (4, 1)])
def test_borders(host: HostKernels, layout: Layout, height: int, width: int) -> None:
    points = np.array(list(itertools.product(border_coordinates(width), border_coordinates(height))))
    frames = -(-len(points) // (height * width))
    grid = np.full((frames * height * width, 2), 0.0, np.float32)
    grid[: len(points)] = points
    planes = torch.from_numpy(grid).view(frames, height, width, 2).permute(0, 3, 1, 2)
    motion = torch.cat([planes, torch.ones(frames, 1, height, width)], dim=1)
    source = random(1, 1, 4, height, width)
    found = run_warp(host, "float32", layout, source, motion)
    expected = warp_in_torch(source.double(), motion.double())
    assert ((found - expected).abs() <= tolerance(source, expected, "float32")).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_corners_that_are_not_sampled_do_not_count(host: HostKernels, layout: Layout) -> None:
    # On a pixel's center its neighbors have the weight 0, which an infinite neighbor turns into NaN, as in torch; a
    # corner outside is not there at all.
    source = torch.full((1, 4, 4, 4), torch.inf)
    source[:, :, 3, 3] = 2.0
    center = torch.tensor([0.75, 0.75, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4).clone()
    assert (run_warp(host, "float32", layout, source, center) == 2.0).all()
    center[:, :2] = -0.25
    source[:, :, 1, 1] = 2.0
    assert run_warp(host, "float32", layout, source, center).isnan().all()
    assert warp_in_torch(source, center).isnan().all()


def test_motion_of_the_pictures_own_size_is_taken_as_it_is(host: HostKernels) -> None:
    # Resizing by 1 would spread an infinity to its neighbors.
    motion = torch.zeros(1, 3, 4, 4)
    motion[0, 0, 2, 2] = torch.inf
    found = run_warp(host, "float32", "planar", torch.ones(1, 1, 4, 4), motion)
    assert (found == 0).sum() == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("storage", ["float16", "bfloat16"])
def test_every_16_bit_value_is_read_and_stored(host: HostKernels, storage: Storage, layout: Layout) -> None:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(TORCH[storage]).view(1, 64, 32, 32)
    hidden = torch.zeros(1, 3, 4, 4)  # occlusion 0: the previous activation shows
    found = run_warp(host, storage, layout, torch.zeros(1, 64, 32, 32), hidden, bits)
    torch.testing.assert_close(found, bits.double(), rtol=0, atol=0, equal_nan=True)


# -- thresholded step


def run_step(
    host: HostKernels,
    latent: Tensor,
    predicted: Tensor,
    history: Tensor,
    noise: Tensor,
    coefficients: Tensor,
    *,
    storages: tuple[Storage, Storage] = ("float32", "float32"),
    order: int = 0,
) -> tuple[Tensor, Tensor]:
    """What one kernel gives, and a kernel for each pass must give likewise to the bit."""
    state, narrow = storages
    lower, weight = quantile_rank(latent[0].numel())
    results = [empty(tuple(shape), state) for shape in (latent.shape, history.shape)]
    inputs = [
        stored(latent, state),
        stored(predicted, narrow),
        stored(history, state),
        stored(noise, state),
        stored(coefficients, "float32"),
    ]
    plan = step_launch(latent[0].numel(), lower, float(weight), len(latent))
    host.run(step_kernel(*storages).name, plan, addresses(inputs), addresses(results), order)
    for one, other in zip(results, run_passes(host, inputs, results, storages, order), strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))
    first, second = (values_of(result, state) for result in results)
    return first, second


def run_passes(
    host: HostKernels,
    inputs: list[NDArray[Any]],
    like: list[NDArray[Any]],
    storages: tuple[Storage, Storage],
    order: int,
) -> list[NDArray[Any]]:
    latent, predicted, _, _, coefficients = inputs
    batch, elements = len(latent), latent[0].size
    lower, weight = quantile_rank(elements)
    counts = np.zeros((batch, step_kernels.COUNTS), np.uint32)
    plan = step_kernels.count_launch(elements, lower, batch)
    for number in range(step_kernels.PASSES):
        kernel = step_kernels.count_kernel(*storages, number)
        host.run(kernel.name, plan, addresses([latent, predicted, coefficients]), addresses([counts]), order)
    results = [np.full_like(array, 255 if array.dtype == np.uint16 else np.nan) for array in like]
    update = step_kernels.update_launch(elements, lower, float(weight), batch)
    host.run(
        step_kernels.update_kernel(*storages).name, update, addresses([*inputs, counts]), addresses(results), order
    )
    return results


def step_arguments(estimates: Tensor) -> tuple[Tensor, ...]:
    """Arguments for which x0 estimates are these (B, n), the next latent is x0, and the carry 0."""
    zeros = torch.zeros_like(estimates)
    coefficients = torch.zeros(len(estimates), 11)
    coefficients[:, rows.X0_FROM_LATENT] = 1
    coefficients[:, rows.NEXT_FROM_X0] = 1
    return estimates, zeros, torch.stack([zeros, zeros], dim=1), zeros, coefficients


def same_values(found: tuple[Tensor, ...], expected: tuple[Any, ...]) -> None:
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.float(), torch.as_tensor(other), rtol=0, atol=0, equal_nan=True)


def hostile_estimates(count: int) -> Tensor:
    rng = np.random.default_rng(0)
    around = np.where(rng.random(count) < 0.89, 0.5, 1.5)
    sparse = np.zeros(count)
    sparse[: count // 5] = 7.5
    cases = (
        rng.standard_normal(count) * 3,
        rng.uniform(-0.5, 0.5, count),
        np.zeros(count),
        np.full(count, -4.25),
        rng.integers(-5, 6, count) * 1.5,
        sparse,
        around,  # the quantile lies between values on both sides of 1, or on one of them
        rng.standard_cauchy(count),
        np.exp(8 * rng.standard_normal(count)),
        np.nextafter(np.float32(2), np.float32(3)) + rng.integers(0, 3, count) * 2.0**-22,
        rng.uniform(1e37, 3e38, count),
        rng.uniform(0.999, 1.001, count),
    )
    return torch.from_numpy(np.stack(cases).astype(np.float32))


# 122,880 values are a latent of the published models.
@pytest.mark.parametrize("count", [122_880, 6_144, 1_007, 7, 2, 1])
def test_step_is_numpys_to_the_last_bit(host: HostKernels, count: int) -> None:
    arguments = step_arguments(hostile_estimates(count))
    expected = apply_step(*(argument.numpy() for argument in arguments))
    same_values(run_step(host, *arguments), expected)


def test_quantile_is_torchs(host: HostKernels) -> None:
    estimates = hostile_estimates(122_880)
    bound = estimates.abs().quantile(0.9, dim=1, keepdim=True).clamp(min=1)
    next_latent, _ = run_step(host, *step_arguments(estimates))
    same_values((next_latent,), (torch.clamp(estimates, -bound, bound) / bound,))


def test_a_rank_on_either_side_of_one(host: HostKernels) -> None:
    # 0.9 · 10 = 9: the tenth value; then the upper neighbor weighs 0.9.
    for count in (11, 12):
        for large in range(4):
            values = torch.linspace(0.1, 0.95, count)
            if large:
                values[-large:] = torch.tensor([1.25, 1.5, 7.0])[-large:]
            arguments = step_arguments(values[None])
            same_values(run_step(host, *arguments), apply_step(*(a.numpy() for a in arguments)))


# Weights of the upper neighbor: 0.9, 0.8, 0.4, 0.
@pytest.mark.parametrize("count", [12, 13, 17, 21])
def test_interpolation_is_done_from_the_nearer_end(host: HostKernels, count: int) -> None:
    # From the other one the last bit differs in some of so many.
    arguments = step_arguments(random(1, 100, count) * 5)
    same_values(run_step(host, *arguments), apply_step(*(argument.numpy() for argument in arguments)))


@pytest.mark.parametrize("count", [1024, 1023])
@pytest.mark.parametrize("share", [0.001, 0.0999, 0.11, 1.0])
@pytest.mark.parametrize("wild", [torch.nan, torch.inf, -torch.inf])
def test_estimates_that_are_no_numbers_give_what_torch_gives(
    host: HostKernels, wild: float, share: float, count: int
) -> None:
    estimates = random(1, 1, count) * 2
    estimates[0, : max(1, int(share * count))] = wild
    arguments = step_arguments(estimates)
    same_values(run_step(host, *arguments), thresholded_step_in_torch(*arguments))


@pytest.mark.parametrize("count", [4096, 1001])
@pytest.mark.parametrize("storages", STORAGES)
def test_step_combines_as_its_coefficients_say(
    host: HostKernels, storages: tuple[Storage, Storage], count: int
) -> None:
    state, narrow = storages
    arguments = [random(seed, 3, count) for seed in range(4)]
    latent, noise = (rounded(arguments[i], state).float() for i in (0, 1))
    predicted = rounded(arguments[2], narrow).float()
    history = rounded(random(5, 3, 2, count), state).float()
    coefficients = random(6, 3, 11)
    coefficients[:, 0] *= 3  # so that the threshold bites in some samples
    exact = (latent, predicted, history, noise, coefficients)
    expected = apply_step(*(argument.numpy() for argument in exact))
    found = run_step(host, *exact, storages=storages)
    same_values(found, tuple(rounded(torch.from_numpy(array), state).float() for array in expected))


def test_order_of_threads_does_not_matter_to_a_step(host: HostKernels) -> None:
    estimates = torch.cat([hostile_estimates(6144)[[0, 4, 6, 9]], random(1, 1, 6144) * 100])
    arguments = step_arguments(estimates)
    first, *others = (run_step(host, *arguments, order=order) for order in THREAD_ORDERS)
    for other in others:
        same_values(other, tuple(result.float() for result in first))


def test_a_samples_counts_are_as_large_as_is_said() -> None:
    text = (ROOT / "thresholded_step" / "passes.cuh").read_text(encoding="utf-8")
    fields = re.search(r"struct StepCounts \{(.*?)\n\};", text, re.DOTALL)[1]  # type: ignore[index]
    names = re.findall(r"uint32 (\w+(?:\[\w+\])*);", fields)
    assert names == ["bins[STEP_PASSES][STEP_BINS]", "below", "most", "least", "least_above"]
    assert step_kernels.COUNTS == step_kernels.PASSES * 2048 + 4


def test_columns_are_the_sampler_tables() -> None:
    text = (ROOT / "thresholded_step" / "kernel.cuh").read_text(encoding="utf-8")
    names = re.findall(r"\w+", re.search(r"enum Column \{(.*?)\}", text, re.DOTALL)[1])  # type: ignore[index]
    assert [getattr(rows, name) for name in names] == list(range(11))


# -- noise


@pytest.mark.parametrize("step", [START, 0, 9, 999])
@pytest.mark.parametrize("count", [122_880, 1_023, 3])
def test_noise_is_that_of_the_host(host: HostKernels, step: int, count: int) -> None:
    seeds = [0, 12345, 2**64 - 1]
    found = np.full((len(seeds), count), np.nan, np.float32)
    steps = [step, 3, step]  # each sample has its own
    inputs = [np.array(seeds, np.uint64), np.array(steps, np.int64)]
    host.run(noise_kernel().name, noise_launch(count, len(seeds)), addresses(inputs), addresses([found]))
    expected = np.concatenate([noise_for([seed], at, (count,)) for seed, at in zip(seeds, steps, strict=True)])
    np.testing.assert_array_max_ulp(found, expected, maxulp=1)
    # Mathematical libraries differ in one value of 10^8 or so.
    assert (found != expected).mean() < 1e-5


# -- pictures


def test_pictures_are_those_of_the_host(host: HostKernels) -> None:
    images = np.random.default_rng(0).uniform(-0.2, 1.2, (2, 3, 4, 5, 9)).astype(np.float32)
    images[0, :, 0, 0, :4] = [0.0, 1.0, -0.0, np.nextafter(np.float32(1), np.float32(0))]
    found, flag = np.full((2, 4, 5, 9, 3), 7, np.uint8), np.zeros(1, np.uint32)
    launch = pictures_launch(4 * 5 * 9, 2)
    host.run(pictures_kernel().name, launch, addresses([images]), addresses([found, flag]))
    np.testing.assert_array_equal(found, to_uint8(images))
    assert flag[0] == 0
    images[1, 2, 3, 4, 8] = np.inf
    host.run(pictures_kernel().name, launch, addresses([images]), addresses([found, flag]))
    assert flag[0] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, np.finfo(np.float32).max])
def test_one_value_that_is_not_finite_is_found(host: HostKernels, value: float) -> None:
    values, flag = np.ones(1000, np.float32), np.zeros(1, np.uint32)
    values[-1] = value
    host.run(not_finite_kernel().name, not_finite_launch(1000), addresses([values]), addresses([flag]))
    assert bool(flag[0]) != np.isfinite(value)


# -- memory


ASAN_FLAGS = ("-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
HARNESS = (Path(__file__).parents[1] / "data" / "kernel_memory.cpp").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def memory_check(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("memory") / "check"
    return build(KERNELS, program, flags=(*ASAN_FLAGS, "-O0"), main=HARNESS)


def test_nothing_is_read_or_written_out_of_bounds(memory_check: Path) -> None:
    done = run(memory_check)
    assert done.returncode == 0, done.stderr
    assert "all runs done" in done.stdout


@pytest.mark.parametrize(
    "short",
    [
        "source",
        "motion",
        "previous",
        "result",
        "latent",
        "history",
        "counts",
        "noise",
        "images",
        "pictures",
        "values",
        "x",
        "partials",
        "shift",
        "residual",
        "normed",
        "qkv",
        "turns",
        "bias",
        "attended",
    ],
)
def test_the_memory_check_sees_a_buffer_that_is_too_short(memory_check: Path, short: str) -> None:
    done = run(memory_check, short)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # Bounds are what is asked for: the search for leaks needs ptrace, which containers and debuggers refuse it.
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False, env=environment, preexec_fn=_fixed_addresses
    )


def _fixed_addresses() -> None:
    """In the new process: no random addresses, if that is allowed; older sanitizers die of those of newer kernels."""
    ctypes.CDLL(None).personality(0x0040000)  # ADDR_NO_RANDOMIZE
