"""The parts of the GPU suite, the most important first, so that a run that ends early has measured them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.gpu_records import Record

if TYPE_CHECKING:
    from benchmarks.gpu_work import Bench


@dataclass(frozen=True)
class Part:
    """One part, which runs in its own process.

    Attributes:
        what: description of what it measures.
        run: runs the part; imports its modules when called.
        need: minimum seconds to start it.
        limit: seconds after which it is killed.
        torch: whether it uses PyTorch.
        kernels: whether it uses this project's kernels.
        model: whether it needs the networks.
        gpu: whether it requires a GPU, with no trial on a CPU.
    """

    what: str
    run: Callable[[Bench], Record]
    need: float
    limit: float
    torch: bool = True
    kernels: bool = False
    model: bool = False
    gpu: bool = False


def _driver(bench: Bench) -> Record:
    from benchmarks.gpu_driver import check_driver

    return check_driver(bench)


def _checks(bench: Bench) -> Record:
    from benchmarks.gpu_kernels import checks

    return checks(bench.device, toy=bench.tiny)


def _ceilings(bench: Bench) -> Record:
    from benchmarks.gpu_kernels import ceilings, chip

    return {"chip": chip(bench.device), **ceilings(bench.device, toy=bench.tiny)}


def _attention(bench: Bench) -> Record:
    from benchmarks.gpu_attention import attention

    return attention(bench)


def _step(bench: Bench) -> Record:
    from benchmarks.gpu_kernels import step_speed

    return step_speed(bench.device, bench.budget, bench.keep, toy=bench.tiny)


def _norm(bench: Bench) -> Record:
    from benchmarks.gpu_norms import norm_speed

    return norm_speed(bench.device, bench.budget, bench.keep, toy=bench.tiny)


def _linear(bench: Bench) -> Record:
    from benchmarks.gpu_linear import linear_attention_speed

    return linear_attention_speed(bench)


def _final(bench: Bench) -> Record:
    from benchmarks.gpu_final import final_speed

    return final_speed(bench)


def _warp(bench: Bench) -> Record:
    from benchmarks.gpu_kernels import warp_speed

    return warp_speed(bench.device, bench.budget, bench.keep, toy=bench.tiny)


def _way(
    networks: str, precision: str, *, graphs: bool = True, compiled: bool = False, last: bool = True
) -> Callable[[Bench], Record]:
    def run(bench: Bench) -> Record:
        from benchmarks.gpu_ways import Way, measure_way

        way = Way(networks, precision, graphs=graphs, compiled=compiled, last=last)  # type: ignore[arg-type]
        return measure_way(bench, way)

    return run


def _batches(precision: str, batches: tuple[int, ...], *, compiled: bool = False) -> Callable[[Bench], Record]:
    def run(bench: Bench) -> Record:
        from benchmarks.gpu_ways import Way, measure_batches

        way = Way("ours", precision, compiled=compiled)
        return measure_batches(bench, way, (1, 2) if bench.tiny else batches)

    return run


def _product(precision: str, batches: tuple[int, ...]) -> Callable[[Bench], Record]:
    def run(bench: Bench) -> Record:
        from benchmarks.gpu_product import measure_product

        return measure_product(bench, precision, batches[:1] if bench.tiny else batches)

    return run


def _shared(bench: Bench) -> Record:
    from benchmarks.gpu_work import make_shared

    return make_shared(bench)


def _clip(what: str, run: Callable[[Bench], Record], need: float, limit: float) -> Part:
    return Part(what, run, need, limit, kernels=True, model=True)


#: Makes weights for the other parts, on the host, while the first parts run.
SHARED = Part("weights for the others, and on a CPU the kernels' host build", _shared, 0, 120)

PARTS: dict[str, Part] = {
    "driver": Part(
        "the ctypes driver: copies, capture, replay, a second thread", _driver, 3, 40, torch=False, gpu=True
    ),
    "checks": Part("this project's kernels against float64", _checks, 8, 75, kernels=True),
    "ceilings": Part("copy bandwidth and matrix rates of the chip", _ceilings, 6, 40),
    "faithful-fp32": _clip(
        "the published way, and the frames to compare with", _way("faithful", "fp32", graphs=False), 12, 60
    ),
    "ours-fp16": _clip("this project's modules and kernels in CUDA graphs", _way("ours", "fp16"), 12, 70),
    "ours-fp16-compiled": _clip(
        "the same by torch.compile: the fastest way", _way("ours", "fp16", compiled=True), 45, 150
    ),
    "attention": Part("temporal attention's core: kernel, and PyTorch's backends", _attention, 8, 40, kernels=True),
    "step": Part("step and noise kernels, and PyTorch's operators", _step, 8, 40, kernels=True),
    "norm": Part("group norm kernels, and PyTorch's operators", _norm, 6, 40, kernels=True),
    "linear": Part("linear attention, compiled, by fused attention and by products", _linear, 8, 45, kernels=True),
    "final": Part("the decoder's last convolution: kernel, and columns compiled", _final, 8, 40, kernels=True),
    "product-fp16": _clip("the target torch, as users run it", _product("fp16", (1,)), 50, 170),
    "product-fp16-batch": _clip("the same for eight clips", _product("fp16", (8,)), 60, 200),
    "warp": Part("WarpBlend at the decoder's sizes, and PyTorch's operators", _warp, 8, 45, kernels=True),
    "faithful-fp16-graphs": _clip("the published way in autocast and CUDA graphs", _way("faithful", "fp16"), 12, 50),
    "batches-fp16": _clip("this project's modules by batch size", _batches("fp16", (8, 32, 1, 2, 4, 16)), 15, 90),
    "batches-fp16-compiled": _clip("the same by torch.compile", _batches("fp16", (8, 32), compiled=True), 45, 150),
    "ours-bf16-compiled": _clip("bfloat16 by torch.compile", _way("ours", "bf16", compiled=True), 45, 150),
    "ours-fp32": _clip("float32, for parity", _way("ours", "fp32"), 12, 60),
    "ours-bf16": _clip("bfloat16", _way("ours", "bf16"), 12, 60),
    "faithful-fp16-compiled": _clip(
        "the published way by torch.compile", _way("faithful", "fp16", compiled=True), 60, 150
    ),
    "ours-fp16-planar": _clip("without channels last", _way("ours", "fp16", last=False), 12, 60),
    "ours-fp16-eager": _clip("without CUDA graphs", _way("ours", "fp16", graphs=False), 12, 60),
    "ours-tf32": _clip("TF32", _way("ours", "tf32"), 12, 60),
}
