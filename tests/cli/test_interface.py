"""The Python interface: the examples of its documentation run, and the settings of a data set reach the bundle."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from PIL import Image

from lfdm_export import Clip, InputError, Pipeline, export_bundle
from lfdm_export.bundle.reader import Bundle
from lfdm_export.cli import generate_main
from lfdm_export.export import bundle_export as export
from lfdm_export.parity.verify import verify_bundle
from lfdm_export.pictures import notebook
from lfdm_export.pictures.preprocess import Preprocessing
from lfdm_export.serving.triton.repository import write_repository
from lfdm_models.labels import MUG
from lfdm_models.model import LfdmModel
from tests.fake_bundle import FRAMES, SIZE, fake_manifest, write_fake_bundle


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, small_bundle: Bundle) -> list[Any]:
    """Export the small bundle's graphs without tracing. Returns the text encoders that were requested."""
    encoders: list[Any] = []

    def trace_graphs(*arguments: object) -> dict[str, ir.Model]:
        return {name: ir.load(small_bundle.stage_path(name)) for name in small_bundle.stages}

    monkeypatch.setattr(export, "trace_graphs", trace_graphs)
    monkeypatch.setattr(export, "load_text_encoder", lambda source, width: encoders.append(source))
    return encoders


@pytest.mark.parametrize(
    ("arguments", "encoder", "labels", "dataset"),
    [
        ({"dataset": "mug"}, "bert-base-cased", MUG, "mug"),
        ({"dataset": "mug", "text_encoder": "folder", "labels": ["fear"]}, "folder", ("fear",), "mug"),
        ({"dataset": "natops", "text_encoder": "none"}, None, MUG, "natops"),
        ({"text_encoder": "none"}, None, MUG, None),
        ({}, None, MUG, None),
        ({"dataset": "mug", "preprocessing": Preprocessing.for_dataset("mhad")}, "bert-base-cased", MUG, "mhad"),
    ],
)
def test_a_data_set_gives_labels_encoder_and_preprocessing(
    quick: list[Any],
    small_model: LfdmModel,
    tmp_path: Path,
    arguments: dict[str, Any],
    encoder: str | None,
    labels: tuple[str, ...],
    dataset: str | None,
):
    bundle = export_bundle(small_model, tmp_path / "bundle", frames=10, image_size=64, reference=False, **arguments)
    assert quick == [encoder]
    assert bundle.labels == labels
    assert bundle.manifest.preprocessing == Preprocessing.for_dataset(dataset)
    np.testing.assert_array_equal(bundle.embedding("fear"), small_model.label_embeddings["fear"])


def test_an_unknown_data_set_is_refused_at_once(quick: list[Any], small_model: LfdmModel, tmp_path: Path):
    with pytest.raises(InputError, match="unknown data set 'ucf'; expected one of mug, mhad, natops"):
        export_bundle(small_model, tmp_path / "bundle", dataset="ucf")
    assert quick == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("provenance", "expected"),
    [({}, (40, 128)), ({"frames": 16, "image_size": 64}, (16, 64)), ({"frames": "x"}, (40, 128))],
)
def test_sizes_are_the_trained_ones(small_model: LfdmModel, provenance: dict[str, object], expected: tuple[int, int]):
    model = LfdmModel(small_model.config, small_model.lfae, small_model.diffusion, provenance)
    assert export.trained_geometry(model) == expected


# --------------------------------------------------------------------- bundles without motion transfer


def test_a_bundle_without_motion_transfer_verifies(quick: list[Any], small_model: LfdmModel, tmp_path: Path):
    bundle = export_bundle(small_model, tmp_path / "bundle", frames=10, image_size=64, drive=False)
    assert "estimate_motion" not in bundle.stages
    assert not [name for name in bundle.manifest.files if "estimate_motion" in name]
    report = verify_bundle(bundle, targets=("onnxruntime",), threads=1)
    assert report.passed, report.table()
    assert repr(report).startswith("<Report of 'bundle', fp32, ")
    assert repr(report).endswith(": passed>")
    photo = np.zeros((64, 64, 3), np.uint8)
    assert Pipeline(bundle).generate(photo, label="fear", steps=2).frames.shape == (1, 10, 64, 64, 3)


