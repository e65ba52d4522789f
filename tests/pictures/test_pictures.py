"""Pictures as people have them, and as strangers make them."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfdm_export.errors import InputError
from lfdm_export.pictures import resize
from lfdm_export.pictures.crop import parse_crop
from lfdm_export.pictures.preprocess import Preprocessing, prepare_image, read_image, read_stream
from lfdm_models.pictures import formats
from lfdm_models.pictures.headers import MAX_SCANS
from lfdm_models.pictures.raster import Raster, read_picture
from lfdm_models.training.pictures import ClipError, DiskClip, Framing

SHORT, ASCII, RATIONAL, UNDEFINED, SRATIONAL = 3, 2, 5, 7, 10
TURN = (274, SHORT, 1, struct.pack("<HH", 6, 0))
_AFTER = struct.pack("<L", 8 + 2 + 2 * 12 + 4)
LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}


def pixels(height: int = 20, width: int = 30, channels: int = 3) -> np.ndarray:
    y, x, c = np.ogrid[:height, :width, :channels]
    return ((y * 7 + x * 5 + c * 50 + x * y // 9) % 256).astype(np.uint8)


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def exif(*entries: tuple[int, int, int, bytes], extra: bytes = b"") -> bytes:
    """An EXIF block of one directory; an entry is tag, type, count and four bytes."""
    body = b"".join(struct.pack("<HHL", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0" + struct.pack("<LH", 8, len(entries)) + body + struct.pack("<L", 0) + extra


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    ways = {
        1: array, 2: array[:, ::-1], 3: array[::-1, ::-1], 4: array[::-1], 5: array.transpose(1, 0, 2),
        6: np.rot90(array, -1), 7: np.rot90(array, 2).transpose(1, 0, 2), 8: np.rot90(array),
    }  # fmt: skip
    return ways[orientation]


# --- Which way up ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_in_every_format(tmp_path: Path, form: str, orientation: int):
    tag = Image.Exif()
    tag[274] = orientation
    path = tmp_path / "a.bin"
    path.write_bytes(encoded(Image.fromarray(pixels()), form, exif=tag, **LOSSLESS.get(form, {})))
    raw = pixels() if form in LOSSLESS else read_image(io_picture(encoded(Image.fromarray(pixels()), form)))
    assert np.array_equal(read_image(path), turned(raw, orientation))


def io_picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_parts_of_a_picture_are_the_parts_of_the_whole(orientation: int):
    tag = Image.Exif()
    tag[274] = orientation
    raster = read_picture(io.BytesIO(encoded(Image.fromarray(pixels()), "PNG", exif=tag)), "a")
    whole = turned(pixels(), orientation)
    assert raster.shape == whole.shape
    assert np.array_equal(raster[3:7], whole[3:7])
    part = raster.crop((2, 4, 15, 18))
    assert np.array_equal(part.array(), whole[4:18, 2:15])
    assert np.array_equal(part.crop((1, 1, 5, 9))[2:4], whole[7:9, 3:7])


@pytest.mark.parametrize(
    "block",
    [
        exif(TURN, (282, ASCII, 3, b"72\0\0")),
        exif(TURN, (283, UNDEFINED, 4, b"72.0")),
        exif(TURN, (283, SRATIONAL, 1, _AFTER), extra=struct.pack("<ll", -1, 0)),
        exif(TURN, (272, RATIONAL, 1, _AFTER), extra=struct.pack("<LL", 1, 2)),
        exif(TURN, (34665, 4, 1, struct.pack("<L", 10**6))),
        exif((274, SHORT, 2, struct.pack("<HH", 6, 0))),
        exif(TURN)[:-4],
    ],
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_odd_exif_does_not_keep_a_photograph_from_being_turned(form: str, block: bytes):
    plain = read_image(io_picture(encoded(Image.fromarray(pixels()), form)))
    found = read_stream(io.BytesIO(encoded(Image.fromarray(pixels()), form, exif=block)), "a", most_pixels=10**6)
    assert np.array_equal(found.array(), np.rot90(plain, -1))


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0", b"Exif\0\0II*\0", b"Exif\0\0\xff\xff\xff\xff\xff", exif((274, SHORT, 1, struct.pack("<HH", 9, 0))),
        exif((274, ASCII, 2, b"6\0\0\0")), exif((274, 99, 1, b"\6\0\0\0")), exif((274, SHORT, 0, b"\6\0\0\0")),
        exif(TURN)[:20],
    ],
)  # fmt: skip
def test_damaged_exif_leaves_the_photograph_as_it_lies(tmp_path: Path, block: bytes):
    path = tmp_path / "a.jpg"
    path.write_bytes(encoded(Image.fromarray(pixels()), "JPEG", exif=block))
    assert np.array_equal(read_image(path), read_image(io_picture(encoded(Image.fromarray(pixels()), "JPEG"))))


def test_orientation_in_xmp_is_followed():
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(Image.fromarray(pixels()), "WEBP", lossless=True, xmp=xmp)
    assert np.array_equal(read_picture(io.BytesIO(data), "a").array(), np.rot90(pixels(), -1))


# --- Which formats ---------------------------------------------------------------------------------


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n"


def test_postscript_starts_no_program_under_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def started(*command: object, **_: object) -> None:
        raise AssertionError(f"started {command}")

    for name in ("run", "Popen", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, name, started)
    for name in ("face.jpg", "face.eps", "f.png"):
        (tmp_path / name).write_bytes(POSTSCRIPT)
        with pytest.raises(InputError, match="format is PostScript, expected one of JPEG, PNG"):
            read_image(tmp_path / name)
    with pytest.raises(InputError, match="image_bytes cannot be read as an image: its format is PostScript"):
        read_stream(io.BytesIO(POSTSCRIPT), "image_bytes", most_pixels=10**6)
    with pytest.raises(ClipError, match="PostScript"):
        DiskClip(tmp_path, Framing(), 8).read([0])


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"%PDF-1.7\n", "a PDF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIF or AVIF"),
        (b"\0\0\0\x18ftypmp42\0\0\0\0", "a video"),
        (b"P6\n2 2\n255\n" + bytes(12), "unknown"),
    ],
)
def test_what_is_not_on_the_list_is_named(tmp_path: Path, data: bytes, what: str):
    (tmp_path / "face.png").write_bytes(data)
    with pytest.raises(InputError, match=f"its format is {what}, expected one of JPEG, PNG, WebP, GIF, BMP, TIFF"):
        read_image(tmp_path / "face.png")


def test_what_is_empty_or_an_address_is_said(tmp_path: Path):
    (tmp_path / "photo.png").touch()
    with pytest.raises(InputError, match=r"photo.png is empty, expected an image; copy it again"):
        prepare_image(tmp_path / "photo.png", 8)
    with pytest.raises(InputError, match=r"is an address, expected a file; download it first"):
        prepare_image("https://example.com/photo.png", 8)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_content_decides_the_format(tmp_path: Path, form: str):
    (tmp_path / "face.txt").write_bytes(encoded(Image.fromarray(pixels()), form))
    assert read_image(tmp_path / "face.txt").shape == (20, 30, 3)


def test_a_still_from_an_animation_is_its_first_frame_and_of_an_apng_the_cover(tmp_path: Path):
    frames = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (10, 20, 30)]
    kinds: dict[str, dict[str, Any]] = {"gif": {}, "webp": {"lossless": True}, "png": {"default_image": True}}
    for ending, options in kinds.items():
        frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:], **options)
        assert read_image(tmp_path / f"a.{ending}")[0, 0, 0] == 10


# --- Depth and colors ------------------------------------------------------------------------------


def test_deep_gray_is_scaled_by_its_depth(tmp_path: Path):
    gray = pixels(8, 9, 1)[:, :, 0]
    expected = np.repeat(gray[:, :, None], 3, axis=2)
    deep: dict[str, np.ndarray] = {
        "16.png": gray.astype(np.uint16) * 257,
        "16.tif": gray.astype(np.uint16) * 257,
        "16_in_32.tif": gray.astype(np.int32) * 257,
    }
    for name, values in deep.items():
        Image.fromarray(values).save(tmp_path / name)
        assert np.array_equal(read_image(tmp_path / name), expected), name
    signed = Image.fromarray((gray / 255 * (2**31 - 1)).round().astype(np.int32))
    signed.save(tmp_path / "signed.tif")
    assert np.array_equal(read_image(tmp_path / "signed.tif"), expected)
    whole = Image.fromarray((gray / 255 * (2**32 - 1)).round().astype(np.uint32).view(np.int32))
    data = encoded(whole, "TIFF").replace(struct.pack("<HHIH", 339, 3, 1, 2), struct.pack("<HHIH", 339, 3, 1, 1))
    (tmp_path / "unsigned.tif").write_bytes(data)  # Pillow writes signed values only
    assert np.array_equal(read_image(tmp_path / "unsigned.tif"), expected)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "RGB"])
def test_every_mode_is_read(tmp_path: Path, mode: str):
    image = Image.new("RGB", (6, 5), (255, 255, 255)).convert(mode)
    # Pillow before 13 writes uncompressed TIFFs of this mode that it does not read.
    path = tmp_path / ("a.jpg" if mode == "YCbCr" else "a.tif")
    image.save(path)
    assert read_image(path).shape == (5, 6, 3)
    assert read_image(path).min() >= 250


# --- Large ones ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(97, 61), (96, 128), (64, 256), (300, 64)])
@pytest.mark.parametrize("dataset", [None, "mhad", "natops"])
def test_scaling_by_strips_changes_no_bit(monkeypatch: pytest.MonkeyPatch, height: int, width: int, dataset: str):
    rule, array = Preprocessing.for_dataset(dataset), pixels(height, width)
    monkeypatch.setattr(resize, "_STRIP_PIXELS", 10**9)
    expected = prepare_image(array, 32, rule)
    monkeypatch.setattr(resize, "_STRIP_PIXELS", 500)
    assert np.array_equal(prepare_image(array, 32, rule), expected)
    assert np.array_equal(prepare_image(Raster(Image.fromarray(array), "a"), 32, rule), expected)


def test_a_large_jpeg_is_scaled_while_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    photo = Image.fromarray(pixels(64, 96)).resize((960, 640))
    photo.save(tmp_path / "a.jpg", quality=95)
    whole = read_image(tmp_path / "a.jpg")
    assert whole.shape == (640, 960, 3)
    full = prepare_image(tmp_path / "a.jpg", 32, crop=(480, 0, 320, 320))
    monkeypatch.setattr(formats, "MAX_WHOLE_PIXELS", 960 * 640 // 4)
    assert read_image(tmp_path / "a.jpg").shape == (320, 480, 3)
    scaled = prepare_image(tmp_path / "a.jpg", 32, crop=(480, 0, 320, 320))  # in pixels of the file
    assert np.abs(scaled.astype(int) - full).mean() < 3


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_of_scans(count: int) -> bytes:
    data = encoded(Image.fromarray(pixels(64, 64)), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def gif_with_frame(width: int, height: int) -> bytes:
    data = bytearray(encoded(Image.fromarray(pixels(10, 10, 1)[:, :, 0]), "GIF"))
    at = data.index(b",\0\0\0\0")
    data[at + 5 : at + 9] = struct.pack("<HH", width, height)
    return bytes(data)


def tiff_of_tiles(side: int) -> bytes:
    entries = (
        (256, 16),
        (257, 16),
        (258, 8),
        (259, 5),
        (262, 1),
        (277, 1),
        (322, side),
        (323, side),
        (324, 8),
        (325, 9),
    )
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(6400, 6400), "6400x6400 pixels, expected 1 to 40,000,000 of a PNG"),
        (png(70_000, 70_000), "70000x70000 pixels"),
        (jpeg_of_scans(3 * MAX_SCANS), f"more than {MAX_SCANS} scans"),
        (gif_with_frame(30_000, 30_000), "30000x30000 pixels"),
        (tiff_of_tiles(70_000), "tiles have 70000x70000 pixels"),
    ],
)
def test_what_would_stall_or_swell_is_refused_before_it_is_decoded(
    monkeypatch: pytest.MonkeyPatch, data: bytes, message: str
):
    def decoded(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decoded)
    with pytest.raises(InputError, match=message):
        read_stream(io.BytesIO(data), "image_bytes", most_pixels=10**8)


def test_many_scans_of_a_real_photograph_are_fine():
    assert read_stream(io.BytesIO(jpeg_of_scans(50)), "a", most_pixels=10**8).shape == (64, 64, 3)


def test_markers_outside_of_scans_are_not_counted():
    data = encoded(Image.fromarray(pixels(64, 64)), "JPEG", comment=b"\xff\xda" * 1000)
    assert read_stream(io.BytesIO(data + b"\xff\xda" * 1000), "a", most_pixels=10**8).shape == (64, 64, 3)


def test_a_progressive_jpeg_is_scaled_or_refused_by_the_memory_of_its_coefficients(monkeypatch: pytest.MonkeyPatch):
    plain, several = (encoded(Image.new("RGB", (800, 800)), "JPEG", progressive=way) for way in (False, True))
    monkeypatch.setattr(formats, "_DECODER_BYTES", 4 * 800 * 800)
    assert read_stream(io.BytesIO(plain), "a", most_pixels=10**8).shape == (800, 800, 3)
    assert read_stream(io.BytesIO(several), "a", most_pixels=10**8).shape == (400, 400, 3)
    monkeypatch.setattr(formats, "_DECODER_BYTES", 800 * 800)
    with pytest.raises(InputError, match="several scans, which takes too much memory"):
        read_stream(io.BytesIO(several), "a", most_pixels=10**8)


def test_damage_is_one_sentence_of_ours():
    frames = [Image.new("P", (20, 20), index) for index in range(3)]
    samples = [
        encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=2),
        *(encoded(Image.fromarray(pixels()), form) for form in ("JPEG", "PNG", "WEBP", "BMP", "TIFF")),
        encoded(Image.fromarray(pixels()), "TIFF", compression="tiff_lzw"),
    ]
    messages = []
    for seed in range(700):
        draws = random.Random(seed)
        data = bytearray(samples[seed % len(samples)])
        for _ in range(4):
            data[draws.randrange(2, len(data))] = draws.randrange(256)
        try:
            read_stream(io.BytesIO(data), "image_bytes", most_pixels=10**6).array()
        except InputError as error:
            messages.append(str(error))
    assert len(messages) > 100
    assert [text for text in messages if "\n" in text or "image_bytes" not in text] == []


# --- Crops -----------------------------------------------------------------------------------------


def test_a_crop_leaves_no_bars(tmp_path: Path):
    white = np.full((40, 100, 3), 255, np.uint8)
    assert prepare_image(white, 20)[0].max() == 0
    assert prepare_image(white, 20, crop="center").min() == 255
    white[:, :60] = 0
    assert prepare_image(white, 20, crop=(60, 0, 40, 40)).min() == 255
    Image.fromarray(white).save(tmp_path / "a.png")
    assert prepare_image(tmp_path / "a.png", 20, crop=(60, 0, 40, 40)).min() == 255
    assert prepare_image(white, 20, crop=(60, 10, 40, 20))[:, 0, 0].tolist() == [0] * 5 + [255] * 10 + [0] * 5


def test_a_crop_takes_the_place_of_the_data_sets_rule():
    white = np.full((240, 320, 3), 255, np.uint8)
    assert prepare_image(white, 32, Preprocessing.for_dataset("mhad"), crop="center").min() == 255


@pytest.mark.parametrize("crop", [(0, 0, 41, 10), (-1, 0, 5, 5), (0, 0, 0, 5), (0, 36, 4, 5), "middle", (1, 2, 3), 7])
def test_a_crop_outside_of_the_picture_is_refused(crop: Any):
    with pytest.raises(InputError, match="crop"):
        prepare_image(pixels(40, 40), 16, crop=crop)


def test_crops_are_parsed():
    assert parse_crop("center") == "center"
    assert parse_crop("face") == "face"
    assert parse_crop("1,2,30,40") == (1, 2, 30, 40)
    for text in ("", "1,2,3", "a,b,c,d", "1,2,3,4,5", "1.5,2,3,4"):
        with pytest.raises(InputError, match="expected center, face, or X,Y,W,H"):
            parse_crop(text)
