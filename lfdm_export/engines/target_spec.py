"""What one backend declares about itself, in `target.py` of its folder.

Declarations are read at every start of the toolkit, so they import nothing of their backend: they name its functions
as "module:function" (an `Entry`), which are imported when they are first used.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

from lfdm_export.engines.cuda_driver import Gpu
from lfdm_export.errors import InputError

if TYPE_CHECKING:
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.engines.device_chain import DeviceChain
    from lfdm_export.engines.interface import ClipMaker, Engine

#: The name of a target; `lfdm_export.engines.targets` lists them all.
Target: TypeAlias = str
Purpose = Literal["export", "run"]
Takes = Literal["graphs", "plans", "weights"]

#: The first compute capability with matrix products in a precision. Source: CUDA programming guide, tensor cores.
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
    """The facts that the choice of a target uses.

    Attributes:
        gpus: NVIDIA GPUs; the first is used.
        no_gpu: why there is none; "" if there is one.
        packages: versions of the installed packages that targets need, by import name.
        processor: features of its processor, as Linux names them.
    """

    gpus: tuple[Gpu, ...]
    no_gpu: str
    packages: Mapping[str, str]
    processor: Collection[str] = ()


#: A function of a backend, "module:function"; `pkgutil.resolve_name` imports it.
Entry: TypeAlias = str
#: Loads a stage of a bundle for a target, given threads on a CPU (None: all cores) and a device, as in
#: `TargetSpec.devices`. Raises EngineError if it cannot be loaded, MissingDependencyError if a package of the target is
#: not installed.
Loader: TypeAlias = Callable[["Bundle", str, Target, int | None, str], "Engine"]
#: Prepares whole clips of a bundle, for a sampling stage, a batch size and threads; None: single stages only.
ClipMakerLoader: TypeAlias = Callable[["Bundle", str, int, int | None], "ClipMaker | None"]
#: Prepares clips of a bundle that stay on the device of a target, for threads on a CPU; raises as a `Loader` does.
DeviceChainLoader: TypeAlias = Callable[["Bundle", Target, int | None], "DeviceChain[Any]"]
#: Why a target with its packages installed lacks a supported precision, for a purpose on a machine; "" if it does not.
#: The last argument is the GPU architectures to build plans for; None for the default of the target.
Lacks: TypeAlias = Callable[[Purpose, str, Machine, Collection[str] | None], str]


def _lacks_nothing(_purpose: Purpose, _precision: str, _machine: Machine, _gpus: Collection[str] | None) -> str:
    return ""


@dataclass(frozen=True)
class TargetSpec:
    """One backend; `lfdm_export.engines.targets` lists them all.

    Attributes:
        name: value of --target.
        title: its name in messages.
        extra: the extra of this project that installs it.
        packages: import names that it needs, each with the distributions that provide it; its own comes first.
        takes: what it runs from a bundle: the "graphs", which are always there; "plans", which are built from them for
            a GPU; or the "weights" of the networks, from which it compiles its own programs.
        load: entry of the `Loader` of its stages.
        cpu_precisions: precisions that it runs on a CPU.
        gpu_precisions: precisions that it runs on a GPU that has them (`FIRST_CAPABILITY`).
        cpu_notes: by precision, how it computes what a CPU lacks.
        bodies: operator bodies in the graphs that it reads; see `lfdm_export.graphs.bodies`.
        devices: values of ``device``; a target without them selects its device itself.
        builds_anywhere: whether its plans can be built without a GPU.
        lacks: what else it lacks, and where.
        clip_maker: entry of the `ClipMakerLoader`, if it can make whole clips; else "".
        device_chain: entry of the `DeviceChainLoader`, if it can keep clips of different steps on its device; else "".
        first_in: precisions in which "auto" tries it before other targets that run graphs.
        loads_together: whether several threads may load stages at the same time.
        auto_on_cpu: whether "auto" also uses it on a machine without a GPU.
        note: note in the table of targets, Markdown.
    """

    name: Target
    title: str
    extra: str
    packages: Mapping[str, tuple[str, ...]]
    takes: Takes
    load: Entry
    cpu_precisions: tuple[str, ...] = ()
    gpu_precisions: tuple[str, ...] = ()
    cpu_notes: Mapping[str, str] = field(default_factory=dict)
    bodies: str = "stored"
    devices: tuple[str, ...] = ()
    builds_anywhere: bool = False
    lacks: Lacks = _lacks_nothing
    clip_maker: Entry = ""
    device_chain: Entry = ""
    first_in: tuple[str, ...] = ()
    loads_together: bool = False
    auto_on_cpu: bool = True
    note: str = ""

    def __post_init__(self) -> None:
        """Check what needs no backend.

        Raises:
            InputError: it names no package or precision, an unknown precision, or an unknown value of `takes`.
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
        """All precisions that it runs anywhere."""
        return tuple(dict.fromkeys((*self.gpu_precisions, *self.cpu_precisions)))

    @property
    def distributions(self) -> tuple[str, ...]:
        """Every distribution that provides one of its packages."""
        return tuple(name for names in self.packages.values() for name in names)

    def lacking(
        self, purpose: Purpose, precision: str, machine: Machine, *, gpus: Collection[str] | None = None
    ) -> str:
        """Why it is not available on a machine, with the remedy, as a clause; "" if it is.

        Args:
            purpose: "export": make plans (targets that run graphs need none); "run": run stages.
            precision: precision of the bundle.
            machine: the machine.
            gpus: architectures to build plans for; None for the default of the target.
        """
        missing = [name for name in self.packages if name not in machine.packages]
        if missing:
            return f"{' and '.join(missing)} not installed: pip install 'lfdm-export[{self.extra}]'"
        if precision not in self.precisions:
            where = "here" if self.gpu_precisions else "on a CPU"
            return f"{self.title} has no {precision} {where}: take another target, or export another precision"
        return self.lacks(purpose, precision, machine, gpus)


def gpu_lacks(gpu: Gpu, precision: str) -> str:
    """Why a GPU does not run a precision, with the remedy, as a clause; "" if it does."""
    if gpu.compute_capability >= FIRST_CAPABILITY[precision]:
        return ""
    return f"{gpu.name} ({gpu.architecture}) has no {precision}: export another precision"
