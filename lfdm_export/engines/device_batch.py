"""The batch of a sampling stage on a device: the rows' states stay there from their first step to their last."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic

from lfdm_export.engines.device import A, Device, Pool
from lfdm_export.sampling.noise import START
from lfdm_export.stages import StageSpec

#: The outputs of a sampling stage, and the inputs that they become.
STATE = {"next_latent": "noisy_latent", "next_history": "history"}
#: Inputs that change at every step, besides the state.
EACH_STEP = ("timestep", "noise", "coefficients")


@dataclass(frozen=True, eq=False)
class DeviceSample(Generic[A]):
    """The inputs of one sample, uploaded once; its memory returns to a pool when nothing refers to it.

    Attributes:
        fixed: the inputs of the stage that no step changes, one row each, by name.
        seed: (1,) int64, the bits of the unsigned seed.
        timesteps: (most steps,) int64.
        coefficients: (most steps, 11) float32.
    """

    fixed: Mapping[str, A]
    seed: A
    timesteps: A
    coefficients: A


@dataclass(frozen=True, eq=False)
class DeviceState(Generic[A]):
    """The state of a sample that is in no row.

    Attributes:
        arrays: latent (1, 3, T, h, w) and history (1, 2, 3, T, h, w), by the names of the inputs.
    """

    arrays: Mapping[str, A]


@dataclass(frozen=True, eq=False)
class DeviceLatent(Generic[A]):
    """A latent, or an estimate of it, that left its row.

    Attributes:
        array: (3, T, h, w) float32.
    """

    array: A


@dataclass(frozen=True)
class RowStep(Generic[A]):
    """What one row does in a step.

    Attributes:
        sample: the sample in the row.
        index: row of its sampler.
        draws: whether the step draws noise.
    """

    sample: DeviceSample[A]
    index: int
    draws: bool


class DeviceBatch(Generic[A]):
    """Rows of one stage, for a thread at a time. The first rows are in use.

    A step runs at the smallest prepared batch size that holds the rows in use; further rows compute values that nobody
    reads. It returns when the step before it is done, so the device always has work, and the host is never far ahead.
    """

    def __init__(self, device: Device[A], spec: StageSpec, sizes: Sequence[int], numbers: A) -> None:
        """Allocate memory for all rows, prepare the step for each batch size, and run it.

        Args:
            device: the device.
            spec: `step` or `step_guided`.
            sizes: batch sizes, ascending; the last is the number of rows, at most the largest batch of the stage.
            numbers: (1 + most steps,) int64 on the device: `START`, 0, 1, …

        Raises:
            EngineError: the stage cannot be prepared, or there is not enough memory.
        """
        slots = sizes[-1]
        self._device, self._spec, self._slots, self._counting = device, spec, slots, numbers
        with device.owned():
            self._inputs = {one.name: device.zeros(one.concrete(batch=slots), one.dtype) for one in spec.inputs}
            self._seeds, self._numbers = (device.zeros((slots,), "int64") for _ in range(2))
        self._silent = [True] * slots
        # All of them now: on some backends preparing a program runs it, which would change states.
        with device.owned():
            self._programs = {size: self._prepared(size) for size in sizes}
        self.clear()
        self._last: Callable[[], None] | None = None
        self._began = 0.0
        self._states: Pool[dict[str, A]] = Pool(self._new_state)
        self._latents: Pool[A] = Pool(lambda: self._new_state("noisy_latent")["noisy_latent"][0])

    def begin(self, row: int, sample: DeviceSample[A]) -> None:
        """Give a row to a new sample, with the start drawn from its seed."""
        with self._device.owned():
            self._give(row, sample)
            part = slice(row, row + 1)
            self._device.copy(self._numbers[part], self._number(START))
            self._device.draw(self._inputs["noisy_latent"][part], self._seeds[part], self._numbers[part])
            self._device.clear(self._inputs["history"][part])

    def resume(self, row: int, sample: DeviceSample[A], state: DeviceState[A]) -> None:
        """Give a row to a sample that had one before."""
        with self._device.owned():
            self._give(row, sample)
            for name, array in state.arrays.items():
                self._device.copy(self._inputs[name][row : row + 1], array)

    def save(self, row: int) -> DeviceState[A]:
        """A copy of a row's state."""
        with self._device.owned():
            arrays = self._states.take()
            for name, array in arrays.items():
                self._device.copy(array, self._inputs[name][row : row + 1])
        return self._states.lend(DeviceState(arrays), arrays)

    def move(self, source: int, target: int) -> None:
        """Copy everything in one row to another."""
        with self._device.owned():
            for array in (*self._inputs.values(), self._seeds):
                self._device.copy(array[target : target + 1], array[source : source + 1])
        self._silent[target] = self._silent[source]

    def step(self, rows: Sequence[RowStep[A]]) -> float:
        """One step of the first rows; waits for the step before.

        Args:
            rows: one per row in use.

        Returns:
            Seconds that the step before took; 0 if there was none since the start or the last `settle`.

        Raises:
            EngineError: the step cannot be queued, then the states are unchanged; or an earlier one failed.
        """
        device = self._device
        with device.owned():
            for row, one in enumerate(rows):
                timestep, coefficients = self._inputs["timestep"], self._inputs["coefficients"]
                device.copy(timestep[row : row + 1], one.sample.timesteps[one.index : one.index + 1])
                device.copy(coefficients[row], one.sample.coefficients[one.index])
            self._draw(rows)
            self._programs[next(size for size in self._programs if size >= len(rows))]()
            before, self._last = self._last, device.mark()
            began, self._began = self._began, time.perf_counter()
            if before is None:
                return 0.0
            before()
        done = time.perf_counter()
        seconds = done - began
        self._began = max(self._began, done)  # it runs when the one before is done
        return seconds

    def settle(self) -> None:
        """Wait for the last step."""
        with self._device.owned():
            if self._last is not None:
                self._last()
                self._last = None

    def latent(self, row: int) -> DeviceLatent[A]:
        """A copy of a row's latent."""
        return self._taken(self._inputs["noisy_latent"][row])

    def estimate(self, row: int) -> DeviceLatent[A]:
        """A copy of a row's newest x0 estimate."""
        return self._taken(self._inputs["history"][row][1])

    def clear(self, row: int | None = None) -> None:
        """Fill a row, or all, with zeros: with coefficients of 0 it then stays zero."""
        part = slice(0, self._slots) if row is None else slice(row, row + 1)
        with self._device.owned():
            for array in (*self._inputs.values(), self._seeds):
                self._device.clear(array[part])
        self._silent[part] = [True] * len(self._silent[part])

    def _taken(self, source: A) -> DeviceLatent[A]:
        with self._device.owned():
            array = self._latents.take()
            self._device.copy(array, source)
        return self._latents.lend(DeviceLatent(array), array)

    def _give(self, row: int, sample: DeviceSample[A]) -> None:
        part = slice(row, row + 1)
        for name, array in sample.fixed.items():
            self._device.copy(self._inputs[name][part], array)
        self._device.copy(self._seeds[part], sample.seed)
        self._device.clear(self._inputs["noise"][part])
        self._silent[row] = True

    def _draw(self, rows: Sequence[RowStep[A]]) -> None:
        """The noise of a step: one launch for neighbors that draw, and zeros for the others."""
        noise = self._inputs["noise"]
        for draws, together in itertools.groupby(enumerate(rows), key=lambda pair: pair[1].draws):
            some = list(together)
            if draws:
                part = slice(some[0][0], some[-1][0] + 1)
                for row, one in some:
                    self._device.copy(self._numbers[row : row + 1], self._number(one.index))
                    self._silent[row] = False
                self._device.draw(noise[part], self._seeds[part], self._numbers[part])
                continue
            for row, _ in some:
                if not self._silent[row]:
                    self._device.clear(noise[row])
                    self._silent[row] = True

    def _number(self, step: int) -> A:
        part: A = self._counting[step - START : step - START + 1]
        return part

    def _prepared(self, size: int) -> Callable[[], None]:
        inputs = {name: array[:size] for name, array in self._inputs.items()}
        outputs = {result: inputs[name] for result, name in STATE.items()}
        program = self._device.program(self._spec.name, inputs, outputs)
        program()
        return program

    def _new_state(self, *names: str) -> dict[str, A]:
        shapes = {one.name: one.concrete(batch=1) for one in self._spec.inputs}
        return {name: self._device.zeros(shapes[name], "float32") for name in names or STATE.values()}


def fixed_inputs(spec: StageSpec) -> list[str]:
    """The inputs of a sampling stage that no step changes."""
    return [one.name for one in spec.inputs if one.name not in (*EACH_STEP, *STATE.values())]


def batch_sizes(slots: int) -> list[int]:
    """Batch sizes for that many rows: powers of two, and all rows."""
    return sorted({1 << power for power in range(slots.bit_length()) if 1 << power <= slots} | {slots})
