"""This project's metrics on the server's metrics page: the sampler's work, and the waiting times of clients.

Each call of Triton's metrics API is a message to the server's process, so events are only counted where they happen;
a separate thread reports the counts twice a second.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import triton_python_backend_utils as pb_utils

from lfdm_export.batching.jobs import Outcome, Timings
from lfdm_export.batching.observer import Tick
from lfdm_export.protocol.contract import IN_FLIGHT, METRICS_INTERVAL
from lfdm_export.serving.models.stub import log_error

#: Upper bounds of the histograms' buckets, in seconds.
BUCKETS = [0.01, 0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0]

_COUNTERS = {
    "lfdm_steps_total": "Sampling steps of single clips",
    "lfdm_slot_steps_total": "Slots offered in all steps; steps over this is the occupancy of slots",
    "lfdm_ticks_total": "Steps of the batch",
    "lfdm_engine_seconds_total": "Seconds spent in the sampling engine",
}
_GAUGES = {
    "lfdm_slots": "Slots of the sampler",
    "lfdm_slots_busy": "Slots in use at the last step",
    "lfdm_waiting": "Clips waiting for a slot at the last step",
    IN_FLIGHT: "Requests that have not had their last response",
}
_HISTOGRAMS = {
    "lfdm_queue_seconds": "Seconds from a clip's arrival at the sampler to its first step",
    "lfdm_sampling_seconds": "Seconds from a clip's first step to its last",
    "lfdm_first_frame_seconds": "Seconds from a stream's arrival to its first frames",
}
_REQUESTS = "lfdm_requests_total"


class Metrics:
    """An observer of the sampler (`lfdm_export.batching.observer.Observer`) that keeps the server's metrics.

    Its methods may be called from any thread.
    """

    def __init__(self, model: str, slots: int) -> None:
        """Register the metrics, labeled with the model, and start to report.

        Args:
            model: name of the Triton model.
            slots: slots of its sampler.
        """
        self._model = model
        kinds = pb_utils.MetricFamily
        # Kept, because a metric is removed with its family.
        self._families = {
            name: pb_utils.MetricFamily(name=name, description=about, kind=kind)
            for metrics, kind in ((_COUNTERS, kinds.COUNTER), (_GAUGES, kinds.GAUGE), (_HISTOGRAMS, kinds.HISTOGRAM))
            for name, about in metrics.items()
        }
        self._requests = pb_utils.MetricFamily(
            name=_REQUESTS, description="Clips by how they ended", kind=kinds.COUNTER
        )
        labels = {"model": model}
        self._plain = {name: self._families[name].Metric(labels=labels) for name in (*_COUNTERS, *_GAUGES)}
        self._histograms = {name: self._families[name].Metric(labels=labels, buckets=BUCKETS) for name in _HISTOGRAMS}
        self._by_outcome: dict[str, Any] = {}
        self._in_flight: Callable[[], int] = int
        self._lock = threading.Lock()
        self._counted: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()
        self._values: list[tuple[str, float]] = []
        self._levels: dict[str, float] = {"lfdm_slots": slots, "lfdm_slots_busy": 0, "lfdm_waiting": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lfdm-metrics", daemon=True)
        self._thread.start()

    def rejected(self) -> None:
        """Count a refusal."""
        with self._lock:
            self._ended["rejected"] += 1

    def joined(self, queued: float, ticks: int) -> None:  # noqa: ARG002 (the observer's signature)
        """Record how long a clip waited."""
        with self._lock:
            self._values.append(("lfdm_queue_seconds", queued))

    def ticked(self, tick: Tick) -> None:
        """Count a step."""
        with self._lock:
            self._counted["lfdm_steps_total"] += tick.running
            self._counted["lfdm_slot_steps_total"] += tick.slots
            self._counted["lfdm_ticks_total"] += 1
            self._counted["lfdm_engine_seconds_total"] += tick.engine_seconds  # type: ignore[assignment]
            self._levels |= {"lfdm_slots_busy": tick.running, "lfdm_waiting": tick.waiting}

    def ended(self, outcome: Outcome, timings: Timings) -> None:
        """Count an outcome; for a finished clip, record the sampling time."""
        with self._lock:
            self._ended[outcome] += 1
            if outcome == "finished":
                self._values.append(("lfdm_sampling_seconds", timings.sampling))

    def first_frame(self, seconds: float) -> None:
        """Record how long a stream waited for its first frames."""
        with self._lock:
            self._values.append(("lfdm_first_frame_seconds", seconds))

    def follow(self, in_flight: Callable[[], int]) -> None:
        """Report the number of requests in flight that a function returns."""
        self._in_flight = in_flight

    def idle(self) -> None:
        """Report that nothing runs or waits."""
        with self._lock:
            self._levels |= {"lfdm_slots_busy": 0, "lfdm_waiting": 0}

    def close(self) -> None:
        """Report the remaining counts, and stop."""
        self._stop.set()
        self._thread.join(5.0)

    def _run(self) -> None:
        try:
            while not self._stop.wait(METRICS_INTERVAL):
                self._report_counts()
            self._report_counts()
        except Exception as error:  # noqa: BLE001 (figures are no reason to stop serving)
            log_error(error)

    def _report_counts(self) -> None:
        in_flight = self._in_flight()
        with self._lock:
            counted, ended, values = self._counted, self._ended, self._values
            levels = self._levels | {IN_FLIGHT: in_flight}
            self._counted, self._ended, self._values = Counter(), Counter(), []
        for name, count in counted.items():
            self._plain[name].increment(count)
        for name, level in levels.items():
            self._plain[name].set(level)
        for name, value in values:
            self._histograms[name].observe(value)
        for outcome, count in ended.items():
            if outcome not in self._by_outcome:
                self._by_outcome[outcome] = self._requests.Metric(labels={"model": self._model, "outcome": outcome})
            self._by_outcome[outcome].increment(count)
