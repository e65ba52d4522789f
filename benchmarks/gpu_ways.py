"""Ways to make a clip: time of each stage, end-to-end time, and distance from float32."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.gpu_clips import Clips, Ours, Published, Task, make
from benchmarks.gpu_profile import kernel_table
from benchmarks.gpu_records import Record
from benchmarks.gpu_timing import measure, measure_wall
from benchmarks.gpu_work import Bench

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Way:
    """A way to make a clip.

    Attributes:
        networks: "faithful", or "ours" for the deployable modules with this project's kernels.
        precision: a name of `DTYPES`.
        graphs: replay CUDA graphs.
        compiled: compile by torch.compile.
        last: use the channels-last memory format; only for "ours".
    """

    networks: Literal["faithful", "ours"]
    precision: str
    graphs: bool = True
    compiled: bool = False
    last: bool = True

    def clips(self, bench: Bench, task: Task) -> Clips:
        """Prepare the way for a task."""
        model, dtype = bench.networks(), DTYPES[self.precision]
        tf32 = self.precision == "tf32"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        if self.networks == "ours":
            return Ours(model, task, dtype, graphs=self.graphs, compiled=self.compiled, last=self.last)
        lower = None if dtype == torch.float32 else dtype
        return Published(model, task, lower=lower, graphs=self.graphs, compiled=self.compiled)


#: The published program's way, with which all others are compared.
REFERENCE = Way("faithful", "fp32", graphs=False)


def measure_way(bench: Bench, way: Way, *, seconds: float = 0.3) -> Record:
    """A way at batch 1: times, distance of its frames, and launched kernels."""
    task = bench.task(1)
    start = time.monotonic()
    clips = way.clips(bench, task)
    bench.keep({"seconds_to_prepare": time.monotonic() - start})
    frames = make(clips, bench.steps)
    if way == REFERENCE:
        torch.save({"frames": frames.cpu(), "latent": clips.latent().cpu()}, bench.settings.reference)
    elif bench.settings.reference.is_file():
        bench.keep({"parity": _parity(bench, frames, clips.latent())})
    else:
        bench.keep({"parity": "not measured: there are no frames of the faithful networks in float32"})
    bench.keep(time_clips(bench, clips, task, seconds=seconds))
    if isinstance(clips, Ours) and not way.compiled:
        bench.keep({"work": {name: asdict(work) for name, work in clips.work().items()}})
    bench.budget.need(3, "the table of kernels")
    stages: dict[str, Callable[[], object]] = {"step": clips.step, "decode": clips.decode}
    return {"launched": {name: kernel_table(stage, bench.device) for name, stage in stages.items()}}


def measure_batches(bench: Bench, way: Way, batches: tuple[int, ...]) -> Record:
    """A way at several batch sizes, the most informative first; a failure ends the part."""
    for batch in batches:
        bench.budget.need(6 + 0.4 * batch + 30 * way.compiled, f"batch {batch}")
        task = bench.task(batch)
        clips = way.clips(bench, task)
        bench.keep({str(batch): time_clips(bench, clips, task, seconds=0.2)})
        del clips
        torch._dynamo.reset()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
    return {}


def time_clips(bench: Bench, clips: Clips, task: Task, *, seconds: float) -> Record:
    """Times of the stages by events on the stream; of the clip by the wall clock, without and with transfers."""
    device = bench.device
    clips.encode()
    clips.start()
    record: Record = {
        "encode": measure(clips.encode, device, seconds=seconds / 2).plain(),
        "step": measure(clips.step, device, seconds=seconds).plain(),
    }
    clips.start()
    record["decode"] = measure(clips.decode, device, seconds=seconds).plain()
    record["clip"] = measure_wall(lambda: make(clips, bench.steps), device, seconds=2 * seconds).plain()
    whole = _end_to_end(clips, task, bench.steps)
    record["end_to_end"] = measure_wall(whole, device, seconds=2 * seconds).plain()
    return record


def _end_to_end(clips: Clips, task: Task, steps: int) -> Callable[[], Tensor]:
    """A clip from an image on the host to uint8 frames on the host."""
    pin = task.image.is_cuda
    image = task.image.cpu().pin_memory() if pin else task.image.clone()
    batch, channels, height, width = image.shape
    shape = (batch, channels, task.frames, height, width)
    result = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)

    def run() -> Tensor:
        task.image.copy_(image, non_blocking=True)
        frames = make(clips, steps)
        result.copy_((frames * 255).round_().clamp_(0, 255).to(torch.uint8), non_blocking=True)
        return result

    return run


def _parity(bench: Bench, frames: Tensor, latent: Tensor) -> Record:
    """Distance from the faithful networks in float32, with the same noise."""
    reference = torch.load(bench.settings.reference, weights_only=True)
    expected, expected_latent = (reference[name].to(frames.device) for name in ("frames", "latent"))
    square = float(torch.mean((frames.double() - expected.double()).clamp(-1, 1) ** 2))
    flow = (latent - expected_latent)[:, :2].norm(dim=1) * expected.shape[-1] / 2
    return {
        "psnr": None if square == 0 else -10 * math.log10(square),
        "largest_frame_error": float((frames - expected).abs().max()),
        "flow_end_point_error_pixels": {"mean": float(flow.mean()), "largest": float(flow.max())},
        "finite": bool(torch.isfinite(frames).all()),
    }
