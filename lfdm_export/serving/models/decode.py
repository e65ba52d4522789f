"""`lfdm_decode`: skips and latent -> frames, chunk by chunk, with this process's engine or through another model."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from lfdm_export.errors import EngineError, InputError
from lfdm_export.generate.decoding import chunk_starts
from lfdm_export.generate.encoded import Encoded
from lfdm_export.pictures.preprocess import to_uint8
from lfdm_export.protocol.contract import Array, RequestCancelledError
from lfdm_export.serving.models.stub import failure, load, response
from lfdm_export.serving.models.warm_up import warm_up
from lfdm_export.serving.triton.config import DECODE_MODEL_PARAMETER
from lfdm_export.serving.triton.engine_files import check_engines

#: A chunk of the latent (1, 3, F, h, w) -> frames and warped images, (1, 3, F, H, W) float32.
DecodeChunk = Callable[[NDArray[np.float32]], tuple[NDArray[np.float32], NDArray[np.float32]]]


class DecodeModel:
    """The Triton model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the engine and run it once; or, if other models run it, check that it comes from the bundle."""
        loaded = load(args)
        self._pipeline, self._interface = loaded.pipeline, loaded.interface
        self._chunk_model = loaded.parameters.get(DECODE_MODEL_PARAMETER)
        if self._chunk_model is None:
            warm_up(self._pipeline, {"decode": [1]})
        else:  # checks the encoder's engine too, whose model has no Python code
            check_engines(self._pipeline.bundle, Path(args["model_repository"]).parent)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request with its requested outputs."""
        answers = []
        for request in requests:
            try:
                answers.append(self._answer(request))
            except Exception as error:  # noqa: BLE001 (each request has its own answer)
                answers.append(failure(error))
        return answers

    def _answer(self, request: Any) -> Any:
        began = time.monotonic()
        requested = set(request.requested_output_names())
        # The encoder's outputs stay where they are: on the GPU if Triton's own engine made them.
        tensors = {spec.name: pb_utils.get_input_tensor_by_name(request, spec.name) for spec in self._interface.inputs}
        missing = [name for name, tensor in tensors.items() if tensor is None]
        if missing:
            raise InputError(f"the inputs {', '.join(missing)} are missing")
        latent, timings = (tensors.pop(name).as_numpy() for name in ("latent", "sample_timings"))
        decode = self._through_model(list(tensors.values())) if self._chunk_model else self._own(list(tensors.values()))
        frames, warped = self._clip(request, latent, decode, requested)
        times = np.append(timings, np.float32(time.monotonic() - began))
        return response({"frames": frames, "warped": warped, "timings": times}, requested)

    def _clip(self, request: Any, latent: Array, decode: DecodeChunk, requested: set[str]) -> list[NDArray[np.uint8]]:
        """Frames and warped images (T, H, W, 3); an output that is not requested stays black."""
        geometry = self._pipeline.bundle.manifest.geometry
        frames, size = geometry.frames, geometry.image_size
        clips = [np.zeros((frames, size, size, 3), np.uint8) for _ in range(2)]
        for begin, given in chunk_starts(frames, geometry.chunk_frames):
            if request.is_cancelled():
                raise RequestCancelledError("the request was cancelled")
            part = slice(begin + given, begin + geometry.chunk_frames)
            decoded = decode(np.ascontiguousarray(latent[None, :, begin : begin + geometry.chunk_frames]))
            for name, clip, pictures in zip(("frames", "warped"), clips, decoded, strict=True):
                if name in requested:
                    clip[part] = to_uint8(pictures[:, :, given:])[0]
        return clips

    def _own(self, tensors: list[Any]) -> DecodeChunk:
        image, *skips = (tensor.as_numpy() for tensor in tensors)
        encoded = Encoded(image, tuple(skips), np.empty(0, np.float32))
        return lambda latent: self._pipeline.decode(encoded, latent)

    def _through_model(self, tensors: list[Any]) -> DecodeChunk:
        """One call into the server per chunk (not per step: a call costs milliseconds)."""

        def decode(latent: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
            call = pb_utils.InferenceRequest(
                model_name=self._chunk_model,
                requested_output_names=["frames", "warped"],
                inputs=[*tensors, pb_utils.Tensor("latent", latent)],
                preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
            )
            answer = call.exec()
            if answer.has_error():
                raise EngineError(f"{self._chunk_model} failed: {answer.error().message()}")
            frames, warped = (
                pb_utils.get_output_tensor_by_name(answer, name).as_numpy() for name in ("frames", "warped")
            )
            return frames, warped

        return decode
