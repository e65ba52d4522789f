"""The procedural characters: all properties of a character, drawn from a seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from lfdm_models.training.drawing import Color
from lfdm_models.training.draws import Draws

Hair = Literal["cap", "long", "afro", "bun", "spikes", "beanie", "bob", "none"]
Ears = Literal["human", "round", "pointed"]
Backdrop = Literal["plain", "discs", "hills", "stripes"]
Clothes = Literal["plain", "collar", "stripe"]


def _rgb(*codes: int) -> tuple[Color, ...]:
    return tuple(((code >> 16) / 255, (code >> 8 & 255) / 255, (code & 255) / 255) for code in codes)


_SKIN = _rgb(0xF9D9C2, 0xF2C6A0, 0xE6AE83, 0xD4956A, 0xB97A4F, 0x9A6240, 0x7A4A30, 0x5A3524)
_FANTASY_SKIN = _rgb(0x9ED8C6, 0xA9C4F2, 0xD3B5F0, 0xF3B6C8, 0xBFDC8A)
_HAIR = _rgb(0x1F1B1C, 0x3B2519, 0x5E3820, 0x8C5A2B, 0xC98F3C, 0xE3C16B, 0xB5482A, 0x8E8E93)
_BRIGHT = _rgb(0xE4572E, 0xF2A541, 0x3E8E7E, 0x3A6EA5, 0x7B5EA7, 0xD1495B, 0x2A9D8F, 0xF4D35E, 0x4A4E69, 0xF7F3E9)
_PASTEL = _rgb(0xBFE3F0, 0xF9D5C5, 0xD8E8B8, 0xE3D3F2, 0xFBE7A8, 0xC3E8DA, 0xF6C9D6, 0xD5DBE8)
_DUSK = _rgb(0x33415C, 0x4B3F72, 0x1F5E63, 0x6B3E4F)
_IRIS = _rgb(0x4A2C1A, 0x2F5D8A, 0x3F7D4F, 0x6E5A2E, 0x39424E, 0x7A3E8E)


@dataclass(frozen=True)
class Character:
    """How a character and its surroundings look.

    Lengths are in half widths of the picture; colors are red, green, blue in [0, 1].

    Attributes:
        skin, hair_color, iris, clothes_color, trim, sky, ground, accent: colors.
        head_x, head_y: center of the head in the neutral pose.
        head_width, crown, chin: half width; height above and below the center.
        taper: how much the face narrows toward the chin.
        squareness: 0 for an ellipse, 1 for a rounded square.
        eye_x, eye_y, eye_width, eye_height: position in radii of the head, and radii.
        pupil: radius of the iris.
        brow_tilt: angle in radians. brow_width: half thickness.
        nose: half width.
        mouth_y, mouth_width: position in radii of the head, and half width.
        mood: curvature of the mouth in the neutral pose.
        blush: opacity of the cheeks' color.
        glasses, freckles: whether the character has them.
        hair, ears, clothes, backdrop: kinds.
        hairline: height of the hair above the center, in radii of the head. parting: its slant.
        shoulders: half width of the body.
        hand_side: side of the visible hand, -1 or 1.
        light_x, light_y: direction of the light, of length about 1. light: its strength.
        backdrop_draws: positions of the backdrop's parts in [0, 1].
    """

    skin: Color
    hair_color: Color
    iris: Color
    clothes_color: Color
    trim: Color
    sky: Color
    ground: Color
    accent: Color
    head_x: float
    head_y: float
    head_width: float
    crown: float
    chin: float
    taper: float
    squareness: float
    eye_x: float
    eye_y: float
    eye_width: float
    eye_height: float
    pupil: float
    brow_tilt: float
    brow_width: float
    nose: float
    mouth_y: float
    mouth_width: float
    mood: float
    blush: float
    glasses: bool
    freckles: bool
    hair: Hair
    ears: Ears
    clothes: Clothes
    backdrop: Backdrop
    hairline: float
    parting: float
    shoulders: float
    hand_side: float
    light_x: float
    light_y: float
    light: float
    backdrop_draws: tuple[float, ...]


def sample_character(draws: Draws) -> Character:
    """Draw a random character."""
    fantasy = draws.chance(0.14)
    dark = draws.chance(0.2)
    sky = draws.pick(_DUSK if dark else _PASTEL)
    hand_side = draws.sign()
    eye_width = draws.uniform(0.09, 0.12)
    return Character(
        skin=_vary(draws, draws.pick(_FANTASY_SKIN if fantasy else _SKIN)),
        hair_color=_vary(draws, draws.pick(_BRIGHT if fantasy or draws.chance(0.15) else _HAIR)),
        iris=draws.pick(_IRIS),
        clothes_color=_vary(draws, draws.pick(_BRIGHT)),
        trim=draws.pick(_BRIGHT),
        sky=_vary(draws, sky),
        ground=_vary(draws, _mix(sky, draws.pick(_DUSK if dark else _PASTEL), 0.75)),
        accent=_mix(sky, draws.pick(_BRIGHT), draws.uniform(0.25, 0.5)),
        head_x=-0.13 * hand_side + draws.uniform(-0.03, 0.03),
        head_y=draws.uniform(-0.12, -0.04),
        head_width=draws.uniform(0.42, 0.5),
        crown=draws.uniform(0.5, 0.58),
        chin=draws.uniform(0.5, 0.6),
        taper=draws.uniform(0.0, 0.22),
        squareness=draws.uniform(0.0, 0.6),
        eye_x=draws.uniform(0.38, 0.46),
        eye_y=draws.uniform(-0.12, 0.04),
        eye_width=eye_width,
        eye_height=eye_width * draws.uniform(0.95, 1.3),
        pupil=eye_width * draws.uniform(0.66, 0.8),
        brow_tilt=draws.uniform(-0.15, 0.25),
        brow_width=draws.uniform(0.018, 0.032),
        nose=draws.uniform(0.04, 0.065),
        mouth_y=draws.uniform(0.5, 0.58),
        mouth_width=draws.uniform(0.1, 0.15),
        mood=draws.uniform(0.01, 0.045),
        blush=draws.uniform(0.0, 0.4),
        glasses=draws.chance(0.2),
        freckles=draws.chance(0.15),
        hair=draws.pick(get_args(Hair)),
        ears=draws.pick(("round", "pointed")) if draws.chance(0.5 if fantasy else 0.08) else "human",
        clothes=draws.pick(get_args(Clothes)),
        backdrop=draws.pick(get_args(Backdrop)),
        hairline=draws.uniform(0.48, 0.62),
        parting=draws.uniform(-0.25, 0.25),
        shoulders=draws.uniform(0.52, 0.64),
        hand_side=hand_side,
        light_x=draws.sign() * draws.uniform(0.3, 0.9),
        light_y=-draws.uniform(0.3, 0.8),
        light=draws.uniform(0.08, 0.2),
        backdrop_draws=tuple(draws.uniform() for _ in range(9)),
    )


def _vary(draws: Draws, color: Color) -> Color:
    factor = draws.uniform(0.92, 1.06)
    red, green, blue = (min(channel * factor + draws.uniform(-0.02, 0.02), 1.0) for channel in color)
    return red, green, blue


def _mix(first: Color, second: Color, share: float) -> Color:
    red, green, blue = (a + (b - a) * share for a, b in zip(first, second, strict=True))
    return red, green, blue


def darker(color: Color, factor: float) -> Color:
    """The color times a factor, at most white."""
    red, green, blue = (min(channel * factor, 1.0) for channel in color)
    return red, green, blue
