"""Events of a stream during generation, and the clip assembled from them. No network access."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.client.jobs import Arguments, Job, Plan, make_clip, make_plan, read_timings
from lfdm_export.errors import InputError, ServerError
from lfdm_export.generate.frame_choice import FrameChoice
from lfdm_export.pictures.clip import Clip
from lfdm_export.protocol.contract import Array
from lfdm_export.protocol.model_facts import ModelFacts


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` sampling steps are done."""

    step: int
    steps: int


@dataclass(frozen=True, eq=False, repr=False)
class Preview:
    """Some frames decoded from the estimate of the latent after `step` of `steps`.

    Attributes:
        step: number of steps done.
        steps: total number of steps.
        indices: (n,) int32, positions of the frames in the clip.
        frames: (n, H, W, 3) uint8.
    """

    step: int
    steps: int
    indices: NDArray[np.int32]
    frames: NDArray[np.uint8]

    def __repr__(self) -> str:
        return f"Preview(step={self.step}, steps={self.steps}, {_listed(self.indices)})"


@dataclass(frozen=True, eq=False, repr=False)
class Frames:
    """Final frames of the clip.

    Attributes:
        indices: (n,) int32, positions of the frames in the clip.
        frames: (n, H, W, 3) uint8.
    """

    indices: NDArray[np.int32]
    frames: NDArray[np.uint8]

    def __repr__(self) -> str:
        return f"Frames({_listed(self.indices)})"

    @property
    def first_frame(self) -> int:
        """Position of the first frame in the clip."""
        return int(self.indices[0])


@dataclass(frozen=True, repr=False)
class Done:
    """The clip is complete.

    Attributes:
        timings: seconds per part and the number of steps, by the names of `lfdm_export.protocol.contract.TIMINGS`.
    """

    timings: Mapping[str, float]

    def __repr__(self) -> str:
        return f"Done({', '.join(f'{name}={value:.4g}' for name, value in self.timings.items())})"


Event: TypeAlias = Progress | Preview | Frames | Done


def _listed(indices: NDArray[np.int32]) -> str:
    """Name frames, as "frame 7" or "frames 0 ... 7"."""
    return f"frame {indices[0]}" if len(indices) == 1 else f"{len(indices)} frames, {indices[0]} … {indices[-1]}"


@dataclass(frozen=True)
class Reports:
    """What a stream reports meanwhile; see `lfdm_export.client.AsyncClient.stream`."""

    preview_every: int = 0
    progress_every: int = 0
    preview_warped: bool = False

    def __post_init__(self) -> None:
        """Check the numbers of steps.

        Raises:
            InputError: one is not a number of steps.
        """
        for name in ("preview_every", "progress_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
                raise InputError(f"{name} is {value!r}, expected a number of steps, or 0 for none")

    def tensors(self) -> dict[str, Array]:
        """The inputs of the request; those with their default are left out."""
        numbers = {"preview_every": self.preview_every, "progress_every": self.progress_every}
        tensors: dict[str, Array] = {name: np.array([value], np.int32) for name, value in numbers.items() if value}
        return {**tensors, "preview_warped": np.array([True])} if self.preview_warped else tensors


def plan_stream(call: Arguments, facts: ModelFacts, chosen: FrameChoice, reports: Reports) -> tuple[Plan, Job]:
    """Prepare the request of one streamed sample.

    Raises:
        InputError: an argument is invalid, or there are several samples.
    """
    plan = make_plan(call, facts)
    if len(plan.jobs) != 1:
        raise InputError(f"found {len(plan.jobs)} samples, expected one per stream; open more streams, or use generate")
    (job,) = plan.jobs
    tensors = {**job.tensors, **reports.tensors()}
    if chosen.positions is not None:
        tensors["only_frames"] = np.array(chosen.positions, np.int32)
        plan = replace(plan, settings={**plan.settings, **chosen.facts()})
    return plan, Job(tensors, job.request_id)


class Assembly:
    """Converts the responses of one stream into events, and its frames into a clip."""

    def __init__(self, plan: Plan, job: Job, facts: ModelFacts) -> None:
        """Start with no responses."""
        self._plan, self._job, self._facts = plan, job, facts
        self._frames = np.zeros((facts.frames, facts.image_size, facts.image_size, 3), np.uint8)
        only = job.tensors.get("only_frames")
        self._chosen = FrameChoice.of(None if only is None else only.tolist(), facts.frames)
        self._positions = list(self._chosen.positions or range(facts.frames))
        self._have = np.zeros(facts.frames, bool)
        self._timings: Array | None = None

    @property
    def done(self) -> bool:
        """Whether the last response has arrived."""
        return self._timings is not None

    def state(self) -> str:
        """Short description of the progress."""
        return "done" if self.done else self._progress()

    def take(self, tensors: Mapping[str, Array]) -> Event:
        """Convert a response into an event.

        Args:
            tensors: tensors of the response, as returned by `lfdm_export.client.wire.decode`.

        Raises:
            ServerError: the response is invalid at this point of the stream.
        """
        kind = tensors["kind"][0].decode() if "kind" in tensors else "nothing"
        if self.done:
            raise self._wrong(f"{kind!r} after the end")
        if kind == "progress":
            return Progress(*self._steps(tensors))
        if kind == "preview":
            return Preview(*self._steps(tensors), *self._pictures(tensors))
        if kind == "frames":
            indices, frames = self._pictures(tensors)
            self._frames[indices], self._have[indices] = frames, True
            return Frames(indices, frames)
        if kind == "done":
            if "timings" not in tensors or not self._have[self._positions].all():
                raise self._wrong(f"the end after {self._progress()}")
            self._timings = tensors["timings"]
            return Done(read_timings(tensors["timings"]))
        raise self._wrong(f"{kind!r}")

    def clip(self) -> Clip:
        """Assemble the clip, without warped images and latent.

        Raises:
            ServerError: the stream has not ended.
        """
        if self._timings is None:
            raise self._wrong(f"{self._progress()} and no end")
        answer = {"frames": self._frames[self._positions], "timings": self._timings}
        clip = make_clip([answer], self._plan, self._facts)
        return replace(clip, fps=self._chosen.rate(None))

    def _progress(self) -> str:
        return f"{self._have.sum()} of {self._chosen.count} frames"

    def _steps(self, tensors: Mapping[str, Array]) -> tuple[int, int]:
        if "step" not in tensors or "steps" not in tensors:
            raise self._wrong("a response without step and steps")
        return int(tensors["step"][0]), int(tensors["steps"][0])

    def _pictures(self, tensors: Mapping[str, Array]) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        if "frames" not in tensors or "frame_indices" not in tensors:
            raise self._wrong("a response without frames and frame_indices")
        frames, indices = tensors["frames"], tensors["frame_indices"]
        expected = (len(indices), *self._frames.shape[1:])
        if frames.shape != expected or len(indices) == 0 or indices.min() < 0 or indices.max() >= len(self._have):
            raise self._wrong(
                f"frames {indices.tolist()} of shape {frames.shape}, expected {expected} of {len(self._have)} frames"
            )
        return indices, frames

    def _wrong(self, found: str) -> ServerError:
        return ServerError(
            f"the server's stream holds {found}; the model was exchanged, or server and client differ in version",
            "INTERNAL",
            self._job.request_id,
        )
