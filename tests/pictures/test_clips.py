"""Clips that are read: their time base, their bounds, what they may be."""

from __future__ import annotations

import io
import os
import threading
import zipfile
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from lfdm_export.errors import InputError
from lfdm_export.generate.arguments import load_embedding
from lfdm_export.machine import available_cores
from lfdm_export.pictures import clips
from lfdm_export.pictures.clip_files import save_clip
from lfdm_export.pictures.clips import load_clip, own_rate, read_footage, resample
from lfdm_export.pictures.gif import encode_gif
from lfdm_models.pictures import timed
from lfdm_models.training.pictures import ClipError, DiskClip, Framing


def frame(value: int, height: int = 16, width: int = 16) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def video(path: Path, times: Sequence[int], values: Sequence[int], codec: str = "ffv1") -> Path:
    """A frame of each value at each of these times, in milliseconds."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for time, value in zip(times, values, strict=True):
            picture = av.VideoFrame.from_ndarray(frame(value), format="rgb24")
            picture.pts, picture.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def seen(frames: np.ndarray) -> list[int]:
    """The values of frames, coarse enough for any codec."""
    return [round(int(value) / 10) * 10 for value in frames[:, 8, 8, 0]]


# --- Time ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["mp4", "webp", "gif"])
def test_a_steady_clip_comes_frame_by_frame_at_its_rate(tmp_path: Path, ending: str):
    frames = np.stack([frame(5 * index) for index in range(24)])
    footage = read_footage(save_clip(tmp_path / f"a.{ending}", frames, fps=24))
    assert len(footage.frames) == 24
    assert footage.fps == pytest.approx(24, abs=0.3)


def test_a_rate_is_reached_by_time_not_by_number(tmp_path: Path):
    path = save_clip(tmp_path / "a.webp", np.stack([frame(10 * index) for index in range(20)]), fps=20, lossless=True)
    assert seen(load_clip(path, fps=4)) == [20, 70, 120, 170]
    assert len(load_clip(path, fps=40)) == 40
    assert read_footage(path, fps=40).fps == 40


def test_a_camera_of_variable_rate_keeps_its_time(tmp_path: Path):
    # Ten frames in the first half second, a pause of half a second, ten frames in half a second more.
    times = [*range(0, 500, 50), *range(1000, 1500, 50)]
    footage = read_footage(video(tmp_path / "a.mkv", times, [10 * (index + 1) for index in range(20)]))
    assert footage.fps == pytest.approx(20, abs=0.1)
    assert len(footage.frames) == pytest.approx(30, abs=1)
    assert seen(footage.frames)[9:20] == [100] * 11
    assert len(load_clip(tmp_path / "a.mkv", fps=10)) == pytest.approx(15, abs=1)


def test_times_that_jump_or_run_backwards_are_bounded(tmp_path: Path):
    with pytest.raises(InputError, match="fewer frames per second"):
        load_clip(video(tmp_path / "a.mkv", [0, 33, 66, 10_000_000], [1, 2, 3, 4]))
    with pytest.raises(InputError, match="fewer frames per second"):
        load_clip(tmp_path / "a.mkv", fps=100)
    assert len(load_clip(tmp_path / "a.mkv", fps=0.01)) == 100


def test_the_rate_of_a_clip():
    assert own_rate([1 / 24] * 24) == 24
    assert own_rate([0.04, 0.04, 0.05] * 8) == pytest.approx(23.08, abs=0.01)  # a GIF's 1/100 s
    assert own_rate([1001 / 30000] * 9) == pytest.approx(30000 / 1001)
    assert own_rate([0.1, 0.3, 0.11]) == 10
    assert own_rate([0.04] * 10 + [2.0] * 3) == 25  # pauses do not slow it down
    assert own_rate([1e-9] * 5) == clips.MAX_FPS
    assert own_rate([5000.0, 5000.0]) == 1


def test_a_clip_shorter_than_a_sample_has_one(tmp_path: Path):
    path = save_clip(tmp_path / "a.webp", np.stack([frame(10), frame(90)]), fps=50)
    assert len(load_clip(path, fps=1)) == 1


def test_gif_frames_without_a_time_are_shown_as_browsers_do(tmp_path: Path):
    pictures = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (10, 200)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=0)
    assert read_footage(tmp_path / "a.gif").fps == 10


def test_sources_without_times_have_no_rate_but_the_one_given(tmp_path: Path):
    frames = np.stack([frame(value) for value in (10, 20, 30)])
    for name in ("frames/", "a.npz"):
        path = save_clip(f"{tmp_path}/{name}", frames)
        assert read_footage(path).fps is None
        assert len(read_footage(path, fps=60).frames) == 3
        assert read_footage(path, fps=60).fps == 60


def test_resampling_keeps_the_length_in_time():
    frames = np.stack([frame(index) for index in range(60)])
    assert len(resample(frames, 60, 50)) == 50
    assert seen(resample(frames, 60, 10))[-1] == 60
    assert len(resample(frames[:1], 60, 1)) == 1


@pytest.mark.parametrize("fps", [0, -1, float("nan"), 1000])
def test_rates_out_of_range_are_refused(tmp_path: Path, fps: float):
    path = save_clip(tmp_path / "a.webp", frame(1)[None])
    with pytest.raises(InputError, match="fps is"):
        load_clip(path, fps=fps)


# --- What it may be --------------------------------------------------------------------------------


def test_the_cover_of_an_apng_is_no_frame(tmp_path: Path):
    pictures = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (10, 20, 30)]
    pictures[0].save(
        tmp_path / "a.png", save_all=True, append_images=pictures[1:], default_image=True, duration=[100, 100]
    )
    assert seen_red(load_clip(tmp_path / "a.png")) == [20, 30]
    pictures[0].save(tmp_path / "b.png", save_all=True, append_images=pictures[1:], duration=100)
    assert seen_red(load_clip(tmp_path / "b.png")) == [10, 20, 30]


def seen_red(frames: np.ndarray) -> list[int]:
    return frames[:, 0, 0, 0].tolist()


def test_the_content_decides_what_a_clip_is(tmp_path: Path):
    frames = np.stack([frame(60), frame(180)])
    for ending in ("mp4", "gif", "webp", "npz"):
        (tmp_path / f"{ending}.bin").write_bytes(save_clip(tmp_path / f"a.{ending}", frames).read_bytes())
        assert load_clip(tmp_path / f"{ending}.bin").shape == (2, 16, 16, 3)
    (tmp_path / "from_the_web.gif").write_bytes((tmp_path / "a.mp4").read_bytes())
    assert len(load_clip(tmp_path / "from_the_web.gif")) == 2
    assert len(DiskClip(tmp_path / "from_the_web.gif", Framing(), 8)) == 2


def test_a_title_in_another_encoding_is_no_damage(tmp_path: Path):
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "ABCDEFGH"
        stream: Any = container.add_stream("ffv1", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame(9), format="rgb24")))
        container.mux(stream.encode(None))
    path.write_bytes(path.read_bytes().replace(b"ABCDEFGH", b"\xdc\xff\xfe\x80EFGH"))
    assert load_clip(path).shape == (1, 16, 16, 3)
    assert len(DiskClip(path, Framing(), 8)) == 1


@pytest.mark.parametrize("name", ["http: clip.mkv", "concat:a.mkv", "pipe:0.mkv"])
def test_a_name_is_never_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(video(tmp_path / "a.mkv", [0, 40], [10, 20]).read_bytes())
    assert len(load_clip(name)) == 2


@pytest.mark.parametrize(
    "playlist",
    ["#EXTM3U\n#EXTINF:1,\nsecret.mkv\n#EXT-X-ENDLIST\n", "ffconcat version 1.0\nfile secret.mkv\n"],
)
def test_playlists_lead_to_no_other_file(tmp_path: Path, playlist: str):
    video(tmp_path / "secret.mkv", [0, 40], [10, 20])
    (tmp_path / "a.mp4").write_text(playlist)
    with pytest.raises(InputError, match="cannot be read as a video"):
        load_clip(tmp_path / "a.mp4")
    with pytest.raises(ClipError):
        DiskClip(tmp_path / "a.mp4", Framing(), 8)


def test_a_still_picture_is_no_clip(tmp_path: Path):
    for ending in ("jpg", "bmp", "tif", "png"):
        Image.new("RGB", (4, 4)).save(tmp_path / f"a.{ending}")
        with pytest.raises(InputError, match="is a single picture"):
            load_clip(tmp_path / f"a.{ending}")


# --- Bounds ----------------------------------------------------------------------------------------


def test_frames_are_prepared_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = save_clip(tmp_path / "a.mp4", np.stack([frame(10 * index, 64, 96) for index in range(6)]))
    monkeypatch.setattr(clips, "MAX_CLIP_PIXELS", 6 * 4 * 4)  # of what is kept
    read = []

    def prepare(picture: np.ndarray) -> np.ndarray:
        read.append(picture.shape)
        return picture[:4, :4]

    assert read_footage(path, prepare=prepare).frames.shape == (6, 4, 4, 3)
    assert read == [(64, 96, 3)] * 6


def test_only_the_frames_that_a_rate_needs_are_prepared(tmp_path: Path):
    path = save_clip(tmp_path / "a.webp", np.stack([frame(10 * index) for index in range(20)]), fps=20)
    read = []

    def prepare(picture: np.ndarray) -> np.ndarray:
        read.append(1)
        return picture

    read_footage(path, fps=5, prepare=prepare)
    assert len(read) == 5


def gif_header(path: Path, width: int, height: int) -> Path:
    data = bytearray(encode_gif(np.stack([frame(1), frame(90), frame(200)]), 10))
    data[6:10] = np.array([width, height], "<u2").tobytes()
    path.write_bytes(data)
    return path


def test_animations_and_videos_that_would_swell_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match=r"clip of 30000x30000 pixels, expected at most 10,000,000"):
        load_clip(gif_header(tmp_path / "a.gif", 30_000, 30_000))
    path = save_clip(tmp_path / "a.mp4", np.stack([frame(1)] * 4))
    monkeypatch.setattr(timed, "MAX_VIDEO_FRAME_PIXELS", 100)
    with pytest.raises(InputError, match="video of 16x16 pixels, expected at most 100"):
        load_clip(path)
    monkeypatch.undo()
    monkeypatch.setattr(timed, "MAX_SOURCE_FRAMES", 3)
    for made in (path, save_clip(tmp_path / "b.gif", np.stack([frame(1)] * 4))):
        with pytest.raises(InputError, match="more than 3 frames"):
            load_clip(made)


def test_damaged_archives_are_refused_before_anything_is_unpacked(tmp_path: Path):
    def archive(header: bytes, body: bytes = b"", name: str = "frames.npy") -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        with zipfile.ZipFile(path, "w") as made:
            data = b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + body
            made.writestr(name, data)
        return path

    def header(shape: str, dtype: str = "|u1") -> bytes:
        return f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"

    for path, message in (
        (archive(header("(100000, 100000, 100000, 3)")), "pixels in all"),
        (archive(header("(2, 4, 4, 3)"), bytes(50)), "ends within the frames"),
        (archive(header("(2, 4, 4, 3)", "|O"), bytes(50)), "expected"),
        (archive(header("(-2, 4, 4, 3)")), "."),
        (archive(b"(" * 60_000), "cannot be read as a NumPy archive"),
        (archive(header("(2, 4, 4, 3)"), name="other.npy"), "holds other"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_clip(path)
        assert "\n" not in str(error.value)
    good = archive(header("(2, 4, 4, 3)"), bytes(96)).read_bytes()
    for cut in range(0, len(good), 7):
        (tmp_path / "a.npz").write_bytes(good[:cut])
        with pytest.raises(InputError):
            load_clip(tmp_path / "a.npz")


def test_an_array_by_columns_is_read(tmp_path: Path):
    frames = np.arange(2 * 3 * 4 * 3, dtype=np.uint8).reshape(2, 3, 4, 3)
    np.savez(tmp_path / "a.npz", frames=np.asfortranarray(frames))
    assert np.array_equal(load_clip(tmp_path / "a.npz"), frames)


def test_a_pipe_is_read(tmp_path: Path):
    data = save_clip(tmp_path / "a.webp", np.stack([frame(10), frame(90)])).read_bytes()
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(data))
    writer.start()
    assert len(load_clip(tmp_path / "pipe")) == 2
    writer.join()


def test_frames_of_another_size_in_a_stream_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    frames = iter([timed.TimedFrame(frame(1), 0.1), timed.TimedFrame(frame(1, 8, 8), 0.1)])
    monkeypatch.setattr(clips, "video_frames", lambda *_: frames)
    (tmp_path / "a.mp4").write_bytes(b"x")
    with pytest.raises(InputError, match=r"frame 1 of .* has 8x8 pixels, the first 16x16; make all equal"):
        load_clip(tmp_path / "a.mp4")


def test_an_animation_that_ends_early_gives_what_is_there(tmp_path: Path):
    data = encode_gif(np.stack([frame(1), frame(90), frame(200)]), 10)
    (tmp_path / "a.gif").write_bytes(data[:-1])
    assert len(load_clip(tmp_path / "a.gif")) == 3
    buffer = io.BytesIO(data)
    assert [round(shown.seconds or 0, 3) for shown in timed.animation_frames(buffer, "a")] == [0.1] * 3


def test_a_damaged_embedding_is_one_sentence(tmp_path: Path):
    path = tmp_path / "e.npy"
    np.save(path, np.zeros(5, np.float32))
    sound = path.read_bytes()
    damaged = [sound[:cut] for cut in range(0, len(sound), 9)]
    damaged += [sound.replace(b"(5,)", change) for change in (b"(9**", b"((((", b"(-5)", b"\xff,,)", b"'a\x00\n")]
    damaged += [b"PK\3\4 no archive", b"\x93NUMPY\x09\0"]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"e\.npy cannot be read") as error:
            load_embedding(path)
        assert "\n" not in str(error.value)


def test_a_decoded_frame_keeps_no_threads():
    """A process that was forked from this one would wait for them forever when it frees the frame."""
    frame = av.VideoFrame.from_ndarray(np.zeros((256, 256, 3), np.uint8), format="rgb24").reformat(format="yuv420p")

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))  # noqa: PTH208

    before = threads()
    pixels = timed._square_pixels(frame, None, "x.mp4")
    assert pixels.shape == (256, 256, 3)
    assert threads() == before
    if available_cores() > 1:  # the measurement tells the two apart
        other = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p", threads=1)
        other.to_ndarray(format="rgb24", threads=0)
        assert threads() > before
