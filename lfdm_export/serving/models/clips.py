"""Encode and decode around a sampler: on the host with single stages, or with a chain on a device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lfdm_export.batching.jobs import Context, Latent
from lfdm_export.engines.device_chain import FRAMES, DeviceChain, DeviceEncoded
from lfdm_export.generate.decoding import chunk_starts
from lfdm_export.generate.encoded import Encoded
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.pictures.preprocess import to_uint8
from lfdm_export.serving.models.encode import encode

UInt8 = NDArray[np.uint8]


class Clips(Protocol):
    """What a model does with a clip besides sampling."""

    def encode(self, image: NDArray[np.float32]) -> Any:
        """The encoding of an image (1, 3, H, W) float32."""

    def context(self, encoded: Any) -> Context:
        """What the sampler needs of an encoding."""

    def on_host(self, latent: Latent) -> NDArray[np.float32]:
        """A latent (1, 3, T, h, w) as an array."""

    def decode(
        self,
        encoded: Any,
        latent: Latent,
        frames: Sequence[int] | None = None,
        wanted: Sequence[str] = (FRAMES,),
    ) -> Iterator[tuple[int, list[UInt8]]]:
        """Decode frames, all by default: the position of the first of each part, and its wanted pictures."""


class HostClips:
    """Single stages, with arrays of the host between them."""

    def __init__(self, pipeline: Pipeline) -> None:
        """Use a pipeline."""
        self._pipeline = pipeline

    def encode(self, image: NDArray[np.float32]) -> Encoded:
        """See `Clips`."""
        return encode(self._pipeline, image)

    def context(self, encoded: Encoded) -> Context:
        """The output of `encode` that the sampler needs."""
        return encoded.context

    def on_host(self, latent: Latent) -> NDArray[np.float32]:
        """The latent itself."""
        array: NDArray[np.float32] = latent
        return array

    def decode(
        self,
        encoded: Encoded,
        latent: Latent,
        frames: Sequence[int] | None = None,
        wanted: Sequence[str] = (FRAMES,),
    ) -> Iterator[tuple[int, list[UInt8]]]:
        """See `Clips`; one run per chunk."""
        chosen = latent if frames is None else latent[:, :, list(frames)]
        chunk = self._pipeline.bundle.manifest.geometry.chunk_frames
        for begin, given in chunk_starts(chosen.shape[2], chunk):
            decoded = self._pipeline.decode(encoded, np.ascontiguousarray(chosen[:, :, begin : begin + chunk]))
            pictures = dict(zip(("frames", "warped"), decoded, strict=True))
            yield begin + given, [to_uint8(pictures[name])[0][given:] for name in wanted]


class DeviceClips:
    """A chain on a device."""

    def __init__(self, chain: DeviceChain[Any]) -> None:
        """Use a chain, which is prepared."""
        self.chain = chain

    def encode(self, image: NDArray[np.float32]) -> DeviceEncoded[Any]:
        """See `Clips`."""
        return self.chain.encode(image)

    def context(self, encoded: DeviceEncoded[Any]) -> Context:
        """The encoding itself: it stays on the device."""
        return encoded

    def on_host(self, latent: Latent) -> NDArray[np.float32]:
        """A copy of the latent."""
        return self.chain.latent(latent)[None]

    def decode(
        self,
        encoded: DeviceEncoded[Any],
        latent: Latent,
        frames: Sequence[int] | None = None,
        wanted: Sequence[str] = (FRAMES,),
    ) -> Iterator[tuple[int, list[UInt8]]]:
        """See `Clips`; as many frames at once as the memory allows."""
        return self.chain.decode(encoded, latent, frames, wanted)
