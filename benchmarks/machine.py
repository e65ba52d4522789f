"""The machine of a measurement: hardware, versions, load."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

from lfdm_export.files.atomic import write_file
from lfdm_export.machine import available_cores, package_versions, processor_info, processor_name

#: Default folder of results.
RESULTS = Path(__file__).resolve().parent / "results"
_PACKAGES = ("lfdm-export", "torch", "onnx", "onnxruntime", "onnxscript", "openvino", "numpy")
#: CPU flags that determine the speed of matrix products.
_FLAGS = (
    "avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_bf16", "amx_int8",
    "amx_tile", "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip
#: Share of the cores that other programs may use; above it a measurement counts as disturbed.
_QUIET = 0.25


def describe() -> dict[str, object]:
    """Hardware, versions, date and load, ready for JSON."""
    return {
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "cores": available_cores(),
        "flags": _cpu_flags(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": package_versions(_PACKAGES),
        "load_average": list(os.getloadavg()),
    }


def at_start() -> dict[str, Any]:
    """`describe`, with a ``warning``, also printed, if other programs use the machine; else it is None."""
    load, cores = os.getloadavg()[0], available_cores()
    warning = None
    if load > _QUIET * cores:
        warning = f"the machine is busy: load average {load:.2f} on {cores} cores before the run; times are noisy"
        print(f"WARNING: {warning}", file=sys.stderr)
    return {**describe(), "warning": warning}


def write_json(path: Path, content: object) -> None:
    """Write a result atomically."""
    write_file(path, (json.dumps(content, indent=1) + "\n").encode())


def _cpu_model() -> str:
    info, name = processor_info(), processor_name()
    numbers = [f"{key} {info[key]}" for key in ("cpu family", "model", "stepping") if key in info]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _cpu_flags() -> list[str]:
    info = processor_info()
    present = set((info.get("flags") or info.get("Features") or "").split())
    return [flag for flag in _FLAGS if flag in present]
