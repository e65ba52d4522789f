from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lfdm_export import Clip, Pipeline
from lfdm_export.bundle.reader import Bundle
from lfdm_export.bundle.writer import BundleWriter
from lfdm_export.engines.interface import KeepsState
from lfdm_export.engines.onnxruntime import engine as ort_engine
from lfdm_export.engines.onnxruntime.target import PROVIDERS
from lfdm_export.errors import BundleError, EngineError, InputError
from lfdm_export.pictures.clip_files import save_clip
from lfdm_export.pictures.preprocess import to_float
from lfdm_export.sampling import loop
from lfdm_export.sampling.noise import START, seeded_noise
from lfdm_export.sampling.options import SamplingOptions
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.sampling.tables import sampler_table
from lfdm_models.schedule import cosine_schedule
from tests.closeness import assert_same_floats
from tests.fake_bundle import (
    CHUNK,
    EMBEDDINGS,
    FRAMES,
    LABELS,
    LATENT,
    NULL,
    SIZE,
    TRAINING_STEPS,
    WIDTH,
    fake_manifest,
    predicted_noise,
    update,
    write_fake_bundle,
    write_graphs,
)

SHAPE = (3, FRAMES, LATENT, LATENT)
SCHEDULE = cosine_schedule(TRAINING_STEPS)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("pipeline") / "fake")


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> Pipeline:
    return Pipeline.open(bundle, threads=1)


def photo(batch: int = 0, seed: int = 0) -> NDArray[np.uint8]:
    shape = (SIZE, SIZE, 3)
    return np.random.default_rng(seed).integers(0, 256, (batch, *shape) if batch else shape, np.uint8)


