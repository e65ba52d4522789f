"""How a command ends on a signal, or when its output has no reader."""

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

#: Signals that end a command, if the system has them.
_STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")
#: Number of signals that end the process at once, without cleanup.
_IMPATIENT = 3


class Stopped(KeyboardInterrupt):
    """A signal ends the command; context managers clean up as after Ctrl-C.

    Attributes:
        number: number of the signal.
        traceback: it shall leave the command as an exception (--debug).
    """

    traceback = False

    def __init__(self, number: int) -> None:
        """Store the signal's number."""
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def status(self) -> int:
        """Exit status of a shell for this signal."""
        return 128 + self.number


@contextlib.contextmanager
def orderly() -> Iterator[None]:
    """Within the context, signals raise `Stopped`, and output that cannot be printed is not an error.

    A closed pipe (``| head -1``) is ignored; a full disk is reported once on stderr. Also usable as a decorator, around
    a whole command.
    """
    _open_standard_files()
    with _patient_output(), _stopping_signals():
        yield


def is_stdout(path: object) -> bool:
    """Whether a path leads to the stdout of this process, as /dev/stdout does."""
    if not isinstance(path, str | os.PathLike):
        return False
    with contextlib.suppress(OSError, ValueError):
        return os.path.samestat(user_path(path).stat(), os.fstat(1)) and not os.path.samestat(
            os.fstat(1),
            os.stat(os.devnull),  # noqa: PTH116
        )
    return False


def _open_standard_files() -> None:
    """Open missing standard files; otherwise libraries would print to the next file that is opened."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor


@contextlib.contextmanager
def _stopping_signals() -> Iterator[None]:
    """Let signals that would end the process raise `Stopped`; ignored (nohup) and handled signals stay unchanged."""
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
    except Stopped as stopped:
        if before and not stopped.traceback:  # it came outside of `console.run`, such as while arguments are parsed
            raise SystemExit(stopped.status) from None
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _patient_output() -> Iterator[None]:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without ✓ shows ? instead of failing
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


def was_printed() -> bool:
    """Whether everything that was printed within `orderly` went to stdout, or to a reader that had enough."""
    stream: Any = sys.stdout
    if stream is not None:
        stream.flush()
    while isinstance(stream, _Patient):  # one per nested context
        if stream.lost:
            return False
        stream = stream.below
    return True


class _Patient:
    """A text stream that survives a closed reader or a full disk.

    Attributes:
        below: the stream that it writes to.
        lost: some text is lost, not for want of a reader.
    """

    lost = False

    def __init__(self, stream: TextIO, complaints: _Patient | None) -> None:
        """Wrap `stream`; report once on `complaints`, unless None, why nothing more is printed."""
        self.below, self._complaints = stream, complaints

    def write(self, text: str) -> int:
        """Write, if possible."""
        with self._until_it_fails():
            self.below.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if possible."""
        with self._until_it_fails():
            self.below.flush()

    @contextlib.contextmanager
    def _until_it_fails(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
                self.lost = True
                if self._complaints is not None:
                    self._complaints.write(f"warning: results cannot be printed: {error.strerror or error}\n")
            self._complaints = None
            # The buffered text would fail again, at the latest on interpreter exit.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.below.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        """Forward everything else to the stream."""
        return getattr(self.below, name)
