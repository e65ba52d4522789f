"""The thread that makes the videos, one at a time."""

from __future__ import annotations

import logging
import threading

from lfdm_export.errors import InputError
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.progress import Progress
from lfdm_export.web.store import Store, Video
from lfdm_export.web.turns import Turns
from lfdm_export.web.video_request import VideoRequest
from lfdm_export.wording import describe_error

logger = logging.getLogger(__name__)

#: Progress in percent at the end of sampling. The rest is decoding; other stages do not count.
_SAMPLED = 75


class _Cancelled(Exception):
    """The video was cancelled, or the server is ending."""


class Worker:
    """Makes the queued videos of a store until it is stopped. The next server queues an unfinished video again."""

    def __init__(self, store: Store, pipeline: Pipeline, turns: Turns | None = None) -> None:
        """Start the thread.

        Args:
            store: the queued videos.
            pipeline: makes the videos. Other threads may use it only in turn; its bundle and its sampler tables may be
                read at any time.
            turns: the queue of all users of the pipeline; None if there are no others.
        """
        self._store, self._pipeline, self._turns = store, pipeline, turns or Turns()
        self._wake = threading.Condition()
        self._stopping = False
        self._unwanted: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="lfdm-web-worker", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Tell the thread that a video was queued."""
        with self._wake:
            self._wake.notify()

    def give_up(self, name: str) -> None:
        """Stop making a video within a step."""
        with self._wake:
            self._unwanted.add(name)

    def stop(self) -> None:
        """End the thread within a step."""
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
            wanted = VideoRequest.of(video.request)
            if video.request["bundle_id"] != self._pipeline.bundle.manifest.bundle_id:
                name = video.request["model"]
                raise InputError(
                    f"it was requested from the bundle {name}, which is no longer served; request it again"
                )
            progress = self._reporter(video.id)
            with self._turns.taken(on_wait=lambda _: progress("waiting", 0, 1)):
                clip = self._pipeline.generate(
                    self._store.photo(video.id),
                    **wanted.condition(self._pipeline.bundle),  # type: ignore[arg-type]
                    seed=wanted.seed,
                    progress=progress,
                    **wanted.options.given(),
                )
            for ending in ("mp4", "gif"):
                clip.save(self._store.clip(video.id, ending), fps=wanted.fps)
        except _Cancelled:
            with self._wake:
                self._unwanted.discard(video.id)
            return
        except Exception as error:  # a failed video does not end the thread
            logger.exception("the video %s failed", video.id)
            self._store.end(video.id, "failed", describe_error(error))
            return
        if not self._store.end(video.id, "completed"):  # it was cancelled or removed meanwhile
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
