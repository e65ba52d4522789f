"""The targets that run a bundle, which of them this machine has, and the default.

A target is a program that runs stages; its declaration says what it needs from a bundle, and where it runs.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from lfdm_export.engines.cuda_driver import find_gpus
from lfdm_export.engines.onnxruntime.target import ONNXRUNTIME
from lfdm_export.engines.openvino.target import OPENVINO
from lfdm_export.engines.pytorch.target import PYTORCH
from lfdm_export.engines.target_spec import Machine, Purpose, Takes, Target, TargetSpec
from lfdm_export.engines.tensorrt.target import TENSORRT, TENSORRT_RTX
from lfdm_export.errors import EngineError, InputError
from lfdm_export.machine import package_versions, processor_features

#: All targets. To add one, add its folder and a line here. Among targets with the same `takes`, "auto" tries them in
#: this order.
TARGETS: tuple[TargetSpec, ...] = (
    ONNXRUNTIME,
    OPENVINO,
    TENSORRT,
    TENSORRT_RTX,
    PYTORCH,
)
#: Selects one of the targets; see `find_target`.
AUTO = "auto"
#: Means every available target.
EVERY_TARGET = "all"
#: Means, in verification, a CPU that rounds as a GPU does.
SIMULATION = "simulation"


@dataclass(frozen=True)
class Choice:
    """The selected target and the reason, as a clause; None if no target makes plans here."""

    target: Target | None
    reason: str


def target_names(*takes: Takes) -> tuple[Target, ...]:
    """The names of all targets, or of those with one of these values of `takes`."""
    return tuple(spec.name for spec in TARGETS if not takes or spec.takes in takes)


def target_titles(*takes: Takes) -> str:
    """Titles of the targets with one of these values of `takes`: "ONNX Runtime or OpenVINO"."""
    *titles, last = (spec.title for spec in TARGETS if spec.takes in takes)
    return f"{', '.join(titles)} or {last}" if titles else last


def spec_of(name: str) -> TargetSpec:
    """The declaration of a target.

    Raises:
        InputError: the name is unknown.
    """
    check_target_name(name)
    return next(spec for spec in TARGETS if spec.name == name)


def check_target_name(name: str, *others: str) -> None:
    """Reject a name that is neither a target nor one of `others`.

    Raises:
        InputError: the name is neither.
    """
    expected = (*others, *target_names())
    if name not in expected:
        raise InputError(f"unknown target {name!r}; expected {', '.join(expected)}")


def device_names() -> tuple[str, ...]:
    """The values of ``device``."""
    return tuple(dict.fromkeys(device for spec in TARGETS for device in spec.devices))


def device_target(device: str) -> TargetSpec:
    """The target that runs on a device, by the name of the device.

    Raises:
        InputError: the name is unknown.
    """
    for spec in TARGETS:
        if device in spec.devices:
            return spec
    raise InputError(f"unknown device {device!r}; expected one of {', '.join(device_names())}")


def this_machine() -> Machine:
    """The facts of this machine; imports nothing heavy."""
    gpus, no_gpu = find_gpus()
    needed = {name: distributions for spec in TARGETS for name, distributions in spec.packages.items()}
    found = {
        name: next(iter(package_versions(distributions).values()), "of unknown version")
        for name, distributions in needed.items()
        if _is_there(name)
    }
    return Machine(gpus, no_gpu, found, processor_features())


def find_target(
    name: str,
    purpose: Purpose,
    precision: str,
    *,
    plans: Collection[str] = (),
    machine: Machine | None = None,
    gpus: Collection[str] | None = None,
) -> Choice:
    """The target that a name selects on this machine.

    To make plans, "auto" is the first target that can make them here, else None. To run, it is the first target for
    which the bundle holds plans or weights, else the first that runs graphs. `TARGETS` gives the order, except in
    precisions for which a target is `first_in`.

    Args:
        name: a target, or "auto".
        purpose: "export" or "run".
        precision: precision of the bundle.
        plans: the targets for which the bundle holds plans or weights; used for "run".
        machine: None for this one.
        gpus: architectures to build plans for.

    Raises:
        InputError: the name is unknown.
        EngineError: the target is not available here; or "auto" finds no target that runs the bundle.
    """
    return find_targets(name, purpose, precision, plans=plans, machine=machine, gpus=gpus)[0]


def find_targets(
    name: str,
    purpose: Purpose,
    precision: str,
    *,
    plans: Collection[str] = (),
    machine: Machine | None = None,
    gpus: Collection[str] | None = None,
) -> tuple[Choice, ...]:
    """Every target that a name may select on this machine, the preferred one first, as in `find_target`.

    Raises:
        InputError: the name is unknown.
        EngineError: the target is not available here; or "auto" finds no target that runs the bundle.
    """
    check_target_name(name, AUTO)
    machine = this_machine() if machine is None else machine
    if name != AUTO:
        reason = spec_of(name).lacking(purpose, precision, machine, gpus=gpus)
        if reason:
            raise EngineError(f"the target {name!r} is not available here: {reason}")
        return (Choice(name, "as requested"),)
    against: dict[str, str] = {}
    able: list[Choice] = []
    for spec in _tried(purpose, precision, plans, machine):
        reason = spec.lacking(purpose, precision, machine, gpus=gpus)
        if reason:
            against[spec.title] = reason
        else:
            able.append(Choice(spec.name, _why(spec, purpose, machine, against)))
    if able:
        return tuple(able)
    listed = "; ".join(f"{title}: {reason}" for title, reason in against.items())
    if purpose == "export":
        return (Choice(None, listed),)
    raise EngineError(f"nothing here runs a bundle of precision {precision!r}: {listed}")


def _tried(purpose: Purpose, precision: str, plans: Collection[str], machine: Machine) -> Iterable[TargetSpec]:
    """The targets that "auto" tries, in this order."""
    if purpose == "export":
        return [spec for spec in TARGETS if spec.takes == "plans"]
    held = [spec for spec in TARGETS if spec.takes != "graphs" and spec.name in plans]
    graphs = [spec for spec in TARGETS if spec.takes == "graphs"]
    graphs.sort(key=lambda spec: precision not in spec.first_in)
    return [spec for spec in (*held, *graphs) if machine.gpus or spec.auto_on_cpu]


def _why(spec: TargetSpec, purpose: Purpose, machine: Machine, against: Mapping[str, str]) -> str:
    there = f"{spec.title} {machine.packages[next(iter(spec.packages))]} is installed"
    if purpose == "export" and spec.builds_anywhere:
        there += " and builds without a GPU"
    elif spec.gpu_precisions and machine.gpus:
        there += f" and there is a GPU, {machine.gpus[0].name} ({machine.gpus[0].architecture})"
    return there + "".join(f"; not {title}: {reason}" for title, reason in against.items())


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False
