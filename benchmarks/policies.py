"""Scheduling policies that the product's is compared with: ``lfdm-serve --policy benchmarks.policies:OneClip``.

They run whole clips: nobody joins or leaves a batch that runs, nothing that has begun is stopped, priorities do not
count, and a batch's answers go out together.
"""

from __future__ import annotations

from collections.abc import Sequence

from lfdm_export.batching.live_job import LiveJob
from lfdm_export.batching.order import Queue

#: How long a batch may wait for company, in seconds.
BATCH_DELAY = 0.05


class DynamicShrink:
    """Clips batched by arrival; those that have their steps cost nothing more."""

    stops = False

    def choose(self, queue: Queue) -> list[LiveJob]:
        """The batch that runs; else the first that came, once they are enough or have waited."""
        live = queue.live
        full = len(live) >= queue.slots or (live and queue.now >= live[0].submitted + BATCH_DELAY)
        return _running(queue) or (list(live[: queue.slots]) if full else [])

    def answered(self, queue: Queue) -> Sequence[LiveJob]:
        """When the longest of the batch is done."""
        return [] if _running(queue) else queue.finished


class Dynamic(DynamicShrink):
    """Clips batched by arrival, in a batch that keeps its size to the end, as a loop over one tensor does."""

    def choose(self, queue: Queue) -> list[LiveJob]:
        """The batch, with those that have their steps."""
        chosen = super().choose(queue)
        return [*chosen, *queue.finished] if chosen else []


class OneClip(DynamicShrink):
    """One clip after the other, by arrival."""

    def choose(self, queue: Queue) -> list[LiveJob]:
        """The one that runs, else the first that came."""
        return _running(queue) or list(queue.live[:1])


def _running(queue: Queue) -> list[LiveJob]:
    return [live for live in queue.live if live.joined is not None]


#: By the names in results and in `--contestants`.
POLICIES = {
    "step": "step",
    "clip": f"{__name__}:OneClip",
    "dynamic": f"{__name__}:Dynamic",
    "dynamic-shrink": f"{__name__}:DynamicShrink",
}
