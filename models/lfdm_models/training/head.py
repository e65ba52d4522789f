"""The head of a procedural character as a rotating ellipsoid, with hair and ears."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lfdm_models.training.characters import Character, darker
from lfdm_models.training.drawing import Canvas, Float32Array, Patch, ellipse, per_frame
from lfdm_models.training.motions import Pose

Float64Array = NDArray[np.float64]
_CUT = 2.0**20


def exact(values: Float64Array) -> Float64Array:
    """Values rounded to multiples of 2^-20, which removes differences in the last bit between machines."""
    cut: Float64Array = np.rint(values * _CUT) / _CUT
    return cut


class Spot(NamedTuple):
    """A point on the face, seen from the front. Every attribute is (T,).

    Attributes:
        x, y: position on the canvas.
        narrow, flat: foreshortening across and along, 1 from the front.
        visible: 0 where it is turned to the back.
    """

    x: Float64Array
    y: Float64Array
    narrow: Float64Array
    flat: Float64Array
    visible: Float64Array


class Skull(NamedTuple):
    """The skull's patch of the canvas, and the distance to its outline there."""

    patch: Patch
    outline: Float32Array


class Head:
    """Position of the head in T poses, and drawing of everything except the face's features."""

    def __init__(self, who: Character, pose: Pose) -> None:
        self.who = who
        self.sin_yaw, self.cos_yaw = exact(np.sin(pose.yaw)), exact(np.cos(pose.yaw))
        self.sin_pitch, self.cos_pitch = exact(np.sin(pose.pitch)), exact(np.cos(pose.pitch))
        self.sin, self.cos = exact(np.sin(pose.roll)), exact(np.cos(pose.roll))
        # Rolls about the neck; turning the head also shifts it a little.
        pivot = 0.85 * who.chin
        lean = 0.1 * self.sin_yaw
        self.x = who.head_x + lean + pivot * self.sin
        self.y = who.head_y - pose.lift + pivot * (1 - self.cos) + 0.08 * self.sin_pitch
        self.height = (who.crown + who.chin) / 2

    def patch(self, canvas: Canvas, x: Float64Array, y: Float64Array, reach: float) -> Patch:
        """The area around a point on the canvas, rotated with the head."""
        return canvas.patch(x, y, (reach, reach), cos=self.cos, sin=self.sin)

    def place(self, x: Float64Array, y: Float64Array) -> tuple[Float64Array, Float64Array]:
        """Offsets from the head's center, before roll -> canvas."""
        return self.x + x * self.cos - y * self.sin, self.y + x * self.sin + y * self.cos

    def spot(self, across: float, down: float, depth: float = 1.0) -> Spot:
        """A point of the face.

        Args:
            across: position in the neutral pose, in radii of the head.
            down: likewise.
            depth: distance from the center, 1 on the surface.
        """
        front = float(np.sqrt(max(1 - across * across - down * down, 0.05))) * depth
        x = across * self.cos_yaw + front * self.sin_yaw
        z = front * self.cos_yaw - across * self.sin_yaw
        y = down * self.cos_pitch + z * self.sin_pitch
        z = z * self.cos_pitch - down * self.sin_pitch
        radius = self.who.chin if down > 0 else self.who.crown
        canvas_x, canvas_y = self.place(self.who.head_width * x, radius * y)
        # Half the effect of a sphere: features are flatter than its edge.
        narrow = np.clip(0.5 + 0.5 * z / front, 0.3, 1.05)
        flat = np.clip(0.5 + 0.5 * self.cos_pitch, 0.3, 1.0)
        return Spot(canvas_x, canvas_y, narrow, flat, np.clip(z * 6, 0.0, 1.0))

    def draw_behind(self, canvas: Canvas) -> None:
        """Draw the hair behind body and skull."""
        who = self.who
        hair = darker(who.hair_color, 0.8)
        sway = -0.08 * self.sin_yaw
        width = who.head_width
        if who.hair in ("long", "bob"):
            length = 0.62 if who.hair == "long" else 0.3
            x, y = self.place(sway, np.full_like(sway, 0.12 if who.hair == "long" else 0.0))
            back = self.patch(canvas, x, y, 0.95)
            canvas.fill(back, _boxy(back.u, back.v, width * 1.24, who.crown * 0.75 + length / 1.6, 0.6), hair)
        elif who.hair == "afro":
            x, y = self.place(sway, np.full_like(sway, -0.2))
            back = self.patch(canvas, x, y, 0.8)
            canvas.fill(back, ellipse(back.u, back.v, width * 1.42, who.crown * 1.12), hair)
        elif who.hair == "bun":
            x, y = self.place(1.6 * sway, np.full_like(sway, -who.crown * 1.08) - 0.1 * self.sin_pitch)
            bun = self.patch(canvas, x, y, 0.3)
            canvas.fill(bun, ellipse(bun.u, bun.v, 0.2, 0.18), hair)
        elif who.hair == "spikes":
            for i in range(-2, 3):
                x, y = self.place(width * 0.42 * i + sway, np.full_like(sway, -who.crown * (1.0 - 0.1 * i * i)))
                spike = self.patch(canvas, x, y, 0.3)
                slanted = spike.u + np.float32(0.25 * i) * spike.v
                canvas.fill(spike, ellipse(slanted, spike.v, 0.1, 0.24), hair)

    def draw_ears(self, canvas: Canvas) -> None:
        """Draw the ears, partly behind the skull."""
        who = self.who
        for side in (-1.0, 1.0):
            if who.ears == "human":
                x, y = self.place(
                    who.head_width * (side * 1.0 - 0.22 * self.sin_yaw),
                    np.full_like(self.x, 0.02) - 0.1 * self.sin_pitch,
                )
                ear = self.patch(canvas, x, y, 0.17)
                canvas.fill(ear, ellipse(ear.u, ear.v, 0.095, 0.135), darker(who.skin, 0.88))
                continue
            x, y = self.place(
                who.head_width * (side * 0.72 - 0.15 * self.sin_yaw), -0.92 * who.crown - 0.08 * self.sin_pitch
            )
            ear = self.patch(canvas, x, y, 0.4)
            lean = ear.u + np.float32(side * 0.3) * ear.v
            tall = 0.18 if who.ears == "round" else 0.3
            canvas.fill(ear, ellipse(lean, ear.v, 0.17, tall), darker(who.skin, 0.85))
            canvas.fill(ear, ellipse(lean, ear.v, 0.095, tall * 0.62), (0.95, 0.66, 0.68), alpha=0.75)

    def _shape(self, patch: Patch) -> Float32Array:
        """Distance to the outline of the skull."""
        who = self.who
        v = patch.v
        half = np.where(v > 0, np.float32(who.chin), np.float32(who.crown))
        taper = 1 + np.float32(who.taper) * np.maximum(v, 0) / np.float32(who.chin)
        p, q = patch.u * taper / np.float32(who.head_width), v / half
        p2, q2 = p * p, q * q
        round_, square = p2 + q2, np.sqrt(p2 * p2 + q2 * q2)
        k = np.sqrt(round_ + np.float32(who.squareness) * (square - round_))
        distance: Float32Array = (k - 1) * np.float32(min(who.head_width, self.height))
        return distance

    def draw_skull(self, canvas: Canvas) -> Skull:
        """Draw the shaded face without features; returns the skull for `draw_front`."""
        who = self.who
        patch = self.patch(canvas, self.x, self.y, 0.72)
        light = np.float32(who.light * 0.9)
        tone = np.float32(1.02) + light * (np.float32(who.light_x) * patch.u + np.float32(who.light_y) * patch.v)
        tone -= np.float32(0.28) * (patch.u * patch.u + patch.v * patch.v)
        outline = self._shape(patch)
        canvas.fill(patch, outline - np.float32(0.02), darker(who.skin, 0.62), alpha=0.55)
        canvas.fill(patch, outline, who.skin, tone=tone)
        return Skull(patch, outline)

    def draw_front(self, canvas: Canvas, skull: Skull) -> None:
        """Draw hair or a hat on the skull, over the forehead."""
        who = self.who
        if who.hair == "none":
            return
        patch = skull.patch
        cap = skull.outline - np.float32(0.045)
        hat = who.hair == "beanie"
        # The hairline is a curve on the rotating skull, higher in the middle.
        across = patch.u - per_frame(0.5 * who.head_width * self.sin_yaw)
        middle = -who.hairline * who.crown + 0.3 * self.sin_pitch
        bend = 0.0 if hat else 1.05
        line = patch.v - per_frame(middle) - np.float32(bend) * across * across
        if not hat:
            line = line - np.float32(who.parting) * across
        color = who.trim if hat else who.hair_color
        light = np.float32(who.light)
        tone = 1 + light * (
            np.float32(who.light_x) * patch.u * 2 + np.float32(who.light_y) * (patch.v + np.float32(0.4))
        )
        canvas.fill(patch, np.maximum(cap, line), color, tone=tone)
        if hat:
            rim = np.maximum(cap - np.float32(0.02), np.abs(line + np.float32(0.02)) - np.float32(0.07))
            canvas.fill(patch, rim, darker(who.trim, 0.78))


def _boxy(u: Float32Array, v: Float32Array, a: float, b: float, squareness: float) -> Float32Array:
    """Distance to a shape between an ellipse and a rounded box."""
    p, q = u / np.float32(a), v / np.float32(b)
    p2, q2 = p * p, q * q
    round_ = p2 + q2
    k = np.sqrt(round_ + np.float32(squareness) * (np.sqrt(p2 * p2 + q2 * q2) - round_))
    distance: Float32Array = (k - 1) * np.float32(min(a, b))
    return distance
