"""Points of a procedural character for training an LFAE's regions."""

from __future__ import annotations

import numpy as np

from lfdm_models.training.characters import Character
from lfdm_models.training.drawing import Float32Array
from lfdm_models.training.figure import hand_at
from lfdm_models.training.head import Float64Array, Head
from lfdm_models.training.motions import Pose

#: In the order of the points. Left and right are as in the picture.
LANDMARKS = (
    "left eye",
    "right eye",
    "nose",
    "upper lip",
    "lower lip",
    "left ear",
    "right ear",
    "crown",
    "chin",
    "hand",
    "forearm",
)

# Unequal, because a round region would have no direction. Lips part by less than the width of their surroundings.
_BROAD, _TIGHT = (0.15, 0.22), (0.09, 0.07)


def landmarks(who: Character, pose: Pose) -> Float32Array:
    """Positions of the points of `LANDMARKS` in T poses, with the rotation and size of a region around each.

    Args:
        who: the character.
        pose: T poses.

    Returns:
        (T, 11, 5) float32: x, y from -1 (left, top) to 1 (right, bottom), the picture's edges; angle in radians,
        clockwise, 0 upright; standard deviations of a region there, across and along it, in half widths.
    """
    head = Head(who, pose)
    eyes = [head.spot(side * who.eye_x, who.eye_y) for side in (-1.0, 1.0)]
    nose, mouth = head.spot(0.0, 0.2, 1.12), head.spot(0.0, who.mouth_y)
    still = np.zeros_like(head.x)
    ears = [
        head.place(who.head_width * (side - 0.22 * head.sin_yaw), 0.02 - 0.1 * head.sin_pitch) for side in (-1.0, 1.0)
    ]
    crown = head.place(still - 0.08 * head.sin_yaw, still - 0.95 * who.crown)
    chin = head.place(still + 0.08 * head.sin_yaw, still + 0.95 * who.chin)
    lips = mouth.y - 0.03 * pose.smile
    points: list[tuple[Float64Array, Float64Array]] = [
        *((eye.x, eye.y) for eye in eyes),
        (nose.x, nose.y),
        (mouth.x, lips - 0.06 * pose.mouth_open),
        (mouth.x, lips + 0.05 * pose.smile + 0.16 * pose.mouth_open),
        *ears,
        crown,
        chin,
        hand_at(who, pose, 0.58),
        hand_at(who, pose, 0.25),
    ]
    arm = pose.arm_swing + who.hand_side * 0.06
    angles = [pose.roll] * (len(points) - 2) + [arm, arm]
    sizes = [_TIGHT if "lip" in name else _BROAD for name in LANDMARKS]
    values = [
        np.stack([*point, angle, still + size[0], still + size[1]], axis=-1)
        for point, angle, size in zip(points, angles, sizes, strict=True)
    ]
    return np.stack(values, axis=1).astype(np.float32)
