"""Drawing a character in its poses."""

from __future__ import annotations

import numpy as np

from lfdm_models.training.characters import Character, darker
from lfdm_models.training.drawing import Canvas, Patch, UInt8Array, bowl, ellipse, segment
from lfdm_models.training.face import draw_face
from lfdm_models.training.head import Float64Array, Head, exact
from lfdm_models.training.motions import Pose


def draw(character: Character, pose: Pose, size: int) -> UInt8Array:
    """Draw a character in T poses.

    Args:
        character: the character.
        pose: T poses.
        size: pixels per side.

    Returns:
        (T, size, size, 3) uint8.
    """
    still = Canvas(1, size)
    _draw_backdrop(still, character)
    canvas = still.repeat(len(pose.yaw))
    head = Head(character, pose)
    head.draw_behind(canvas)
    _draw_body(canvas, character)
    head.draw_ears(canvas)
    skull = head.draw_skull(canvas)
    draw_face(canvas, character, pose, head)
    head.draw_front(canvas, skull)
    _draw_arm(canvas, character, pose)
    _light(canvas, character)
    return canvas.to_uint8()


def _draw_backdrop(canvas: Canvas, who: Character) -> None:
    whole = canvas.patch(0.0, 0.0, (1.0, 1.0))
    height = np.broadcast_to((whole.v + 1) / 2, (1, canvas.size, canvas.size))
    for channel in range(3):
        low, high = who.ground[channel], who.sky[channel]
        canvas.pixels[channel] = np.float32(high) + np.float32(low - high) * height
    at = who.backdrop_draws
    if who.backdrop == "discs":
        for i in range(3):
            radius = 0.14 + 0.22 * at[3 * i + 2]
            disc = canvas.patch(2 * at[3 * i] - 1, 1.4 * at[3 * i + 1] - 1, (radius, radius))
            canvas.fill(disc, ellipse(disc.u, disc.v, radius, radius), who.accent, alpha=0.7)
    elif who.backdrop == "hills":
        sun = canvas.patch(1.6 * at[0] - 0.8, -0.6 + 0.3 * at[1], (0.2, 0.2))
        canvas.fill(sun, ellipse(sun.u, sun.v, 0.17, 0.17), (1.0, 0.96, 0.84), alpha=0.85)
        for i, tone in enumerate((1.0, 0.86)):
            hill = canvas.patch(2 * at[2 + i] - 1, 1.15 + 0.2 * i, (1.4, 0.95))
            canvas.fill(hill, ellipse(hill.u, hill.v, 1.3, 0.75 + 0.15 * at[4 + i]), darker(who.accent, tone))
    elif who.backdrop == "stripes":
        width = 0.1 + 0.08 * at[0]
        for i in range(4):
            stripe = canvas.patch(-0.9 + 0.6 * i + 0.2 * at[1], 0.0, (width, 1.0))
            canvas.fill(stripe, np.abs(stripe.u) - np.float32(width), who.accent, alpha=0.45)


def _draw_body(canvas: Canvas, who: Character) -> None:
    top = who.head_y + who.chin
    body = canvas.patch(who.head_x, 1.25, (who.shoulders, 0.9))
    shape = ellipse(body.u, body.v, who.shoulders, 1.25 - top - 0.06)
    tone = 1 + np.float32(0.5 * who.light) * (np.float32(who.light_x) * body.u)
    canvas.fill(body, shape, who.clothes_color, tone=tone)
    if who.clothes == "stripe":
        band = np.maximum(shape, np.abs(body.v + np.float32(1.25 - 0.84)) - np.float32(0.05))
        canvas.fill(body, band, who.trim, tone=tone)
    neck = canvas.patch(who.head_x, top - 0.02, (0.2, 0.24))
    canvas.fill(neck, ellipse(neck.u, neck.v, 0.17, 0.2), darker(who.skin, 0.82))
    if who.clothes == "collar":
        collar = canvas.patch(who.head_x, top + 0.08, (0.26, 0.14))
        canvas.fill(collar, bowl(collar.u, collar.v, 0.24, 0.1, 0.16, 0.02), who.trim)


def hand_at(who: Character, pose: Pose, distance: float) -> tuple[Float64Array, Float64Array]:
    """A point of the forearm by its distance from the elbow; the hand's center is at 0.58."""
    cos, sin = _forearm(who, pose)
    elbow_x, elbow_y = who.hand_side * 0.66, 1.2 - 0.42 * pose.arm_raise
    return elbow_x + distance * sin, elbow_y - distance * cos


def _forearm(who: Character, pose: Pose) -> tuple[Float64Array, Float64Array]:
    """Cosine and sine of the forearm's angle."""
    angle = pose.arm_swing + who.hand_side * 0.06
    return exact(np.cos(angle)), exact(np.sin(angle))


def _draw_arm(canvas: Canvas, who: Character, pose: Pose) -> None:
    """Draw a sleeve and a mitten, rotated about the elbow, which is below the picture."""
    cos, sin = _forearm(who, pose)

    def along(distance: float, reach: float) -> Patch:
        x, y = hand_at(who, pose, distance)
        return canvas.patch(x, y, (reach, reach), cos=cos, sin=sin)

    sleeve = along(-0.05, 0.58)
    dark = darker(who.clothes_color, 0.88)
    canvas.fill(sleeve, segment(sleeve.v, sleeve.u, 0.42, 0.125), dark)
    cuff = along(0.43, 0.2)
    canvas.fill(cuff, segment(cuff.u, cuff.v, 0.09, 0.055), who.trim)
    hand = along(0.58, 0.28)
    thumb_u, thumb_v = hand.u + np.float32(who.hand_side * 0.115), hand.v - np.float32(0.03)
    skin = darker(who.skin, 0.97)
    canvas.fill(hand, ellipse(thumb_u, thumb_v, 0.06, 0.085), darker(who.skin, 0.9))
    canvas.fill(hand, ellipse(hand.u, hand.v, 0.125, 0.165), skin)
    for finger in (-0.045, 0.045):
        line = segment(hand.v + np.float32(0.1), hand.u + np.float32(finger), 0.05, 0.008)
        canvas.fill(hand, line, darker(who.skin, 0.72), alpha=0.8)


def _light(canvas: Canvas, who: Character) -> None:
    whole = canvas.patch(0.0, 0.0, (1.0, 1.0))
    gain = 1 + np.float32(who.light) * (np.float32(who.light_x) * whole.u + np.float32(who.light_y) * whole.v)
    gain -= np.float32(0.06) * (whole.u * whole.u + whole.v * whole.v)
    canvas.pixels *= gain
