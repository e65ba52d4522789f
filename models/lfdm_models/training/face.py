"""The features of a procedural character's face."""

from __future__ import annotations

import numpy as np

from lfdm_models.training.characters import Character, darker
from lfdm_models.training.drawing import Canvas, bowl, ellipse, per_frame, segment
from lfdm_models.training.head import Head, Spot, exact
from lfdm_models.training.motions import Pose

_WHITE = (0.98, 0.98, 0.97)
_INK = (0.13, 0.1, 0.11)
_MOUTH = (0.36, 0.09, 0.11)
_TONGUE = (0.87, 0.42, 0.43)


def draw_face(canvas: Canvas, who: Character, pose: Pose, head: Head) -> None:
    """Draw cheeks, eyes, brows, nose and mouth."""
    for side in (-1.0, 1.0):
        _draw_cheek(canvas, who, pose, head, side)
    for side in (-1.0, 1.0):
        _draw_eye(canvas, who, pose, head, side)
    _draw_nose(canvas, who, head)
    _draw_mouth(canvas, who, pose, head)


def _draw_cheek(canvas: Canvas, who: Character, pose: Pose, head: Head, side: float) -> None:
    spot = head.spot(side * 0.52, 0.34)
    cheek = head.patch(canvas, spot.x, spot.y - 0.03 * pose.smile, 0.16)
    blush = who.blush * spot.visible
    canvas.fill(cheek, ellipse(cheek.u, cheek.v, 0.11 * spot.narrow, 0.075), (0.93, 0.36, 0.36), alpha=blush, blur=0.07)
    if who.freckles:
        for dx, dy in ((-0.05, 0.0), (0.0, 0.035), (0.05, -0.005)):
            u = cheek.u - per_frame(dx * spot.narrow)
            dot = ellipse(u, cheek.v - np.float32(dy), 0.014, 0.014)
            canvas.fill(cheek, dot, darker(who.skin, 0.62), alpha=0.8 * spot.visible)


def _draw_eye(canvas: Canvas, who: Character, pose: Pose, head: Head, side: float) -> None:
    spot = head.spot(side * who.eye_x, who.eye_y)
    eye = head.patch(canvas, spot.x, spot.y, 0.25)
    open_ = np.clip(1 + pose.eyes, 0.1, 1.5)
    width, height = who.eye_width * spot.narrow, who.eye_height * open_ * spot.flat
    canvas.fill(eye, ellipse(eye.u, eye.v + np.float32(0.016), width + 0.012, height + 0.006), darker(who.skin, 0.34))
    white = ellipse(eye.u, eye.v, width, height)
    canvas.fill(eye, white, _WHITE)
    u = eye.u - per_frame(0.5 * width * pose.gaze)
    iris = ellipse(u, eye.v, who.pupil * spot.narrow, who.pupil * 1.05 * spot.flat)
    canvas.fill(eye, np.maximum(iris, white), who.iris)
    canvas.fill(eye, np.maximum(iris + np.float32(0.45 * who.pupil), white + np.float32(0.005)), _INK)
    shine = ellipse(u + np.float32(0.35 * who.pupil), eye.v + np.float32(0.38 * who.pupil), 0.022, 0.022)
    canvas.fill(eye, np.maximum(shine, white), (1.0, 1.0, 1.0), alpha=0.95)
    _draw_brow(canvas, who, pose, head, side)
    if who.glasses:
        _draw_lens(canvas, who, head, spot, side)


def _draw_brow(canvas: Canvas, who: Character, pose: Pose, head: Head, side: float) -> None:
    spot = head.spot(side * who.eye_x, who.eye_y - (who.eye_height + 0.085) / who.crown)
    y = spot.y - 0.085 * pose.brows
    angle = side * (who.brow_tilt - 0.1 * pose.brows)
    cos, sin = exact(np.cos(angle)), exact(np.sin(angle))
    brow = canvas.patch(
        spot.x,
        y,
        (0.2, 0.2),
        cos=head.cos * cos - head.sin * sin,
        sin=head.sin * cos + head.cos * sin,
    )
    color = darker(who.hair_color if who.hair not in ("none", "beanie") else who.skin, 0.55)
    canvas.fill(brow, segment(brow.u, brow.v, 0.95 * who.eye_width * spot.narrow - 0.02, who.brow_width), color)


def _draw_lens(canvas: Canvas, who: Character, head: Head, spot: Spot, side: float) -> None:
    lens = head.patch(canvas, spot.x, spot.y, 0.27)
    ring = ellipse(lens.u, lens.v, (who.eye_width + 0.06) * spot.narrow, who.eye_height + 0.05)
    canvas.fill(lens, np.abs(ring) - np.float32(0.012), _INK)
    if side > 0:
        bridge_at = head.spot(0.0, who.eye_y, 1.05)
        gap = who.eye_x * who.head_width - who.eye_width - 0.06
        bridge = head.patch(canvas, bridge_at.x, bridge_at.y, 0.15)
        canvas.fill(bridge, segment(bridge.u, bridge.v, max(gap, 0.01), 0.012), _INK)


def _draw_nose(canvas: Canvas, who: Character, head: Head) -> None:
    spot = head.spot(0.0, 0.2, 1.12)
    nose = head.patch(canvas, spot.x, spot.y, 0.14)
    canvas.fill(nose, ellipse(nose.u, nose.v - np.float32(0.012), who.nose * 1.1, who.nose), darker(who.skin, 0.72))
    canvas.fill(nose, ellipse(nose.u, nose.v + np.float32(0.008), who.nose, who.nose * 0.9), darker(who.skin, 0.98))


def _draw_mouth(canvas: Canvas, who: Character, pose: Pose, head: Head) -> None:
    spot = head.spot(0.0, who.mouth_y)
    mouth = head.patch(canvas, spot.x, spot.y - 0.03 * pose.smile, 0.42)
    round_ = np.clip(pose.mouth_open - 1.2 * pose.smile, 0.0, 1.0)
    half = who.mouth_width * (1 + 0.55 * pose.smile - 0.3 * round_) * spot.narrow
    bend = who.mood + 0.13 * pose.smile
    upper = (1 - 0.75 * np.clip(pose.smile, 0, 1)) * bend - 0.11 * round_
    lower = bend + 0.16 * pose.mouth_open * (1 + 0.35 * pose.smile)
    # Corners rise when the middle falls.
    v = mouth.v + per_frame(0.45 * bend)
    lips = bowl(mouth.u, v, half, upper, lower, 0.02)
    canvas.fill(mouth, lips, darker((0.66, 0.25, 0.24), 0.55 + 0.45 * max(who.skin)))
    inside = bowl(mouth.u, v, np.maximum(half - 0.012, 0.02), upper, lower, -0.004)
    canvas.fill(mouth, inside, _MOUTH, alpha=np.clip(pose.mouth_open * 8, 0.0, 1.0))
    deep = per_frame(np.clip(pose.mouth_open * 3, 0.0, 1.0))
    tongue = ellipse(mouth.u, v - per_frame(lower), half * 0.62, 0.075 * (0.4 + pose.mouth_open))
    canvas.fill(mouth, np.maximum(tongue, inside), _TONGUE, alpha=np.clip(pose.mouth_open * 3, 0.0, 1.0))
    arch = 1 - (mouth.u / per_frame(half)) * (mouth.u / per_frame(half))
    teeth = v - arch * per_frame(upper) - np.float32(0.045) * deep
    canvas.fill(mouth, np.maximum(teeth, inside), _WHITE, alpha=np.clip(pose.mouth_open * 6, 0.0, 1.0))
