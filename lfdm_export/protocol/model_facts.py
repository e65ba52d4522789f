"""What a served model reports about itself: a parameter of its Triton configuration, read by clients.

NumPy only, as in `lfdm_export.protocol.contract`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from lfdm_export.bundle.manifest import Manifest
from lfdm_export.errors import LfdmExportError
from lfdm_export.files.json_codec import from_plain, to_plain
from lfdm_export.pictures.preprocess import Preprocessing
from lfdm_export.sampling.options import SamplingOptions
from lfdm_export.wording import count, shortened

#: Key among the `parameters` in the configurations of the clip model and the stream model.
FACTS_PARAMETER = "lfdm_facts"


@dataclass(frozen=True, repr=False)
class ModelFacts:
    """The facts about a bundle that a client uses.

    Attributes:
        labels: known labels.
        has_text: whether it accepts free text.
        text_width: elements of a text embedding.
        frames: frames T per clip.
        image_size: rows and columns of a frame.
        latent_size: rows and columns of the latent.
        residual_flow: meaning of the grid in the latent; see `lfdm_export.pictures.clip.Clip`.
        preprocessing: how a photograph becomes an image for the model.
        sampler: defaults of generation.
        precision: precision of the graphs.
        trained: whether the weights are trained; None if unknown.
        bundle_id: identity of the bundle, as in `lfdm_export.bundle.manifest.Manifest.bundle_id`; None from an older
            server.
    """

    labels: tuple[str, ...]
    has_text: bool
    text_width: int
    frames: int
    image_size: int
    latent_size: int
    residual_flow: bool
    preprocessing: Preprocessing
    sampler: SamplingOptions
    precision: str
    trained: bool | None = None
    bundle_id: str | None = None

    def __repr__(self) -> str:
        labels = f"{count(len(self.labels), 'label')} ({shortened(self.labels)})" if self.labels else "no labels"
        size = self.image_size
        return f"<ModelFacts: {self.precision}, {count(self.frames, 'frame')} of {size}x{size}, {labels}>"

    @classmethod
    def of(cls, manifest: Manifest) -> ModelFacts:
        """The facts of a bundle."""
        geometry, trained = manifest.geometry, manifest.provenance.get("trained")
        return cls(
            labels=manifest.labels,
            has_text=manifest.has_text,
            text_width=geometry.text_width,
            frames=geometry.frames,
            image_size=geometry.image_size,
            latent_size=geometry.latent_size,
            residual_flow=manifest.config.residual_flow,
            preprocessing=manifest.preprocessing,
            sampler=manifest.sampler,
            precision=manifest.precision,
            trained=trained if isinstance(trained, bool) else None,
            bundle_id=manifest.bundle_id,
        )

    def to_json(self) -> str:
        """One line of JSON, the value of the parameter."""
        return json.dumps(to_plain(self), allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> ModelFacts:
        """Read the output of `to_json`.

        Raises:
            LfdmExportError: the text is not valid.
        """
        try:
            return from_plain(cls, json.loads(text), FACTS_PARAMETER)
        except (ValueError, RecursionError) as error:
            raise LfdmExportError(
                f"the parameter {FACTS_PARAMETER} of the model's configuration cannot be read ({error}); "
                "server and client are of different versions: install the same one"
            ) from error
