from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from lfdm_export.errors import InputError, MissingDependencyError
from lfdm_export.pictures import clip_files as media
from lfdm_export.pictures import clips
from lfdm_export.pictures.clip_files import load_clip, save_clip
from lfdm_export.pictures.preprocess import read_image

PHOTO = Path(__file__).parents[1] / "data" / "astronaut.jpg"


@pytest.fixture(scope="module")
def clip() -> np.ndarray:
    """A photograph that moves sideways, and then stands still for a frame: (6,64,80,3) uint8."""
    photo = read_image(PHOTO)[40:104]
    return np.stack([photo[:, 60 + 4 * shift : 140 + 4 * shift] for shift in (0, 1, 2, 3, 4, 4)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


@pytest.mark.parametrize(("ending", "least"), [("gif", 33), ("webp", 33), ("mp4", 33)])
def test_round_trip_of_lossy_formats(tmp_path, clip, ending, least):
    path = save_clip(tmp_path / f"clip.{ending}", clip)
    assert path == tmp_path / f"clip.{ending}"
    loaded = load_clip(path)
    assert loaded.shape == clip.shape
    assert psnr(loaded, clip) > least
    assert list(tmp_path.iterdir()) == [path]


def test_round_trip_of_exact_formats(tmp_path, clip):
    assert np.array_equal(load_clip(save_clip(tmp_path / "clip.webp", clip, lossless=True)), clip)
    assert np.array_equal(load_clip(save_clip(tmp_path / "clip.npz", clip)), clip)
    folder = save_clip(f"{tmp_path}/frames/", clip)
    assert [entry.name for entry in sorted(folder.iterdir())] == [f"frame_{index:03d}.png" for index in range(6)]
    assert np.array_equal(load_clip(folder), clip)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["clip.npz", "clip.webp", "frames"]


def test_gif_of_few_colors_is_exact_and_keeps_still_frames(tmp_path):
    colors = np.random.default_rng(0).integers(0, 256, (200, 3), dtype=np.uint8)
    indices = np.random.default_rng(1).integers(0, 200, (5, 20, 30))
    indices[1:, :10] = indices[0, :10]  # half of the picture stands still,
    indices[3] = indices[2]  # and a frame repeats wholly
    frames = colors[indices]
    save_clip(tmp_path / "a.gif", frames)
    with Image.open(tmp_path / "a.gif") as image:
        assert getattr(image, "n_frames", 1) == 5
        assert image.info["loop"] == 0
    # k-means keeps each of so few colors; nothing is left over from the frame before.
    assert np.abs(load_clip(tmp_path / "a.gif").astype(int) - frames).max() <= 1


def test_gif_keeps_black_and_white(tmp_path, clip):
    frames = clip.copy()
    frames[:, :8], frames[:, 8:16] = 0, 255
    loaded = load_clip(save_clip(tmp_path / "a.gif", frames))
    assert np.array_equal(loaded[:, :16], frames[:, :16])


def test_gif_does_not_flicker(tmp_path):
    still = np.repeat(read_image(PHOTO)[None, :64, :64], 3, axis=0)
    still[:, 40:44, 40:44] = np.array([0, 90, 180], np.uint8)[:, None, None, None]  # a small thing changes
    loaded = load_clip(save_clip(tmp_path / "a.gif", still))
    assert np.array_equal(loaded[0, :40], loaded[2, :40])


@pytest.mark.parametrize("fps", [10, 15, 30, 7.5])
def test_gif_time_does_not_drift(tmp_path, fps):
    frames = np.arange(30, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    save_clip(tmp_path / "a.gif", frames, fps=fps)
    total = 0.0
    with Image.open(tmp_path / "a.gif") as image:
        for index in range(30):
            image.seek(index)
            total += image.info["duration"]
    assert total == pytest.approx(30_000 / fps, abs=5.01)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (31, 64), (64, 33)])
@pytest.mark.parametrize("ending", ["gif", "webp", "mp4", "png", "npz"])
def test_any_size_and_a_single_frame(tmp_path, ending, size):
    frames = np.full((1, *size, 3), 200, np.uint8)
    path = save_clip(tmp_path / f"a.{ending}", frames)
    if ending == "png":
        assert np.array_equal(read_image(path), frames[0])
        return
    even = tuple(side + side % 2 for side in size) if ending == "mp4" else size
    loaded = load_clip(path)
    assert loaded.shape == (1, *even, 3)
    assert np.abs(loaded.astype(int) - 200).max() <= 3


def test_mp4_is_what_players_expect(tmp_path, clip):
    save_clip(tmp_path / "a.mp4", clip, fps=12.5)
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.width, stream.height) == (80, 64)
        assert stream.average_rate == Fraction(25, 2)


