"""`lfdm_condition`: label, text and sampling options of a request, checked before any expensive work."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bundle.manifest import TEXT_STAGE
from lfdm_export.errors import InputError, MissingDependencyError
from lfdm_export.generate.arguments import embedding_rows
from lfdm_export.pictures.preprocess import to_float
from lfdm_export.protocol.contract import USED_SEED, Array
from lfdm_export.protocol.requests import parse_condition, parse_sampling
from lfdm_export.sampling.noise import draw_seed
from lfdm_export.sampling.options import guided_at
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.serving.models.stub import Loaded, answer_each, load

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Conditions:
    """The sampling inputs of a clip.

    Attributes:
        embedding: (text_width,) float32.
        table: the sampler's steps.
        guidance_scale: scale of classifier-free guidance.
        guided: (S,) bool, the steps at which guidance acts.
        seed: seed of the noise, given or drawn.
    """

    embedding: NDArray[np.float32]
    table: SamplerTable
    guidance_scale: float
    guided: NDArray[np.bool_]
    seed: int


def conditions(tensors: Mapping[str, Array], loaded: Loaded) -> Conditions:
    """Parse a request's tensors for this bundle.

    Raises:
        InputError: a tensor is invalid.
    """
    limits, pipeline = loaded.settings.limits, loaded.pipeline
    # All cheap checks come before the text encoder runs.
    sampling, given = parse_sampling(tensors, limits), parse_condition(tensors, limits)
    options, table = pipeline.resolve(sampling.options)
    if table.steps > limits.steps:
        raise InputError(f"{table.name} would take {table.steps} steps, this server allows {limits.steps}; use fewer")
    training_steps = pipeline.bundle.manifest.config.dm.training_steps
    guided = guided_at(options.scale, table.timesteps, training_steps, options.guidance_interval)
    if given.label is not None:
        embedding = pipeline.bundle.embedding(given.label)
    elif given.text is not None:
        embedding = _embedded(given.text, loaded)
    else:
        assert given.text_embedding is not None  # one of the three is there
        embedding = embedding_rows(given.text_embedding, pipeline.bundle.manifest.geometry.text_width)[0]
    seed = draw_seed() if sampling.seed is None else sampling.seed
    return Conditions(embedding, table, options.scale, guided, seed)


def _embedded(text: str, loaded: Loaded) -> NDArray[np.float32]:
    try:
        embedding: NDArray[np.float32] = loaded.pipeline.embed_text([text])[0]
    except MissingDependencyError as error:
        labels = ", ".join(loaded.pipeline.bundle.labels) or "none"
        raise InputError(
            f"this server takes no free text, for it has no {error.package}; give one of its labels ({labels}) or a "
            "text embedding"
        ) from error
    return embedding


def warm_up_text(loaded: Loaded) -> None:
    """Load the text encoder and run it once, if the bundle has one.

    The bundle contains the labels' embeddings: labels are served even if the package for free text is not installed;
    a request with free text then gets an error that names it.
    """
    if TEXT_STAGE not in loaded.pipeline.bundle.stages:
        return
    try:
        loaded.pipeline.embed_text(["warm-up"])
    except MissingDependencyError as error:
        logger.warning("labels are served, free text is not: %s", error)


class ConditionModel:
    """The Triton model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle and load its text encoder."""
        self._loaded = load(args)
        warm_up_text(self._loaded)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request with the networks' input picture and the sampler's inputs."""
        return answer_each(requests, self._loaded.interface, self._condition)

    def _condition(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        found = conditions(tensors, self._loaded)
        seed = np.array([found.seed], np.int64)
        return {
            "image": to_float(tensors["pixels"][None]),
            "text_embedding": found.embedding,
            "seed": seed,
            USED_SEED.name: seed,
            "guidance_scale": np.array([found.guidance_scale], np.float32),
            "timesteps": found.table.timesteps,
            "coefficients": found.table.coefficients,
            "draws_noise": found.table.draws_noise,
            "guided": found.guided,
        }
