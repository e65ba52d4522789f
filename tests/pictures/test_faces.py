"""The crop around a face, with a stand-in for OpenCV, and with OpenCV where it is installed."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfdm_export.errors import EngineError, InputError, MissingDependencyError
from lfdm_export.pictures.faces import largest_face
from lfdm_export.pictures.preprocess import find_face, prepare_image
from lfdm_models.pictures.raster import Raster

PHOTO = Path(__file__).parents[1] / "data" / "astronaut.jpg"


@pytest.fixture
def opencv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A stand-in that finds `boxes`, and keeps the picture that it searched as `searched`."""
    (tmp_path / "haarcascade_frontalface_alt2.xml").write_text("weights")
    found = SimpleNamespace(boxes=[], searched=None, __version__="4.14.0", COLOR_RGB2GRAY=7)
    found.data = SimpleNamespace(haarcascades=f"{tmp_path}/")

    def detect(gray: np.ndarray, **_: Any) -> list[tuple[int, ...]]:
        found.searched = gray
        return found.boxes

    found.CascadeClassifier = lambda path: SimpleNamespace(detectMultiScale=detect)
    found.cvtColor = lambda pixels, code: pixels[:, :, 0]
    found.equalizeHist = lambda gray: gray
    monkeypatch.setitem(sys.modules, "cv2", found)
    return found


def blank(height: int, width: int) -> np.ndarray:
    return np.zeros((height, width, 3), np.uint8)


def test_the_largest_face_has_the_margin_of_mug(opencv: SimpleNamespace):
    opencv.boxes = [(10, 10, 50, 50), (300, 200, 100, 100), (600, 10, 60, 60)]
    face = largest_face(blank(600, 800))
    x, y, width, height = face.crop
    assert face.found == 3
    assert width == height == round(100 * 896 / 494)
    assert x + width / 2 == pytest.approx(350, abs=1)
    assert (250 - y) / height == pytest.approx(0.53, abs=0.01)


@pytest.mark.parametrize("box", [(0, 0, 200, 200), (600, 400, 200, 200), (200, 0, 590, 590)])
def test_a_face_at_the_edge_gets_a_square_within_the_picture(opencv: SimpleNamespace, box: tuple[int, ...]):
    opencv.boxes = [box]
    x, y, width, height = largest_face(blank(600, 800)).crop
    assert width == height == min(round(box[2] * 896 / 494), 600)
    assert 0 <= x <= 800 - width
    assert 0 <= y <= 600 - height
    prepare_image(blank(600, 800), 16, crop=(x, y, width, height))


def test_a_large_picture_is_searched_small_and_cropped_in_its_own_pixels(opencv: SimpleNamespace):
    opencv.boxes = [(300, 200, 100, 100)]
    face = largest_face(blank(1200, 1600))
    assert opencv.searched.shape == (600, 800)
    assert face.crop[2] == round(200 * 896 / 494)
    # A decoder that halved the picture: the crop counts in pixels of the file.
    halved = Raster(Image.fromarray(blank(1200, 1600)), "a.jpg", (3200, 2400))
    assert largest_face(halved).crop[2] == round(400 * 896 / 494)


def test_the_picture_is_turned_upright_first(opencv: SimpleNamespace, tmp_path: Path):
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(blank(100, 300)).save(tmp_path / "a.jpg", exif=exif)
    opencv.boxes = [(20, 100, 44, 44)]
    face = find_face(tmp_path / "a.jpg")
    assert opencv.searched.shape == (300, 100)
    assert face.crop[1] > 60


def test_several_faces_are_logged_where_nobody_chooses(opencv: SimpleNamespace, caplog: pytest.LogCaptureFixture):
    picture = np.random.default_rng(0).integers(0, 256, (600, 800, 3), np.uint8)
    opencv.boxes = [(300, 200, 100, 100), (10, 10, 50, 50)]
    crop = largest_face(picture).crop
    with caplog.at_level(logging.WARNING):
        cut = prepare_image(picture, 32, crop="face")
    assert f"2 faces found, the largest is used: crop {','.join(map(str, crop))}" in caplog.text
    np.testing.assert_array_equal(cut, prepare_image(picture, 32, crop=crop))
    caplog.clear()
    opencv.boxes = opencv.boxes[:1]
    prepare_image(picture, 32, crop="face")
    assert caplog.text == ""


def test_no_face_names_the_remedy(opencv: SimpleNamespace):
    with pytest.raises(InputError, match=r"no face .* 30x20 pixels.*--crop X,Y,W,H"):
        prepare_image(blank(20, 30), 16, crop="face")


def test_without_opencv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lfdm-export\[face\]'"):
        prepare_image(blank(20, 30), 16, crop="face")


@pytest.mark.parametrize("lost", ["CascadeClassifier", "data"])
def test_an_opencv_without_weights_is_refused(opencv: SimpleNamespace, lost: str):
    delattr(opencv, lost)
    with pytest.raises(EngineError, match=r"OpenCV 4\.14\.0 has no weights.*below 5"):
        prepare_image(blank(20, 30), 16, crop="face")


def test_opencv_finds_the_face_of_a_photograph(tmp_path: Path):
    pytest.importorskip("cv2", reason="the extra `face` is not installed")
    face = find_face(PHOTO)
    x, y, side, _ = face.crop
    assert face.found == 1
    assert 100 < side < 160
    assert x < 100 < 160 < x + side, "the cheeks are in it"
    assert y < 40 < 120 < y + side, "forehead and chin are in it"
    with Image.open(PHOTO) as picture:
        exif = Image.Exif()
        exif[274] = 8
        picture.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned.png", exif=exif)
        picture.save(tmp_path / "upright.png")
    assert find_face(tmp_path / "turned.png") == find_face(tmp_path / "upright.png")
    with pytest.raises(InputError, match="no face"):
        find_face(np.asarray(Image.open(PHOTO))[128:])
