from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lfdm_export.errors import EngineError, InputError
from lfdm_export.pictures.preprocess import Preprocessing, prepare_image, prepare_images, read_image, to_float, to_uint8
from lfdm_export.pictures.resize import area_resize

PHOTO = Path(__file__).parents[1] / "data" / "astronaut.jpg"


def pattern(height: int, width: int, channels: int = 3) -> np.ndarray:
    y, x, c = np.ogrid[:height, :width, :channels]
    return ((y * 37 + x * 91 + c * 53 + (x * y) % 97 + y * y // 7) % 256).astype(np.uint8)


# First digits of the SHA-256 of what OpenCV gives (4.9.0 and 5.0.0 alike):
# cv2.resize(pattern(*old), new[::-1], interpolation=cv2.INTER_AREA).tobytes()
OPENCV = [
    ((896, 896), (128, 128), "c5862e0f6b7ad3ac"),
    ((229, 260), (112, 128), "5558a6b557395d60"),
    ((480, 336), (128, 89), "59778c190388f099"),
    ((64, 48), (32, 24), "602a92ca204c6815"),
    ((90, 120), (30, 60), "6169302e32710fbb"),
    ((31, 17), (13, 16), "22ea254f96b14fd5"),
    ((128, 128), (127, 128), "9c41c8e6fed60426"),
    ((7, 5), (1, 1), "da7810608f3324d0"),
    ((20, 30), (41, 77), "d6a4e8f6b0350d34"),
    ((33, 21), (128, 81), "9fb9bb64abfa39cd"),
    ((50, 20), (25, 40), "9abdd2f5204c3760"),
    ((3, 2), (128, 85), "6d9d83086faac501"),
    ((1, 1), (4, 4), "960268efd18c79c2"),
    ((1000, 750), (128, 96), "3dc5840a03423ac1"),
    ((77, 128), (11, 120), "852d1c3157d8b0cd"),
]


@pytest.mark.parametrize(("old", "new", "digest"), OPENCV)
def test_area_resize_equals_opencv(old, new, digest):
    resized = area_resize(pattern(*old), new)
    assert resized.shape == (*new, 3)
    assert resized.dtype == np.uint8
    assert hashlib.sha256(resized.tobytes()).hexdigest()[:16] == digest


def test_area_resize_rounds_as_opencv():
    # Means of 2x2 blocks round a half up; of other blocks, to even.
    assert area_resize(np.array([[1, 1], [0, 0]], np.uint8)[:, :, None], (1, 1)).item() == 1
    assert area_resize(np.array([[1, 0]] * 4, np.uint8)[:, :, None], (1, 1)).item() == 0
    assert area_resize(np.array([[1, 2]] * 4, np.uint8)[:, :, None], (1, 1)).item() == 2


def test_area_resize_to_the_same_size_is_a_copy():
    image = pattern(8, 9)
    same = area_resize(image, (8, 9))
    assert np.array_equal(same, image)
    assert not np.shares_memory(same, image)


@pytest.mark.parametrize(
    ("case", "dataset", "photograph"),
    [("mug128", "mug", "mug_img_0000.jpg"), ("natops128", "natops", "natops_g01s10p01-0000-0055.png")],
)
def test_photographs_come_out_as_published(shared_dir, case, dataset, photograph):
    golden = np.load(shared_dir / "golden" / f"cases_{case}.npz")["image_u8"]
    prepared = prepare_images(shared_dir / "images" / photograph, 128, Preprocessing.for_dataset(dataset))
    assert np.array_equal(prepared, golden)


def test_mhad_is_scaled_to_its_own_shape_first():
    rule = Preprocessing.for_dataset("mhad")
    image = pattern(240, 320)
    expected = np.zeros((128, 128, 3), np.uint8)
    expected[:, 19:108] = area_resize(area_resize(image, (480, 336)), (128, 89))  # 39 columns spare: 19 left, 20 right
    assert np.array_equal(prepare_image(image, 128, rule), expected)


def test_only_the_cameras_pictures_are_cropped():
    rule = Preprocessing.for_dataset("natops")
    camera, other = pattern(240, 320), pattern(300, 300)
    assert np.array_equal(prepare_image(camera, 64, rule), prepare_image(camera[10:239, 30:290], 64))
    assert np.array_equal(prepare_image(other, 64, rule), prepare_image(other, 64))


@pytest.mark.parametrize("dataset", [None, "mug", "mhad", "natops"])
def test_a_picture_of_the_right_size_passes_unchanged(dataset):
    image = pattern(32, 32)
    assert np.array_equal(prepare_image(image, 32, Preprocessing.for_dataset(dataset)), image)


def test_padding_puts_the_smaller_half_first():
    white = np.full((3, 6, 3), 255, np.uint8)
    prepared = prepare_image(white, 6)
    assert prepared[:, 0, 0].tolist() == [0, 255, 255, 255, 0, 0]
    assert prepare_image(white.transpose(1, 0, 2), 6)[0, :, 0].tolist() == [0, 255, 255, 255, 0, 0]


def test_a_batch_is_prepared_picture_by_picture():
    batch = np.stack([pattern(20, 30), pattern(20, 30)[::-1]])
    prepared = prepare_images(batch, 16)
    assert prepared.shape == (2, 16, 16, 3)
    assert np.array_equal(prepared[1], prepare_image(batch[1], 16))
    assert prepare_images(batch[0], 16).shape == (1, 16, 16, 3)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(pattern(12, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to show
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), np.rot90(pattern(12, 20), -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_black(tmp_path, mode):
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0] = (200, 200, 200, 255)
    rgba[1] = (200, 200, 200, 0)
    Image.fromarray(rgba).convert(mode).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[:, 0].tolist() == [[200, 200, 200], [0, 0, 0]]


def test_half_transparent_pixels_are_scaled():
    rgba = np.array([[[255, 100, 0, 128]]], np.uint8)
    assert read_image(rgba).tolist() == [[[128, 50, 0]]]


def test_gray_and_16_bit_pictures(tmp_path):
    gray = pattern(5, 6, 1)[:, :, 0]
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    Image.fromarray(gray > 99).save(tmp_path / "bits.png")
    expected = np.repeat(gray[:, :, None], 3, axis=2)
    for image in (tmp_path / "gray.png", tmp_path / "deep.png", gray, gray[:, :, None], gray.astype(np.uint16) * 257):
        assert np.array_equal(read_image(image), expected)
    assert np.array_equal(read_image(tmp_path / "bits.png"), (expected > 99) * np.uint8(255))


def test_a_pil_image_reads_like_its_file():
    with Image.open(PHOTO) as image:
        assert np.array_equal(read_image(image), read_image(str(PHOTO)))


def one_sentence(error: pytest.ExceptionInfo[InputError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_what_is_no_picture_is_refused(tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "cut.jpg").write_bytes(PHOTO.read_bytes()[:5000])
    for name, expected in (
        ("text.png", "cannot be read as an image"),
        ("empty.jpg", "is empty, expected an image"),
        ("cut.jpg", "truncated"),
        ("none.jpg", "does not exist"),
        ("", "is a folder"),
    ):
        with pytest.raises(InputError, match=expected) as error:
            read_image(tmp_path / name)
        assert str(tmp_path) in one_sentence(error)


def test_a_decompression_bomb_is_refused_unread(tmp_path):
    Image.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 20_000
    with pytest.raises(InputError, match="9000x9000 pixels"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4, 3), np.float32), "type float32, expected uint8"),
        (np.zeros((4, 4, 2), np.uint8), r"shape \(4, 4, 2\), expected"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\), expected"),
        (np.zeros((1, 2, 4, 4, 3), np.uint8), r"shape \(1, 2, 4, 4, 3\), expected"),
        (np.zeros((0, 4, 4, 3), np.uint8), "at least one"),
        (np.zeros((1, 2000, 3), np.uint8), "too long and thin"),
        (b"bytes", "must be a path"),
        (Image.new("F", (4, 4)), "float values"),
    ],
)
def test_what_has_no_meaning_as_a_picture_is_refused(image, message):
    with pytest.raises(InputError, match=message) as error:
        prepare_images(image, 64)
    one_sentence(error)


@pytest.mark.parametrize("dataset", [None, "mug", "mhad", "natops"])
def test_preprocessing_survives_json(dataset):
    rule = Preprocessing.for_dataset(dataset)
    assert Preprocessing.from_json(json.loads(json.dumps(rule.to_json()))) == rule


def test_damaged_preprocessing_facts_are_refused():
    plain = Preprocessing.for_dataset("natops").to_json()
    for change in (
        {"crop_rows": [10, 10]},
        {"crop_rows": [0, 999]},
        {"frame_size": None},
        {"frame_size": "x"},
        {"x": 1},
    ):
        with pytest.raises(InputError):
            Preprocessing.from_json({**plain, **change})
    with pytest.raises(InputError, match="unknown data set"):
        Preprocessing.for_dataset("ucf")


def test_to_float():
    images = pattern(4, 6)[None]
    floats = to_float(images)
    assert floats.shape == (1, 3, 4, 6)
    assert floats.dtype == np.float32
    assert floats.flags.c_contiguous
    assert np.array_equal(floats[0, 2], images[0, :, :, 2].astype(np.float32) / np.float32(255))


def test_to_uint8_clamps_and_truncates():
    values = np.array([-0.1, 0.0, 0.5, 254.99 / 255, 1.0, 7.0], np.float32)
    frames = np.broadcast_to(values[:, None, None], (2, 3, 6, 4, 5))
    video = to_uint8(frames)
    assert video.shape == (2, 6, 4, 5, 3)
    assert video[1, :, 3, 4, 2].tolist() == [0, 0, 127, 254, 255, 255]


def test_to_uint8_undoes_to_float():
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    assert np.array_equal(to_uint8(to_float(images)[:, :, None])[:, 0], images)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_to_uint8_refuses_what_is_not_finite(value):
    frames = np.zeros((1, 3, 2, 4, 4), np.float32)
    frames[0, 1, 1, 2, 2] = value
    with pytest.raises(EngineError, match="frame 1 of sample 0"):
        to_uint8(frames)
