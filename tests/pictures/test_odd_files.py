"""Pictures, clips and embeddings as people have them: odd but good files are read right, bad ones named."""

from __future__ import annotations

import io
import os
import struct
import threading
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from lfdm_export.errors import InputError
from lfdm_export.files.names import user_path
from lfdm_export.generate.arguments import load_embedding
from lfdm_export.pictures.clip_files import save_clip
from lfdm_export.pictures.clips import read_footage
from lfdm_export.pictures.preprocess import picture_size, read_image
from lfdm_models.pictures import png_chunks
from lfdm_models.pictures.errors import PictureError
from lfdm_models.pictures.formats import open_picture

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*before: bytes, after: bytes = b"") -> bytes:
    """A PNG of `PIXELS` with further chunks before and after its pixels."""
    rows = b"".join(b"\0" + row.tobytes() for row in PIXELS)
    header = struct.pack(">IIBBBBB", 6, 4, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), *before, chunk(b"IDAT", zlib.compress(rows)), after, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


BOMB = zlib.compress(bytes(20_000_000), 9)


@pytest.mark.parametrize(
    "data",
    [
        png(chunk(b"iCCP", b"printer\0\0" + zlib.compress(os.urandom(3_000_000)))),
        png(chunk(b"iCCP", b"bomb\0\0" + BOMB)),
        png(chunk(b"zTXt", b"workflow\0\0" + BOMB)),
        png(after=chunk(b"zTXt", b"workflow\0\0" + BOMB)),
        png(chunk(b"iTXt", b"prompt\0\1\0\0\0" + BOMB)),
        png(*(chunk(b"tEXt", b"prompt\0" + bytes(100_000)) for _ in range(700))),
    ],
    ids=["large profile", "profile", "text", "text after the pixels", "international text", "70 MB of text"],
)
def test_what_a_png_carries_beside_its_pixels_does_not_cost_the_picture(tmp_path: Path, data: bytes):
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), PIXELS)


def test_orientation_in_a_png_survives_beside_a_large_profile(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = png(
        chunk(b"iCCP", b"p\0\0" + zlib.compress(os.urandom(2_000_000))), after=chunk(b"eXIf", exif.tobytes()[6:])
    )
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(PIXELS, -1))


def test_a_png_of_endless_chunks_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(png_chunks, "_MOST_CHUNKS", 50)
    with pytest.raises(PictureError, match="a PNG of more than 50 chunks, which stalls decoders; save it again"):
        open_picture(io.BytesIO(png(*[chunk(b"tEXt", b"a\0b")] * 60)), "a.png")