def reference_latent(
    images: NDArray[np.uint8],
    embeddings: NDArray[np.float32],
    seeds: tuple[int, ...],
    table: SamplerTable,
    scale: float,
) -> NDArray[np.float32]:
    """Compute the expected result of the fake graphs in NumPy."""
    blocks = to_float(images).reshape(len(images), 3, LATENT, SIZE // LATENT, LATENT, SIZE // LATENT)
    context = blocks.mean(axis=(3, 5))

    def step(noisy_latent: Any, timestep: Any, history: Any, noise: Any, coefficients: Any) -> Any:
        predicted = predicted_noise(noisy_latent, context, embeddings, timestep, scale)
        return update(noisy_latent, predicted, history, noise, coefficients)

    source = seeded_noise(seeds, SHAPE)
    return loop.sample(step, table, source(START), source)


def reference_frames(images: NDArray[np.uint8], latent: NDArray[np.float32]) -> NDArray[np.float32]:
    level = latent.mean(axis=(1, 3, 4))[:, None, :, None, None]
    return to_float(images)[:, :, None] / 2 + 0.25 + level / 4


# ------------------------------------------------------------------------------------- one generation


def test_a_clip_is_what_the_stages_make(pipe: Pipeline):
    image = photo()
    clip = pipe.generate(image, label="happiness", steps=4, eta=0.5, seed=7)
    table = sampler_table("ddim", SCHEDULE, 4, 0.5)
    expected = reference_latent(image[None], EMBEDDINGS[1:2], (7,), table, 1.0)
    np.testing.assert_allclose(clip.latent, expected, atol=1e-5)
    frames = reference_frames(image[None], clip.latent)
    assert clip.frames.shape == clip.warped.shape == (1, FRAMES, SIZE, SIZE, 3)
    assert clip.frames.dtype == clip.warped.dtype == np.uint8
    expected_u8 = (np.clip(frames, 0, 1) * 255).transpose(0, 2, 3, 4, 1)
    assert np.abs(clip.frames - np.floor(expected_u8)).max() <= 1
    warped = (to_float(image[None]) * to_float(image[None]).mean() * 255).transpose(0, 2, 3, 1)
    assert np.abs(clip.warped - np.floor(warped)[:, None]).max() <= 1
    np.testing.assert_array_equal(clip.source, image[None])
    assert (clip.labels, clip.seeds, clip.residual_flow) == (("happiness",), (7,), False)
    assert np.ptp(clip.latent.mean(axis=(1, 3, 4))) > 1e-3, "frames must differ, or chunk order is not tested"


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++2m", "unipc"])
def test_every_sampler_takes_its_own_defaults(pipe: Pipeline, sampler: str):
    steps, eta = (4, None) if sampler == "ddim" else (None, None)  # the manifest's default is 4 steps of DDIM
    clip = pipe.generate(photo(), label="Anger", sampler=sampler, seed=0)
    table = sampler_table(sampler, SCHEDULE, steps, eta)
    expected = reference_latent(photo()[None], EMBEDDINGS[:1], (0,), table, 1.0)
    np.testing.assert_allclose(clip.latent, expected, atol=2e-5)


def test_defaults_come_from_the_manifest(tmp_path: Path):
    defaults = SamplingOptions("unipc", steps=3, guidance_scale=0.0)
    pipe = Pipeline.open(write_fake_bundle(tmp_path / "x", fake_manifest(sampler=defaults)))
    expected = pipe.generate(photo(), label="Anger", sampler="unipc", steps=3, guidance_scale=0.0, seed=0)
    np.testing.assert_array_equal(pipe.generate(photo(), label="Anger", seed=0).latent, expected.latent)
    assert pipe.sampler_table("ddim").steps == 10, "the default steps are those of the default sampler alone"
    assert pipe.sampler_table(steps=5).steps == 5


@pytest.mark.parametrize(
    ("scale", "stage", "row", "weight"),
    [(1.0, "step", EMBEDDINGS[2], 1.0), (0.0, "step", NULL, 1.0), (2.5, "step_guided", EMBEDDINGS[2], 2.5)],
)
def test_guidance_takes_the_right_stage(
    bundle: Bundle, scale: float, stage: str, row: NDArray[np.float32], weight: float
):
    pipe = Pipeline.open(bundle)
    clip = pipe.generate(photo(), label="turn left", guidance_scale=scale, seed=0)
    assert set(pipe.stages.loaded) == {"encode", stage, "decode"}
    table = sampler_table("ddim", SCHEDULE, 4, 1.0)
    expected = reference_latent(photo()[None], row[None], (0,), table, weight)
    np.testing.assert_allclose(clip.latent, expected, atol=1e-5)


def test_engines_are_loaded_once(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    loaded: list[str] = []
    real = ort_engine._load

    def counting(path: Path, *args: Any, **options: Any) -> Any:
        loaded.append(path.stem)
        return real(path, *args, **options)

    monkeypatch.setattr(ort_engine, "_load", counting)
    pipe = Pipeline.open(bundle)
    assert loaded == [], "nothing before it is needed"
    for _ in range(2):
        pipe.generate(photo(), label="Anger")
    assert loaded == ["encode", "step", "decode"]


# -------------------------------------------------------------------------------------------- noise


def test_handed_noise_is_taken_in_order(pipe: Pipeline):
    rng = np.random.default_rng(11)
    table = pipe.sampler_table("ddim", 4, 1.0)
    draws = [rng.standard_normal((1, *SHAPE), np.float32) for _ in range(1 + int(table.draws_noise.sum()))]
    clip = pipe.generate(photo(), label="Anger", steps=4, eta=1.0, noise=iter(draws))
    context = pipe.encode(photo()).context

    def step(noisy_latent: Any, timestep: Any, history: Any, noise: Any, coefficients: Any) -> Any:
        predicted = predicted_noise(noisy_latent, context, EMBEDDINGS[:1], timestep)
        return update(noisy_latent, predicted, history, noise, coefficients)

    expected = loop.sample(step, table, draws[0], iter(draws[1:]))
    np.testing.assert_allclose(clip.latent, expected, atol=1e-5)
    assert clip.seeds is None


def test_noise_that_runs_out_or_does_not_fit(pipe: Pipeline):
    draw = np.zeros((1, *SHAPE), np.float32)
    with pytest.raises(InputError, match="draws ended before the noise of step 0"):
        pipe.generate(photo(), label="Anger", noise=iter([draw]))
    with pytest.raises(InputError, match="start is float32"):
        pipe.generate(photo(2), label="Anger", noise=iter([draw]))
    with pytest.raises(InputError, match="both seed and noise"):
        pipe.generate(photo(), label="Anger", noise=iter([draw]), seed=1)


def test_the_seed_decides(pipe: Pipeline):
    first, second, other = (pipe.generate(photo(), label="Anger", seed=seed).latent for seed in (3, 3, 4))
    np.testing.assert_array_equal(first, second)
    assert np.abs(first - other).max() > 0.1


# ------------------------------------------------------------------------------------------ batches


def test_samples_of_a_batch_do_not_depend_on_each_other(pipe: Pipeline):
    images = photo(3)
    labels = ("Anger", "turn left", "happiness")
    together = pipe.generate(images, label=labels, seed=(5, 9, 2), guidance_scale=1.5)
    for index, (label, seed) in enumerate(zip(labels, (5, 9, 2), strict=True)):
        alone = pipe.generate(images[index], label=label, seed=seed, guidance_scale=1.5)
        np.testing.assert_allclose(together.latent[index], alone.latent[0], atol=1e-6)
        assert np.abs(together.frames[index].astype(int) - alone.frames[0]).max() <= 1
    assert together.labels == labels
    assert together.seeds == (5, 9, 2)


def test_a_single_seed_counts_up(pipe: Pipeline):
    clip = pipe.generate(photo(), label=list(LABELS), seed=40)
    assert clip.seeds == (40, 41, 42)
    assert clip.labels == LABELS
    np.testing.assert_array_equal(clip.source, np.stack([photo()] * 3))
    alone = pipe.generate(photo(), label=LABELS[2], seed=42)
    np.testing.assert_allclose(clip.latent[2], alone.latent[0], atol=1e-6)


@pytest.mark.parametrize(
    ("images", "label", "seed", "batch"),
    [(0, "Anger", [1, 2, 3], 3), (2, "Anger", 0, 2), (0, ["Anger"] * 2, None, 2), (3, LABELS, [1, 2, 3], 3)],
)
def test_what_is_given_once_serves_all(pipe: Pipeline, images: int, label: Any, seed: Any, batch: int):
    clip = pipe.generate(photo(images), label=label, seed=seed)
    assert len(clip.frames) == len(clip.latent) == len(clip.source) == len(clip.warped) == batch
    assert clip.labels is not None
    assert clip.seeds is not None
    assert len(clip.labels) == len(clip.seeds) == batch


def test_batches_beyond_a_stages_largest_run_in_parts(pipe: Pipeline):
    largest = pipe.bundle.stages["decode"].batch[2]
    batch = largest + 1
    clip = pipe.generate(photo(), label="Anger", seed=list(range(batch)), guidance_scale=2.0)
    alone = pipe.generate(photo(), label="Anger", seed=batch - 1, guidance_scale=2.0)
    np.testing.assert_allclose(clip.latent[-1], alone.latent[0], atol=1e-6)
    assert np.abs(clip.frames[-1].astype(int) - alone.frames[0]).max() <= 1


def test_a_seed_that_is_not_given_is_drawn_and_told(pipe: Pipeline):
    first, second = (pipe.generate(photo(), label=["Anger", "happiness"], steps=2) for _ in range(2))
    assert first.seeds is not None
    assert first.seeds != second.seeds
    assert first.seeds[1] == first.seeds[0] + 1
    assert first.metadata(1)["seed"] == first.seeds[1]
    again = pipe.generate(photo(), label=["Anger", "happiness"], steps=2, seed=first.seeds[0])
    np.testing.assert_array_equal(again.latent, first.latent)
    encoded = pipe.encode(photo())
    assert (pipe.sample(encoded, EMBEDDINGS[0], steps=2) != pipe.sample(encoded, EMBEDDINGS[0], steps=2)).any()


# ------------------------------------------------------------------------------- conditions and input


def test_an_embedding_instead_of_a_label(pipe: Pipeline):
    by_label = pipe.generate(photo(), label=" HAPPINESS", seed=0)
    assert by_label.labels == ("happiness",)
    for embedding in (EMBEDDINGS[1], EMBEDDINGS[1:2], EMBEDDINGS[1].astype(np.float64), EMBEDDINGS[1].tolist()):
        by_embedding = pipe.generate(photo(), text_embedding=embedding, seed=0)
        np.testing.assert_array_equal(by_embedding.latent, by_label.latent)
        assert by_embedding.labels is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "found 0 of label, text and text_embedding"),
        ({"label": "Anger", "text_embedding": NULL}, "found 2 of label"),
        ({"label": "angr"}, "did you mean 'Anger'"),
        ({"label": 3}, "label is 3, expected a string"),
        ({"label": []}, "expected a string or a sequence"),
        ({"label": ["Anger", 3]}, "expected a string or a sequence"),
        ({"text": "jump"}, "no text encoder; give one of its labels .Anger, happiness, turn left."),
        ({"text_embedding": NULL * np.float32(np.nan)}, "text_embedding holds values that are not finite"),
        ({"text_embedding": NULL[:3]}, rf"text_embedding has shape \(3,\), expected \({WIDTH},\)"),
        ({"text_embedding": np.zeros((1, 1, WIDTH))}, "text_embedding has shape"),
        ({"text_embedding": np.zeros((0, WIDTH))}, "text_embedding has shape"),
        ({"text_embedding": "Anger"}, "not an array of numbers"),
        ({"text_embedding": [[1.0], [1.0, 2.0]]}, "not an array of numbers"),
        ({"text_embedding": np.zeros(WIDTH, complex)}, "not an array of numbers"),
        ({"label": "Anger", "steps": 0}, "steps: found 0"),
        ({"label": "Anger", "steps": TRAINING_STEPS}, f"steps: found {TRAINING_STEPS}"),
        ({"label": "Anger", "steps": 2.5}, "steps: found 2.5"),
        ({"label": "Anger", "eta": 1.5}, "eta: found 1.5"),
        ({"label": "Anger", "eta": float("nan")}, "eta is nan"),
        ({"label": "Anger", "sampler": "unipc", "eta": 0.5}, "has no eta"),
        ({"label": "Anger", "sampler": "euler"}, "sampler: found 'euler'"),
        ({"label": "Anger", "guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"label": "Anger", "guidance_scale": "much"}, "guidance_scale is 'much'"),
        ({"label": "Anger", "seed": -1}, "seed: found -1"),
        ({"label": "Anger", "seed": 1.5}, "seed is 1.5"),
        ({"label": "Anger", "seed": []}, r"seed is \[\]"),
        ({"label": "Anger", "seed": [1, 2.5]}, "seed: found 2.5"),
        ({"label": LABELS, "seed": [1, 2]}, "found 1 of images, 3 of labels, 2 of seeds"),
        ({"label": LABELS, "seed": [1]}, "found 1 seeds for 3 samples"),
    ],
)
def test_wrong_arguments(pipe: Pipeline, arguments: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        pipe.generate(photo(), **arguments)


def test_batches_that_do_not_agree(pipe: Pipeline):
    with pytest.raises(InputError, match="found 2 of images, 3 of labels"):
        pipe.generate(photo(2), label=LABELS)
    with pytest.raises(InputError, match="2 text embeddings for 3 images"):
        pipe.sample(pipe.encode(photo(3)), EMBEDDINGS[:2])


@pytest.mark.parametrize("kind", ["path", "pil", "array", "batch"])
def test_kinds_of_image(pipe: Pipeline, tmp_path: Path, kind: str):
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    image: Any = {
        "path": tmp_path / "photo.png",
        "pil": Image.fromarray(photo()),
        "array": photo(),
        "batch": photo()[None],
    }[kind]
    np.testing.assert_array_equal(pipe.generate(image, label="Anger").source, photo()[None])


def test_images_are_brought_to_the_models_size(pipe: Pipeline):
    wide = np.full((10, 40, 3), 200, np.uint8)
    source = pipe.generate(wide, label="Anger").source[0]
    assert source.shape == (SIZE, SIZE, 3)
    assert (source[:6] == 0).all()
    assert (source[6:10] == 200).all()
    assert (source[10:] == 0).all()


def test_an_image_that_is_none(pipe: Pipeline, tmp_path: Path):
    with pytest.raises(InputError, match="does not exist"):
        pipe.generate(tmp_path / "none.png", label="Anger")


def test_free_text(tmp_path: Path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    manifest = fake_manifest(with_text=True)
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "jump": 1, "high": 2}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    with BundleWriter(tmp_path / "x") as writer:
        write_graphs(writer.folder, manifest)
        (writer.folder / "tokenizer").mkdir()
        tokenizer.save(str(writer.folder / "tokenizer" / "tokenizer.json"))
        writer.write_embeddings(EMBEDDINGS, NULL)
        pipe = Pipeline.open(writer.finish(manifest))
    np.testing.assert_array_equal(pipe.embed_text(["jump", "jump high high"]), np.repeat([[1.0], [5.0]], WIDTH, axis=1))
    clip = pipe.generate(photo(), text="jump high", seed=0)
    expected = pipe.generate(photo(), text_embedding=np.full(WIDTH, 3.0), seed=0)
    np.testing.assert_array_equal(clip.latent, expected.latent)
    assert clip.labels == ("jump high",)


# ------------------------------------------------------------------------------- decode and motion


@pytest.mark.parametrize("frames", [1, CHUNK, FRAMES, 2 * FRAMES + 1])
def test_decode_takes_any_number_of_frames(pipe: Pipeline, frames: int):
    latent = np.random.default_rng(1).standard_normal((2, 3, frames, LATENT, LATENT), np.float32)
    images = photo(2)
    seen: list[tuple[str, int, int]] = []
    found, warped = pipe.decode(pipe.encode(images), latent, progress=lambda *report: seen.append(report))
    assert found.shape == warped.shape == (2, 3, frames, SIZE, SIZE)
    assert found.dtype == warped.dtype == np.float32
    np.testing.assert_allclose(found, reference_frames(images, latent), atol=1e-5)
    assert seen[0] == ("decode", 0, frames)
    assert seen[-1] == ("decode", frames, frames)


@pytest.mark.parametrize(
    ("latent", "message"),
    [
        (np.zeros((1, 3, 5, 4, 5), np.float32), r"latent has shape \(1, 3, 5, 4, 5\), expected \(1, 3, frames, 4, 4\)"),
        (np.zeros((2, 3, 5, 4, 4), np.float32), "latent has shape"),
        (np.zeros((1, 3, 0, 4, 4), np.float32), "latent has shape"),
        (np.zeros((3, 5, 4, 4), np.float32), "latent has shape"),
        (np.zeros((1, 3, 5, 4, 4)), "latent is float64"),
        (np.full((1, 3, 5, 4, 4), np.nan, np.float32), "values finite"),
    ],
)
def test_wrong_latents(pipe: Pipeline, latent: Any, message: str):
    with pytest.raises(InputError, match=message):
        pipe.decode(pipe.encode(photo()), latent)


@pytest.mark.parametrize("length", [1, 11])
def test_motion_is_absolute_frame_by_frame(pipe: Pipeline, length: int):
    image, driving = photo(), photo(length, seed=5)
    clip = pipe.transfer_motion(image, driving)
    difference = (to_float(driving) - to_float(image[None])).reshape(length, 3, LATENT, 4, LATENT, 4).mean(axis=(3, 5))
    np.testing.assert_allclose(clip.latent[0].transpose(1, 0, 2, 3), difference, atol=1e-6)
    frames = reference_frames(image[None], clip.latent)
    expected = np.floor(np.clip(frames, 0, 1) * 255).transpose(0, 2, 3, 4, 1)
    assert clip.frames.shape == (1, length, SIZE, SIZE, 3)
    assert np.abs(clip.frames - expected).max() <= 1
    assert (clip.labels, clip.seeds) == (None, None)


def test_motion_from_a_file(pipe: Pipeline, tmp_path: Path):
    driving = photo(4, seed=5)
    np.savez(tmp_path / "drive.npz", frames=driving)
    from_file = pipe.transfer_motion(photo(), tmp_path / "drive.npz")
    np.testing.assert_array_equal(from_file.latent, pipe.transfer_motion(photo(), driving).latent)


def test_motion_keeps_the_time_of_the_driving_clip(pipe: Pipeline, tmp_path: Path):
    drive = save_clip(tmp_path / "drive.webp", photo(24, seed=5), fps=24)
    clip = pipe.transfer_motion(photo(), drive)
    assert clip.frames.shape[1] == 24
    assert clip.fps == pytest.approx(24, abs=0.1)
    clip = pipe.transfer_motion(photo(), drive, fps=6)
    assert (clip.frames.shape[1], clip.fps) == (6, 6)
    assert clip.settings["made_by"] == "transfer_motion"
    assert pipe.transfer_motion(photo(), photo(3)).fps is None


def test_settings_say_what_was_sampled(pipe: Pipeline):
    clip = pipe.generate(photo(), label="anger", sampler="unipc", steps=3, guidance_scale=2, seed=9)
    found = clip.metadata(0)
    assert {name: found[name] for name in ("sampler", "steps", "eta", "guidance_scale", "label", "seed")} == {
        "sampler": "unipc", "steps": 3, "eta": None, "guidance_scale": 2.0, "label": "Anger", "seed": 9,
    }  # fmt: skip
    assert pipe.generate(photo(), label="anger", steps=2).settings["eta"] == pipe.bundle.manifest.sampler.eta


def test_wrong_motion(pipe: Pipeline, tmp_path: Path):
    with pytest.raises(InputError, match="takes one image, found a batch of 2"):
        pipe.transfer_motion(photo(2), photo(3))
    with pytest.raises(InputError, match=r"driving_clip has shape \(16, 16, 3\)"):
        pipe.transfer_motion(photo(), photo())
    with pytest.raises(InputError, match="does not exist"):
        pipe.transfer_motion(photo(), tmp_path / "none.gif")


def test_progress_tells_every_stage(pipe: Pipeline):
    seen: list[tuple[str, int, int]] = []
    pipe.generate(photo(), label="Anger", steps=3, progress=lambda *report: seen.append(report))
    stages = list(dict.fromkeys(stage for stage, _, _ in seen))
    assert stages == ["encode", "denoise", "decode"]
    for stage, total in (("encode", 1), ("denoise", 3), ("decode", FRAMES)):
        done = [count for name, count, all_of_it in seen if name == stage and all_of_it == total]
        assert done == sorted(done)
        assert (done[0], done[-1]) == (0, total)


# ------------------------------------------------------------------------------------------- failures


def test_a_path_is_checked_by_hash(bundle: Bundle, tmp_path: Path):
    copy = write_fake_bundle(tmp_path / "x")
    assert Pipeline.open(str(copy.path)).bundle.labels == LABELS
    graph = copy.stage_path("decode")
    data = bytearray(graph.read_bytes())
    data[-1] ^= 1
    graph.write_bytes(data)
    with pytest.raises(BundleError, match=r"onnx/decode\.onnx was altered"):
        Pipeline.open(copy.path)


def test_values_that_are_not_finite_stop_at_once(tmp_path: Path):
    body = """
    next_latent = Log (noisy_latent)
    next_history = Identity (history)
"""
    pipe = Pipeline.open(write_fake_bundle(tmp_path / "x", step=body))
    with pytest.raises(EngineError, match=r"step 1 of 4 gave values that are not finite.*lfdm-verify"):
        pipe.generate(photo(), label="Anger")


def test_on_a_gpu_the_state_stays_there(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    """The CPU runs under another device's name: the engine's own loop gives the same clip."""
    monkeypatch.setitem(PROVIDERS, "cuda", ("CPUExecutionProvider",))
    monkeypatch.setitem(ort_engine.MEMORY, "cuda", "cpu")
    monkeypatch.setattr(ort_engine, "require_on_gpu", lambda *_: None)
    arguments: dict[str, Any] = {"label": ["Anger", "happiness"], "eta": 1.0, "seed": 3}
    there, here = Pipeline.open(bundle, device="cuda"), Pipeline.open(bundle)
    for scale in (1.0, 2.5):
        found = there.generate(photo(), **arguments, guidance_scale=scale)
        expected = here.generate(photo(), **arguments, guidance_scale=scale)
        assert_same_floats(found.latent, expected.latent)
        assert np.abs(found.frames.astype(int) - expected.frames).max() <= 1
    for stage in ("step", "step_guided"):
        assert isinstance(there.stages.engine(stage), KeepsState)
        assert not isinstance(here.stages.engine(stage), KeepsState)


def test_wrong_number_of_tensors(pipe: Pipeline):
    with pytest.raises(EngineError, match="'encode' takes 1 inputs, found 0"):
        pipe.stages.run("encode")
    with pytest.raises(BundleError, match="no stage 'paint'"):
        pipe.stages.run("paint", photo())


def test_opening_needs_no_onnxruntime(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert Pipeline.open(bundle).sampler_table().steps == 4


# ------------------------------------------------------------------------------------------------ clip


@pytest.fixture(scope="module")
def clips(pipe: Pipeline) -> Clip:
    return pipe.generate(photo(2), label="Anger")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("clip.gif", ["clip-0.gif", "clip-1.gif"]),
        ("a.b/clip.webp", ["a.b/clip-0.webp", "a.b/clip-1.webp"]),
        ("sheets.png", ["sheets-0.png", "sheets-1.png"]),
        ("frames/", ["frames-0", "frames-1"]),
        ("clip.npz", ["clip.npz"]),
    ],
)
def test_a_batch_is_saved_one_by_one(clips: Clip, tmp_path: Path, name: str, expected: list[str]):
    written = clips.save(f"{tmp_path}/{name}")
    assert list(written) == [tmp_path / one for one in expected]
    assert all(path.exists() for path in written)


def test_saved_frames_are_the_clips(clips: Clip, tmp_path: Path):
    clips.save(tmp_path / "clip.npz")
    with np.load(tmp_path / "clip.npz") as archive:
        assert set(archive.files) == {"frames", "latent", "warped", "metadata"}
        np.testing.assert_array_equal(archive["frames"], clips.frames)
        np.testing.assert_array_equal(archive["latent"], clips.latent)
        np.testing.assert_array_equal(archive["warped"], clips.warped)
    folders = clips.save(f"{tmp_path}/frames/")
    for sample, folder in enumerate(folders):
        for index, path in enumerate(sorted(folder.iterdir())):
            np.testing.assert_array_equal(np.asarray(Image.open(path)), clips.frames[sample, index])


def test_panels_are_five_pictures_wide(pipe: Pipeline, tmp_path: Path):
    clip = pipe.generate(photo(), label="Anger")
    (path,) = clip.save(tmp_path / "clip.gif", panels=True, fps=5)
    with Image.open(path) as image:
        assert image.width == 5 * SIZE
        assert getattr(image, "n_frames", 1) == FRAMES
        assert image.info["duration"] == 200
    (plain,) = clip.save(tmp_path / "plain", format="gif")
    with Image.open(plain) as image:
        assert image.width == SIZE
    with pytest.raises(InputError, match="npz and motion files hold neither panels"):
        clip.save(tmp_path / "clip.npz", panels=True)


# --- Guidance on an interval -----------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "unipc"])
def test_guidance_acts_in_its_interval(pipe: Pipeline, sampler: str):
    def latent(scale: float, **options: Any) -> NDArray[np.float32]:
        common: dict[str, Any] = {"label": "turn left", "sampler": sampler, "steps": 4, "seed": 0}
        return pipe.generate(photo(), guidance_scale=scale, **common, **options).latent

    guided, plain = latent(2.0), latent(1.0)
    np.testing.assert_array_equal(latent(2.0, guidance_interval=(0, 1)), guided)
    np.testing.assert_array_equal(latent(2.0, guidance_interval=(0.99, 1)), plain)
    assert not np.array_equal(guided, plain)
    # Step by step, each with its own scale.
    times = sampler_table(sampler, SCHEDULE, 4).timesteps
    inside = (times / (TRAINING_STEPS - 1) >= 0.3) & (times / (TRAINING_STEPS - 1) <= 0.7)
    assert 0 < inside.sum() < 4
    found, embedding = latent(2.0, guidance_interval=(0.3, 0.7)), pipe.bundle.embedding("turn left")[None]
    context, steps = pipe.encode(photo()).context, iter(inside)

    def step(
        noisy_latent: NDArray[np.float32],
        timestep: NDArray[np.int64],
        history: NDArray[np.float32],
        noise: NDArray[np.float32],
        coefficients: NDArray[np.float32],
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        predicted = predicted_noise(noisy_latent, context, embedding, timestep, 2.0 if next(steps) else 1.0)
        return update(noisy_latent, predicted, history, noise, coefficients)

    source = seeded_noise([0], SHAPE)
    assert_same_floats(found, loop.sample(step, sampler_table(sampler, SCHEDULE, 4), source(START), source))


def test_the_interval_is_told(pipe: Pipeline):
    clip = pipe.generate(photo(), label="Anger", guidance_scale=2.0, guidance_interval=(0.2, 0.8))
    assert clip.settings["guidance_interval"] == [0.2, 0.8]
    assert "guidance_interval" not in pipe.generate(photo(), label="Anger", guidance_scale=2.0).settings


@pytest.mark.parametrize("interval", [(0.8, 0.2), (-0.1, 1), (0, 1.1), (0, float("nan")), (0.1,), "ab", 3])
def test_wrong_intervals(pipe: Pipeline, interval: Any):
    with pytest.raises(InputError, match="guidance_interval is"):
        pipe.generate(photo(), label="Anger", guidance_scale=2.0, guidance_interval=interval)


def test_the_unconditional_prediction_has_no_interval(pipe: Pipeline):
    with pytest.raises(InputError, match="which takes no guidance_interval"):
        pipe.generate(photo(), label="Anger", guidance_scale=0.0, guidance_interval=(0.3, 0.7))


def test_a_pipeline_says_why_it_cannot_be_pickled(pipe: Pipeline):
    for duplicate in (pickle.dumps, copy.deepcopy):
        with pytest.raises(TypeError, match="holds engines and cannot be pickled or copied; open the bundle in each"):
            duplicate(pipe)


@pytest.mark.parametrize("threads", ["1", 1.5, True, 0])
def test_threads_are_a_whole_number(bundle: Bundle, threads: Any):
    with pytest.raises(EngineError, match=f"threads is {threads!r}, expected 1 or more"):
        Pipeline.open(bundle, threads=threads).generate(photo(), label=LABELS[0], steps=1)
