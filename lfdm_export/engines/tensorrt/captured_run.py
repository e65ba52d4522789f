"""A run of an engine with fixed shapes and addresses, and work after it: captured as one CUDA graph where possible."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping

from lfdm_export.engines.cuda_driver import DevicePointer, Handle
from lfdm_export.engines.tensorrt.gpu_memory import quietly
from lfdm_export.engines.tensorrt.gpu_session import GpuSession
from lfdm_export.engines.tensorrt.plan_context import PlanContext, Shapes
from lfdm_export.engines.tensorrt.target import TENSORRT_RTX


class CapturedRun:
    """Queues the run; its caller owns the session.

    With TensorRT the run and the work after it are captured once; TensorRT for RTX captures its engines itself.
    """

    def __init__(
        self,
        session: GpuSession,
        context: PlanContext,
        shapes: Shapes,
        pointers: Mapping[str, DevicePointer],
        after: Callable[[], None],
    ) -> None:
        """Prepare nothing yet.

        Args:
            session: session of the GPU.
            context: context of the engine, not used by others.
            shapes: shapes of all inputs, by name.
            pointers: GPU addresses of inputs and outputs, by name.
            after: queues further work on the session's stream, always the same.
        """
        self._session, self._context, self._after = session, context, after
        self._shapes, self._pointers = shapes, pointers
        self._graph: Handle | None = None
        self._warm = False

    def __call__(self) -> None:
        """Queue the run, as a graph from the second time on.

        Raises:
            EngineError: the run cannot be queued.
        """
        if self._context.prepare(self._shapes):
            self._context.bind(self._pointers)
            self._graph, self._warm = None, False
        if self._session.api.target == TENSORRT_RTX.name or not self._warm:
            # The first run of TensorRT does work that cannot be captured.
            self._queue()
            self._warm = True
            return
        if self._graph is None:
            self._graph = self._captured()
        self._session.driver.launch(self._graph, self._session.stream)

    def _queue(self) -> None:
        self._context.enqueue()
        self._after()

    def _captured(self) -> Handle:
        driver, stream = self._session.driver, self._session.stream
        driver.begin_capture(stream)
        try:
            self._queue()
        except BaseException:
            quietly(driver.abandon_capture, stream)
            raise
        graph = driver.end_capture(stream)
        weakref.finalize(self, quietly, driver.destroy_graph, graph).atexit = False
        return graph
