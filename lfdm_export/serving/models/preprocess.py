"""`lfdm_preprocess`: any picture -> the model's input pixels."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from lfdm_export.pictures.preprocess import UInt8Array, prepare_image, read_stream
from lfdm_export.protocol.contract import Array
from lfdm_export.protocol.requests import parse_image
from lfdm_export.serving.models.stub import Loaded, answer_each, load


def prepared_pixels(tensors: Mapping[str, Array], loaded: Loaded) -> UInt8Array:
    """The model's input pixels for a request's picture, (size, size, 3) uint8.

    Raises:
        InputError: the picture is invalid.
    """
    given = parse_image(tensors, loaded.settings.limits)
    manifest = loaded.pipeline.bundle.manifest
    size, rule = manifest.geometry.image_size, manifest.preprocessing
    if given.image_bytes is None:
        assert given.image is not None  # one of the two is there
        return prepare_image(given.image, size, rule)
    most = loaded.settings.limits.image_pixels
    return prepare_image(read_stream(io.BytesIO(given.image_bytes), "image_bytes", most_pixels=most), size, rule)


class PreprocessModel:
    """The Triton model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle, for its manifest."""
        self._loaded = load(args)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request with `pixels`."""
        return answer_each(
            requests, self._loaded.interface, lambda tensors: {"pixels": prepared_pixels(tensors, self._loaded)}
        )
