"""Checkpoints of small random networks, in the released layout and in every broken one that a user may bring."""

from __future__ import annotations

import argparse
import bz2
import collections
import datetime as dt
import decimal
import fractions
import io
import logging
import lzma
import os
import pickle
import struct
import types
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch import Tensor, nn

from lfdm_export.checkpoints.architecture import recognize_dm, recognize_lfae
from lfdm_export.checkpoints.load import load_model
from lfdm_export.checkpoints.weight_files import sha256
from lfdm_export.errors import CheckpointError, InputError
from lfdm_models.config import DmConfig, HourglassConfig, LfaeConfig, LfdmConfig
from lfdm_models.diffusion import Diffusion
from lfdm_models.lfae import Lfae
from lfdm_models.schedule import cosine_schedule
from lfdm_models.stored_files import TorchFile

SMALL = LfdmConfig(
    LfaeConfig(
        regions=5,
        width=8,
        max_width=512,
        bottleneck_blocks=2,
        flow_predictor=HourglassConfig(8, 16, 3),
        region_predictor=HourglassConfig(4, 1024, 3),
        bg_predictor=HourglassConfig(4, 12, 4),
    ),
    DmConfig(
        8, (1, 2, 4), heads=2, head_width=8, rotary_width=8, feature_channels=32, text_width=12, training_steps=20
    ),
)
CONFIGS = {
    "small": SMALL,
    "upconv": LfdmConfig(
        replace(SMALL.lfae, regions=3, region_pad=0, bottleneck_blocks=0),
        replace(
            SMALL.dm, learned_null=True, upsample="upconv", multipliers=(1, 3), heads=4, head_width=4, rotary_width=2
        ),
    ),
    "one level, gray, capped": LfdmConfig(
        LfaeConfig(
            image_channels=1,
            regions=1,
            width=6,
            max_width=10,
            down_blocks=3,
            bottleneck_blocks=11,
            flow_predictor=HourglassConfig(5, 5, 4),
            region_predictor=HourglassConfig(7, 20, 3),
            bg_predictor=HourglassConfig(9, 9, 1),
            antialias_size=29,
        ),
        DmConfig(16, (1,), 3, 4, 4, position_buckets=16, feature_channels=10, text_width=7, training_steps=5),
        residual_flow=True,
    ),
    "half resolution": LfdmConfig(
        replace(SMALL.lfae, down_blocks=1, antialias_size=5),
        replace(SMALL.dm, feature_channels=16, multipliers=(2, 2, 1)),
    ),
}
LFAE_PARTS = ("generator", "region_predictor", "bg_predictor")

State = dict[str, Tensor]


def random_states(config: LfdmConfig) -> dict[str, State]:
    """A state dict for each part, with positive variances and the schedule left alone."""
    torch.manual_seed(1)
    lfae, diffusion = Lfae(config.lfae), Diffusion(config.dm)
    states = {part: getattr(lfae, part).state_dict() for part in LFAE_PARTS}
    states["diffusion"] = diffusion.state_dict()
    return {
        part: {
            key: tensor.clone() if "." not in key or not tensor.is_floating_point() else torch.rand(tensor.shape) + 0.1
            for key, tensor in state.items()
        }
        for part, state in states.items()
    }


def save(folder: Path, states: dict[str, Any], **options: Any) -> tuple[Path, Path]:
    """Both files in the released layout, with what else is in them."""
    lfae, dm = folder / "lfae.pth", folder / "dm.pth"
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    torch.save(
        {"example": 1, "epoch": 2, "optimizer": optimizer, **{p: states[p] for p in LFAE_PARTS}}, lfae, **options
    )
    torch.save({"example": 1, "diffusion": states["diffusion"], "optimizer_diff": optimizer}, dm, **options)
    return lfae, dm


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    return random_states(SMALL)


@pytest.fixture
def pair(tmp_path: Path, states: dict[str, State]) -> tuple[Path, Path]:
    return save(tmp_path, states)


def edited(states: dict[str, State], part: str, key: str, value: Tensor | None) -> dict[str, State]:
    """The states, one tensor replaced, added, or left out."""
    state = {**states[part], key: value}
    return {**states, part: {k: v for k, v in state.items() if v is not None}}


def assert_holds(network: nn.Module, state: State, prefix: str = "") -> None:
    found = network.state_dict()
    assert {prefix + key for key in found} == set(state)
    for key, tensor in found.items():
        expected = state[prefix + key]
        assert tensor.dtype == (torch.float32 if expected.is_floating_point() else torch.int64)
        torch.testing.assert_close(tensor, expected.to(tensor.dtype), rtol=0, atol=0)


def error_of(lfae: Path, dm: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_model(lfae, dm)
    message = str(caught.value)
    assert "\n" not in message
    return message


# What loads


@pytest.mark.parametrize("name", CONFIGS)
def test_architecture_is_recognized(name: str, tmp_path: Path):
    config = CONFIGS[name]
    states = random_states(config)
    lfae, dm = save(tmp_path, states)
    model = load_model(lfae, dm, residual_flow=config.residual_flow, region_pad=config.lfae.region_pad)
    assert model.config == config
    for part in LFAE_PARTS:
        assert_holds(getattr(model.lfae, part), states[part])
    assert_holds(model.diffusion, states["diffusion"])
    for network in (model.lfae, model.diffusion):
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())


def test_caps_that_do_not_bind_give_the_same_network(tmp_path: Path):
    config = replace(
        SMALL,
        lfae=replace(SMALL.lfae, max_width=32, region_predictor=HourglassConfig(4, 33, 3)),
    )
    states = random_states(config)
    model = load_model(*save(tmp_path, states))
    assert model.config == SMALL
    assert_holds(model.lfae.generator, states["generator"])


