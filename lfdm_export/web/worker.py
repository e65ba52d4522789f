"""The thread that makes the videos, one after the other."""

from __future__ import annotations

import logging
import threading

from lfdm_export.errors import InputError
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.progress import Progress
from lfdm_export.web.store import Store, Video
from lfdm_export.web.turns import Turns
from lfdm_export.web.wish import Wish
from lfdm_export.wording import describe_error

logger = logging.getLogger(__name__)

#: Shares of the work, in percent: nothing but sampling and decoding counts.
_SAMPLED = 75


class _Cancelled(Exception):
    """The video is not wanted any more, or the server ends."""


class Worker:
    """Makes what waits in a store, until it is stopped; what it was at then is queued again by the next server."""

    def __init__(self, store: Store, pipeline: Pipeline, turns: Turns | None = None) -> None:
        """Begin at once.

        Args:
            store: what waits.
            pipeline: from now on used by this thread alone, or in turn, but for what is only read: its bundle and its
                tables.
            turns: of all who use the pipeline; None where nobody else does.
        """
        self._store, self._pipeline, self._turns = store, pipeline, turns or Turns()
        self._wake = threading.Condition()
        self._stopping = False
        self._unwanted: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="lfdm-web-worker", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something new."""
        with self._wake:
            self._wake.notify()

    def give_up(self, name: str) -> None:
        """Stop making a video, within a step."""
        with self._wake:
            self._unwanted.add(name)

    def stop(self) -> None:
        """End the thread, within a step."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._wake:
                if self._stopping:
                    return
                video = self._store.begin_next()
                if video is None:
                    self._wake.wait()
                    continue
            self._make(video)

    def _make(self, video: Video) -> None:
        try:
            wish = Wish.of(video.wish)
            if video.wish["bundle_id"] != self._pipeline.bundle.manifest.bundle_id:
                raise InputError(f"it was requested of the bundle {video.wish['model']}, which is not served any more")
            progress = self._reporter(video.id)
            with self._turns.taken(on_wait=lambda _: progress("waiting", 0, 1)):
                clip = self._pipeline.generate(
                    self._store.photo(video.id),
                    **wish.condition(self._pipeline.bundle),  # type: ignore[arg-type]
                    seed=wish.seed,
                    progress=progress,
                    **wish.options.given(),
                )
            for ending in ("mp4", "gif"):
                clip.save(self._store.clip(video.id, ending), fps=wish.fps)
        except _Cancelled:
            with self._wake:
                self._unwanted.discard(video.id)
            return
        except Exception as error:  # each video has its own end
            logger.exception("the video %s failed", video.id)
            self._store.end(video.id, "failed", describe_error(error))
            return
        if not self._store.end(video.id, "completed"):  # cancelled or removed a moment ago
            for ending in ("mp4", "gif"):
                self._store.clip(video.id, ending).unlink(missing_ok=True)

    def _reporter(self, name: str) -> Progress:
        def report(stage: str, done: int, total: int) -> None:
            with self._wake:
                if self._stopping or name in self._unwanted:
                    raise _Cancelled
            if stage == "denoise":
                self._store.report(name, _SAMPLED * done // total)
            elif stage == "decode":
                self._store.report(name, _SAMPLED + (99 - _SAMPLED) * done // total)

        return report
