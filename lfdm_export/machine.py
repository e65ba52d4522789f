"""What a result was got with: versions, processor, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterable
from pathlib import Path

_PACKAGES = (
    "lfdm-export", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx-cu13-bindings",
)  # fmt: skip

#: Environment variables that keep libraries from features that the processor has.
_LIMITS = ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA")


def environment(threads: int | None, *, with_torch: bool) -> dict[str, str]:
    """This machine and its programs, by name.

    Args:
        threads: that engines were given; None for all cores.
        with_torch: torch took part.
    """
    return {
        "python": platform.python_version(),
        **package_versions((*_PACKAGES, *["torch"] * with_torch)),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor_name(),
        "threads": str(threads) if threads is not None else f"all of {os.cpu_count()} cores",
    }


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those of the packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def processor_name() -> str:
    """The processor's name, as far as the system tells."""
    return processor_info().get("model name") or platform.processor() or platform.machine()


def processor_facts() -> list[str]:
    """What decides which kernels libraries take: the processor's name and features, and limits of the environment."""
    limits = [f"{name}={os.environ[name]}" for name in _LIMITS if name in os.environ]
    return [processor_name(), processor_info().get("flags", ""), *limits]


def processor_info() -> dict[str, str]:
    """What Linux says of the first core, by its own names; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.split("\n\n", 1)[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}