def test_loaded_networks_compute_what_the_saved_ones_do(tmp_path: Path):
    torch.manual_seed(3)
    lfae, diffusion = Lfae(SMALL.lfae).eval(), Diffusion(SMALL.dm).eval()
    states = {part: getattr(lfae, part).state_dict() for part in LFAE_PARTS} | {"diffusion": diffusion.state_dict()}
    model = load_model(*save(tmp_path, states))
    images = torch.rand(2, 1, 3, 32, 32)
    inputs = torch.randn(1, 3, 2, 8, 8), torch.randn(1, 32, 8, 8), torch.randn(1, 12), torch.tensor([7])
    # Not to the bit: weights from a file lie at other alignments, by which libraries pick their loops. The weights
    # themselves are compared to the bit in the other tests.
    with torch.inference_mode():
        torch.testing.assert_close(model.lfae(*images), lfae(*images), rtol=1e-5, atol=1e-5)
        for scale in (0.0, 1.0):  # 0 reads the null embedding, which is not in the state dict
            expected = diffusion.denoise_fn.guided(*inputs, scale)
            found = model.diffusion.denoise_fn.guided(*inputs, scale)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_module_prefixes_at_any_depth(tmp_path: Path, states: dict[str, State]):
    prefixed = {
        "generator": {f"module.{k}": v for k, v in states["generator"].items()},
        "region_predictor": states["region_predictor"],
        "bg_predictor": {f"module.module.{k}": v for k, v in states["bg_predictor"].items()},
        "diffusion": {
            f"module.{k.replace('denoise_fn.', 'denoise_fn.module.')}": v for k, v in states["diffusion"].items()
        },
    }
    model = load_model(*save(tmp_path, prefixed))
    for part in LFAE_PARTS:
        assert_holds(getattr(model.lfae, part), states[part])
    assert_holds(model.diffusion, states["diffusion"])


