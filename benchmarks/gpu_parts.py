"""The parts of `gpu_suite.py`: what each of them measures, and in which order."""

from __future__ import annotations

import argparse
import math
import runpy
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_timing import Budget, OutOfTimeError

if TYPE_CHECKING:
    import torch

    from benchmarks.gpu_clips import Clips, Task
    from lfdm_models.model import LfdmModel

Record = dict[str, Any]
GOLDEN = "mug128"
BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(eq=False)
class Suite:
    """What the parts share.

    Attributes:
        arguments: of the command line.
        device: where all runs.
        budget: when it must have ended.
        model: the networks, once they were made.
        clip: frames (1, 3, T, H, W) of the faithful networks in float32 at batch 1, once they were made.
    """

    arguments: argparse.Namespace
    device: torch.device
    budget: Budget
    model: LfdmModel | None = None
    clip: Any = None
    flops: dict[str, float] = field(default_factory=dict)

    @property
    def toy(self) -> bool:
        """A trial run of small sizes."""
        return bool(self.arguments.size == "toy")

    @property
    def steps(self) -> int:
        """Of a clip's chain."""
        return 2 if self.toy else 10

    def task(self, batch: int) -> Task:
        """Clips to make.

        Raises:
            RuntimeError: the networks could not be made.
        """
        from benchmarks.gpu_clips import make_task

        if self.model is None:
            raise RuntimeError("there are no networks, because the part 'model' failed")
        size, frames = (64, 2) if self.toy else (128, 40)
        return make_task(self.model, batch, self.device, image_size=size, frames=frames, steps=self.steps)


def _ceilings(suite: Suite) -> Record:
    from benchmarks.gpu_kernels import ceilings

    return ceilings(suite.device, toy=suite.toy)


def _checks(suite: Suite) -> Record:
    from benchmarks.gpu_kernels import checks

    return checks(suite.device, toy=suite.toy)


def _warp_speed(suite: Suite) -> Record:
    from benchmarks.gpu_kernels import warp_speed

    return warp_speed(suite.device, suite.budget, toy=suite.toy)


def _step_speed(suite: Suite) -> Record:
    from benchmarks.gpu_kernels import step_speed

    return step_speed(suite.device, suite.budget, toy=suite.toy)


def _model(suite: Suite) -> Record:
    """The networks, on the device."""
    suite.budget.need(20, "making the networks")
    if suite.toy:
        from lfdm_models.demo import untrained_model

        suite.model, source = untrained_model(), "small, untrained"
    else:
        suite.model, source = _full_model(suite.arguments)
    suite.model.lfae.to(suite.device)
    suite.model.diffusion.to(suite.device)
    parameters = sum(p.numel() for net in (suite.model.lfae, suite.model.diffusion) for p in net.parameters())
    return {"weights": source, "parameters": parameters}


def _full_model(options: argparse.Namespace) -> tuple[LfdmModel, str]:
    import torch

    from lfdm_models.config import DmConfig, LfaeConfig, LfdmConfig
    from lfdm_models.diffusion import Diffusion
    from lfdm_models.lfae import Lfae
    from lfdm_models.model import LfdmModel

    config = LfdmConfig(LfaeConfig(), DmConfig())
    torch.manual_seed(0)
    lfae, diffusion = Lfae(config.lfae), Diffusion(config.dm)
    source = "random, seed 0"
    with tempfile.TemporaryDirectory(prefix="lfdm-golden-") as folder:
        pair = options.checkpoints
        if options.golden:
            make = runpy.run_path(str(options.golden / "make_checkpoints.py"))["make"]
            pair = make(GOLDEN, Path(folder))
        if pair:
            tensors = {k: v for path in pair for k, v in torch.load(path, weights_only=True).items()}
            for part, network in {
                "generator": lfae.generator,
                "region_predictor": lfae.region_predictor,
                "bg_predictor": lfae.bg_predictor,
                "diffusion": diffusion,
            }.items():
                network.load_state_dict({k.removeprefix("module."): v for k, v in tensors[part].items()})
            source = f"golden {GOLDEN}" if options.golden else " ".join(path.name for path in pair)
    networks = (lfae.eval().requires_grad_(False), diffusion.eval().requires_grad_(False))
    return LfdmModel(config, *networks), source


def _parity(suite: Suite) -> Record:
    """Frames and latents of a whole chain against the faithful networks in float32, with the same noise."""
    import torch

    from benchmarks.gpu_clips import Ours, Published, make
    from benchmarks.gpu_kernels import DTYPES

    task = suite.task(1)
    reference = Published(suite.model, task)  # type: ignore[arg-type]  # made by `task`
    suite.clip = make(reference, suite.steps)
    latent = reference.latent()
    found: Record = {}
    for name, dtype in DTYPES.items():
        ours = Ours(suite.model, task, dtype)  # type: ignore[arg-type]
        frames = make(ours, suite.steps)
        square = float(torch.mean((frames.double() - suite.clip.double()).clamp(-1, 1) ** 2))
        flow = (ours.latent() - latent)[:, :2].norm(dim=1) * suite.clip.shape[-1] / 2
        found[name] = {
            "psnr": None if square == 0 else -10 * math.log10(square),
            "largest_frame_error": float((frames - suite.clip).abs().max()),
            "flow_end_point_error_pixels": {"mean": float(flow.mean()), "largest": float(flow.max())},
            "finite": bool(torch.isfinite(frames).all()),
        }
        if not suite.flops:
            suite.flops = ours.flops()
    return {**found, "flops": suite.flops}


