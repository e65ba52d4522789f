"""The Python interface: what its documentation says runs, and what a data set decides reaches the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lfdm_export import InputError, export, export_bundle
from lfdm_export.bundle import Bundle
from lfdm_export.preprocess import Preprocessing
from lfdm_models.labels import MUG
from lfdm_models.model import LfdmModel


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, small_bundle: Bundle) -> list[Any]:
    """Export without tracing: the small bundle's graphs. Gives the text encoders that were looked for."""
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