@pytest.mark.parametrize("layout", ["legacy", "ordered", "bare", "parameters", "safetensors", "misnamed safetensors"])
def test_layouts_of_the_files(layout: str, tmp_path: Path, states: dict[str, State]):
    if layout == "legacy":
        lfae, dm = save(tmp_path, states, _use_new_zipfile_serialization=False)
    elif layout == "ordered":
        lfae, dm = save(tmp_path, {part: collections.OrderedDict(state) for part, state in states.items()})
    elif layout == "bare":
        lfae, dm = save(tmp_path, states)
        torch.save({**states["diffusion"], "step": 7}, dm)
    elif layout == "parameters":
        lfae, dm = save(
            tmp_path,
            {
                part: {k: nn.Parameter(v) if v.is_floating_point() else v for k, v in state.items()}
                for part, state in states.items()
            },
        )
    else:
        ending = ".safetensors" if layout == "safetensors" else ".pth"
        lfae, dm = tmp_path / f"lfae{ending}", tmp_path / f"dm{ending}"
        flat = {part: {f"{part}.{k}": v for k, v in state.items()} for part, state in states.items()}
        safetensors.torch.save_file({k: v for part in LFAE_PARTS for k, v in flat[part].items()}, lfae)
        safetensors.torch.save_file({f"module.{k}": v for k, v in flat["diffusion"].items()}, dm)
    model = load_model(str(lfae), str(dm))
    for part in LFAE_PARTS:
        assert_holds(getattr(model.lfae, part), states[part])
    assert_holds(model.diffusion, states["diffusion"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype: torch.dtype, tmp_path: Path, states: dict[str, State]):
    converted = {
        part: {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        for part, state in states.items()
    }
    model = load_model(*save(tmp_path, converted))
    assert_holds(model.lfae.generator, converted["generator"])
    # Half precision would lose the schedule's end; it is the cosine one, which is known.
    for name, expected in cosine_schedule(SMALL.dm.training_steps).buffers().items():
        np.testing.assert_array_equal(getattr(model.diffusion.schedule(), name), expected)
    weights = model.diffusion.denoise_fn.state_dict()
    expected_weights = {k: v for k, v in converted["diffusion"].items() if k.startswith("denoise_fn.")}
    for key, tensor in expected_weights.items():
        torch.testing.assert_close(weights[key.removeprefix("denoise_fn.")], tensor.float(), rtol=0, atol=0)


def test_a_half_precision_schedule_of_1000_steps_is_restored(tmp_path: Path):
    config = replace(SMALL, dm=replace(SMALL.dm, training_steps=1000))
    states = random_states(config)
    exact = states["diffusion"]
    halved = {**states, "diffusion": {k: v.half() for k, v in exact.items()}}
    assert halved["diffusion"]["alphas_cumprod"][-1] == 0  # lost
    model = load_model(*save(tmp_path, halved))
    torch.testing.assert_close(model.diffusion.get_buffer("alphas_cumprod"), exact["alphas_cumprod"], rtol=0, atol=0)
    halved["diffusion"]["betas"] = (exact["betas"] * 0.9).half()
    assert "diffusion.betas has dtype torch.float16, too coarse" in error_of(*save(tmp_path, halved))


def test_the_checkpoints_own_schedule_is_kept(tmp_path: Path, states: dict[str, State]):
    a = torch.linspace(0.99, 0.01, 20)
    own = edited(states, "diffusion", "alphas_cumprod", a)
    own = edited(own, "diffusion", "alphas_cumprod_prev", torch.cat([torch.ones(1), a[:-1]]))
    model = load_model(*save(tmp_path, own))
    np.testing.assert_array_equal(model.diffusion.schedule().alphas_cumprod, a.numpy())


@pytest.mark.parametrize(("learned_null", "pad"), [(False, 3), (True, 0)])
def test_region_pad_is_guessed_aloud_and_can_be_given(
    learned_null: bool, pad: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    lfae, dm = save(tmp_path, random_states(replace(SMALL, dm=replace(SMALL.dm, learned_null=learned_null))))
    with caplog.at_level(logging.INFO, "lfdm_export"):
        model = load_model(lfae, dm)
    assert model.config.lfae.region_pad == pad
    assert model.lfae.region_predictor.regions.padding == (pad, pad)
    assert f"taking {pad}" in caplog.text
    assert "for MHAD give region_pad=0" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "lfdm_export"):
        assert load_model(lfae, dm, region_pad=0).config.lfae.region_pad == 0
        assert [load_model(lfae, dm, dataset=name).config.lfae.region_pad for name in ("mug", "natops")] == [3, 0]
        assert load_model(lfae, dm, dataset="mug", region_pad=0).config.lfae.region_pad == 0
    assert "MHAD" not in caplog.text
    with pytest.raises(InputError, match="region_pad is -1"):
        load_model(lfae, dm, region_pad=-1)


def test_provenance_names_the_files_and_not_their_folder(pair: tuple[Path, Path]):
    lfae, dm = pair
    assert load_model(lfae, dm).provenance == {
        "lfae": {"file": "lfae.pth", "sha256": sha256(lfae)},
        "dm": {"file": "dm.pth", "sha256": sha256(dm)},
        "trained": None,
    }


def test_a_loaded_model_outlives_its_files(pair: tuple[Path, Path], states: dict[str, State]):
    model = load_model(*pair)
    for path in pair:
        path.write_bytes(b"")
    assert_holds(model.lfae.generator, states["generator"])


# What is not a checkpoint


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (bytes(np.random.default_rng(0).integers(0, 256, 4096, dtype=np.uint8)), "of an unknown kind"),
        (b"\0" * 4096, "of an unknown kind"),
        (b"Notes on the training\n", "a text file"),
        (jpeg(), "a JPEG image"),
        (b"\n<!DOCTYPE html><html><title>Google Drive - Virus scan warning</title>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "gzip archive; unpack it"),
        (pickle.dumps({"diffusion": {}}), "a Python pickle"),
        (b"PK\x03\x04" + b"\0" * 100, "truncated or damaged"),
        (struct.pack("<Q", 1000) + b'{"a":', "truncated"),
        (struct.pack("<Q", 6) + b"{nope}", "truncated or damaged"),
        (struct.pack("<Q", 9) + b'{"a":[1]}', "truncated or damaged"),
    ],
)
def test_what_is_no_checkpoint(content: bytes, words: str, tmp_path: Path, pair: tuple[Path, Path]):
    lfae, dm = pair
    wrong = tmp_path / "wrong.pth"
    wrong.write_bytes(content)
    for message in (error_of(wrong, dm), error_of(lfae, wrong)):
        assert words in message
        assert str(wrong) in message


def test_paths_that_lead_to_no_file(tmp_path: Path, pair: tuple[Path, Path]):
    lfae, dm = pair
    assert f"there is no file {tmp_path / 'none.pth'}" in error_of(tmp_path / "none.pth", dm)
    assert f"{tmp_path} is a folder" in error_of(lfae, tmp_path)
    assert "not a regular file" in error_of(lfae, Path("/dev/null"))
    with pytest.raises((CheckpointError, InputError), match=r"is not a path|there is no file"):
        load_model("a\0b", dm)


@pytest.mark.parametrize("top", [[1, 2], torch.zeros(3), 7])
def test_a_top_level_that_is_no_dict(top: object, tmp_path: Path, pair: tuple[Path, Path]):
    torch.save(top, tmp_path / "wrong.pth")
    assert f"holds a {type(top).__name__}, expected a dict" in error_of(tmp_path / "wrong.pth", pair[1])


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0.001, 0.3, 0.9, 0.999999])
def test_truncated_files(kept: float, legacy: bool, tmp_path: Path, states: dict[str, State]):
    lfae, dm = save(tmp_path, states, _use_new_zipfile_serialization=not legacy)
    whole = dm.read_bytes()
    dm.write_bytes(whole[: max(64, int(kept * len(whole)))])
    message = error_of(lfae, dm)
    assert "is truncated or damaged" in message
    assert "fetch it again" in message


