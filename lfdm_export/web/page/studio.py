"""The callback of the page: makes a clip from the form, and yields what the page shows. Needs no browser."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lfdm_export.errors import LfdmExportError
from lfdm_export.web.page import markup
from lfdm_export.web.page.form import Form
from lfdm_export.web.page.makers import Maker
from lfdm_export.web.page.shelf import Shelf
from lfdm_export.web.page.watch import Event, Failed, Made, Preview, Stopped, Watch
from lfdm_export.wording import count, describe_error

logger = logging.getLogger(__name__)

# Seconds between two updates of the page.
_GLANCE = 0.1


class Studio:
    """Makes the clips of any number of visitors at once."""

    def __init__(self, maker: Maker, shelf: Shelf, uploads: Path, most_pixels: int) -> None:
        """Make clips with a maker.

        Args:
            maker: makes the clips.
            shelf: keeps the clips.
            uploads: the folder of all uploaded files.
            most_pixels: most pixels of a photograph.
        """
        self.maker, self._shelf, self._uploads, self._most_pixels = maker, shelf, uploads, most_pixels
        self._lock = threading.Lock()
        self._under_way: dict[Watch, tuple[str, threading.Thread]] = {}
        self._closed = False

    def make(self, visitor: str, values: Sequence[object]) -> Iterator[tuple[str, str]]:
        """Make a clip. Closing the iterator cancels it within a step, and so does `stop`.

        Args:
            visitor: id of the visitor.
            values: values of the form's fields, see `lfdm_export.web.page.form.Form.read`.

        Yields:
            The status and the picture that the page shows from now on, as HTML.
        """
        watch, began = Watch(), time.monotonic()
        thread = threading.Thread(target=self._work, args=(values, watch), name="lfdm-page", daemon=True)
        with self._lock:
            closed = self._closed
            if not closed:
                self._under_way[watch] = visitor, thread
                thread.start()
        if closed:
            yield markup.failure("the server is shutting down; try again later"), markup.nothing()
            return
        shown = markup.starting(), markup.nothing()
        yield shown
        try:
            while True:
                news = watch.news(_GLANCE)
                for event in news:
                    if event is not None:
                        shown = self._shown(event, shown, time.monotonic() - began)
                if news:
                    yield shown
                if watch.stopped:
                    yield markup.said("Stopped."), markup.nothing()
                if watch.stopped or None in news:
                    return
                time.sleep(_GLANCE)
        finally:
            watch.stop()

    def stop(self, visitor: str) -> None:
        """Cancel the clips of a visitor."""
        with self._lock:
            watches = [watch for watch, (whose, _) in self._under_way.items() if whose == visitor]
        for watch in watches:
            watch.stop()

    def close(self) -> None:
        """Cancel all clips, and wait for their threads."""
        with self._lock:
            self._closed, under_way = True, dict(self._under_way)
        for watch in under_way:
            watch.stop()
        for _, thread in under_way.values():
            thread.join()

    def _work(self, values: Sequence[object], watch: Watch) -> None:
        try:
            form = Form.read(values, self._uploads)
            photo = form.prepared(self.maker.facts, self._most_pixels)
            clip = replace(self.maker.make(form, photo.pixels, watch), surroundings=photo.surroundings)
            watch.progress("write the files", 0, 1)
            watch.tell(Made(self._shelf.keep(clip, panels=form.panels)))
        except Stopped:
            pass
        except Exception as error:  # reported to the visitor; the server continues
            if not isinstance(error, LfdmExportError):
                logger.exception("a clip of the page failed")
            watch.fail(describe_error(error))
        finally:
            with self._lock:
                del self._under_way[watch]
            watch.end()

    def _shown(self, event: Event, shown: tuple[str, str], seconds: float) -> tuple[str, str]:
        """The status and the picture after an event."""
        if isinstance(event, Made):
            kept = event.kept
            size = f"{kept.width} × {kept.height}"
            return markup.said(f"{count(kept.frames, 'frame')} of {size} in {seconds:.1f} s"), markup.result(kept)
        if isinstance(event, Failed):
            return markup.failure(event.why), markup.nothing()
        if isinstance(event, Preview):
            return markup.status(event), markup.preview(event, self.maker.facts.image_size)
        return markup.status(event), shown[1]