def _time_clips(suite: Suite, clips: Clips, *, seconds: float = 0.4) -> Record:
    """Stages and the whole; the stages by events on the stream, the whole by the wall clock."""
    from benchmarks.gpu_clips import make
    from benchmarks.gpu_timing import measure, measure_wall

    device = suite.device
    clips.encode()
    clips.start()
    record: Record = {
        "encode": measure(clips.encode, device, seconds=seconds / 2).plain(),
        "step": measure(clips.step, device, seconds=seconds).plain(),
    }
    clips.start()
    record["decode"] = measure(clips.decode, device, seconds=seconds).plain()
    record["clip"] = measure_wall(lambda: make(clips, suite.steps), device, seconds=2 * seconds).plain()
    return record


def _clip(suite: Suite) -> Record:
    """One clip at batch 1 by every way that needs no compiler."""
    import torch

    from benchmarks.gpu_clips import Ours, Published

    task, model = suite.task(1), suite.model
    assert model is not None
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    ways: dict[str, Callable[[], Clips]] = {
        "faithful fp32": lambda: Published(model, task),
        "ours fp16": lambda: Ours(model, task, half),
        "ours bf16": lambda: Ours(model, task, brain),
        "ours fp32": lambda: Ours(model, task, single),
        "ours fp16, planar": lambda: Ours(model, task, half, last=False),
        "ours fp16, no graphs": lambda: Ours(model, task, half, graphs=False),
        "faithful tf32": lambda: Published(model, task),
        "ours tf32": lambda: Ours(model, task, single),
        "faithful fp32, graphs": lambda: Published(model, task, graphs=True),
        "faithful fp16": lambda: Published(model, task, lower=half),
        "faithful bf16": lambda: Published(model, task, lower=brain),
        "faithful fp16, graphs": lambda: Published(model, task, lower=half, graphs=True),
    }
    if suite.toy:
        ways = {name: way for name, way in ways.items() if name in ("faithful fp32", "ours fp16", "faithful bf16")}
    return _time_ways(suite, ways, 12)


def _compiled(suite: Suite) -> Record:
    """One clip at batch 1 by ways through torch.compile."""
    import torch

    from benchmarks.gpu_clips import Ours, Published

    task, model = suite.task(1), suite.model
    assert model is not None
    ways: dict[str, Callable[[], Clips]] = {
        "ours fp16, compiled": lambda: Ours(model, task, torch.float16, compiled=True),
        "faithful fp16, compiled": lambda: Published(model, task, lower=torch.float16, compiled=True),
        "ours bf16, compiled": lambda: Ours(model, task, torch.bfloat16, compiled=True),
        "faithful fp32, compiled": lambda: Published(model, task, compiled=True),
    }
    if suite.toy:  # a compiler for CPUs shows nothing of one for GPUs
        ways.clear()
    return _time_ways(suite, ways, 90)


def _time_ways(suite: Suite, ways: dict[str, Callable[[], Clips]], seconds: float) -> Record:
    """Time ways to make clips; one that fails, or for which no time is left, says so."""
    import torch

    found: Record = {}
    for name, way in ways.items():
        tf32 = "tf32" in name
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        try:
            suite.budget.need(seconds, name)
            found[name] = _time_clips(suite, way())
        except OutOfTimeError as error:
            found[name] = {"skipped": str(error)}
        except Exception as error:  # noqa: BLE001  (one way less, not all)
            found[name] = {"failed": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        finally:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
            if "compiled" in name:
                torch._dynamo.reset()
    _raise_if_failed(found)
    return found


def _raise_if_failed(found: Record) -> None:
    failed = [name for name, one in found.items() if "failed" in one]
    if failed:
        error = RuntimeError(f"failed: {', '.join(failed)}")
        error.data = found  # type: ignore[attr-defined]
        raise error


def _batches(suite: Suite) -> Record:
    """Ours and the faithful networks for growing batches, with the share of the matrix-product rate."""
    import torch

    from benchmarks.gpu_clips import Ours, Published

    found: Record = {"ours fp16": {}, "ours bf16": {}, "faithful fp16": {}, "faithful fp32": {}}
    failed: Record = {}
    model = suite.model
    assert model is not None
    for batch in BATCHES[:2] if suite.toy else BATCHES:
        for name, by_batch in found.items():
            slow = name == "faithful fp32" and batch not in (1, 8)
            if slow or (suite.toy and name == "ours bf16"):
                continue
            lower = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(name.split()[1])
            try:
                suite.budget.need(6 + 0.6 * batch, f"{name} at batch {batch}")
                task = suite.task(batch)
                ours = name.startswith("ours") and lower is not None
                clips: Clips = Ours(model, task, lower) if ours and lower else Published(model, task, lower=lower)
                by_batch[str(batch)] = _time_clips(suite, clips, seconds=0.2)
                if ours and suite.flops:
                    step = by_batch[str(batch)]["step"]["median"]
                    by_batch[str(batch)]["flops_a_second"] = batch * suite.flops["step"] / step
            except OutOfTimeError as error:
                by_batch[str(batch)] = {"skipped": str(error)}
            except Exception as error:  # noqa: BLE001  (one batch less, not all)
                by_batch[str(batch)] = {"failed": f"{type(error).__name__}: {error}"}
                failed[f"{name} {batch}"] = {"failed": str(error)}
                traceback.print_exc()
            clips = None  # type: ignore[assignment]  # its memory, before the next one is made
            if suite.device.type == "cuda":
                torch.cuda.empty_cache()
    try:
        _raise_if_failed(failed)
    except RuntimeError as error:
        error.data = found  # type: ignore[attr-defined]
        raise
    return found


#: In the order of what one would miss most.
PARTS: dict[str, Callable[[Suite], Record]] = {
    "ceilings": _ceilings,
    "checks": _checks,
    "warp_speed": _warp_speed,
    "step_speed": _step_speed,
    "model": _model,
    "parity": _parity,
    "clip": _clip,
    "batches": _batches,
    "compiled": _compiled,
}
