"""Checks of the plans' `ctypes` driver on a real GPU: copies, capture, replay, pinned memory; from two threads."""

from __future__ import annotations

import threading
import traceback
from dataclasses import asdict

import numpy as np

from benchmarks.gpu_records import Record
from benchmarks.gpu_work import Bench
from lfdm_export.engines.cuda_driver import CudaDriver, Handle, load_driver
from lfdm_export.engines.tensorrt.gpu_memory import DeviceBuffer, PinnedArray, PinnedRing
from lfdm_export.errors import EngineError

_COUNT = 122_880
_TURNS = 8


class WrongCopyError(Exception):
    """Data came back from the GPU changed."""


def check_driver(bench: Bench) -> Record:
    """Check every driver call that plans make, except TensorRT's own.

    Raises:
        EngineError: the driver reports an error; earlier results are kept.
        WrongCopyError: a copy is wrong.
    """
    driver = load_driver()
    bench.keep({"gpus": [asdict(gpu) for gpu in driver.gpus()]})
    driver.use_first_gpu()
    stream = driver.create_stream()
    try:
        bench.keep({"copies": _copies(driver, stream)})
        bench.keep({"capture and replay": _capture(driver, stream)})
        bench.keep({"pinned ring": _ring(driver, stream)})
        return {"second thread": _second_thread(driver, stream)}
    finally:
        driver.destroy_stream(stream)


def _copies(driver: CudaDriver, stream: Handle) -> str:
    device = DeviceBuffer(driver, 4 * _COUNT)
    up, down = _pinned(driver), _pinned(driver)
    up.array[:] = np.arange(_COUNT)
    driver.upload(device.pointer, up.address, up.size, stream)
    driver.download(down.address, device.pointer, down.size, stream)
    driver.synchronize(stream)
    return _right(down.array, up.array)


def _capture(driver: CudaDriver, stream: Handle) -> str:
    source, target = (DeviceBuffer(driver, 4 * _COUNT) for _ in range(2))
    up, down = _pinned(driver), _pinned(driver)
    up.array[:] = np.arange(_COUNT)
    driver.upload(source.pointer, up.address, up.size, stream)
    driver.clear(target.pointer, target.size, stream)
    driver.begin_capture(stream)
    driver.copy(target.pointer, source.pointer, source.size, stream)
    graph = driver.end_capture(stream)
    for _ in range(3):
        driver.launch(graph, stream)
    driver.download(down.address, target.pointer, down.size, stream)
    driver.synchronize(stream)
    driver.destroy_graph(graph)
    return _right(down.array, up.array)


def _ring(driver: CudaDriver, stream: Handle) -> str:
    device, down = DeviceBuffer(driver, 4 * _COUNT), _pinned(driver)
    ring = PinnedRing(driver, (_COUNT,), np.float32, 2)
    for turn in range(_TURNS):
        ring.upload(device.pointer, np.full(_COUNT, turn, np.float32), stream)
    driver.download(down.address, device.pointer, down.size, stream)
    driver.synchronize(stream)
    ring.settle()
    return _right(down.array, np.full(_COUNT, _TURNS - 1, np.float32))


def _second_thread(driver: CudaDriver, stream: Handle) -> str:
    """The same copies from a second thread, which binds the existing context."""
    found: list[str] = []

    def work() -> None:
        try:
            driver.bind()
            found.append(_copies(driver, stream))
        except (EngineError, WrongCopyError):
            found.append(traceback.format_exc())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if found != ["right"]:
        raise WrongCopyError(f"the driver does not work from a second thread: {found[0]}")
    return found[0]


def _pinned(driver: CudaDriver) -> PinnedArray:
    return PinnedArray(driver, (_COUNT,), np.float32)


def _right(found: np.ndarray, expected: np.ndarray) -> str:
    if not np.array_equal(found, expected):
        raise WrongCopyError(f"{int((found != expected).sum())} of {expected.size} values differ")
    return "right"