def test_a_video_filmed_upright_is_turned(tmp_path, clip):
    save_clip(tmp_path / "a.mp4", clip)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 44  # of the track header: here a quarter turn clockwise
    data[matrix : matrix + 36] = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30], ">i4").tobytes()
    (tmp_path / "upright.mp4").write_bytes(data)
    turned = np.rot90(load_clip(tmp_path / "a.mp4"), -1, axes=(1, 2))
    assert np.array_equal(load_clip(tmp_path / "upright.mp4"), turned)


def test_without_pyav_the_extra_is_named(tmp_path, clip, monkeypatch):
    save_clip(tmp_path / "a.mp4", clip)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingDependencyError, match=r"lfdm-export\[video\]"):
        load_clip(tmp_path / "a.mp4")
    with pytest.raises(MissingDependencyError, match=r"lfdm-export\[video\]"):
        save_clip(tmp_path / "b.mp4", clip)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


def test_a_png_file_is_a_contact_sheet(tmp_path, clip):
    sheet = read_image(save_clip(tmp_path / "a.png", clip))
    assert sheet.shape == (2 * 66 - 2, 3 * 82 - 2, 3)
    assert np.array_equal(sheet[:64, 82:162], clip[1])
    assert np.array_equal(sheet[66:, 164:], clip[5])


def test_npz_holds_a_batch_with_its_latents(tmp_path, clip):
    batch = np.stack([clip, clip[:, ::-1]])
    latent = np.linspace(-1, 1, 2 * 3 * 6 * 16, dtype=np.float32).reshape(2, 3, 6, 4, 4)
    save_clip(tmp_path / "a.npz", batch, latent=latent, warped=batch[:, ::-1])
    with np.load(tmp_path / "a.npz") as arrays:
        assert sorted(arrays.files) == ["frames", "latent", "warped"]
        assert np.array_equal(arrays["frames"], batch)
        assert np.array_equal(arrays["latent"], latent)
        assert np.array_equal(arrays["warped"], batch[:, ::-1])
    with pytest.raises(InputError, match=r"shape \(2, 6, 64, 80, 3\)"):
        load_clip(tmp_path / "a.npz")
    with pytest.raises(InputError, match=r"expected \(T,H,W,3\) for gif"):
        save_clip(tmp_path / "a.gif", batch)


def test_format_overrides_the_ending(tmp_path, clip):
    save_clip(tmp_path / "noending", clip, format="gif")
    assert (tmp_path / "noending").read_bytes().startswith(b"GIF89a")
    save_clip(tmp_path / "a.GIF", clip)
    assert (tmp_path / "a.GIF").read_bytes().startswith(b"GIF89a")
    assert save_clip(tmp_path / "numbered", clip, format="png").is_dir()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("a.avi", {}, "gif, webp, mp4, png, npz"),
        ("a", {}, "gif, webp, mp4, png, npz"),
        ("a.gif", {"format": "bmp"}, "'bmp'"),
        ("a.gif", {"fps": 0}, "fps is 0"),
        ("a.gif", {"fps": float("nan")}, "fps is nan"),
        ("a.gif", {"fps": 60}, "at most 50 for gif"),
        ("folder/", {"format": "gif"}, "names a folder"),
    ],
)
def test_what_cannot_be_written_is_refused(tmp_path, clip, name, arguments, message):
    with pytest.raises(InputError, match=message):
        save_clip(f"{tmp_path}/{name}", clip, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "frames", [np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4, 3)), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_frames_of_another_kind_are_refused(tmp_path, frames):
    with pytest.raises(InputError, match="expected"):
        save_clip(tmp_path / "a.gif", frames)


