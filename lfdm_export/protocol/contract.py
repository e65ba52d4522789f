"""The interface between clients and the server: models, tensors, parameters, and the meaning of responses.

NumPy only. The server, the clients and the generated `config.pbtxt` files take all names, data types and shapes from
here. The names of the stages (`skip_0`, `latent`, `frames` …) are those of `lfdm_export.stages`.
`lfdm_export.protocol.requests` checks the content of a request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import LfdmExportError
from lfdm_export.sampling.tuned import sampler_names

WireType = Literal["BYTES", "UINT8", "BOOL", "INT32", "INT64", "FP32"]
Array: TypeAlias = NDArray[Any]

# --- Models ---------------------------------------------------------------------------------------

#: The ensemble: one request, one clip.
CLIP_MODEL = "lfdm"
#: The decoupled model: previews, then frames in chunks as they are decoded. gRPC streams only.
STREAM_MODEL = "lfdm_stream"
# The models in the ensemble.
PREPROCESS_MODEL = "lfdm_preprocess"
CONDITION_MODEL = "lfdm_condition"
ENCODE_MODEL = "lfdm_encode"
SAMPLE_MODEL = "lfdm_sample"
DECODE_MODEL = "lfdm_decode"
#: In the order in which a clip passes through them.
STEP_MODELS = (PREPROCESS_MODEL, CONDITION_MODEL, ENCODE_MODEL, SAMPLE_MODEL, DECODE_MODEL)
#: Models that a client may call directly, for a motion that it already has: no sampling, nothing shared with others.
MOTION_MODELS = (ENCODE_MODEL, DECODE_MODEL)

# --- Request parameters ---------------------------------------------------------------------------

#: Custom request parameter, an integer: higher runs first; the default is 0.
PRIORITY_PARAMETER = "lfdm_priority"
#: The largest priority allowed, positive or negative.
MAX_PRIORITY = 1000
#: Seeds travel as signed 64-bit integers.
MAX_SEED = 2**63 - 1
# The deadline is the `timeout` of Triton in microseconds, from the arrival of the request at the sampler.

# --- Responses ------------------------------------------------------------------------------------

#: Responses of the stream by their `kind`.
StreamKind = Literal["progress", "preview", "frames", "done"]
#: Elements of `timings`: seconds in the queue, seconds of sampling, number of sampling steps, seconds of decoding.
TIMINGS = ("queue_seconds", "sampling_seconds", "steps", "decode_seconds")
#: Start of the message for a missed deadline. Its status is UNAVAILABLE: models in Triton have no DEADLINE_EXCEEDED.
DEADLINE_MESSAGE = "deadline exceeded"
#: Start of the message for a full queue; its status is UNAVAILABLE.
QUEUE_FULL_MESSAGE = "queue full"
#: Start of the message of a server that is stopping; its status is UNAVAILABLE.
DRAINING_MESSAGE = "server is stopping"
#: Part of Triton's message, with status NOT_FOUND, while a model is loaded again, or unloaded before the server stops.
RELOADED_MESSAGE = "has no available versions"

# --- Metrics --------------------------------------------------------------------------------------

#: Gauge: requests of a model (label `model`) whose last response is not sent yet.
IN_FLIGHT = "lfdm_in_flight"
#: Maximum age of our own metrics, in seconds.
METRICS_INTERVAL = 0.5

_NUMPY: Mapping[WireType, type[np.generic]] = {
    "BYTES": np.object_,
    "UINT8": np.uint8,
    "BOOL": np.bool_,
    "INT32": np.int32,
    "INT64": np.int64,
    "FP32": np.float32,
}


class RequestCancelledError(LfdmExportError):
    """The client cancelled its request; the status is CANCELLED."""


class OverloadedError(LfdmExportError):
    """The server cannot serve the request now; the status is UNAVAILABLE."""


@dataclass(frozen=True)
class WireTensor:
    """One tensor of a request or a response.

    Attributes:
        name: its name on the wire.
        datatype: its type in Triton; BYTES are strings of variable length.
        shape: ints for fixed axes, names for axes that depend on the bundle or the request.
        optional: a request may omit it; a response holds it only on request.
        about: description, one line.
    """

    name: str
    datatype: WireType
    shape: tuple[int | str, ...]
    optional: bool = False
    about: str = ""

    @property
    def dtype(self) -> np.dtype[Any]:
        """The NumPy dtype; object, holding `bytes`, for BYTES."""
        return np.dtype(_NUMPY[self.datatype])


def _option(name: str, datatype: WireType, about: str) -> WireTensor:
    return WireTensor(name, datatype, (1,), optional=True, about=about)


#: Exactly one of these is required.
IMAGE_INPUTS = (
    _option("image_bytes", "BYTES", "an encoded picture (JPEG, PNG …), or its base64 text"),
    WireTensor("image", "UINT8", ("height", "width", 3), optional=True, about="RGB pixels, of any size"),
)
#: Exactly one of these is required.
CONDITION_INPUTS = (
    _option("label", "BYTES", "one of the bundle's labels, UTF-8"),
    _option("text", "BYTES", "free text, UTF-8, for bundles with a text encoder"),
    WireTensor("text_embedding", "FP32", ("text_width",), optional=True, about="finite values"),
)
#: All have defaults in the bundle, except the seed: it is drawn, and `USED_SEED` returns it.
SAMPLING_INPUTS = (
    _option("seed", "INT64", "0 to 2^63 - 1"),
    _option("steps", "INT32", "sampling steps, from 1"),
    _option("sampler", "BYTES", f"one of {', '.join(sampler_names())}"),
    _option("eta", "FP32", "DDIM's share of fresh noise, 0 to 1"),
    _option("guidance_scale", "FP32", "1: as trained; above 1: more of the label"),
    WireTensor("guidance_interval", "FP32", (2,), optional=True, about="shares of the schedule, 0 to 1, with guidance"),
)
CLIP_INPUTS = (*IMAGE_INPUTS, *CONDITION_INPUTS, *SAMPLING_INPUTS)
#: The seed of the clip. It needs its own name, because the inputs and outputs of an ensemble share theirs.
USED_SEED = WireTensor("used_seed", "INT64", (1,), optional=True, about="the seed, given or drawn")
CLIP_OUTPUTS = (
    WireTensor("frames", "UINT8", ("frames", "size", "size", 3), about="the clip, RGB"),
    WireTensor("warped", "UINT8", ("frames", "size", "size", 3), optional=True, about="the warped image, RGB"),
    WireTensor("latent", "FP32", (3, "frames", "latent_size", "latent_size"), optional=True, about="grid, occlusion"),
    WireTensor("timings", "FP32", (len(TIMINGS),), optional=True, about=", ".join(TIMINGS)),
    USED_SEED,
)
STREAM_INPUTS = (
    *CLIP_INPUTS,
    _option("preview_every", "INT32", "interval of the previews in steps; 0, the default, for none"),
    _option("progress_every", "INT32", "interval of the responses of kind progress in steps; 0, the default, for none"),
    _option("preview_warped", "BOOL", "previews show the image moved by the flow alone, which costs no decoding"),
    WireTensor(
        "only_frames", "INT32", ("n",), optional=True, about="ascending positions of the frames to decode, from 0"
    ),
)
#: `kind`, `step` and `steps` are in each response; `frame_indices` and `frames` in previews and frames; the rest in the
#: last response, of kind done.
STREAM_OUTPUTS = (
    WireTensor("kind", "BYTES", (1,), about="progress, preview, frames or done"),
    WireTensor("step", "INT32", (1,), about="steps that are done"),
    WireTensor("steps", "INT32", (1,), about="steps that there are"),
    WireTensor("frame_indices", "INT32", ("n",), optional=True, about="which frames of the clip these are, from 0"),
    WireTensor("frames", "UINT8", ("n", "size", "size", 3), optional=True, about="RGB"),
    WireTensor("frame_count", "INT32", (1,), optional=True, about="frames of the clip"),
    WireTensor("timings", "FP32", (len(TIMINGS),), optional=True, about=", ".join(TIMINGS)),
    USED_SEED,
)
#: A request to the sampler with this input alone cancels another one: cancellation does not reach a running ensemble.
CANCEL_INPUT = _option("cancel_request_id", "BYTES", "id of the request to cancel")
#: The response: whether a request with that id was waiting or running.
CANCEL_OUTPUT = WireTensor("cancelled", "BOOL", (1,), optional=True, about="whether there was such a request")


def preview_indices(frames: int, chunk: int) -> NDArray[np.int32]:
    """Indices of the frames in a preview: as many as one run of `decode` returns, evenly spaced over the clip.

    Args:
        frames: frames T of the clip.
        chunk: frames per run of `decode`; at most T.
    """
    return np.linspace(0, frames - 1, chunk).round().astype(np.int32)
