"""Animates an image by a saved motion on a server, which encodes the image and decodes the latent. No network access.

Both requests use the server's models `encode` and `decode`, which every clip passes through; nothing is sampled.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfdm_export.client.jobs import read_timings
from lfdm_export.client.wire import decode, infer_request
from lfdm_export.errors import InputError, ServerError
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.crop import Crop
from lfdm_export.pictures.motion import Motion
from lfdm_export.pictures.preprocess import ImageLike, prepare_images, to_float
from lfdm_export.protocol.contract import CLIP_OUTPUTS, DECODE_MODEL, ENCODE_MODEL, Array, WireTensor
from lfdm_export.protocol.model_facts import ModelFacts

_MAP = ("batch", "channels", "rows", "columns")
_IMAGE = WireTensor("image", "FP32", _MAP)
# For any number of levels: the server has as many as its model.
_ENCODED = tuple(WireTensor(name, "FP32", _MAP) for name in (*(f"skip_{level}" for level in range(9)), "feature"))
_LATENT = WireTensor("latent", "FP32", (3, "frames", "rows", "columns"))
# Timings of sampling; zeros, because nothing is sampled.
_SAMPLE_TIMINGS = WireTensor("sample_timings", "FP32", (3,))
_OUTPUTS = tuple(spec for spec in CLIP_OUTPUTS if spec.name in ("frames", "warped", "timings"))


@dataclass(frozen=True, eq=False)
class MotionPlan:
    """One image and its motion.

    Attributes:
        source: (1, size, size, 3) uint8, the prepared image.
        motion: saved motion that is decoded.
        facts: facts of the served model.
        request_id: ID of the decode request.
    """

    source: NDArray[np.uint8]
    motion: Motion
    facts: ModelFacts
    request_id: str

    def encode_request(self, seconds: float) -> Any:
        """Build the request for the image's skips and feature."""
        tensors = {_IMAGE.name: to_float(self.source)}
        return infer_request(ENCODE_MODEL, (_IMAGE,), tensors, request_id=self.request_id, seconds=seconds)

    def encoded(self, response: Any) -> dict[str, Array]:
        """Read the skips and the feature from the response.

        Raises:
            ServerError: the response has none.
        """
        found = decode(response, _ENCODED)
        if "feature" not in found:
            raise ServerError("the server's answer lacks feature", "INTERNAL", self.request_id)
        return found

    def decode_request(self, encoded: Mapping[str, Array], seconds: float) -> Any:
        """Build the request for the frames."""
        tensors = {
            _IMAGE.name: to_float(self.source),
            **encoded,
            _LATENT.name: self.motion.latent,
            _SAMPLE_TIMINGS.name: np.zeros(3, np.float32),
        }
        return infer_request(
            DECODE_MODEL,
            (_IMAGE, *_ENCODED, _LATENT, _SAMPLE_TIMINGS),
            tensors,
            outputs=[spec.name for spec in _OUTPUTS],
            request_id=self.request_id,
            seconds=seconds,
        )

    def clip(self, response: Any) -> Clip:
        """Read the clip from the response.

        Raises:
            ServerError: the response does not match the request.
        """
        answer, size = decode(response, _OUTPUTS), self.facts.image_size
        for name in ("frames", "warped"):
            if name not in answer or answer[name].shape != (self.facts.frames, size, size, 3):
                shape = answer[name].shape if name in answer else None
                raise ServerError(f"{name} in the server's answer has shape {shape}", "INTERNAL", self.request_id)
        made = dict(self.motion.settings)
        word, seed = made.pop("text", made.pop("label", None)), made.pop("seed", None)
        return Clip(
            frames=answer["frames"][None],
            warped=answer["warped"][None],
            latent=self.motion.latent[None],
            source=self.source,
            residual_flow=self.facts.residual_flow,
            labels=(word,) if isinstance(word, str) else None,
            seeds=(seed,) if isinstance(seed, int) else None,
            timings=(read_timings(answer["timings"]),),
            fps=self.motion.fps,
            settings={
                **made,
                "made_by": "animate",
                "bundle_id": self.facts.bundle_id,
                "precision": self.facts.precision,
                "motion_bundle_id": made.get("bundle_id"),
            },
        )


def plan_motion(image: ImageLike, motion: Motion, facts: ModelFacts, crop: Crop | None) -> MotionPlan:
    """Prepare the requests.

    Raises:
        InputError: the image or the motion is invalid.
    """
    motion.require_fit(facts.latent_size, facts.frames, residual_flow=facts.residual_flow)
    if motion.latent.shape[1] != facts.frames:
        raise InputError(
            f"the motion has {motion.latent.shape[1]} frames, a server decodes {facts.frames}; take the bundle itself"
        )
    source = prepare_images(image, facts.image_size, facts.preprocessing, crop=crop)
    if len(source) != 1:
        raise InputError(f"animate takes one image from a server, found a batch of {len(source)}; call it for each")
    return MotionPlan(source, motion, facts, uuid.uuid4().hex)