def test_a_failed_write_leaves_the_old_file(tmp_path, clip, monkeypatch):
    path = save_clip(tmp_path / "a.webp", clip)
    before = path.read_bytes()
    too_wide = np.zeros((1, 1, 20_000, 3), np.uint8)
    with pytest.raises(InputError, match=r"a\.webp cannot be written"):
        save_clip(path, too_wide)
    with pytest.raises(InputError, match=r"b\.gif cannot be written"):
        save_clip(tmp_path / "b.gif", np.zeros((1, 1, 70_000, 3), np.uint8))
    monkeypatch.setattr(media, "encode_gif", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_clip(tmp_path / "b.gif", clip)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_folders_are_made_but_never_overwritten(tmp_path, clip):
    assert save_clip(tmp_path / "new" / "deep" / "a.gif", clip).is_file()
    with pytest.raises(InputError, match="not an empty folder"):
        save_clip(f"{tmp_path}/new/", clip)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="cannot be written"):
        save_clip(tmp_path / "file" / "a.gif", clip)
    (tmp_path / "empty").mkdir()
    assert len(list(save_clip(f"{tmp_path}/empty/", clip).iterdir())) == 6


def test_folder_of_pictures_in_natural_order(tmp_path):
    for number in (1, 2, 10):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"f{number}.png")
    (tmp_path / "notes.txt").write_text("ignored")
    assert load_clip(tmp_path)[:, 0, 0, 0].tolist() == [1, 2, 10]
    assert load_clip(tmp_path, max_frames=2)[:, 0, 0, 0].tolist() == [1, 2]
    Image.new("RGB", (5, 4)).save(tmp_path / "f11.png")
    with pytest.raises(InputError, match=r"frame 3 of .* has 5x4 pixels, the first 4x4"):
        load_clip(tmp_path)


def test_frames_that_stay_longer_are_repeated(tmp_path):
    pictures = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (10, 20, 30)]
    pictures[0].save(
        tmp_path / "a.webp", save_all=True, append_images=pictures[1:], duration=[100, 300, 110], lossless=True
    )
    assert load_clip(tmp_path / "a.webp")[:, 0, 0, 0].tolist() == [10, 20, 20, 20, 30]
    assert load_clip(tmp_path / "a.webp", max_frames=3)[:, 0, 0, 0].tolist() == [10, 20, 20]


def test_what_is_no_clip_is_refused(tmp_path, clip):
    for name, content in (("a.mp4", b"no video"), ("a.gif", b"GIF89a"), ("a.npz", b"PK"), ("a.txt", b"text")):
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "other.npz", video=clip)
    np.savez(tmp_path / "floats.npz", frames=clip / 255)
    np.savez(tmp_path / "objects.npz", frames=np.array([{}], dtype=object))
    (tmp_path / "folder").mkdir()
    Image.fromarray(clip[0]).save(tmp_path / "still.png")
    for name, message in {
        "a.mp4": "cannot be read as a video",
        "a.gif": "cannot be read as an image",
        "a.npz": "cannot be read as a NumPy archive",
        "a.txt": "is not a clip that can be read",
        "other.npz": "holds video, expected an array named frames",
        "floats.npz": "float64",
        "objects.npz": "type object",
        "folder": "has no pictures",
        "still.png": "single picture",
        "none.gif": "does not exist",
    }.items():
        with pytest.raises(InputError, match=message) as error:
            load_clip(tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="max_frames is 0"):
        load_clip(tmp_path / "a.gif", max_frames=0)


def test_a_clip_that_is_too_large_is_refused(tmp_path, clip, monkeypatch):
    for ending in ("gif", "webp", "mp4", "npz"):
        save_clip(tmp_path / f"a.{ending}", clip)
    save_clip(f"{tmp_path}/frames/", clip)
    monkeypatch.setattr(clips, "MAX_CLIP_PIXELS", 4 * 64 * 80)
    for name in ("a.gif", "a.webp", "a.mp4", "a.npz", "frames"):
        with pytest.raises(InputError, match="shorter or smaller"):
            load_clip(tmp_path / name)
    assert load_clip(tmp_path / "a.mp4", max_frames=3).shape[0] == 3
