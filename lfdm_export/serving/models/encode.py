"""`lfdm_encode`: picture -> skips and context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lfdm_export.generate.encoded import Encoded
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.protocol.contract import Array
from lfdm_export.serving.models.stub import answer_each, load
from lfdm_export.serving.models.warm_up import warm_up


def encode(pipeline: Pipeline, image: Array) -> Encoded:
    """Encode one picture (1, 3, size, size) float32."""
    *skips, context = pipeline.stages.run("encode", image)
    return Encoded(image, tuple(skips), context)


class EncodeModel:
    """The Triton model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the engine and run it once."""
        loaded = load(args)
        self._pipeline, self._interface = loaded.pipeline, loaded.interface
        warm_up(self._pipeline, {"encode": [1]})

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request with the stage's outputs."""
        return answer_each(requests, self._interface, self._encode)

    def _encode(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        encoded = encode(self._pipeline, tensors["image"])
        outputs = (*encoded.skips, encoded.context)
        return {spec.name: array for spec, array in zip(self._interface.outputs, outputs, strict=True)}
