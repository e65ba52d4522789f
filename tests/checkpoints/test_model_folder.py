from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from lfdm_export.checkpoints import model_folder
from lfdm_export.checkpoints.load import load_model
from lfdm_export.checkpoints.model_folder import load_model_folder, save_model
from lfdm_export.checkpoints.weight_files import sha256
from lfdm_export.errors import CheckpointError, InputError
from lfdm_models.config import DmConfig, HourglassConfig, LfaeConfig, LfdmConfig
from lfdm_models.diffusion import Diffusion
from lfdm_models.lfae import Lfae
from lfdm_models.model import LfdmModel

CONFIG = LfdmConfig(
    LfaeConfig(
        regions=3,
        width=8,
        bottleneck_blocks=1,
        flow_predictor=HourglassConfig(8, blocks=2),
        region_predictor=HourglassConfig(4, blocks=2),
        bg_predictor=HourglassConfig(4, blocks=2),
        region_pad=1,
        region_temperature=0.25,
    ),
    DmConfig(8, (1, 2), 2, 8, 8, feature_channels=32, text_width=12, training_steps=10),
    residual_flow=True,
)


@pytest.fixture
def model() -> LfdmModel:
    torch.manual_seed(2)
    return LfdmModel(
        CONFIG,
        Lfae(CONFIG.lfae).eval(),
        Diffusion(CONFIG.dm).eval(),
        {"trained": True, "data": "synthetic", "steps": 5},
        {"wave": np.arange(12, dtype=np.float32), "point – left": np.ones(12, dtype=np.float32)},
    )


