"""Files that the parts of the GPU suite share: settings, weights, the host build of the kernels, a clip.

Every part runs in its own process. Files for other parts are in the work folder.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu_records import Record, write_record
from benchmarks.gpu_timing import Budget

if TYPE_CHECKING:
    import torch

    from benchmarks.gpu_clips import Task
    from lfdm_export.ops.cuda.source import Kernel
    from lfdm_models.model import LfdmModel

#: Variant of the golden recipe.
GOLDEN = "mug128"


@dataclass(frozen=True)
class Settings:
    """Settings of all parts.

    Attributes:
        device: "cuda", or "cpu" for a trial.
        tiny: use small sizes, for a trial.
        work: folder for files that parts make for each other.
        out: folder for results.
        golden: folder of the golden recipe that makes the weights, if it is used.
        checkpoints: files of the weights, if given. Without both, weights are random.
    """

    device: str
    tiny: bool
    work: Path
    out: Path
    golden: Path | None = None
    checkpoints: tuple[Path, Path] | None = None

    def save(self) -> None:
        """Write the settings into the work folder."""
        plain = json.dumps(asdict(self), default=str)
        (self.work / "settings.json").write_text(plain, encoding="utf-8")

    @staticmethod
    def load(work: Path) -> Settings:
        """Read the settings from the work folder."""
        plain = json.loads((work / "settings.json").read_text(encoding="utf-8"))
        checkpoints = tuple(map(Path, plain["checkpoints"])) if plain["checkpoints"] else None
        golden = Path(plain["golden"]) if plain["golden"] else None
        return Settings(
            plain["device"], plain["tiny"], Path(plain["work"]), Path(plain["out"]), golden, checkpoints  # type: ignore[arg-type]
        )  # fmt: skip

    @property
    def weights(self) -> Path:
        """File of the networks' state, float32."""
        return self.work / "weights.pt"

    @property
    def reference(self) -> Path:
        """File of frames (1, 3, T, H, W) and latent of the faithful networks in float32 at batch 1."""
        return self.work / "reference.pt"

    @property
    def host_kernels(self) -> Path:
        """Folder of the kernels' host build, for trials on a CPU."""
        return self.work / "kernels.so"

    def record(self, part: str) -> Path:
        """The file of a part's record."""
        return self.out / "parts" / f"{part}.json"


@dataclass(eq=False)
class Bench:
    """The environment of a part.

    Attributes:
        settings: settings of all parts.
        budget: time limit of the part.
        record: file of the part's record.
        model: the networks on the host, if the part needs them.
        data: the part's results so far.
    """

    settings: Settings
    budget: Budget
    record: Path
    model: LfdmModel | None = None
    data: Record = field(default_factory=dict)
    _on_device: bool = field(default=False, init=False)

    @property
    def device(self) -> torch.device:
        """The device of all computations."""
        import torch

        return torch.device(self.settings.device)

    @property
    def tiny(self) -> bool:
        """Whether this is a trial with small sizes."""
        return self.settings.tiny

    @property
    def steps(self) -> int:
        """Sampling steps of a clip."""
        return 2 if self.tiny else 10

    def keep(self, data: Record) -> None:
        """Add results and write them, so that they survive a crash of the process."""
        self.data |= data
        write_record(self.record, {"status": "running", "data": self.data})

    def networks(self) -> LfdmModel:
        """The networks, on the device."""
        assert self.model is not None
        if not self._on_device:
            self.model.lfae.to(self.device)
            self.model.diffusion.to(self.device)
            self._on_device = True
        return self.model

    def task(self, batch: int) -> Task:
        """The task of `batch` clips."""
        from benchmarks.gpu_clips import make_task

        size, frames = (64, 2) if self.tiny else (128, 40)
        return make_task(self.networks(), batch, self.device, image_size=size, frames=frames, steps=self.steps)


def make_shared(bench: Bench) -> Record:
    """The part "shared": write the weights, and on a CPU the kernels' host build, into the work folder."""
    import torch

    settings = bench.settings
    model, source = _small_model() if settings.tiny else _full_model(settings)
    parts = {"lfae": model.lfae, "diffusion": model.diffusion}
    torch.save({name: network.state_dict() for name, network in parts.items()}, settings.weights)
    if settings.device == "cpu":
        build_host_kernels(settings)
    parameters = sum(p.numel() for network in parts.values() for p in network.parameters())
    return {"weights": source, "parameters": parameters}


