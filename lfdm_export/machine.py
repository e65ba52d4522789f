"""What a result was got with: versions, processor, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

_PACKAGES = ("lfdm-export", "numpy", "onnxruntime", "onnxruntime-gpu")


def environment(threads: int | None, *, with_torch: bool) -> dict[str, str]:
    """This machine and its programs, by name.

    Args:
        threads: that engines were given; None for all cores.
        with_torch: torch took part.
    """
    found = {"python": platform.python_version()}
    for name in (*_PACKAGES, *["torch"] * with_torch):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        **found,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": _processor(),
        "threads": str(threads) if threads is not None else f"all of {os.cpu_count()} cores",
    }


def _processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()