def test_round_trip(model: LfdmModel, tmp_path: Path):
    folder = save_model(model, tmp_path / "new" / "model")
    names = ["dm.safetensors", "labels.safetensors", "lfae.safetensors", "model.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    loaded = load_model_folder(str(folder))
    assert loaded.config == CONFIG
    assert loaded.lfae.region_predictor.temperature == 0.25
    for network, original in ((loaded.lfae, model.lfae), (loaded.diffusion, model.diffusion)):
        torch.testing.assert_close(network.state_dict(), original.state_dict(), rtol=0, atol=0)
    assert list(loaded.label_embeddings) == ["wave", "point – left"]
    np.testing.assert_array_equal(loaded.label_embeddings["wave"], model.label_embeddings["wave"])
    assert loaded.provenance == {
        **model.provenance,
        "lfae": {"file": "lfae.safetensors", "sha256": sha256(folder / "lfae.safetensors")},
        "dm": {"file": "dm.safetensors", "sha256": sha256(folder / "dm.safetensors")},
    }
    again = save_model(loaded, tmp_path / "again")
    assert (again / "dm.safetensors").read_bytes() == (folder / "dm.safetensors").read_bytes()


def test_the_weights_load_as_a_pair_too(model: LfdmModel, tmp_path: Path):
    folder = save_model(model, tmp_path / "model")
    pair = load_model(folder / "lfae.safetensors", folder / "dm.safetensors", residual_flow=True, region_pad=1)
    assert pair.config == replace(CONFIG, lfae=replace(CONFIG.lfae, region_temperature=0.1))


def test_weights_that_share_memory(model: LfdmModel, tmp_path: Path):
    def rotary(network: Diffusion, attention: str) -> nn.Module:
        return network.get_submodule(f"denoise_fn.{attention}.fn.fn.fn.rotary_emb")

    shared = rotary(model.diffusion, "mid_temporal_attn")
    model.diffusion.set_submodule("denoise_fn.init_temporal_attn.fn.fn.fn.rotary_emb", shared)
    model.lfae.generator.final.weight.data = torch.randn(9, 8, 7, 7)[3:6]
    loaded = load_model_folder(save_model(model, tmp_path / "model"))
    torch.testing.assert_close(loaded.lfae.generator.final.weight.data, model.lfae.generator.final.weight.data)
    torch.testing.assert_close(rotary(loaded.diffusion, "init_temporal_attn").state_dict(), shared.state_dict())


def test_provenance_of_the_original_files_is_kept(model: LfdmModel, tmp_path: Path):
    model.provenance = {"lfae": {"file": "RegionMM.pth", "sha256": "0"}, "dm": {"file": "flowdiff.pth", "sha256": "1"}}
    model.label_embeddings = {}
    loaded = load_model_folder(save_model(model, tmp_path / "model"))
    assert loaded.provenance == {**model.provenance, "trained": None}
    assert loaded.label_embeddings == {}


def test_an_older_model_is_replaced_and_nothing_else(model: LfdmModel, tmp_path: Path):
    target = tmp_path / "model"
    target.mkdir()
    save_model(model, target)
    model.label_embeddings = {}
    save_model(model, target)
    assert not (target / "labels.safetensors").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (target / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds other files"):
        save_model(model, target)
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="is a file"):
        save_model(model, tmp_path / "file")
    with pytest.raises(InputError, match="cannot write the model"):
        save_model(model, tmp_path / "file" / "model")
    assert (target / "thesis.tex").read_text(encoding="utf-8") == "x"


def test_a_failure_half_way_leaves_the_older_model(model: LfdmModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = save_model(model, tmp_path / "model")
    before = {path.name: path.read_bytes() for path in target.iterdir()}

    def full(*_: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_folder, "sha256", full)
    with pytest.raises(InputError, match="No space left on device"):
        save_model(model, target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("embedding", [np.ones(11, np.float32), np.full(12, np.nan, np.float32)])
def test_labels_that_cannot_be_stored(embedding: np.ndarray, model: LfdmModel, tmp_path: Path):
    model.label_embeddings = {"wave": embedding}
    with pytest.raises(InputError, match=r"label 'wave' has shape \(\d+,\), expected 12 finite"):
        save_model(model, tmp_path / "model")


def test_provenance_that_cannot_be_stored(model: LfdmModel, tmp_path: Path):
    model.provenance = {"loss": float("nan")}
    with pytest.raises(InputError, match="provenance"):
        save_model(model, tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["lfae.safetensors", "dm.safetensors", "labels.safetensors"])
def test_altered_and_missing_files(name: str, model: LfdmModel, tmp_path: Path):
    folder = save_model(model, tmp_path / "model")
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} was altered"):
        load_model_folder(folder)
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load_model_folder(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "model.json.version is 2"),
        ({"format": "onnx"}, "model.json.format"),
        ({"residual_flow": "no"}, "residual_flow"),
        ({"region_pad": -1}, "out of range"),
        ({"region_temperature": 0.0}, "out of range"),
        ({"labels": ["a", "a"]}, "twice"),
        ({"labels": []}, "files are"),
        ({"labels": ["wave"]}, r"embeddings is torch.float32 \[2, 12\], expected torch.float32 \[1, 12\]"),
        ({"files": {"../x": "0"}}, "files are ../x"),
        ({"more": 1}, "unknown more"),
        (None, "damaged or of another version"),
    ],
)
def test_cards_that_are_wrong(change: dict[str, object] | None, words: str, model: LfdmModel, tmp_path: Path):
    folder = save_model(model, tmp_path / "model")
    path = folder / "model.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    path.write_text("{" if change is None else json.dumps({**card, **change}))
    with pytest.raises(CheckpointError, match=words):
        load_model_folder(folder)


def test_folders_that_hold_no_model(tmp_path: Path):
    with pytest.raises(CheckpointError, match="there is no model folder"):
        load_model_folder(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"it has no model\.json"):
        load_model_folder(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file, expected a model folder"):
        load_model_folder(tmp_path / "file")


def test_label_embeddings_that_are_not_finite(model: LfdmModel, tmp_path: Path):
    folder = save_model(model, tmp_path / "model")
    labels, card_path = folder / "labels.safetensors", folder / "model.json"
    safetensors.torch.save_file({"embeddings": torch.full((2, 12), torch.nan)}, labels)
    card = json.loads(card_path.read_text(encoding="utf-8"))
    card["files"]["labels.safetensors"] = sha256(labels)
    card_path.write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        load_model_folder(folder)