def load_model(settings: Settings) -> LfdmModel:
    """The networks with the weights that `make_shared` wrote, on the host."""
    import torch

    from lfdm_models.config import DmConfig, LfaeConfig, LfdmConfig
    from lfdm_models.demo import CONFIG
    from lfdm_models.diffusion import Diffusion
    from lfdm_models.lfae import Lfae
    from lfdm_models.model import LfdmModel

    config = CONFIG if settings.tiny else LfdmConfig(LfaeConfig(), DmConfig())
    lfae, diffusion = Lfae(config.lfae), Diffusion(config.dm)
    state = torch.load(settings.weights, weights_only=True)
    lfae.load_state_dict(state["lfae"])
    diffusion.load_state_dict(state["diffusion"])
    return LfdmModel(config, lfae.eval().requires_grad_(False), diffusion.eval().requires_grad_(False))


def build_host_kernels(settings: Settings) -> None:
    """Build the kernels for the host, into the work folder."""
    from lfdm_export.ops.cuda.host import build

    build(_kernels(), settings.host_kernels)


@contextlib.contextmanager
def kernels_for(settings: Settings) -> Iterator[None]:
    """On a CPU, use the host build of the kernels."""
    if settings.device != "cpu":
        yield
        return
    from lfdm_export.ops.cuda.dispatch import standing_in
    from lfdm_export.ops.cuda.host import HostKernels

    with standing_in(HostKernels(settings.host_kernels, _kernels())):
        yield


def _kernels() -> list[Kernel]:
    from lfdm_export.ops.final_conv import kernels as final
    from lfdm_export.ops.group_norm_silu import kernels as norm
    from lfdm_export.ops.linear_attention import kernels as linear
    from lfdm_export.ops.temporal_attention.kernels import STORAGES as CORES
    from lfdm_export.ops.temporal_attention.kernels import core_kernel
    from lfdm_export.ops.thresholded_step import kernels as step
    from lfdm_export.ops.warp.kernels import warp_kernel

    kernels = [step.noise_kernel()]
    for storages in step.STORAGES:
        kernels += [step.step_kernel(*storages), step.update_kernel(*storages)]
        kernels += [step.count_kernel(*storages, number) for number in range(step.PASSES)]
    # Kernels of the published network, and of the small one.
    kernels += [core_kernel(storage, width, frames) for storage in CORES for width, frames in ((32, 40), (16, 8))]
    sizes = [*((channels, 32) for channels in (64, 128, 256)), *((channels, 16) for channels in (32, 64))]
    kernels += [linear.linear_kernel(storage, *size) for storage in linear.STORAGES for size in sizes]
    kernels += [final.final_kernel(storage, channels) for storage in final.STORAGES for channels in (16, 64)]
    kernels += [norm.apply_kernel(*storages) for storages in norm.STORAGES]
    for storage in ("float32", "float16", "bfloat16"):
        kernels.append(norm.statistics_kernel(storage))
        for blend in (False, True):
            kernels += [warp_kernel(storage, "planar", blend=blend), warp_kernel(storage, "channels_last", blend=blend)]
    return kernels


def _small_model() -> tuple[LfdmModel, str]:
    from lfdm_models.demo import untrained_model

    return untrained_model(), "small, untrained"


def _full_model(settings: Settings) -> tuple[LfdmModel, str]:
    """Networks of the published size, and a description of their weights' origin."""
    import torch

    from lfdm_models.config import DmConfig, LfaeConfig, LfdmConfig
    from lfdm_models.diffusion import Diffusion
    from lfdm_models.lfae import Lfae
    from lfdm_models.model import LfdmModel

    config = LfdmConfig(LfaeConfig(), DmConfig())
    torch.manual_seed(0)
    lfae, diffusion = Lfae(config.lfae), Diffusion(config.dm)
    pair, source = settings.checkpoints, "random, seed 0"
    if settings.golden is not None:
        pair, source = _golden_checkpoints(settings.golden, settings.work), f"golden recipe {GOLDEN}"
    elif pair is not None:
        source = " ".join(path.name for path in pair)
    if pair is not None:
        tensors: dict[str, Any] = {k: v for path in pair for k, v in torch.load(path, weights_only=True).items()}
        for part, network in {
            "generator": lfae.generator,
            "region_predictor": lfae.region_predictor,
            "bg_predictor": lfae.bg_predictor,
            "diffusion": diffusion,
        }.items():
            network.load_state_dict({k.removeprefix("module."): v for k, v in tensors[part].items()})
    return LfdmModel(config, lfae.eval().requires_grad_(False), diffusion.eval().requires_grad_(False)), source


def _golden_checkpoints(recipe: Path, folder: Path) -> tuple[Path, Path]:
    import runpy

    make: Callable[[str, Path], tuple[Path, Path]] = runpy.run_path(str(recipe / "make_checkpoints.py"))["make"]
    return make(GOLDEN, folder)
