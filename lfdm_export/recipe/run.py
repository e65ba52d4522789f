"""Makes a recipe: skips parts that are there, resumes interrupted ones, and records every session."""

from __future__ import annotations

import contextlib
import datetime as dt
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from lfdm_export.errors import InputError, LfdmExportError
from lfdm_export.files.atomic import claimed, write_file
from lfdm_export.machine import environment
from lfdm_export.progress import Progress, report
from lfdm_export.recipe.card import card
from lfdm_export.recipe.make import Maker
from lfdm_export.recipe.parts import Part, Recipe, TrainedPart, steps_of
from lfdm_export.recipe.record import CARD, Record, Session, digests, load_average
from lfdm_models.training.devices import choose_device
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.loop import StopTraining
from lfdm_models.training.settings import Device

_LOCK = ".recipe.lock"
#: Called with a sentence on a part.
Tell = Callable[[str], None]


@dataclass(frozen=True)
class RecipeOutcome:
    """How a run of a recipe ended.

    Attributes:
        part: the part at which it stopped; None if all requested parts are there.
        step: steps of the optimizer that were done of this part.
        signal: number of the signal that stopped it; 0 for none.
    """

    part: str | None = None
    step: int = 0
    signal: int = 0


def tell_nobody(sentence: str) -> None:
    """Say nothing."""


def run_recipe(
    recipe: Recipe,
    folder: Path,
    *,
    only: Collection[str] = (),
    threads: int | None = None,
    device: Device = "auto",
    minutes: float | None = None,
    progress: Progress | None = None,
    tell: Tell = tell_nobody,
) -> RecipeOutcome:
    """Make the parts of a recipe that are not there yet, in order.

    A part is there if its files have the recorded hashes, and were made with the same settings from the same files. An
    interrupted training continues from its last checkpoint, with the same bits as without the interruption on the same
    machine with the same number of threads.

    Args:
        recipe: the recipe.
        folder: its folder; see `lfdm_export.recipe.record`.
        only: names of the parts to make; empty for all.
        threads: CPU threads; None for all cores.
        device: device of the training.
        minutes: stop, with a checkpoint, after the step in which this time has passed; None for no limit. Parts that
            train nothing are not started after it, but finished.
        progress: called as ``progress(part, done, total)``.
        tell: called with a sentence on each part.

    Raises:
        InputError: a name is unknown, a needed part is missing, or the folder cannot be used.
        LfdmExportError: a part failed; the parts before it are kept.
    """
    chosen = choose_parts(recipe, only)
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    with _alone(folder), _threads(threads):
        runner = _Runner(Record(folder, recipe), threads, device, deadline, progress, tell)
        made: set[str] = set()
        for part in recipe.parts:
            if any(name not in made for name in part.inputs):
                if part.name in chosen:
                    raise InputError(_lacking(part, made))
                continue
            if runner.record.made(part):
                if part.name in chosen:
                    tell(f"{part.name}: is there")
            elif part.name in chosen:
                outcome = runner.make(part)
                if outcome.part is not None:
                    return outcome
            else:
                continue
            made.add(part.name)
        if len(made) == len(recipe.parts):
            write_file(folder / CARD, card(recipe, runner.record).encode())
            tell(f"card: {folder / CARD}")
    return RecipeOutcome()


def choose_parts(recipe: Recipe, only: Collection[str]) -> tuple[str, ...]:
    """Names of the parts to make, in order.

    Raises:
        InputError: a name is unknown.
    """
    names = [part.name for part in recipe.parts]
    for name in only:
        if name not in names:
            raise InputError(f"recipe {recipe.name!r} has no part {name!r}; choose from {', '.join(names)}")
    return tuple(name for name in names if not only or name in only)


def _lacking(part: Part, made: Collection[str]) -> str:
    name = next(name for name in part.inputs if name not in made)
    return (
        f"part {part.name!r} needs {name!r}, which is not there with today's settings; "
        f"make it first: --only {name} {part.name}"
    )


