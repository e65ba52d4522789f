"""Converts a call into one request per sample, and their responses into a clip. No network access."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lfdm_export.errors import InputError, ServerError
from lfdm_export.files.json_codec import to_plain
from lfdm_export.generate.arguments import (
    common_batch,
    condition_name,
    embedding_rows,
    per_sample,
    sample_seeds,
    seed_count,
)
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.crop import Crop
from lfdm_export.pictures.preprocess import ImageLike, prepare_images
from lfdm_export.protocol.contract import CLIP_OUTPUTS, MAX_PRIORITY, MAX_SEED, SAMPLING_INPUTS, TIMINGS, Array
from lfdm_export.protocol.model_facts import ModelFacts
from lfdm_export.sampling.options import SamplingOptions


@dataclass(frozen=True, eq=False)
class Arguments:
    """Arguments of a call of `Client.generate`, documented there."""

    image: ImageLike
    crop: Crop | None = None
    label: str | Sequence[str] | None = None
    text: str | Sequence[str] | None = None
    text_embedding: ArrayLike | None = None
    options: SamplingOptions = SamplingOptions()
    seed: int | Sequence[int] | None = None
    warped: bool = False
    latent: bool = False
    priority: int = 0
    request_id: str | None = None


@dataclass(frozen=True, eq=False)
class Job:
    """One sample, sent as one request.

    Attributes:
        tensors: inputs of the request, by name.
        request_id: ID of the request.
    """

    tensors: Mapping[str, Array]
    request_id: str


@dataclass(frozen=True, eq=False)
class Plan:
    """All samples of a call.

    Attributes:
        jobs: one job per sample.
        outputs: names of the requested outputs.
        source: (B, H, W, 3) uint8, the prepared images.
        words: label or text of each sample, if any.
        seeds: seed of each sample.
        priority: priority of all requests.
        settings: settings of the generation, plain JSON values by name.
    """

    jobs: tuple[Job, ...]
    outputs: tuple[str, ...]
    source: NDArray[np.uint8] = field(repr=False)
    words: tuple[str, ...] | None
    seeds: tuple[int, ...]
    priority: int
    settings: Mapping[str, object]


def make_plan(call: Arguments, facts: ModelFacts) -> Plan:
    """Prepare the requests of a call.

    The image is scaled here, as the server would do it: a prepared image has 49 kB, a photograph megabytes.

    Raises:
        InputError: an argument is invalid.
    """
    source = prepare_images(call.image, facts.image_size, facts.preprocessing, crop=call.crop)
    name, words, conditions = _conditions(call, facts)
    batch = common_batch({"images": len(source), name + "s": len(conditions), "seeds": seed_count(call.seed)})
    # Drawn before sending, so that a retry gives the same clip, and the caller can reproduce it.
    seeds = sample_seeds(call.seed, batch)
    if max(seeds) > MAX_SEED:
        raise InputError(f"seed: found {max(seeds)}, expected 0 to 2^63 - 1; choose one in that range")
    if isinstance(call.priority, bool) or not isinstance(call.priority, int) or abs(call.priority) > MAX_PRIORITY:
        raise InputError(f"priority is {call.priority!r}, expected an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}")
    if call.request_id == "" or (call.request_id is not None and not call.request_id.isprintable()):
        raise InputError(f"request_id is {call.request_id!r}, expected printable characters, or none for a new one")
    common, base_id = _sampling(call.options), call.request_id or uuid.uuid4().hex
    jobs = tuple(
        Job(
            tensors={
                "image": source[index % len(source)],
                name: conditions[index % len(conditions)],
                "seed": np.array([seeds[index]], np.int64),
                **common,
            },
            request_id=base_id if batch == 1 else f"{base_id}-{index}",
        )
        for index in range(batch)
    )
    wanted = {"frames": True, "warped": call.warped, "latent": call.latent, "timings": True}
    return Plan(
        jobs=jobs,
        outputs=tuple(spec.name for spec in CLIP_OUTPUTS if wanted.get(spec.name)),
        source=np.repeat(source, batch // len(source), axis=0),
        words=None if words is None else words * (batch // len(words)),
        seeds=seeds,
        priority=call.priority,
        # About model and sampling, for the clip's metadata; the response adds the steps.
        settings={
            "made_by": "generate",
            "bundle_id": facts.bundle_id,
            "precision": facts.precision,
            **to_plain(call.options.over(facts.sampler)),
            "condition": name,
        },
    )


def text_tensor(value: str) -> Array:
    """Convert a string to a BYTES tensor of one element."""
    array = np.empty(1, np.object_)
    array[0] = value.encode()
    return array


def _conditions(call: Arguments, facts: ModelFacts) -> tuple[str, tuple[str, ...] | None, list[Array]]:
    """Return the name of the conditioning input, its words if any, and its tensor per sample."""
    condition_name(call.label, call.text, call.text_embedding)
    if call.text_embedding is not None:
        return "text_embedding", None, list(embedding_rows(call.text_embedding, facts.text_width))
    if call.label is not None:
        # The server matches the label; the clip stores the server's spelling.
        known = {label.strip().casefold(): label for label in facts.labels}
        labels = per_sample(call.label, "label")
        words = tuple(known.get(label.strip().casefold(), label) for label in labels)
        return "label", words, [text_tensor(label) for label in words]
    assert call.text is not None
    texts = per_sample(call.text, "text")
    return "text", texts, [text_tensor(text) for text in texts]


def _sampling(options: SamplingOptions) -> dict[str, Array]:
    """Return the inputs that all samples share; the server checks the ranges that depend on its model."""
    given = options.given()
    return {
        spec.name: text_tensor(value)
        if isinstance(value := given[spec.name], str)
        else np.atleast_1d(np.array(value, spec.dtype))
        for spec in SAMPLING_INPUTS
        if spec.name in given
    }


def check_answer(answer: Mapping[str, Array], plan: Plan, job: Job, facts: ModelFacts) -> None:
    """Check a response against the request.

    Raises:
        ServerError: an output is missing, or its size does not match the model.
    """
    missing = [name for name in plan.outputs if name not in answer]
    if missing:
        raise ServerError(f"the server's answer lacks {', '.join(missing)}", "INTERNAL", job.request_id)
    size, small = facts.image_size, facts.latent_size
    expected = {
        "frames": (facts.frames, size, size, 3),
        "warped": (facts.frames, size, size, 3),
        "latent": (3, facts.frames, small, small),
    }
    for name, shape in expected.items():
        if name in answer and answer[name].shape != shape:
            raise ServerError(
                f"{name} in the server's answer has shape {answer[name].shape}, expected {shape}; "
                "the model was exchanged while the client was open: open a new one",
                "INTERNAL",
                job.request_id,
            )


def make_clip(answers: Sequence[Mapping[str, Array]], plan: Plan, facts: ModelFacts) -> Clip:
    """Assemble the clip of all samples from their checked responses, in order."""
    size, small, batch = facts.image_size, facts.latent_size, len(answers)
    # Outputs that were not requested have no frames.
    absent: dict[str, Array] = {
        "warped": np.empty((0, size, size, 3), np.uint8),
        "latent": np.empty((3, 0, small, small), np.float32),
    }

    def together(name: str) -> Array:
        return np.stack([answer[name] if name in answer else absent[name] for answer in answers])

    timings = tuple(read_timings(answer["timings"]) for answer in answers)
    return Clip(
        frames=together("frames"),
        warped=together("warped"),
        latent=together("latent"),
        source=plan.source[:batch],
        residual_flow=facts.residual_flow,
        labels=plan.words,
        seeds=plan.seeds,
        timings=timings,
        settings={**plan.settings, "steps": int(timings[0]["steps"])},
    )


def read_timings(values: Array) -> dict[str, float]:
    """Return the timings by name, in seconds except `steps`."""
    return {name: float(value) for name, value in zip(TIMINGS, values, strict=True)}
