"""The running sampler of a model's process: one loop for all its requests."""

from __future__ import annotations

import os
import threading
import time

from lfdm_export.batching.order import find_policy
from lfdm_export.batching.step_batcher import StepBatcher
from lfdm_export.errors import EngineError
from lfdm_export.serving.models.metrics import Metrics
from lfdm_export.serving.models.stub import Loaded, log_error

#: Seconds between two checks that the loop is alive.
_LOOK = 0.5
#: Seconds after the loop died until the process ends; meanwhile its requests get their errors.
_LAST_WORDS = 1.0


class RunningSampler:
    """A `StepBatcher` over a bundle, its metrics, and a watchdog that ends the process if the loop dies."""

    def __init__(self, loaded: Loaded) -> None:
        """Start the loop; on the device if the settings say so."""
        pipeline, settings, manifest = loaded.pipeline, loaded.settings, loaded.pipeline.bundle.manifest
        self.metrics = Metrics(loaded.interface.name, settings.slots)
        self.batcher = StepBatcher(
            pipeline.stages.device_chain if settings.on_device else pipeline.stages,
            manifest.geometry,
            pipeline.bundle.null_embedding,
            slots=settings.slots,
            queue_limit=settings.queue_limit,
            fixed_batch=settings.fixed_batch,
            policy=find_policy(settings.policy),
            observer=self.metrics,
        )
        self.metrics.follow(lambda: self.batcher.stats().outstanding)
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="lfdm-watch", daemon=True).start()

    def close(self) -> None:
        """End the loop; remaining requests get an error."""
        self._closing.set()
        self.batcher.close()
        self.metrics.close()

    def _watch(self) -> None:
        while not self._closing.wait(_LOOK):
            if not self.batcher.alive:
                log_error(EngineError("the sampler's loop has died; the process ends, so that it is restarted"))
                time.sleep(_LAST_WORDS)
                os._exit(1)
            if self.batcher.stats().outstanding == 0:  # the gauges would keep the last step's values
                self.metrics.idle()
