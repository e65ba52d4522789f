"""Kernels of a stage: the number of launches, and the kernels that take most time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_records import Record
from benchmarks.gpu_timing import synchronize

#: Rows of a table of kernels, by time.
_ROWS = 200
_NAME_LENGTH = 120


def kernel_table(run: Callable[[], Any], device: torch.device) -> Record:
    """The kernels that one run launches, by PyTorch's profiler; in a trial on a CPU, its operators instead.

    Returns:
        "launches", "seconds" of all kernels together, and "kernels": name, launches and seconds of the slowest ones.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    run()
    synchronize(device)
    with profile(activities=activities) as profiler:
        run()
        synchronize(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    rows = []
    for event in profiler.key_averages():
        micros = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if event.device_type == kind and micros > 0:
            rows.append((event.key[:_NAME_LENGTH], event.count, micros * 1e-6))
    rows.sort(key=lambda row: -row[2])
    return {
        "launches": sum(count for _, count, _ in rows),
        "seconds": sum(seconds for _, _, seconds in rows),
        "kernels": [{"name": name, "launches": count, "seconds": s} for name, count, s in rows[:_ROWS]],
    }
