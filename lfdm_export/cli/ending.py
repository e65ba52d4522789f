"""How a command ends: by a signal, or when nobody reads what it prints."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any, TextIO

from lfdm_export.files.names import user_path

#: Signals that end a command, where the system has them.
_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")
#: A signal of so many ends the process at once, whatever it is cleaning up.
_IMPATIENT = 3


class Stopped(KeyboardInterrupt):
    """A signal ends the command; contexts clean up as after Ctrl-C.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        """Keep the signal's number."""
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """The exit status by which a shell tells it."""
        return 128 + self.number


@contextlib.contextmanager
def orderly() -> Iterator[None]:
    """For the whole of a command: signals raise `Stopped`, and output that cannot be printed is no error.

    Readers who have enough (``| head -1``) are nobody's fault; a full disk is told once on stderr. Use it as a
    decorator, too.
    """
    _open_standard_files()
    with _patient_output(), _stopping_signals():
        yield


def is_stdout(path: object) -> bool:
    """Whether what is written to a path goes where this process prints its results, as /dev/stdout does."""
    if not isinstance(path, str | os.PathLike):
        return False
    with contextlib.suppress(OSError, ValueError):
        return os.path.samestat(user_path(path).stat(), os.fstat(1)) and not os.path.samestat(
            os.fstat(1),
            os.stat(os.devnull),  # noqa: PTH116
        )
    return False


def _open_standard_files() -> None:
    """Without these, the next file that is opened would be the one that libraries print to."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free


@contextlib.contextmanager
def _stopping_signals() -> Iterator[None]:
    """Signals that would end the process raise `Stopped`; those that are ignored (nohup) or handled stay so."""
    before: dict[signal.Signals, Any] = {}
    came: list[int] = []

    def stop(number: int, _: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            raise Stopped(number)
        if len(came) >= _IMPATIENT:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    if threading.current_thread() is threading.main_thread():
        for name in _STOPPING:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                before[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _patient_output() -> Iterator[None]:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ✓ gets a ?, and its result
    before = sys.stdout, sys.stderr
    errors = None if sys.stderr is None else _Patient(sys.stderr, None)
    results = None if sys.stdout is None else _Patient(sys.stdout, errors)
    sys.stdout, sys.stderr = results, errors
    try:
        yield
    finally:
        for stream in (results, errors):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


class _Patient:
    """A text stream that goes on where its reader is gone, or its disk is full."""

    def __init__(self, stream: TextIO, complaints: _Patient | None) -> None:
        """Tell `complaints`, if there are any, once why nothing more is printed."""
        self._stream, self._complaints = stream, complaints

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        with self._until_it_fails():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        with self._until_it_fails():
            self._stream.flush()

    @contextlib.contextmanager
    def _until_it_fails(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: it was closed
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError) and self._complaints is not None:
                self._complaints.write(f"warning: results cannot be printed: {error.strerror or error}\n")
            self._complaints = None
            # What it still holds would fail again, at the latest when the interpreter ends.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's own."""
        return getattr(self._stream, name)
