"""Whole clips on a GPU: image, embedding and seed are uploaded, 8-bit pictures downloaded, with no wait in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.interface import ClipRequest, Float32, MadeClips
from lfdm_export.engines.pytorch.interfaces import PictureDecode
from lfdm_export.engines.pytorch.loop import TorchLoop
from lfdm_export.engines.pytorch.session import TorchSession, torch_session
from lfdm_export.errors import EngineError, not_finite
from lfdm_export.rewrite.lfae import Decode
from lfdm_export.stages import StageSpec
from lfdm_export.wording import one_line

# Frames of all samples decoded at once; more do not use a GPU better, but need memory.
_DECODED_AT_ONCE = 320


class TorchClipMaker:
    """Makes clips for one sampling stage and batch size; any thread may use it, one at a time."""

    def __init__(self, session: TorchSession, encode: StageSpec, sampling: StageSpec, batch: int) -> None:
        """Compile and capture the encoder, the step and the decoder.

        Args:
            session: session of a bundle; without a GPU its kernels need a stand-in.
            encode: the stage `encode`.
            sampling: `step` or `step_guided`.
            batch: number of samples made together.

        Raises:
            EngineError: a stage cannot be compiled, or there is not enough memory.
        """
        self._session, self.batch = session, batch
        self._loop = TorchLoop(session, sampling, batch)
        try:
            with session.owned():
                self._make(encode)
        except RuntimeError as error:
            raise EngineError(f"clips cannot be prepared for a batch of {batch}: {error}") from error

    def _make(self, encode: StageSpec) -> None:
        session, batch, geometry = self._session, self.batch, self._session.manifest.geometry
        (image,) = encode.inputs
        self._image = torch.zeros(image.concrete(batch=batch), device=session.device)
        encoder = session.program(f"encode-{batch}", session.module("encode"), (self._image,))
        self._encode, encoded = session.captured(lambda: encoder(self._image))
        *skips, self._context = encoded
        self._chunk = _chunk(geometry.frames, batch)
        part = (batch, 3, self._chunk, geometry.latent_size, geometry.latent_size)
        self._part = torch.zeros(part, device=session.device)
        inputs = (self._image, *skips, self._part)
        decoder = session.program(f"pictures-{batch}", PictureDecode(cast(Decode, session.module("decode"))), inputs)
        self._decode, self._decoded = session.captured(lambda: decoder(*inputs))
        side = geometry.image_size
        self._pictures = tuple(
            torch.empty(batch, geometry.frames, side, side, 3, dtype=torch.uint8, pin_memory=session.on_gpu)
            for _ in range(2)
        )
        self._latent = torch.empty(batch, *part[1:2], geometry.frames, *part[3:], pin_memory=session.on_gpu)

    def make(self, request: ClipRequest, on_step: Callable[[int], None] | None = None) -> MadeClips:
        """Make clips.

        Args:
            request: a request of `batch` samples.
            on_step: called after each queued step.

        Raises:
            EngineError: the run fails, or returns values that are not finite.
        """
        try:
            with self._session.owned():
                self._image.copy_(torch.from_numpy(np.ascontiguousarray(request.image)))
                self._encode()
                fixed: dict[str, NDArray[np.float32] | Tensor] = {"context": self._context, **request.fixed}
                self._loop.begin_seeded(request.seeds, fixed, request.table)
                for index in range(request.table.steps):
                    self._loop.step_seeded(index, draws=bool(request.table.draws_noise[index]))
                    if on_step is not None:
                        on_step(index)
                return self._finish(request.frames)
        except RuntimeError as error:
            raise EngineError(f"clips failed in PyTorch: {one_line(error, 300)}") from error

    def _finish(self, wanted: tuple[int, ...] | None) -> MadeClips:
        """Decode the runs of frames that hold wanted ones: the shape of a run is fixed."""
        latent = self._loop.inputs["noisy_latent"]
        self._latent.copy_(latent, non_blocking=True)
        chosen = list(range(latent.shape[2]) if wanted is None else wanted)
        for first in sorted({frame - frame % self._chunk for frame in chosen}):
            self._part.copy_(latent[:, :, first : first + self._chunk])
            self._decode()
            for pictures, decoded in zip(self._pictures, self._decoded, strict=True):
                pictures[:, first : first + self._chunk].copy_(decoded, non_blocking=True)
        if self._session.on_gpu:
            torch.cuda.current_stream().synchronize()
        frames, warped = (pictures.numpy()[:, chosen] for pictures in self._pictures)
        found: Float32 = self._latent.numpy()[:, :, chosen]
        if not np.isfinite(found).all():
            raise not_finite("sampling gave")
        return MadeClips(frames, warped, found)


def clip_maker(bundle: Bundle, stage: str, batch: int, threads: int | None) -> TorchClipMaker | None:
    """What makes whole clips if the bundle runs on a GPU; None on a CPU, where single stages are as fast.

    Args:
        bundle: a bundle exported for the target torch.
        stage: the sampling stage.
        batch: number of samples made together.
        threads: threads of the session, which the engines of the bundle share.

    Raises:
        EngineError: a stage cannot be compiled, or there is not enough memory.
    """
    session = torch_session(bundle, threads=threads)
    if not session.on_gpu:
        return None
    return TorchClipMaker(session, bundle.stages["encode"], bundle.stages[stage], batch)


def _chunk(frames: int, batch: int) -> int:
    """Frames of a clip decoded at once: a divisor of their number."""
    most = max(1, _DECODED_AT_ONCE // batch)
    return max(part for part in range(1, frames + 1) if frames % part == 0 and part <= most)