def test_truncated_safetensors(tmp_path: Path, states: dict[str, State], pair: tuple[Path, Path]):
    path = tmp_path / "dm.safetensors"
    safetensors.torch.save_file({f"diffusion.{k}": v for k, v in states["diffusion"].items()}, path)
    whole = path.read_bytes()
    for size in (20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "truncated" in error_of(pair[0], path)


def test_archives_that_are_no_checkpoint(tmp_path: Path, pair: tuple[Path, Path]):
    lfae, dm = pair
    photos = tmp_path / "photos.zip"
    with zipfile.ZipFile(photos, "w") as archive:
        archive.writestr("a.jpg", jpeg())
    assert "without a checkpoint's data.pkl (it holds a.jpg)" in error_of(lfae, photos)
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(dm) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert "is compressed, which torch.save never does" in error_of(lfae, packed)


# What would run code


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_not_run(legacy: bool, tmp_path: Path, pair: tuple[Path, Path]):
    lfae, dm = pair
    trap, victim = tmp_path / "trap.pth", tmp_path / "victim"
    torch.save({"diffusion": {}, "extra": Payload(victim)}, trap, _use_new_zipfile_serialization=not legacy)
    for message in (error_of(trap, dm), error_of(lfae, trap)):
        assert "could run code when loaded; it was refused" in message
        assert "mkdir" in message
        assert "state dict" in message
    trap.write_bytes(pickle.dumps(Payload(victim)))
    assert "could run code" in error_of(trap, dm)
    assert not victim.exists()
    torch.load(io.BytesIO(_torch_bytes(Payload(victim))), weights_only=False)
    assert victim.exists()  # so the payload works


def _torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("legacy", [False, True])
def test_a_whole_module_is_refused(legacy: bool, tmp_path: Path, pair: tuple[Path, Path]):
    path = tmp_path / "module.pth"
    torch.save({"diffusion": Diffusion(SMALL.dm)}, path, _use_new_zipfile_serialization=not legacy)
    message = error_of(pair[0], path)
    assert "lfdm_models.diffusion.Diffusion" in message
    assert "save state dicts only" in message


@pytest.mark.parametrize("value", [slice(3), np.random.default_rng(0), print, ValueError("x")])
def test_other_objects_are_refused(value: object, tmp_path: Path, pair: tuple[Path, Path]):
    torch.save({"extra": value}, tmp_path / "extra.pth")
    assert "it was refused" in error_of(tmp_path / "extra.pth", pair[1])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_beside_the_weights(protocol: int, tmp_path: Path, states: dict[str, State]):
    beside = {
        "args": argparse.Namespace(lr=1e-4, folder=Path("data"), batch=np.int64(3)),
        "loss": np.float32(0.5),
        "history": np.arange(3.0),
        "seen": {1, 2},
        "best": (None, True, 2**70, 1j, b"x", frozenset({1})),
        "version": torch.__version__,
        "dtype": torch.float32,
        "counts": collections.Counter("ab"),
        "rng": torch.get_rng_state(),
        "kept": {"of": [torch.ones(2).to_sparse()]},
    }
    torch.save({part: states[part] for part in LFAE_PARTS} | beside, tmp_path / "lfae.pth", pickle_protocol=protocol)
    torch.save({"diffusion": states["diffusion"]} | beside, tmp_path / "dm.pth", pickle_protocol=protocol)
    model = load_model(tmp_path / "lfae.pth", tmp_path / "dm.pth")
    assert_holds(model.lfae.generator, states["generator"])
    assert_holds(model.diffusion, states["diffusion"])


def test_numbers_of_numpy_are_read_as_numbers(tmp_path: Path):
    torch.save({"a": np.float64(1.5), "b": np.int32(-3), "c": np.bool_(True), "d": np.float16(0.25)}, tmp_path / "x")
    assert TorchFile(tmp_path / "x").top == {"a": 1.5, "b": -3, "c": True, "d": 0.25}


@pytest.mark.parametrize("name", ["model", "state_dict", "model_state_dict", "module"])
def test_what_trainers_wrap_networks_in(name: str, tmp_path: Path, states: dict[str, State]):
    lfae = {part: states[part] for part in LFAE_PARTS}
    torch.save({"epoch": 3, name: lfae}, tmp_path / "lfae.pth")
    torch.save({name: {"state_dict": {"diffusion": states["diffusion"]}}}, tmp_path / "dm.pth")
    model = load_model(tmp_path / "lfae.pth", tmp_path / "dm.pth")
    assert_holds(model.lfae.generator, states["generator"])
    flat = {f"diffusion.{key}": value for key, value in states["diffusion"].items()}
    torch.save({name: flat, "hyper_parameters": {"lr": 1e-4}}, tmp_path / "dm.pth")
    assert_holds(load_model(tmp_path / "lfae.pth", tmp_path / "dm.pth").diffusion, states["diffusion"])
    torch.save({"model": flat, "state_dict": flat}, tmp_path / "dm.pth")
    assert "holds networks under model and under state_dict" in error_of(tmp_path / "lfae.pth", tmp_path / "dm.pth")


def test_networks_that_were_compiled(tmp_path: Path, states: dict[str, State]):
    compiled = {part: {f"_orig_mod.{key}": value for key, value in states[part].items()} for part in LFAE_PARTS}
    inner = {key.replace("denoise_fn.", "denoise_fn._orig_mod."): v for key, v in states["diffusion"].items()}
    compiled["diffusion"] = {f"module._orig_mod.{key}": value for key, value in inner.items()}
    model = load_model(*save(tmp_path, compiled))
    for part in LFAE_PARTS:
        assert_holds(getattr(model.lfae, part), states[part])
    assert_holds(model.diffusion, states["diffusion"])
    compiled["diffusion"]["betas"] = states["diffusion"]["betas"]
    assert "diffusion.betas is there twice" in error_of(*save(tmp_path, compiled))


def test_an_unknown_prefix_is_named(tmp_path: Path, pair: tuple[Path, Path], states: dict[str, State]):
    path = tmp_path / "dm.pth"
    torch.save({f"net.diffusion.{key}": value for key, value in states["diffusion"].items()}, path)
    assert "its keys begin with 'net.'" in error_of(pair[0], path)


# What a hostile file claims


def crafted(path: Path, pickled: bytes, storages: Mapping[str, bytes] | None = None) -> Path:
    """A file in torch.save's layout with that pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        for key, data in (storages or {}).items():
            archive.writestr(f"x/data/{key}", data)
    return path


def tensor_pickle(count: bytes, offset: bytes, shape: bytes, strides: bytes, kind: bytes = b"FloatStorage") -> bytes:
    """A pickle of {'diffusion': {'betas': tensor}}, its numbers as they are pickled."""
    storage = b"(X\x07\0\0\0storagectorch\n" + kind + b"\nX\x01\0\0\0" + b"0X\x03\0\0\0cpu" + count + b"tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + strides + b"\x89NtR"
    return b"\x80\x02}X\x09\0\0\0diffusion}X\x05\0\0\0betas" + tensor + b"ss."


ONE, MILLION, TERA = b"K\x01", b"J\x40\x42\x0f\x00", b"\x8a\x06\0\0\0\0\0\x01"


@pytest.mark.parametrize(
    ("pickled", "words"),
    [
        (b"\x80\x02})" + b"\x85" * 200_000 + b"K\x01s.", "a key of one of its dicts is a tuple"),
        (b"\x80\x02cbuiltins\nset\n]" + b"\x85" * 50 + b"\x85R.", "holds a set, expected a dict"),
        (b"\x80\x02" + b"}" * 600_000 + b".", "more than 500000 operations"),
        (b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x01\x85R.", "holds a bytearray, expected a dict"),
        (b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x08\0\0\0punycode\x86R.", "is truncated or damaged"),
        (b"\x80\x02(I1\nI2\nl.", "torch.save's own pickle protocol"),
        (b"\x80\x02.", "is truncated or damaged"),
        (b"\x80\x02h\x07.", "is truncated or damaged"),
        (b"\x80\x02}X\x09\0\0\0diffusion}", "is truncated or damaged"),
        (b"\x80\x02X\xff\xff\xff\x7fa.", "is truncated or damaged"),
        (tensor_pickle(TERA, ONE, ONE + b"\x85", ONE + b"\x85"), "the storage 0 is missing or too short"),
        (tensor_pickle(ONE, b"K\0", TERA + b"\x85", b"K\0\x85"), "declares 4,398,046,511,104 bytes of weights"),
        (tensor_pickle(ONE, b"K\0", MILLION * 3 + b"\x87", b"K\0" * 3 + b"\x87"), "declares 4,000,000,000,000,000,0"),
        (tensor_pickle(ONE, TERA, ONE + b"\x85", ONE + b"\x85"), "reaches beyond what is stored"),
        (tensor_pickle(ONE, b"K\0", b"K\x02\x85", ONE + b"\x85"), "reaches beyond what is stored"),
        (tensor_pickle(ONE, b"J\xff\xff\xff\xff", ONE + b"\x85", ONE + b"\x85"), "a size that no tensor has"),
        (tensor_pickle(ONE, b"K\0", b"J\xff\xff\xff\xff\x85", ONE + b"\x85"), "a size that no tensor has"),
        (tensor_pickle(ONE, b"K\0", b"(" + ONE * 40 + b"t", b"(" + ONE * 40 + b"t"), "more than 16 axes"),
        (tensor_pickle(ONE, b"K\0", ONE + b"\x85", b")"), "is truncated or damaged"),
        (tensor_pickle(ONE, b"K\0", b"K\0" + TERA + b"\x86", ONE * 2 + b"\x86"), "which holds no number"),
        (tensor_pickle(ONE, b"K\0", ONE + b"\x85", ONE + b"\x85", b"QInt8Storage"), "expected an ordinary dense"),
    ],
)
def test_what_a_crafted_pickle_claims(pickled: bytes, words: str, tmp_path: Path, pair: tuple[Path, Path]):
    assert words in error_of(pair[0], crafted(tmp_path / "crafted.pth", pickled, {"0": b"\0\0\x80\x3f"}))


def test_a_value_that_contains_itself_many_times(tmp_path: Path, pair: tuple[Path, Path]):
    # 2^60 paths lead to the innermost tuple; one that walked, printed or hashed it would never end.
    doubled = b"".join(b"q%ch%c\x86" % (index, index) for index in range(60))
    pickled = b"\x80\x02}(X\x08\0\0\0training}X\x0d\0\0\0residual_flow)" + doubled + b"su."
    assert "residual_flow is a tuple" in error_of(pair[0], crafted(tmp_path / "x.pth", pickled))


def test_a_list_of_entries_that_is_too_long(tmp_path: Path, pair: tuple[Path, Path]):
    path = crafted(tmp_path / "x.pth", b"\x80\x02}.", {str(index) * 9000: b"" for index in range(1000)})
    assert "its list of entries is larger" in error_of(pair[0], path)


def test_a_part_of_another_storage_and_odd_strides(tmp_path: Path, pair: tuple[Path, Path], states: dict[str, State]):
    whole = {**states["diffusion"], "other": torch.zeros(3)}
    del whole["other"]
    weight = states["diffusion"]["denoise_fn.final_conv.1.weight"]
    larger = torch.stack([torch.zeros_like(weight), weight], -1)
    whole["denoise_fn.final_conv.1.weight"] = larger[..., 1]  # every second number, from the second on
    whole["denoise_fn.final_conv.1.bias"] = torch.full((1,), 0.5).expand(weight.shape[0])
    for legacy in (False, True):
        torch.save({"diffusion": whole}, tmp_path / "dm.pth", _use_new_zipfile_serialization=not legacy)
        found = load_model(pair[0], tmp_path / "dm.pth").diffusion.denoise_fn.state_dict()
        torch.testing.assert_close(found["final_conv.1.weight"], weight, rtol=0, atol=0)
        assert found["final_conv.1.bias"].tolist() == [0.5] * len(weight)


def test_label_embeddings_are_checked_before_they_are_copied(tmp_path: Path, pair: tuple[Path, Path]):
    for table, words in (
        (torch.zeros(1, 1).expand(2, 2 * 10**12), "label_embeddings declares more bytes"),
        (torch.zeros(2, 12).to_sparse(), "label_embeddings is a sparse tensor"),
        (torch.empty(2, 12, device="meta"), "label_embeddings is a tensor on device meta"),
        (torch.zeros(2, 12, dtype=torch.complex64), "are not names with a row of numbers"),
        (torch.full((2, 12), float("nan")), "all different and finite"),
        ("no tensor", "are not names with a row of numbers"),
    ):
        torch.save({"labels": ["a", "b"], "label_embeddings": table}, tmp_path / "dm.pth")
        assert words in error_of(pair[0], tmp_path / "dm.pth")


def test_label_embeddings_that_require_a_gradient(tmp_path: Path, pair: tuple[Path, Path], states: dict[str, State]):
    table = torch.ones(2, 12, requires_grad=True)
    content = {"labels": ["a", "b"], "label_embeddings": table, "diffusion": states["diffusion"]}
    torch.save(content, tmp_path / "dm.pth")
    assert load_model(pair[0], tmp_path / "dm.pth").label_embeddings["b"].tolist() == [1.0] * 12


def test_a_safetensors_header_that_is_too_long(tmp_path: Path, pair: tuple[Path, Path]):
    path = tmp_path / "dm.safetensors"
    header = b'{"a":[' + b"1," * (5 << 20) + b"1]}"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    assert "is not a checkpoint" in error_of(pair[0], path)


def test_thousands_of_modules(tmp_path: Path, states: dict[str, State], pair: tuple[Path, Path]):
    many = states["generator"] | {f"bottleneck.r{index}.conv1.weight": torch.ones(1) for index in range(3000)}
    lfae, dm = save(tmp_path, {**states, "generator": many})
    assert "expected at most 256" in error_of(lfae, dm)


# What are other networks


def test_swapped_files(pair: tuple[Path, Path]):
    lfae, dm = pair
    assert error_of(dm, lfae) == f"{dm} is a DM checkpoint, expected an LFAE; were the two files swapped?"
    assert "is an LFAE checkpoint, expected a DM" in error_of(lfae, lfae)
    assert "is a DM checkpoint, expected an LFAE" in error_of(dm, dm)


def test_checkpoints_of_something_else(tmp_path: Path, pair: tuple[Path, Path], states: dict[str, State]):
    other = tmp_path / "other.pth"
    torch.save({"resnet": {"w": torch.ones(1)}, "conv.weight": torch.ones(1), "fc.bias": torch.ones(1)}, other)
    assert f"{other} is not an LFAE checkpoint: it lacks generator and region_predictor and bg_predictor; " in error_of(
        other, pair[1]
    )
    assert "lacks diffusion; it holds conv, fc" in error_of(pair[0], other)
    torch.save({}, other)
    assert "it holds no weights" in error_of(pair[0], other)
    torch.save({part: states[part] for part in LFAE_PARTS[:2]}, other)
    assert "it lacks bg_predictor; it holds generator, region_predictor" in error_of(other, pair[1])
    unet = {k.removeprefix("denoise_fn."): v for k, v in states["diffusion"].items() if k.startswith("denoise_fn.")}
    torch.save(unet, other)
    assert "lacks diffusion" in error_of(pair[0], other)


def test_ambiguous_or_odd_entries(tmp_path: Path, pair: tuple[Path, Path], states: dict[str, State]):
    lfae, path = pair[0], tmp_path / "odd.pth"
    diffusion = states["diffusion"]
    torch.save({"diffusion": diffusion, **diffusion}, path)
    assert "two diffusion models" in error_of(lfae, path)
    torch.save({"diffusion": {**diffusion, "module.betas": diffusion["betas"]}}, path)
    assert "diffusion.betas is there twice" in error_of(lfae, path)
    torch.save({"diffusion": {**diffusion, "betas": 3}}, path)
    assert "'betas' is a int, expected named tensors" in error_of(lfae, path)
    torch.save({"diffusion": [diffusion]}, path)
    assert "diffusion is a list, expected a state dict" in error_of(lfae, path)


ALTERED = [
    ("generator", "first.conv.weight"),
    ("generator", "down_blocks.1.norm.running_var"),
    ("generator", "pixelwise_flow_predictor.hourglass.decoder.up_blocks.1.conv.bias"),
    ("generator", "pixelwise_flow_predictor.mask.weight"),
    ("generator", "bottleneck.r1.norm2.num_batches_tracked"),
    ("region_predictor", "regions.weight"),
    ("region_predictor", "down.weight"),
    ("bg_predictor", "encoder.down_blocks.3.conv.weight"),
    ("diffusion", "denoise_fn.init_conv.bias"),
    ("diffusion", "denoise_fn.downs.1.0.block1.proj.weight"),
    ("diffusion", "denoise_fn.ups.0.4.weight"),
    ("diffusion", "denoise_fn.init_temporal_attn.fn.fn.fn.rotary_emb.freqs"),
    ("diffusion", "denoise_fn.final_conv.1.weight"),
    ("diffusion", "betas"),
    ("diffusion", "posterior_mean_coef2"),
]


def size_of(part: str, states: dict[str, State]) -> int:
    return sum(len(states[p]) for p in (LFAE_PARTS if part in LFAE_PARTS else ("diffusion",)))


@pytest.mark.parametrize(("part", "key"), ALTERED)
def test_a_missing_key_is_named(part: str, key: str, tmp_path: Path, states: dict[str, State]):
    message = error_of(*save(tmp_path, edited(states, part, key, None)))
    assert f"1 of {size_of(part, states)} keys are missing: {part}.{key}; " in message


@pytest.mark.parametrize(("part", "key"), ALTERED)
def test_a_wrong_shape_is_named_with_both_shapes(part: str, key: str, tmp_path: Path, states: dict[str, State]):
    shape = list(states[part][key].shape)
    wrong = torch.ones([*shape[:-1], shape[-1] + 1] if shape else [2])
    message = error_of(*save(tmp_path, edited(states, part, key, wrong)))
    assert f"1 of {size_of(part, states)} tensors have a wrong shape: " in message
    assert f"{part}.{key} is {list(wrong.shape)}, expected {shape}; " in message


@pytest.mark.parametrize("name", ["small", "upconv"])
def test_recognition_takes_no_single_odd_tensor_for_the_truth(name: str):
    """Whichever is wrong, the comparison that follows must name that one."""
    config, states = CONFIGS[name], random_states(CONFIGS[name])
    lfae = {f"{part}.{k}": tuple(v.shape) for part in LFAE_PARTS for k, v in states[part].items()}
    dm = {f"diffusion.{k}": tuple(v.shape) for k, v in states["diffusion"].items()}
    unet = "diffusion.denoise_fn"
    alone = {  # nothing else shows these numbers
        "bg_predictor.fc.weight",
        f"{unet}.time_rel_pos_bias.relative_attention_bias.weight",
        f"{unet}.init_conv.weight",
    }

    def odd_ones(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, tuple[int, ...]]]:
        for key in set(shapes) - alone:
            for axis in range(len(shapes[key])):
                yield key, tuple(size + (i == axis) for i, size in enumerate(shapes[key]))

    for key, shape in odd_ones(lfae):
        assert recognize_lfae({**lfae, key: shape}, "x", region_pad=config.lfae.region_pad) == config.lfae, (key, shape)
    for key, shape in odd_ones(dm):
        assert recognize_dm({**dm, key: shape}, "x") == config.dm, (key, shape)


def test_many_missing_and_unexpected_keys_are_counted(tmp_path: Path, states: dict[str, State]):
    gone = [key for key in states["generator"] if key.startswith("down_blocks.0.norm")]
    broken = {**states, "generator": {k: v for k, v in states["generator"].items() if k not in gone}}
    broken["generator"] |= {"teacher.weight": torch.ones(1), "teacher.bias": torch.ones(1)}
    message = error_of(*save(tmp_path, broken))
    total = size_of("generator", states)
    assert (
        f"5 of {total} keys are missing: generator.{gone[0]}, generator.{gone[1]}, generator.{gone[2]} and 2 more"
        in message
    )
    assert f"2 of {total - 3} keys are unexpected: generator.teacher.weight, generator.teacher.bias" in message


def test_whole_blocks_missing(tmp_path: Path, states: dict[str, State]):
    without = {k: v for k, v in states["diffusion"].items() if not k.startswith("denoise_fn.downs.1.")}
    message = error_of(*save(tmp_path, {**states, "diffusion": without}))
    assert (
        "all keys diffusion.denoise_fn.downs.1.* are missing, although diffusion.denoise_fn.downs.2.* is there"
        in message
    )
    without = {k: v for k, v in states["generator"].items() if not k.startswith("down_blocks.")}
    assert "all keys generator.down_blocks.0.* are missing" in error_of(
        *save(tmp_path, {**states, "generator": without})
    )
    without = {k: v for k, v in states["diffusion"].items() if k.startswith("denoise_fn.")}
    assert "diffusion.betas is missing" in error_of(*save(tmp_path, {**states, "diffusion": without}))


def test_levels_that_disagree_are_named(tmp_path: Path, states: dict[str, State]):
    def widened(prefix: str, channels: int) -> dict[str, State]:
        return {
            **states,
            "generator": {
                k: torch.ones(channels, *v.shape[1:]) if k.startswith(prefix) and v.ndim else v
                for k, v in states["generator"].items()
            },
        }

    message = error_of(*save(tmp_path, widened("down_blocks.0.", 24)))
    assert "generator.down_blocks.0 gives 24 channels, expected 16" in message
    assert "the 8 of generator.first" in message
    unet = {
        k: torch.ones(20, *v.shape[1:]) if k.startswith(("denoise_fn.downs.1.0.", "denoise_fn.downs.1.1.")) else v
        for k, v in states["diffusion"].items()
    }
    message = error_of(*save(tmp_path, {**states, "diffusion": unet}))
    assert "diffusion.denoise_fn.downs.1 has 20 channels, expected a multiple of the first 8" in message


@pytest.mark.parametrize("outputs", [2, 8])
def test_a_background_predictor_that_is_not_affine(outputs: int, tmp_path: Path, states: dict[str, State]):
    wrong = edited(states, "bg_predictor", "fc.weight", torch.ones(outputs, 12))
    message = error_of(*save(tmp_path, edited(wrong, "bg_predictor", "fc.bias", torch.ones(outputs))))
    assert (
        f"the background predictor gives {outputs} numbers (bg_predictor.fc), expected the 6 of an affine motion"
        in message
    )


@pytest.mark.parametrize(("shape", "words"), [((32, 3), "has 3 heads"), ((30, 2), "position_buckets must be")])
def test_impossible_attention(shape: tuple[int, int], words: str, tmp_path: Path, states: dict[str, State]):
    key = "denoise_fn.time_rel_pos_bias.relative_attention_bias.weight"
    assert words in error_of(*save(tmp_path, edited(states, "diffusion", key, torch.ones(shape))))


def test_a_pair_that_does_not_fit(tmp_path: Path, pair: tuple[Path, Path]):
    other = random_states(CONFIGS["half resolution"])
    (tmp_path / "other").mkdir()
    message = error_of(pair[0], save(tmp_path / "other", other)[1])
    assert "do not fit each other: the LFAE gives features of 32 channels, the DM expects 16" in message
    assert "trained together" in message


# Values that cannot be


@pytest.mark.parametrize(
    ("part", "key"),
    [("generator", "final.weight"), ("bg_predictor", "fc.bias"), ("diffusion", "denoise_fn.final_conv.1.bias")],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float, part: str, key: str, tmp_path: Path, states: dict[str, State]):
    broken = states[part][key].clone()
    broken.view(-1)[0] = value
    message = error_of(*save(tmp_path, edited(states, part, key, broken)))
    assert f"{part}.{key} holds 1 values of {broken.numel()} that are NaN or infinite" in message


def test_a_double_too_large_for_float32(tmp_path: Path, states: dict[str, State]):
    broken = edited(states, "generator", "final.bias", torch.full((3,), 1e300, dtype=torch.float64))
    assert "generator.final.bias holds 3 values of 3" in error_of(*save(tmp_path, broken))


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_types_that_are_no_weights(dtype: torch.dtype, tmp_path: Path, states: dict[str, State]):
    broken = edited(states, "diffusion", "denoise_fn.init_conv.bias", torch.ones(8, dtype=dtype))
    assert f"init_conv.bias has dtype {dtype}, expected a floating-point type" in error_of(*save(tmp_path, broken))


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("alphas_cumprod", torch.linspace(1.0, 0.1, 20), "expected between 0 and 1"),
        ("alphas_cumprod", torch.linspace(0.9, 0.0, 20), "expected between 0 and 1"),
        ("alphas_cumprod", torch.linspace(0.1, 0.9, 20), "rises at step 1, expected to fall"),
        ("alphas_cumprod_prev", torch.linspace(0.9, 0.1, 20), "is not alphas_cumprod of the step before"),
        ("betas", torch.full((20,), float("nan")), "diffusion.betas holds 20 values of 20"),
    ],
)
def test_a_schedule_that_is_none(name: str, values: Tensor, words: str, tmp_path: Path, states: dict[str, State]):
    assert words in error_of(*save(tmp_path, edited(states, "diffusion", name, values)))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_small_file_cannot_ask_for_much_memory(legacy: bool, tmp_path: Path, states: dict[str, State]):
    huge = edited(states, "generator", "first.conv.weight", torch.zeros(1).expand(10**6, 10**4, 7, 7))
    lfae, dm = save(tmp_path, huge, _use_new_zipfile_serialization=not legacy)
    assert lfae.stat().st_size < 10**6
    assert "declares 1,960,000" in error_of(lfae, dm)


@pytest.mark.parametrize("value", [torch.ones(8).to_sparse(), torch.ones(8, device="meta")])
def test_tensors_without_ordinary_storage(value: Tensor, tmp_path: Path, states: dict[str, State]):
    broken = edited(states, "diffusion", "denoise_fn.init_conv.bias", value)
    assert "expected an ordinary dense tensor" in error_of(*save(tmp_path, broken))


def test_nothing_is_written(tmp_path: Path, pair: tuple[Path, Path]):
    before = sorted(tmp_path.iterdir())
    load_model(*pair)
    error_of(pair[1], pair[0])
    assert sorted(tmp_path.iterdir()) == before


# The published sizes


@pytest.mark.parametrize(
    ("name", "lfae", "dm"),
    [
        ("mug128", LfaeConfig(), DmConfig()),
        ("natops128", LfaeConfig(region_pad=0), DmConfig(learned_null=True, upsample="upconv")),
    ],
)
def test_golden_checkpoints_load(
    name: str, lfae: LfaeConfig, dm: DmConfig, golden_checkpoints: dict[str, tuple[Path, Path]]
):
    model = load_model(*golden_checkpoints[name])
    assert model.config == LfdmConfig(lfae, dm)
    tensors = torch.load(golden_checkpoints[name][1], weights_only=True, mmap=True)["diffusion"]
    assert_holds(model.diffusion, tensors)


# What trainers add


@pytest.mark.parametrize("wrapper", ["ema", "net", "params_ema", "G"])
def test_networks_under_any_single_name(tmp_path: Path, states: dict[str, State], wrapper: str):
    lfae, dm = tmp_path / "lfae.pth", tmp_path / "dm.pth"
    torch.save({wrapper: {part: states[part] for part in LFAE_PARTS}, "epoch": 3}, lfae)
    torch.save({"checkpoint": {"state_dict": {"diffusion": states["diffusion"]}}, "args": {}}, dm)
    assert_holds(load_model(lfae, dm).diffusion, states["diffusion"])


def test_averaged_weights_beside_the_model_are_left_alone(tmp_path: Path, states: dict[str, State]):
    lfae, _ = save(tmp_path, states)
    averaged = {key: tensor * 0 for key, tensor in states["diffusion"].items()}
    torch.save({"ema": {"diffusion": averaged}, "model": {"diffusion": states["diffusion"]}}, tmp_path / "both.pth")
    assert_holds(load_model(lfae, tmp_path / "both.pth").diffusion, states["diffusion"])
    torch.save({"ema": {"diffusion": averaged}, "raw": {"diffusion": averaged}}, tmp_path / "two.pth")
    assert "holds networks under ema and under raw; keep one of them" in error_of(lfae, tmp_path / "two.pth")


def test_an_unknown_prefix_within_a_wrapper_is_named(tmp_path: Path, states: dict[str, State]):
    lfae, _ = save(tmp_path, states)
    lightning = {f"model.diffusion.{key}": tensor for key, tensor in states["diffusion"].items()}
    torch.save({"state_dict": lightning}, tmp_path / "lightning.pth")
    assert "its keys begin with 'model.', an unknown wrapper" in error_of(lfae, tmp_path / "lightning.pth")


@pytest.mark.parametrize(
    "value",
    [
        dt.datetime(2020, 1, 1),
        dt.timedelta(days=1),
        decimal.Decimal("1.5"),
        fractions.Fraction(1, 2),
        uuid.UUID(int=1),
        types.SimpleNamespace(a=1),
        collections.deque([1]),
        range(3),
        int,
        ...,
        PureWindowsPath("c:/x"),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_values_beside_the_weights_do_not_matter(
    tmp_path: Path, states: dict[str, State], value: object, protocol: int
):
    lfae, dm = save(tmp_path, states)
    torch.save({"diffusion": states["diffusion"], "settings": {"value": value}}, dm, pickle_protocol=protocol)
    assert_holds(load_model(lfae, dm).diffusion, states["diffusion"])


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (bz2.compress(b"x"), "a bzip2 archive; unpack it first"),
        (lzma.compress(b"x"), "an xz archive; unpack it first"),
        (b"\x89HDF\r\n\x1a\n" + bytes(9), "an HDF5 file"),
        (bytes(257) + b"ustar" + bytes(99), "a tar archive; unpack it first"),
        (bytes(2000), "of an unknown kind: it begins with zeros only; fetch it again"),
    ],
)
def test_other_files_are_named(pair: tuple[Path, Path], data: bytes, kind: str):
    pair[1].write_bytes(data)
    assert f"{pair[1]} is not a checkpoint but {kind}" in error_of(*pair)
