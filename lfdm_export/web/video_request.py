"""The options of a requested video, checked against the bundle before the request is queued."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from lfdm_export.bundle.reader import Bundle
from lfdm_export.errors import EngineError, InputError, MissingDependencyError
from lfdm_export.files.json_codec import to_plain
from lfdm_export.files.names import visible
from lfdm_export.generate.arguments import real_number, whole_number
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.pictures.clip import DEFAULT_FPS
from lfdm_export.pictures.crop import parse_crop
from lfdm_export.pictures.gif import MAX_FPS
from lfdm_export.pictures.preprocess import prepare_image, read_stream
from lfdm_export.sampling.noise import check_seeds, draw_seed
from lfdm_export.sampling.options import OPTION_NAMES, SamplingOptions

#: Characters of a prompt.
LONGEST_PROMPT = 4096


@dataclass(frozen=True)
class VideoRequest:
    """The options of a video. None stands for the default of the bundle.

    Attributes:
        prompt: a label of the bundle, or free text if the bundle has a text encoder.
        seed: seed of the noise.
        options: options of sampling.
        fps: frames per second.
    """

    prompt: str
    seed: int
    options: SamplingOptions = SamplingOptions()
    fps: float = DEFAULT_FPS

    def to_json(self) -> dict[str, object]:
        """The values as plain JSON, with each option of sampling as a member."""
        return {"prompt": self.prompt, "seed": self.seed, **to_plain(self.options), "fps": self.fps}

    @classmethod
    def of(cls, plain: Mapping[str, object]) -> VideoRequest:
        """The options in a mapping that has the values of `to_json`, and perhaps others."""
        options = SamplingOptions(**{name: plain[name] for name in OPTION_NAMES})  # type: ignore[arg-type]
        return cls(plain["prompt"], plain["seed"], options, plain["fps"])  # type: ignore[arg-type]

    def condition(self, bundle: Bundle) -> dict[str, str]:
        """The prompt as an argument of `Pipeline.generate`: a label if the bundle has it, else a text.

        Raises:
            InputError: the prompt is not a label, and the bundle has no text encoder.
        """
        try:
            return {"label": bundle.labels[bundle.label_index(self.prompt)]}
        except InputError:
            if not bundle.manifest.has_text:
                raise
        return {"text": self.prompt}


#: Fields of a request that only this server has; allowed at the top or in an object ``extra``.
OPTIONS = ("seed", *OPTION_NAMES, "fps")
#: All fields of a request, those of OpenAI's interface first.
KNOWN = ("prompt", "model", "seconds", "size", "input_reference", "extra", "crop", *OPTIONS)
_INTEGERS, _NUMBERS = ("seed", "steps"), ("eta", "guidance_scale", "fps")


def read_video_request(given: Mapping[str, Any], pipeline: Pipeline) -> VideoRequest:
    """Read and check the options of a request.

    Args:
        given: fields of the request; those of a form are text.
        pipeline: the pipeline that makes the video.

    Raises:
        InputError: a field is unknown or missing, or has the wrong type, or is out of range.
    """
    extra = given.get("extra") or {}
    if not isinstance(extra, Mapping):
        raise InputError("extra is not an object; send options as fields, such as seed and steps")
    plain = {name: value for name, value in {**given, **extra}.items() if value not in (None, "")}
    unknown = [name for name in plain if name not in KNOWN]
    if unknown:
        raise InputError(f"unknown field {unknown[0][:80]!r}, expected some of {', '.join(KNOWN)}")
    prompt = plain.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > LONGEST_PROMPT:
        labels = ", ".join(pipeline.bundle.labels[:20])
        raise InputError(f"prompt must be text of 1 to {LONGEST_PROMPT} characters; labels are {labels or 'none'}")
    if visible(prompt) != prompt:
        raise InputError(f"prompt has characters that cannot be printed: {prompt[:80]!a}")
    found: dict[str, Any] = {name: whole_number(plain[name], name) for name in _INTEGERS if name in plain}
    found |= {name: _number(plain[name], name) for name in _NUMBERS if name in plain}
    if "sampler" in plain:
        found["sampler"] = str(plain["sampler"])
    seed, fps = found.pop("seed", None), found.pop("fps", DEFAULT_FPS)
    wanted = VideoRequest(prompt, draw_seed() if seed is None else seed, SamplingOptions(**found), fps)
    wanted.condition(pipeline.bundle)
    check_seeds([wanted.seed])
    pipeline.resolve(wanted.options)
    if not 1 <= wanted.fps <= MAX_FPS:
        raise InputError(f"fps is {wanted.fps:g}, expected 1 to {MAX_FPS}")
    _check_shape(plain, wanted, pipeline)
    return wanted


def model_of(bundle: Bundle) -> dict[str, object]:
    """The facts of the model that are stored with a request, because a later server may have another model."""
    manifest = bundle.manifest
    return {
        "model": bundle.name,
        "bundle_id": manifest.bundle_id,
        "size": manifest.geometry.image_size,
        "frames": manifest.geometry.frames,
    }


def _check_shape(plain: Mapping[str, Any], wanted: VideoRequest, pipeline: Pipeline) -> None:
    """Compare size and seconds, if they are given, with the clips of the bundle.

    Raises:
        InputError: they differ.
    """
    geometry = pipeline.bundle.manifest.geometry
    size, seconds = f"{geometry.image_size}x{geometry.image_size}", geometry.frames / wanted.fps
    if str(plain.get("size", size)).lower() != size:
        raise InputError(f"size is {str(plain['size'])[:40]!r}, this model makes {size}; leave it out")
    if "seconds" in plain and abs(_number(plain["seconds"], "seconds") - seconds) > 0.5:
        raise InputError(
            f"seconds is {str(plain['seconds'])[:40]}, this model's clips take {seconds:g} s at {wanted.fps:g} frames "
            "per second; leave it out, or give another fps"
        )


def read_photo(data: bytes, crop: object, bundle: Bundle, *, most_pixels: int) -> bytes:
    """Prepare a photograph for the model, as PNG.

    Args:
        data: the encoded picture.
        crop: "center", "face" or "X,Y,W,H"; None or "" for none.
        bundle: the bundle with the rules of preparation.
        most_pixels: most pixels of the picture, checked before it is decoded.

    Raises:
        InputError: the picture cannot be used.
    """
    manifest = bundle.manifest
    raster = read_stream(io.BytesIO(data), "input_reference", most_pixels=most_pixels)
    cut = parse_crop(str(crop)) if crop else None
    try:
        pixels = prepare_image(raster, manifest.geometry.image_size, manifest.preprocessing, crop=cut)
    except (MissingDependencyError, EngineError) as error:
        raise InputError(f"this server cannot find faces, give crop as X,Y,W,H: {error}") from error
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def photo_of_json(given: object) -> bytes:
    """The photograph of a JSON request: base64 text, a data URL, or an object that has either as ``image_url``.

    Raises:
        InputError: it is something else, such as an address, which the server does not fetch.
    """
    text = given.get("image_url") if isinstance(given, Mapping) else given
    if not isinstance(text, str):
        raise InputError(
            "input_reference is missing: send the photograph as a file, or in JSON as base64 or a data URL"
        )
    head, comma, rest = text.partition(",")
    if text.startswith(("http:", "https:")):
        raise InputError("input_reference is an address, which this server does not fetch; send the picture itself")
    try:
        return base64.b64decode(rest if comma and head.startswith("data:") else text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError("input_reference is not base64; send the bytes of a picture as base64 or a data URL") from None


def _number(value: object, name: str) -> float:
    number = real_number(value, name)
    if not -1e9 < number < 1e9:
        raise InputError(f"{name} is {str(value)[:40]!r}, expected a number")
    return number
