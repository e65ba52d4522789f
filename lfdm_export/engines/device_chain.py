"""Clips whose encoder outputs, states, noise and latents stay on one device: only pictures leave it.

What crosses to and from the host per clip is the same for any number of steps: the image, the embedding, the seed, the
guidance scale and the sampler's table; 8-bit frames and one flag.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, cast

import numpy as np
from numpy.typing import NDArray

from lfdm_export.engines.checks import Array
from lfdm_export.engines.device import PICTURES, A, Device, DeviceMemoryError, Layout, Pool
from lfdm_export.engines.device_batch import DeviceBatch, DeviceLatent, DeviceSample, batch_sizes, fixed_inputs
from lfdm_export.errors import EngineError, not_finite
from lfdm_export.sampling.noise import START
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.stages import COEFFICIENTS, Geometry, StageSpec

logger = logging.getLogger(__name__)

UInt8 = NDArray[np.uint8]
#: The outputs of `decode`.
FRAMES, WARPED = "frames", "warped"


@dataclass(frozen=True, eq=False)
class DeviceEncoded(Generic[A]):
    """The image of a clip and the encoder's outputs; their memory returns to a pool when nothing refers to them.

    Attributes:
        arrays: image, skips and context, one row each, by name.
    """

    arrays: Mapping[str, A]


class DeviceChain(Generic[A]):
    """Encode, sample and decode on one device. Any thread may call any method; they wait for each other.

    Attributes:
        device: the device.
        stages: the stages of the bundle.
        most_steps: training steps of the model: no sampler takes more.
    """

    def __init__(
        self, device: Device[A], stages: Mapping[str, StageSpec], geometry: Geometry, training_steps: int
    ) -> None:
        """Prepare the encoder and the decoder, and run each once.

        Args:
            device: the device.
            stages: the stages of the bundle.
            geometry: its sizes.
            training_steps: training steps of the model: no sampler takes more.

        Raises:
            EngineError: a stage cannot be prepared, or there is not enough memory.
        """
        self.device, self.stages = device, stages
        self._geometry, self.most_steps = geometry, training_steps
        (self._image_spec,) = stages["encode"].inputs
        with device.owned():
            self._numbers = device.zeros((1 + training_steps,), "int64")
            device.upload(self._numbers, np.arange(START, training_steps, dtype=np.int64))
            self._coder = {"image": device.zeros(self._image_spec.concrete(batch=1), "float32")}
            made = device.results("encode", 1)
            self._encode = device.program("encode", self._coder, made)
            self._coder |= made
            self._encode()
            self._flag = device.zeros((1,), "int32")
            self._prepare_decoder()
        self._encodings: Pool[dict[str, A]] = Pool(self._new_encoding)
        self._samples: dict[str, Pool[DeviceSample[A]]] = {
            stage: Pool(lambda spec=stages[stage]: self._new_sample(spec))  # type: ignore[misc]
            for stage in ("step", "step_guided")
        }

    # --- Encode and sample ------------------------------------------------------------------------

    def encode(self, image: NDArray[np.float32]) -> DeviceEncoded[A]:
        """Encode one image (1, 3, H, W) float32 in [0, 1]."""
        device = self.device
        with device.owned():
            arrays = self._encodings.take()
            device.upload(self._coder["image"], image)
            self._encode()
            for name, array in arrays.items():
                device.copy(array, self._coder[name])
        return self._encodings.lend(DeviceEncoded(arrays), arrays)

    def sample(
        self, stage: str, encoded: DeviceEncoded[A], inputs: Mapping[str, Array], seed: int, table: SamplerTable
    ) -> DeviceSample[A]:
        """Upload the inputs of a sample.

        Args:
            stage: the sampling stage.
            encoded: of its image.
            inputs: the inputs of the stage that no step changes except `context`, one row each, by name.
            seed: 0 to 2^64 - 1.
            table: the sampler.

        Raises:
            EngineError: the sampler has more steps than the model was trained with.
        """
        if table.steps > self.most_steps:
            raise EngineError(
                f"the sampler takes {table.steps} steps, expected at most {self.most_steps}, the training steps of "
                "the model; ask for fewer"
            )
        device = self.device
        with device.owned():
            memory = self._samples[stage].take()
            for name, array in memory.fixed.items():
                if name in inputs:
                    device.upload(array, inputs[name])
            device.copy(memory.fixed["context"], encoded.arrays["context"])
            device.upload(memory.seed, np.array([seed], np.uint64).view(np.int64))
            device.upload(memory.timesteps[: table.steps], table.timesteps)
            device.upload(memory.coefficients[: table.steps], table.coefficients)
        sample = DeviceSample(memory.fixed, memory.seed, memory.timesteps, memory.coefficients)
        return self._samples[stage].lend(sample, memory)

    def batch(self, stage: str, slots: int, *, fixed: bool = False) -> DeviceBatch[A]:
        """The batch of a sampling stage.

        Args:
            stage: its name.
            slots: number of rows.
            fixed: always run all rows.

        Raises:
            EngineError: there are more rows than the stage runs at once, or it cannot be prepared.
        """
        most = self.stages[stage].batch[2]
        if slots > most:
            raise EngineError(f"found {slots} slots, expected at most {most}, the most that {stage} runs at once")
        sizes = (slots,) if fixed else tuple(batch_sizes(slots))
        return DeviceBatch(self.device, self.stages[stage], sizes, self._numbers)

    # --- Decode -----------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """How many frames a run of `decode` takes here."""
        return self._layout

    def decode(
        self,
        encoded: DeviceEncoded[A],
        latent: DeviceLatent[A],
        frames: Sequence[int] | None = None,
        wanted: Sequence[str] = (FRAMES,),
    ) -> Iterator[tuple[int, list[UInt8]]]:
        """Decode frames of a latent, as many at once as the memory allows.

        Args:
            encoded: of the image.
            latent: the latent.
            frames: which frames; None for all.
            wanted: `FRAMES`, `WARPED` or both.

        Yields:
            The position of the first frame of this part, and the wanted pictures (n, H, W, 3) uint8.

        Raises:
            EngineError: the run fails, or the latent or a picture has values that are not finite.
        """
        indices = list(range(self._geometry.frames)) if frames is None else [int(frame) for frame in frames]
        most, device = self._layout.rows * self._layout.frames, self.device
        for begin in range(0, len(indices), most):
            some = indices[begin : begin + most]
            with device.owned():
                self._place(encoded, latent.array, some)
                device.clear(self._flag)
                device.flag_not_finite(latent.array, self._flag)
                self._decode()
                *pictures, flag = device.download([*(self._pictures[name] for name in wanted), self._flag])
            if flag[0]:
                raise not_finite("sampling or decoding gave")
            yield begin, [cast(UInt8, array.reshape(most, *array.shape[2:])[: len(some)]) for array in pictures]

    def latent(self, latent: DeviceLatent[A]) -> NDArray[np.float32]:
        """The latent on the host, (3, T, h, w) float32."""
        with self.device.owned():
            (array,) = self.device.download([latent.array])
        return cast(NDArray[np.float32], array)

    def _prepare_decoder(self) -> None:
        """Prepare the largest run of `decode` for which there is memory."""
        layouts = self.device.layouts(self._geometry.frames)
        for layout in layouts:
            try:
                self._layout, self._decode = layout, self._decoder(layout)
                return
            except DeviceMemoryError as error:
                if layout == layouts[-1]:
                    raise
                logger.info("decode does not fit with %s: %s", layout, error)

    def _decoder(self, layout: Layout) -> Callable[[], None]:
        device, geometry = self.device, self._geometry
        rows, side = layout.rows, geometry.image_size
        latent = (rows, 3, layout.frames, geometry.latent_size, geometry.latent_size)
        names = [one.name for one in self.stages["decode"].inputs]
        arrays = {
            **device.results("encode", rows),
            "image": device.zeros(self._image_spec.concrete(batch=rows), "float32"),
            "latent": device.zeros(latent, "float32"),
        }
        self._given = {name: arrays[name] for name in names}
        self._pictures = {
            name: device.zeros((rows, layout.frames, side, side, 3), "uint8") for name in (FRAMES, WARPED)
        }
        program = device.program(PICTURES, self._given, self._pictures, self._flag)
        program()
        return program

    def _place(self, encoded: DeviceEncoded[A], latent: A, frames: Sequence[int]) -> None:
        """Copy the inputs of a run; neighboring frames of a channel together."""
        copy, each = self.device.copy, self._layout.frames
        used = -(-len(frames) // each)
        for name, array in self._given.items():
            if name != "latent":
                for row in range(used):
                    copy(array[row : row + 1], encoded.arrays[name])
        for position, frame, count in runs(frames, each):
            row, first = divmod(position, each)
            for channel in range(3):
                target = self._given["latent"][row][channel]
                copy(target[first : first + count], latent[channel][frame : frame + count])

    # --- Memory -----------------------------------------------------------------------------------

    def _new_encoding(self) -> dict[str, A]:
        image = self.device.zeros(self._image_spec.concrete(batch=1), "float32")
        return {**self.device.results("encode", 1), "image": image}

    def _new_sample(self, spec: StageSpec) -> DeviceSample[A]:
        device, names = self.device, fixed_inputs(spec)
        fixed = {one.name: device.zeros(one.concrete(batch=1), one.dtype) for one in spec.inputs if one.name in names}
        return DeviceSample(
            fixed,
            device.zeros((1,), "int64"),
            device.zeros((self.most_steps,), "int64"),
            device.zeros((self.most_steps, COEFFICIENTS), "float32"),
        )


def runs(frames: Sequence[int], each: int) -> Iterator[tuple[int, int, int]]:
    """Position, first frame and length of each run of neighboring frames that lies in one row of `each` frames."""
    keyed = itertools.groupby(enumerate(frames), key=lambda pair: (pair[0] // each, pair[1] - pair[0]))
    for _, group in keyed:
        (position, frame), *more = group
        yield position, frame, 1 + len(more)
