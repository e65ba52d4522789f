"""A clip's file says how the clip was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfdm_export.errors import InputError
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.clip_files import load_clip, save_clip
from lfdm_export.pictures.metadata import clip_metadata

SETTINGS = {"bundle": "mug", "sampler": "ddim", "steps": 10, "eta": None, "condition": "label"}


def clip(samples: int = 1, **changes: object) -> Clip:
    frames = np.random.default_rng(0).integers(0, 256, (samples, 3, 16, 16, 3), dtype=np.uint8)
    return Clip(
        **{
            "frames": frames,
            "warped": frames,
            "latent": np.zeros((samples, 3, 3, 4, 4), np.float32),
            "source": frames[:, 0],
            "residual_flow": False,
            "labels": ("Lächeln", "nod")[:samples],
            "seeds": (7, 8)[:samples],
            "settings": SETTINGS,
            **changes,
        }  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.mp4", "a.png", "a.npz", "frames/"])
@pytest.mark.parametrize("panels", [False, True])
def test_every_format_carries_it(tmp_path: Path, name: str, panels: bool):
    if panels and name == "a.npz":
        return
    clip().save(f"{tmp_path}/{name}", fps=12, panels=panels)
    found = clip_metadata(tmp_path / name)
    assert found.pop("program") == "lfdm-export"
    assert found.pop("version")
    assert found == {
        "bundle": "mug", "sampler": "ddim", "steps": 10, "condition": "label", "label": "Lächeln", "seed": 7, "fps": 12,
    }  # fmt: skip
    if name != "a.png":
        assert len(load_clip(tmp_path / name)) == 3


def test_each_sample_has_its_own(tmp_path: Path):
    paths = clip(2).save(tmp_path / "a.gif")
    assert [(clip_metadata(path)["label"], clip_metadata(path)["seed"]) for path in paths] == [
        ("Lächeln", 7),
        ("nod", 8),
    ]
    (path,) = clip(2).save(tmp_path / "a.npz")
    assert clip_metadata(path)["label"] == ["Lächeln", "nod"]
    assert clip_metadata(path)["seed"] == [7, 8]


def test_a_text_is_called_so(tmp_path: Path):
    (path,) = clip(settings={"condition": "text"}).save(tmp_path / "a.gif")
    assert clip_metadata(path)["text"] == "Lächeln"
    assert "label" not in clip_metadata(path)


def test_long_metadata_survive(tmp_path: Path):
    text = "words " * 700
    for ending in ("gif", "webp", "png", "mp4", "npz"):
        (path,) = clip(labels=(text,)).save(tmp_path / f"a.{ending}")
        assert clip_metadata(path)["label"] == text


def test_files_of_others_say_nothing(tmp_path: Path):
    frames = clip().frames[0]
    for ending in ("gif", "webp", "png", "mp4", "npz"):
        path = save_clip(tmp_path / f"a.{ending}", frames)
        with pytest.raises(InputError, match="carries no metadata"):
            clip_metadata(path)
    for comment in (b"holiday", b"[" * 60_000, b'{"program": "other"}', b"[1]", b"\xff\xfe"):
        Image.fromarray(frames[0]).save(tmp_path / "b.gif", comment=comment)
        with pytest.raises(InputError, match="carries no metadata"):
            clip_metadata(tmp_path / "b.gif")
    with pytest.raises(InputError, match="does not exist"):
        clip_metadata(tmp_path / "none.gif")


def test_a_clip_of_its_own_rate_is_saved_at_that(tmp_path: Path):
    driven = clip(fps=24.0)
    (path,) = driven.save(tmp_path / "a.gif")
    assert clip_metadata(path)["fps"] == 24
    assert gif_seconds(path) == pytest.approx(3 / 24, abs=0.011)
    (path,) = driven.save(tmp_path / "b.gif", fps=10)
    assert gif_seconds(path) == pytest.approx(0.3)


def test_a_gif_of_a_quick_clip_keeps_its_speed_with_fewer_frames(tmp_path: Path):
    frames = np.random.default_rng(0).integers(0, 256, (2, 60, 8, 8, 3), dtype=np.uint8)
    quick = clip(2, frames=frames, fps=60.0)
    for path in quick.save(tmp_path / "a.gif"):
        assert gif_seconds(path) == pytest.approx(1.0)
        assert clip_metadata(path)["fps"] == 50
    with pytest.raises(InputError, match="at most 50 for gif"):
        quick.save(tmp_path / "b.gif", fps=60)


def gif_seconds(path: Path) -> float:
    total = 0
    with Image.open(path) as image:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            total += image.info["duration"]
    return total / 1000


def test_scale_enlarges_and_titles_stand_above_the_panels(tmp_path: Path):
    (path,) = clip().save(f"{tmp_path}/a/", scale=3)
    assert load_clip(path).shape == (3, 48, 48, 3)
    (path,) = clip().save(f"{tmp_path}/b/", panels=True, scale=4)
    frames = load_clip(path)
    height = frames.shape[1] - 64
    assert frames.shape[2] == 5 * 64
    assert height > 0
    assert height % 2 == 0
    for place in range(5):  # dark letters on white above each
        title = frames[0, :height, place * 64 : place * 64 + 64]
        assert title.min() < 100
        assert np.median(title) > 240
    wrong: list[Any] = [0, 9, 1.5, True]
    for scale in wrong:
        with pytest.raises(InputError, match="scale is"):
            clip().save(tmp_path / "c.gif", scale=scale)
    with pytest.raises(InputError, match="npz and motion files hold neither panels"):
        clip().save(tmp_path / "c.npz", scale=2)


def test_metadata_are_plain_json(tmp_path: Path):
    (path,) = clip().save(tmp_path / "a.png")
    with Image.open(path) as image:
        assert json.loads(image.info["lfdm"])["seed"] == 7