def test_motion_transfer_of_a_bundle_without_it_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bundle = write_fake_bundle(tmp_path / "small", fake_manifest(with_drive=False))
    assert Bundle.open(bundle.path).manifest.has_drive is False
    photo = np.zeros((SIZE, SIZE, 3), np.uint8)
    assert Pipeline(bundle).generate(photo, label="anger", steps=2).frames.shape == (1, FRAMES, SIZE, SIZE, 3)
    with pytest.raises(InputError, match="exported without the stage 'estimate_motion', which motion transfer needs"):
        Pipeline(bundle).transfer_motion(photo, photo[None])
    Image.fromarray(photo).save(tmp_path / "photo.png")
    arguments = [str(bundle.path), "--image", f"{tmp_path}/photo.png", "--drive", "clip.gif", "-o", "a.gif"]
    assert generate_main(arguments) == 1
    printed = capsys.readouterr().err
    assert "give a bundle that lfdm-export wrote without --without-drive" in printed
    assert printed.count("\n") == 1


def test_a_triton_repository_needs_no_motion_transfer(tmp_path: Path):
    bundle = write_fake_bundle(tmp_path / "small", fake_manifest(with_drive=False))
    repository = write_repository(bundle, tmp_path / "repository")
    assert not list(repository.rglob("*estimate_motion*"))
    assert list(repository.rglob("decode.onnx"))


# -------------------------------------------------------------------------------- repr of objects


def clip_of(samples: int = 2, frames: int = 3, size: int = 16, **more: Any) -> Clip:
    pictures = np.random.default_rng(0).integers(0, 256, (samples, frames, size, size, 3), np.uint8)
    latent = np.zeros((samples, 3, frames, 4, 4), np.float32)
    return Clip(pictures, pictures, latent, pictures[:, 0], residual_flow=False, **more)


def test_a_bundle_and_what_is_made_with_it_show_themselves_in_a_line(tmp_path: Path):
    bundle = write_fake_bundle(tmp_path / "fake")
    summary = f"fp32, {FRAMES} frames of {SIZE}x{SIZE}, 3 labels (Anger, happiness, turn left)"
    assert repr(bundle) == f"<Bundle '{tmp_path}/fake': {summary}>"
    assert repr(bundle.manifest) == f"<Manifest: {summary}>"
    pipeline = Pipeline(tmp_path / "fake", target="onnxruntime")
    assert repr(pipeline) == f"<Pipeline '{tmp_path}/fake': {summary}; target onnxruntime, loaded: nothing yet>"
    encoded = pipeline.encode(np.zeros((2, SIZE, SIZE, 3), np.uint8))
    assert repr(encoded) == f"<Encoded: 2 images of {SIZE}x{SIZE}>"
    assert repr(pipeline).endswith("target onnxruntime, loaded: encode>")


def test_a_path_makes_a_pipeline_as_opening_it_does(tmp_path: Path):
    write_fake_bundle(tmp_path / "fake")
    photo = np.zeros((SIZE, SIZE, 3), np.uint8)
    one = Pipeline(str(tmp_path / "fake")).generate(photo, label="anger", steps=2, seed=0)
    other = Pipeline.open(tmp_path / "fake").generate(photo, label="anger", steps=2, seed=0)
    np.testing.assert_array_equal(one.frames, other.frames)


def test_a_clip_shows_itself_in_a_line():
    assert repr(clip_of(1, 1)) == "<Clip: 1 sample of 1 frame of 16x16>"
    clip = clip_of(6, labels=("nod",) * 6, seeds=tuple(range(6)))
    assert repr(clip) == (
        "<Clip: 6 samples of 3 frames of 16x16, labels: nod, nod, nod, nod + 2 more, seeds: 0, 1, 2, 3 + 2 more>"
    )


def gifs_of(html: str) -> list[Image.Image]:
    return [
        Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"data:image/gif;base64,([^\"]+)", html)
    ]


def test_a_notebook_shows_a_moving_clip():
    html = clip_of(labels=("<b>nod", "wave"), seeds=(7, 8))._repr_html_()
    pictures = gifs_of(html)
    assert [(picture.size, getattr(picture, "n_frames", 1)) for picture in pictures] == [((16, 16), 3)] * 2
    assert "&lt;b&gt;nod, seed 7" in html
    assert "<b>" not in html
    assert gifs_of(clip_of(1)._repr_html_())


def test_what_a_notebook_shows_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(notebook, "PIXELS", 16 * 16 * 6)
    html = clip_of(5)._repr_html_()
    assert len(gifs_of(html)) == 2
    assert "+ 3 more" in html
    (long,) = gifs_of(clip_of(1, frames=20)._repr_html_())
    assert getattr(long, "n_frames", 1) == 5
    assert long.info["duration"] == 400, "as long as before"


def test_a_model_shows_its_size(small_model: LfdmModel):
    assert re.fullmatch(r"<LfdmModel: LFAE of \d\.\d M weights, DM of \d\.\d M, 7 own labels>", repr(small_model))
