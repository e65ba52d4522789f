"""The labeled motions of the procedural characters, as poses over time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_models.training.draws import Draws

Float64Array: TypeAlias = NDArray[np.float64]

_MAX_YAW, _MAX_PITCH, _MAX_ROLL = 0.52, 0.42, 0.34
# Sines may differ in the last bit between machines, so poses are rounded to multiples of 1 / _QUANTUM.
_QUANTUM = 2.0**20


@dataclass(frozen=True)
class Pose:
    """A character at T moments; the neutral pose is all zeros. Every attribute is (T,) float64.

    Attributes:
        yaw, pitch, roll: rotation of the head in radians: to the picture's right, down, clockwise.
        smile: 0 … 1, corners of the mouth up.
        mouth_open: 0 … 1.
        eyes: above 0 wider, below 0 narrower; -1 is closed.
        brows: 0 … 1, raised.
        gaze: -1 … 1, pupils to the left or right of the picture.
        lift: rise of the head, in half heights of the picture.
        arm_raise: 0 … 1, from beside the chest to beside the face.
        arm_swing: rotation of the forearm in radians, clockwise.
    """

    yaw: Float64Array
    pitch: Float64Array
    roll: Float64Array
    smile: Float64Array
    mouth_open: Float64Array
    eyes: Float64Array
    brows: Float64Array
    gaze: Float64Array
    lift: Float64Array
    arm_raise: Float64Array
    arm_swing: Float64Array


@dataclass(frozen=True)
class Motion:
    """One performance of a label.

    Attributes:
        label: one of `LABELS`.
        amplitude: 1 is normal.
        onset: start of the motion, as a share of the clip.
        duration: time until the pose is neutral again, as a share of the clip.
        rise: share of the duration after which the pose is held; the way back takes as long.
        cycles: repetitions of a motion to and fro.
        side: -1 or 1, the first side of a motion to and fro, or the side of a tilt.
    """

    label: str
    amplitude: float
    onset: float
    duration: float
    rise: float
    cycles: float
    side: float

    def pose(self, moments: Float64Array) -> Pose:
        """Poses at `moments` (T,), shares of the clip from 0 (neutral) to 1."""
        phase = np.clip((moments - self.onset) / self.duration, 0.0, 1.0)
        channels = {name: np.zeros(len(moments)) for name in Pose.__dataclass_fields__}
        for name, values in _MOTIONS[self.label](_Beat(phase, self)).items():
            channels[name] = np.rint(self.amplitude * values * _QUANTUM) / _QUANTUM
        return Pose(**channels)


@dataclass(frozen=True)
class _Beat:
    """The time within a motion, and the basic curves of motions, each (T,)."""

    phase: Float64Array
    motion: Motion
    held: Float64Array = field(init=False)

    def __post_init__(self) -> None:
        ramp = np.clip(np.minimum(self.phase, 1 - self.phase) / self.motion.rise, 0.0, 1.0)
        object.__setattr__(self, "held", ramp * ramp * (3 - 2 * ramp))

    @property
    def swing(self) -> Float64Array:
        """To and fro, -1 … 1, to the motion's side first."""
        envelope = np.clip(np.minimum(self.phase, 1 - self.phase) / 0.15, 0.0, 1.0)
        return self.motion.side * envelope * np.sin(2 * np.pi * self.motion.cycles * self.phase)

    @property
    def dips(self) -> Float64Array:
        """Forth and back, 0 … 1."""
        return (1 - np.cos(2 * np.pi * self.motion.cycles * self.phase)) / 2


def _smile(beat: _Beat) -> dict[str, Float64Array]:
    held = beat.held
    return {"smile": held, "mouth_open": 0.42 * held, "eyes": -0.35 * held, "brows": 0.25 * held}


def _surprise(beat: _Beat) -> dict[str, Float64Array]:
    held = beat.held
    return {"mouth_open": held, "eyes": 0.3 * held, "brows": held, "lift": 0.05 * held}


def _look(direction: float) -> Callable[[_Beat], dict[str, Float64Array]]:
    return lambda beat: {"yaw": direction * _MAX_YAW * beat.held, "gaze": direction * 0.6 * beat.held}


def _nod(beat: _Beat) -> dict[str, Float64Array]:
    return {"pitch": _MAX_PITCH * beat.dips, "lift": -0.05 * beat.dips}


def _shake_head(beat: _Beat) -> dict[str, Float64Array]:
    return {"yaw": 0.85 * _MAX_YAW * beat.swing}


def _tilt_head(beat: _Beat) -> dict[str, Float64Array]:
    return {"roll": beat.motion.side * _MAX_ROLL * beat.held}


def _wave(beat: _Beat) -> dict[str, Float64Array]:
    return {"arm_raise": beat.held, "arm_swing": 0.34 * beat.swing}


_MOTIONS: dict[str, Callable[[_Beat], dict[str, Float64Array]]] = {
    "smile": _smile,
    "surprise": _surprise,
    "look left": _look(-1.0),
    "look right": _look(1.0),
    "nod": _nod,
    "shake head": _shake_head,
    "tilt head": _tilt_head,
    "wave": _wave,
}
#: In the order of their embeddings. Left and right are as in the picture.
LABELS: tuple[str, ...] = tuple(_MOTIONS)
_TO_AND_FRO = {"nod": (2.0, 2.0), "shake head": (1.5, 2.0), "wave": (2.0, 2.5)}


def sample_motion(draws: Draws, label: str | None) -> Motion:
    """Draw a random performance of `label`, or of a random label if None.

    Raises:
        ValueError: the label is unknown.
    """
    drawn = draws.pick(LABELS)  # always drawn, so that the other draws do not depend on `label`
    label = drawn if label is None else label
    if label not in _MOTIONS:
        raise ValueError(f"unknown label {label!r}; expected one of {', '.join(LABELS)}")
    onset = draws.uniform(0.0, 0.12)
    return Motion(
        label=label,
        amplitude=draws.uniform(0.85, 1.1),
        onset=onset,
        duration=draws.uniform(0.84, 0.97) - onset,
        rise=draws.uniform(0.26, 0.4),
        cycles=draws.pick(_TO_AND_FRO.get(label, (1.0, 1.0))),
        side=draws.sign(),
    )
