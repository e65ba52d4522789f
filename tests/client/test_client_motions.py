"""A client's requests for a motion, without a network."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lfdm_export.client.motions import plan_motion
from lfdm_export.client.settings import import_protocol
from lfdm_export.client.wire import encode
from lfdm_export.errors import InputError, ServerError
from lfdm_export.pictures.motion import Motion
from lfdm_export.protocol.model_facts import ModelFacts
from tests.fake_bundle import FRAMES, LATENT, SIZE, fake_manifest

pytest.importorskip("tritonclient.grpc")

FACTS = ModelFacts.of(fake_manifest())
PHOTO = np.zeros((SIZE, SIZE, 3), np.uint8)


def motion(frames: int = FRAMES, size: int = LATENT, **settings: object) -> Motion:
    return Motion(np.zeros((3, frames, size, size), np.float32), False, settings=settings)


def response(**arrays: np.ndarray[Any, Any]) -> Any:
    messages, _ = import_protocol()
    made = messages.ModelInferResponse()
    for name, array in arrays.items():
        made.outputs.add(name=name, datatype={"f": "FP32", "u": "UINT8"}[array.dtype.kind], shape=array.shape)
        made.raw_output_contents.append(encode(array))
    return made


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (motion(size=8), "5 frames of 8x8, the bundle's latents have 5 of 4x4"),
        (motion(7, sampler="ddim"), "7 frames of 4x4"),
        (motion(7), "the motion has 7 frames, a server decodes 5; take the bundle itself"),
        (Motion(motion().latent, True), "holds offsets"),
    ],
)
def test_a_motion_that_does_not_fit_is_not_sent(given: Motion, message: str):
    with pytest.raises(InputError, match=message):
        plan_motion(PHOTO, given, FACTS, None)


def test_one_picture_at_a_time():
    with pytest.raises(InputError, match="found a batch of 2; call it for each"):
        plan_motion(np.stack([PHOTO, PHOTO]), motion(), FACTS, None)


def test_what_came_of_the_picture_is_sent_with_the_latent():
    plan = plan_motion(PHOTO, motion(label="waves", seed=3), FACTS, None)
    first = plan.encode_request(9.0)
    assert (first.model_name, [tensor.name for tensor in first.inputs]) == ("lfdm_encode", ["image"])
    skips = {name: np.ones((1, 2, 3, 3), np.float32) for name in ("skip_0", "skip_1", "feature", "context")}
    second = plan.decode_request(plan.encoded(response(**skips)), 9.0)
    names = [tensor.name for tensor in second.inputs]
    assert (second.model_name, names) == (
        "lfdm_decode", ["image", "skip_0", "skip_1", "feature", "latent", "sample_timings"],
    )  # fmt: skip
    frames = np.ones((FRAMES, SIZE, SIZE, 3), np.uint8)
    clip = plan.clip(response(frames=frames, warped=frames, timings=np.zeros(4, np.float32)))
    np.testing.assert_array_equal(clip.frames[0], frames)
    assert (clip.labels, clip.seeds) == (("waves",), (3,))


def test_answers_that_are_none():
    plan = plan_motion(PHOTO, motion(), FACTS, None)
    with pytest.raises(ServerError, match="lacks feature"):
        plan.encoded(response(skip_0=np.ones((1, 2, 3, 3), np.float32)))
    short = np.ones((FRAMES - 1, SIZE, SIZE, 3), np.uint8)
    with pytest.raises(ServerError, match="frames in the server's answer has shape"):
        plan.clip(response(frames=short, warped=short, timings=np.zeros(4, np.float32)))
    odd = replace(plan, facts=replace(FACTS, image_size=SIZE * 2))
    whole = np.ones((FRAMES, SIZE, SIZE, 3), np.uint8)
    with pytest.raises(ServerError):
        odd.clip(response(frames=whole, warped=whole, timings=np.zeros(4, np.float32)))
