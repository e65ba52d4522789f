from __future__ import annotations

import numpy as np
import pytest

from lfdm_export.errors import InputError
from lfdm_export.pictures.panels import panels, with_titles

SIZE, CELLS = 64, 16


def identity() -> np.ndarray:
    line = np.linspace(-1, 1, CELLS, dtype=np.float32)
    return np.stack(np.broadcast_arrays(line[None, :], line[:, None]))


def clip_parts(flow: np.ndarray, occlusion: float, length: int = 2) -> tuple[np.ndarray, ...]:
    source = np.full((SIZE, SIZE, 3), 10, np.uint8)
    frames, warped = np.full((length, SIZE, SIZE, 3), 20, np.uint8), np.full((length, SIZE, SIZE, 3), 30, np.uint8)
    latent = np.concatenate([flow, np.full((1, CELLS, CELLS), 2 * occlusion - 1, np.float32)])
    return source, frames, warped, np.repeat(latent[:, None], length, axis=1)


def grid(strip: np.ndarray) -> np.ndarray:
    return strip[0, :, 3 * SIZE : 4 * SIZE].astype(int)


def test_the_five_pictures_stand_in_order():
    strip = panels(*clip_parts(identity(), occlusion=0.2))
    assert strip.shape == (2, SIZE, 5 * SIZE, 3)
    assert strip.dtype == np.uint8
    for place, value in ((0, 10), (1, 20), (2, 30), (4, 51)):
        assert (strip[:, :, place * SIZE : (place + 1) * SIZE] == value).all()


def test_an_undeformed_grid_hides_the_regular_one():
    picture = grid(panels(*clip_parts(identity(), 1)))
    blue = picture[..., 2] - picture[..., 0]
    # Whatever is not paper is of the deformed grid's color: faint gray lines would show as equal channels.
    inked = picture.sum(axis=2) < 3 * 200
    assert inked.mean() > 0.1
    assert (blue[inked] > 20).all()


def test_the_deformed_grid_moves_with_the_flow_over_a_faint_regular_one():
    shifted = identity()
    shifted[0] += 1  # half the picture to the right
    picture = grid(panels(*clip_parts(shifted, 1)))
    blue = picture[..., 2] - picture[..., 0]
    assert (blue[:, : SIZE // 2 - 2] == 0).all()
    assert (blue[:, SIZE // 2 :] > 20).any()
    assert picture[:, : SIZE // 2 - 2].min() >= 150  # faint
    assert (picture[:, : SIZE // 2 - 2] < 230).any()  # but there


def test_residual_flow_is_an_offset_from_the_identity():
    offset = np.zeros_like(identity())
    offset[1, 4:9] = 0.1
    absolute = panels(*clip_parts(offset + identity(), 0.5))
    assert np.array_equal(panels(*clip_parts(offset, 0.5), residual_flow=True), absolute)
    assert not np.array_equal(panels(*clip_parts(offset, 0.5)), absolute)


def test_wild_values_can_be_drawn():
    flow = identity()
    flow[0, 3, 3], flow[1, 4, 4], flow[0, 5, 5] = np.nan, np.inf, -1e30
    assert panels(*clip_parts(flow, 9)).shape == (2, SIZE, 5 * SIZE, 3)


def test_shapes_that_do_not_belong_together_are_refused():
    source, frames, warped, latent = clip_parts(identity(), 1)
    for parts in (
        (source[:-1], frames, warped, latent),
        (source, frames, warped[:1], latent),
        (source, frames, warped, latent[:, :1]),
        (source, frames[0], warped[0], latent),
    ):
        with pytest.raises(InputError, match="expected"):
            panels(*parts)


def test_every_picture_of_a_row_has_its_title():
    strip = np.full((2, 64, 128, 3), 7, np.uint8)
    found = with_titles(strip, ("one", "two"))
    np.testing.assert_array_equal(found[:, -64:], strip)
    title = found[:, :-64]
    assert len(title[0]) > 0
    assert len(title[0]) % 2 == 0
    np.testing.assert_array_equal(title[0], title[1])
    left, right = title[0, :, :64], title[0, :, 64:]
    assert left.min() < 100
    assert right.min() < 100
    assert (left != right).any()
