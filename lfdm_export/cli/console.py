"""Shared parts of the commands: common options, errors in one line, progress bars."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.segment import Segment

from lfdm_export import __version__
from lfdm_export.cli.ending import Stopped, is_stdout, orderly
from lfdm_export.dependencies import missing_dependency
from lfdm_export.errors import LfdmExportError, ParityError
from lfdm_export.files.names import visible
from lfdm_export.wording import describe_error
from lfdm_models.command_line import Parser, cut_words

OK, FAILED, PARITY_FAILED, INTERRUPTED = 0, 1, 3, 130


class _Parser(Parser):
    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(visible(message, keep="\n"), file)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record), keep="\n")


class _Console(Console):
    """A console safe from control characters in names, files and server messages: it prints them as escapes."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.is_control else segment._replace(text=visible(segment.text, keep="\n"))


def make_parser(program: str, description: str, examples: str) -> argparse.ArgumentParser:
    """Return a parser whose help ends with examples."""
    return _Parser(
        prog=program,
        description=description,
        epilog="examples:\n" + examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def input_file(word: str) -> str:
    """Convert the value of an option that names a file to read: ``-`` is stdin."""
    return "/dev/stdin" if word == "-" else word


def output_file(word: str) -> str:
    """Convert the value of an option that names a file to write: ``-`` is stdout."""
    return "/dev/stdout" if word == "-" else word


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all commands."""
    common = parser.add_argument_group("output")
    common.add_argument("-q", "--quiet", action="store_true", help="print only errors")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    common.add_argument("--version", action="version", version=f"%(prog)s {__version__}")


def run(program: str, args: argparse.Namespace, command: Callable[[], int], *, extra: str = "run") -> int:
    """Run a command's body; convert an exception into one line on stderr and an exit status.

    A signal that ends the command gives 128 plus its number.

    Args:
        program: name of the command.
        args: options of the command; only `debug` is used.
        command: body of the command; returns the exit status.
        extra: the project's extra for this command, named in the error when a package is missing.

    Raises:
        BaseException: with ``--debug``, any exception of the body.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")  # e.g. about unusual EXIF data, which is harmless
    if args.quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # the hub's client reads it on import
    with orderly():
        handler = logging.StreamHandler()
        handler.setFormatter(_Formatter(f"{program}: %(levelname)s: %(message)s"))
        logger = logging.getLogger("lfdm_export")
        logger.addHandler(handler)
        try:
            return command()
        except KeyboardInterrupt as error:
            if args.debug:
                if isinstance(error, Stopped):
                    error.traceback = True
                raise
            ended = isinstance(error, Stopped) and error.status != INTERRUPTED
            complain(program, f"ended by {error}" if ended else "interrupted")
            return error.status if isinstance(error, Stopped) else INTERRUPTED
        except Exception as error:
            if args.debug:
                raise
            if isinstance(error, ModuleNotFoundError) and not isinstance(error, LfdmExportError):
                error = missing_dependency(error, program, extra) or error
            complain(program, "error: " + describe_error(error))
            return PARITY_FAILED if isinstance(error, ParityError) else FAILED
        finally:
            logger.removeHandler(handler)


def complain(program: str, message: str) -> None:
    """Print a line on stderr."""
    text = cut_words(f"{program}: {' '.join(message.split())}")
    _Console(stderr=True, soft_wrap=True).print(visible(text), markup=False, highlight=False)


def say(args: argparse.Namespace, text: object) -> None:
    """Print a result, unless quiet. Text is printed unchanged; tables may be objects of rich.

    Prints to stdout; to stderr if the clip itself goes to stdout (``--out /dev/stdout``).
    """
    if not args.quiet:
        console = _Console(stderr=is_stdout(getattr(args, "out", None)), soft_wrap=isinstance(text, str))
        console.print(visible(text, keep="\n") if isinstance(text, str) else text, markup=False, highlight=False)


def make_console(*, stderr: bool = False) -> Console:
    """Return a console that prints control characters as escapes."""
    return _Console(stderr=stderr)


class Bars:
    """Progress bars on stderr, one per stage; none if quiet, or without a terminal.

    Callable as the library's ``progress(stage, done, total)``.
    """

    def __init__(self, *, quiet: bool, names: dict[str, str] | None = None) -> None:
        """Create bars; `names` replaces the library's names of stages."""
        console = _Console(stderr=True)
        self._names = names or {}
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description:<16}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=quiet or not console.is_terminal,
        )

    def __enter__(self) -> Bars:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bars from the screen."""
        self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show `done` of `total` of a stage."""
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(self._names.get(stage, stage), total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)


class OneBar(Bars):
    """A single bar labeled with the current stage, for stages that are counted together."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show `done` of `total` stages, and the current `stage`."""
        super().__call__("", done, total)
        self._progress.update(self._tasks[""], description=self._names.get(stage, stage))