class _Runner:
    """Makes parts, with the settings that all share."""

    def __init__(
        self,
        record: Record,
        threads: int | None,
        device: Device,
        deadline: float | None,
        progress: Progress | None,
        tell: Tell,
    ) -> None:
        self.record, self.progress, self.tell = record, progress, tell
        self._threads, self._device, self._deadline = threads, device, deadline

    def passed(self) -> bool:
        """Whether the time is over."""
        return self._deadline is not None and time.monotonic() >= self._deadline

    def make(self, part: Part) -> RecipeOutcome:
        """Make a part, or continue it.

        Raises:
            LfdmExportError: it failed.
        """
        record, recipe = self.record, self.record.recipe
        if self.passed():
            return RecipeOutcome(part.name)
        try:
            machine = environment(self._threads, ("torch", "onnxruntime"))
            session = _Meter(self, part, _device_name(self._device), machine)
            _clear(record, part)
            record.begin(part)
            with session:
                maker = Maker(recipe, record.folder, self._device, self._threads, session.step, self.progress)
                if not isinstance(part, TrainedPart):
                    session.finish(maker.make(part))
                else:
                    outcome = maker.train(part)
                    if not outcome.finished:
                        session.save("stopped")
                        return RecipeOutcome(part.name, outcome.step, outcome.signal)
                    session.finish((outcome.checkpoint.name,))
        except (TrainingError, LfdmExportError, ValueError, OSError) as error:
            raise LfdmExportError(f"part {part.name!r} of recipe {recipe.name!r} failed: {error}") from error
        self.tell(session.summary())
        return RecipeOutcome()


class _Meter:
    """Measures a session and keeps its entry in the record up to date."""

    def __init__(self, runner: _Runner, part: Part, device: str, machine: Mapping[str, str]) -> None:
        self._runner, self._part = runner, part
        self._began = time.monotonic()
        # (steps done, wall time, CPU time) after the first and the last step.
        self._first: tuple[int, float, float] | None = None
        self._last: tuple[int, float, float] | None = None
        now = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
        self._session = Session(now, 0.0, 0, 0, None, None, None, device, machine)

    def __enter__(self) -> _Meter:
        self._runner.record.add(self._part, self._session)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyboardInterrupt):
            self.save("stopped")
        elif error is not None:
            self.save("failed")

    def step(self, done: int, total: int, _: Mapping[str, float]) -> None:
        """Count a step of the optimizer.

        Raises:
            StopTraining: the time is over.
        """
        self._last = done, time.monotonic(), time.process_time()
        self._first = self._first or self._last
        assert isinstance(self._part, TrainedPart)
        every = self._part.training.run.checkpoint_every
        if every and done % every == 0:
            self.save()
        report(self._runner.progress, self._part.name, done, total)
        if self._runner.passed():
            raise StopTraining

    def finish(self, names: Sequence[str]) -> None:
        """Mark the part as done, with the files of its result."""
        folder = self._runner.record.folder / self._part.name
        self.save("done", digests(folder, tuple(names)))

    def save(
        self,
        ended: Literal["killed", "stopped", "failed", "done"] = "killed",
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Write the session as it is now."""
        session = replace(self._session, seconds=time.monotonic() - self._began, load=load_average(), ended=ended)
        if self._first is not None and self._last is not None:
            session = replace(session, first_step=self._first[0] - 1, last_step=self._last[0])
            count = self._last[0] - self._first[0]
            if count:
                wall, cpu = ((self._last[n] - self._first[n]) / count for n in (1, 2))
                session = replace(session, seconds_per_step=wall, cpu_seconds_per_step=cpu)
        self._session = session
        self._runner.record.update(self._part, session, files)

    def summary(self) -> str:
        """One line on the finished session."""
        session, name, steps = self._session, self._part.name, steps_of(self._part)
        text = f"{name}: made in {session.seconds:.0f} s"
        if session.seconds_per_step is not None:
            text += f", steps {session.first_step + 1} to {steps} at {session.seconds_per_step:.3f} s"
        return text


def _device_name(device: Device) -> str:
    chosen = choose_device(device)
    return torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else chosen.type


def _clear(record: Record, part: Part) -> None:
    """Remove what an earlier run left of a part, unless its training can continue."""
    place, entry = record.folder / part.name, record.entries.get(part.name)
    if not place.exists():
        return
    if entry is None:
        raise InputError(f"{place} was not made by a recipe; move it, or choose another folder")
    resumes = isinstance(part, TrainedPart) and entry.key == record.key(part) and not entry.done
    if not resumes:
        shutil.rmtree(place)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is created if missing.

    Raises:
        InputError: another process makes a recipe there, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = claimed(folder / _LOCK)
    except BlockingIOError:
        raise InputError(f"another process makes a recipe in {folder}; wait for it, or choose another folder") from None
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
    with lock:
        yield


@contextlib.contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    """Set PyTorch's CPU threads inside the context; None keeps its choice."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
