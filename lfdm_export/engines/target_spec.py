"""What one backend declares of itself; its folder has the declaration, in `target.py`.

Declarations are read wherever the toolkit starts: they import what is heavy inside of their functions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

from lfdm_export.engines.cuda_driver import Gpu
from lfdm_export.errors import InputError

if TYPE_CHECKING:
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.engines.interface import ClipMaker, Engine

#: The name of a target; `lfdm_export.engines.targets` knows them all.
Target: TypeAlias = str
Purpose = Literal["export", "run"]
Takes = Literal["graphs", "plans", "weights"]

#: The first compute capability that multiplies matrices in a precision. Source: CUDA programming guide, tensor cores.
FIRST_CAPABILITY: Mapping[str, tuple[int, int]] = {
    "fp32": (7, 5),
    "fp16": (7, 5),
    "int8": (7, 5),
    "tf32": (8, 0),
    "bf16": (8, 0),
    "fp8": (8, 9),
}


@dataclass(frozen=True)
class Machine:
    """What the targets are chosen by.

    Attributes:
        gpus: NVIDIA GPUs; the first is used.
        no_gpu: why there is none; "" if there is one.
        packages: versions of the packages that targets need and that are installed, by import name.
        processor: what its processor can do, in Linux's words.
    """

    gpus: tuple[Gpu, ...]
    no_gpu: str
    packages: Mapping[str, str]
    processor: Collection[str] = ()


#: Loads a stage of a bundle, given threads on a CPU (None: all cores) and a device, see `TargetSpec.devices`. Raises
#: EngineError where it cannot be loaded, MissingDependencyError where a package of the target is not installed.
Loader: TypeAlias = Callable[["Bundle", str, int | None, str], "Engine"]
#: Prepares whole clips of a bundle, by a sampling stage, for a batch size and threads; None: stages run one by one.
ClipMakerLoader: TypeAlias = Callable[["Bundle", str, int, int | None], "ClipMaker | None"]
#: Why a target whose packages are installed lacks a precision that it knows, for a purpose on a machine; "" if it does
#: not. The last argument is the GPU architectures that plans shall be built for; None for the target's own choice.
Lacks: TypeAlias = Callable[[Purpose, str, Machine, Collection[str] | None], str]


def _lacks_nothing(_purpose: Purpose, _precision: str, _machine: Machine, _gpus: Collection[str] | None) -> str:
    return ""


@dataclass(frozen=True)
class TargetSpec:
    """One backend; `lfdm_export.engines.targets` lists them all.

    Attributes:
        name: value of --target.
        title: what messages call it.
        extra: of this project; installs it.
        packages: import names that it needs, and for each the distributions that can bring it; its own comes first.
        takes: what of a bundle it runs: the "graphs", which are always there; "plans", which are built from them for a
            GPU; or the networks' "weights", of which it compiles its own programs.
        load: loads a stage.
        cpu_precisions: that it runs on a CPU.
        gpu_precisions: that it runs on a GPU which has them (`FIRST_CAPABILITY`).
        cpu_notes: by precision, how it computes what a CPU does not.
        bodies: of the operators in the graphs that it reads; see `lfdm_export.graphs.bodies`.
        devices: values of ``device``; a target without them finds its device itself.
        builds_anywhere: its plans are built with or without a GPU.
        lacks: what else it lacks, and where.
        clip_maker: makes whole clips, if it can.
        first_in: precisions in which "auto" tries it before the others that take graphs.
        auto_on_cpu: "auto" takes it on a machine without a GPU too.
        note: for the table of targets, Markdown.
    """

    name: Target
    title: str
    extra: str
    packages: Mapping[str, tuple[str, ...]]
    takes: Takes
    load: Loader
    cpu_precisions: tuple[str, ...] = ()
    gpu_precisions: tuple[str, ...] = ()
    cpu_notes: Mapping[str, str] = field(default_factory=dict)
    bodies: str = "stored"
    devices: tuple[str, ...] = ()
    builds_anywhere: bool = False
    lacks: Lacks = _lacks_nothing
    clip_maker: ClipMakerLoader | None = None
    first_in: tuple[str, ...] = ()
    auto_on_cpu: bool = True
    note: str = ""

    def __post_init__(self) -> None:
        """Check what can be told without the backend.

        Raises:
            InputError: it names no package, no precision, an unknown one, or takes something unknown.
        """
        unknown = {*self.precisions, *self.cpu_notes, *self.first_in} - set(FIRST_CAPABILITY)
        if unknown or not self.precisions:
            found = ", ".join(sorted(unknown)) or "none"
            raise InputError(f"target {self.name!r}: precisions: found {found}, expected {', '.join(FIRST_CAPABILITY)}")
        if self.takes not in get_args(Takes):
            raise InputError(f"target {self.name!r}: takes {self.takes!r}, expected {', '.join(get_args(Takes))}")
        if not self.packages:
            raise InputError(f"target {self.name!r}: packages: found none, expected at least one import name")

    @property
    def precisions(self) -> tuple[str, ...]:
        """All that it runs anywhere."""
        return tuple(dict.fromkeys((*self.gpu_precisions, *self.cpu_precisions)))

    @property
    def distributions(self) -> tuple[str, ...]:
        """Every distribution that can bring one of its packages."""
        return tuple(name for names in self.packages.values() for name in names)

    def lacking(
        self, purpose: Purpose, precision: str, machine: Machine, *, gpus: Collection[str] | None = None
    ) -> str:
        """Why it is not available on a machine, with the remedy, in a clause; "" if it is.

        Args:
            purpose: "export": make plans (those that take graphs need none); "run": run stages.
            precision: of the bundle.
            machine: the machine.
            gpus: architectures that plans shall be built for; None for the target's own choice.
        """
        missing = [name for name in self.packages if name not in machine.packages]
        if missing:
            return f"{' and '.join(missing)} not installed: pip install 'lfdm-export[{self.extra}]'"
        if precision not in self.precisions:
            where = "here" if self.gpu_precisions else "on a CPU"
            return f"{self.title} has no {precision} {where}: take another target, or export another precision"
        return self.lacks(purpose, precision, machine, gpus)


def gpu_lacks(gpu: Gpu, precision: str) -> str:
    """Why a GPU does not run a precision, with the remedy, in a clause; "" if it does."""
    if gpu.compute_capability >= FIRST_CAPABILITY[precision]:
        return ""
    return f"{gpu.name} ({gpu.architecture}) has no {precision}: export another precision"