def tiff(values: np.ndarray, photometric: int) -> bytes:
    """A TIFF of one strip, gray."""
    height, width = values.shape
    entries = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: photometric, 273: 0, 278: height}
    entries |= {277: 1, 279: values.nbytes}
    entries[273] = 8 + 2 + 12 * len(entries) + 4
    body = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(entries.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + bytes(4) + values.tobytes()


@pytest.mark.parametrize("kind", ["u1", "<u2"])
def test_a_tiff_whose_white_is_0_is_not_negative(tmp_path: Path, kind: str):
    gray = np.array([[0, 100], [200, 255]], np.uint8)
    most = np.iinfo(kind).max
    (tmp_path / "a.tif").write_bytes(tiff((most - gray.astype(np.int64) * (most // 255)).astype(kind), photometric=0))
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif")[:, :, 0], gray)


def test_the_size_of_a_turned_photograph_is_that_of_its_pixels(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=exif)
    assert picture_size(tmp_path / "a.jpg") == (4, 6)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG or another XML"),
        (b"\n<!DOCTYPE html><html>", r"a web page \(HTML\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"a Git LFS pointer \(fetch the file itself: git lfs pull\)"),
        (b"\xff\x0a" + bytes(9), "JPEG XL"),
        (bytes(100), r"unknown \(it begins with zeros, as a file that was not copied completely\)"),
    ],
)
def test_other_formats_are_named(tmp_path: Path, data: bytes, what: str):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match=f"its format is {what}, expected one of"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_cut_picture_is_to_be_copied_again(tmp_path: Path, form: str):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(stream, form)
    for length in (20, len(stream.getvalue()) // 2):
        (tmp_path / "a").write_bytes(stream.getvalue()[:length])
        with pytest.raises(InputError, match=r"a cannot be read as an image \(.+\)") as error:
            read_image(tmp_path / "a")
        assert "unpack" not in str(error.value)


# --- Clips -----------------------------------------------------------------------------------------


def video(path: Path, pixels: np.ndarray, codec: str, pix_fmt: str, *, ratio: Fraction | None = None) -> Path:
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = *pixels.shape[:2], pix_fmt
        if ratio is not None:
            stream.sample_aspect_ratio = ratio
        for _ in range(2):
            picture = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def corners() -> np.ndarray:
    """(16,32,3), with a value of its own in each quarter."""
    picture = np.zeros((16, 32, 3), np.uint8)
    picture[:8, 16:], picture[8:, :16], picture[8:, 16:] = 80, 160, 240
    return picture


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((-1, 0, 0, 1), lambda picture: picture[:, ::-1]),
        ((1, 0, 0, -1), lambda picture: picture[::-1]),
        ((0, 1, 1, 0), lambda picture: picture.transpose(1, 0, 2)),
        ((0, 1, -1, 0), lambda picture: np.rot90(picture, -1)),
        ((0, -1, 1, 0), lambda picture: np.rot90(picture, 1)),
        ((-1, 0, 0, -1), lambda picture: np.rot90(picture, 2)),
    ],
    ids=["mirrored", "upside down, mirrored", "transposed", "clockwise", "counter-clockwise", "half"],
)
def test_a_video_is_turned_and_mirrored_as_players_do(tmp_path: Path, matrix: tuple[int, ...], shown: Any):
    path = video(tmp_path / "a.mp4", corners(), "libx264", "yuv444p")
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 44
    a, b, c, d = (65536 * value for value in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frame = read_footage(path).frames[0].astype(int)
    assert frame.shape == shown(corners()).shape
    assert abs(frame - shown(corners())).max() < 12


def test_pixels_that_are_not_square_are_stretched(tmp_path: Path):
    path = video(tmp_path / "a.mp4", corners(), "libx264", "yuv444p", ratio=Fraction(2))
    assert read_footage(path).frames.shape == (2, 16, 64, 3)


def test_transparency_of_a_video_is_black(tmp_path: Path):
    clear = np.full((16, 16, 4), 200, np.uint8)
    clear[:, :, 3] = 0
    assert read_footage(video(tmp_path / "a.mov", clear, "png", "rgba")).frames.max() == 0


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "is empty, expected a clip; copy it again"), (b"<html>", "damaged, incomplete, or of another kind; copy")],
)
def test_what_is_no_video_says_what_to_do(tmp_path: Path, data: bytes, message: str):
    (tmp_path / "a.mp4").write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_footage(tmp_path / "a.mp4")


@pytest.mark.parametrize("ending", ["gif", "webp", "mp4"])
def test_rates_that_no_file_stores_are_refused(tmp_path: Path, ending: str):
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(InputError, match=r"fps is 1e-09, expected at least 0\.01"):
        save_clip(tmp_path / f"a.{ending}", frames, fps=1e-9)
    assert save_clip(tmp_path / f"a.{ending}", frames, fps=0.01).exists()


def test_a_contact_sheet_goes_into_a_pipe(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    save_clip(pipe, np.zeros((2, 16, 16, 3), np.uint8), format="png")
    reader.join(60)
    assert received[0].startswith(b"\x89PNG")


def test_frames_of_another_run_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def save(picture: Image.Image, path: Path, *_: Any, **__: Any) -> None:
        (tmp_path / "frames").mkdir(exist_ok=True)
        (tmp_path / "frames" / "other.png").touch()

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(InputError, match="frames was filled by another program"):
        save_clip(f"{tmp_path}/frames/", np.zeros((2, 16, 16, 3), np.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["frames"]
    assert [path.name for path in (tmp_path / "frames").iterdir()] == ["other.png"]


def test_an_embedding_comes_through_a_pipe(tmp_path: Path):
    pipe, stream = tmp_path / "pipe", io.BytesIO()
    np.save(stream, np.ones(3, np.float32))
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_bytes(stream.getvalue())).start()
    np.testing.assert_array_equal(load_embedding(pipe), np.ones(3))


# --- Paths -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "a path is empty, as that of a variable that is not set"),
        ("s3://bucket/clip.gif", "is an address, expected a file; download it first, or upload it afterwards"),
        (Path("https://example.com/a.jpg"), "is an address, expected a file"),
        ("file:///tmp/a.jpg", "is an address, expected a file; leave out file://"),
    ],
)
def test_what_is_no_path_is_refused(path: str | Path, message: str):
    with pytest.raises(InputError, match=message):
        user_path(path)


def test_a_folder_named_like_a_scheme_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("s3:").mkdir()
    assert user_path("s3:/a.gif") == Path("s3:/a.gif")
    assert user_path("C:/a.gif") == Path("C:/a.gif")
