from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfdm_export.bundle.reader import Bundle, fingerprint
from lfdm_export.bundle.writer import BundleWriter
from lfdm_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from lfdm_export.errors import BundleError, EngineError, InputError
from lfdm_export.parity.report.checks import CHAIN, Check
from lfdm_export.parity.report.model import Report
from lfdm_export.parity.verify import verify_bundle
from lfdm_export.reference.inputs import CHAIN_OPTIONS
from lfdm_export.stages import stage_specs
from lfdm_models.model import LfdmModel
from lfdm_models.text import BertTextEncoder
from tests.fake_bundle import write_fake_bundle
from tests.test_imports import BLOCKER

pytestmark = pytest.mark.usefixtures("loaded_once")
EVERY_SUBJECT = {
    "latent, largest error", "latent, mean error", "flow, largest error", "flow, mean error",
    "occlusion, largest error", "occlusion, mean error", "frames, largest error", "frames, PSNR",
    "frames, share beyond 1 level", "warped, largest error", "warped, PSNR", "warped, share beyond 1 level",
}  # fmt: skip


@pytest.fixture(scope="module")
def report(small_bundle: Bundle, loaded_once: None) -> Report:
    return verify_bundle(small_bundle, threads=1)


@pytest.fixture
def copy(small_bundle: Bundle, tmp_path: Path) -> Path:
    """A copy of the bundle that a test may damage."""
    return shutil.copytree(small_bundle.path, tmp_path / "copy")


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    edit(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")


def rehash(folder: Path) -> Bundle:
    """The bundle with hashes that fit its changed files, as if it had been exported so."""

    def renew(manifest: dict[str, Any]) -> None:
        manifest["files"] = {
            name: dataclasses.asdict(fingerprint(folder / name))
            for name in manifest["files"]
            if (folder / name).exists()
        }

    edit_manifest(folder, renew)
    return Bundle.open(folder)


def spoil(path: Path, change: Callable[[np.ndarray], object]) -> None:
    """Change the float32 weights of an external data file."""
    weights = np.fromfile(path, np.float32)
    change(weights)
    weights.tofile(path)


def scale(weights: np.ndarray) -> None:
    weights *= np.float32(1.05)


def failing(report: Report, kind: str | None = None) -> set[str]:
    return {check.stage for check in report.failures if kind in (None, check.kind)}


def the(report: Report, stage: str, kind: str) -> Check:
    return next(check for check in report.checks if (check.stage, check.kind) == (stage, kind))


# -------------------------------------------------------------------------------------------- a pass


def test_a_faithful_export_passes_everything(report: Report, small_bundle: Bundle):
    assert report.failures == ()
    assert report.passed
    for spec in small_bundle.stages.values():
        kinds = [check.kind for check in report.checks if check.stage == spec.name]
        outputs = len(spec.outputs)
        assert kinds == ["interface", *["finite"] * outputs, *["values"] * outputs, *["batch"] * outputs]
        for kind in ("finite", "values", "batch"):
            subjects = [c.subject for c in report.checks if c.stage == spec.name and c.kind == kind]
            assert subjects == [tensor.name for tensor in spec.outputs]
    assert {check.subject for check in report.checks if check.stage == CHAIN} == EVERY_SUBJECT
    assert len(report.steps) == 10
    assert [step.timestep for step in report.steps] == sorted((step.timestep for step in report.steps), reverse=True)
    assert all(step.max_abs is not None and step.mean_abs is not None for step in report.steps)


def test_numbers_are_measured(report: Report):
    check = the(report, "decode", "values")
    assert check.found is not None
    assert check.allowed == 1e-4
    assert check.max_abs is not None
    assert check.mean_abs is not None
    assert check.scale is not None
    assert 0 < check.mean_abs < check.max_abs
    assert check.found == check.max_abs / max(1, check.scale)
    assert check.compared == 65_536


def test_the_report_names_its_origin(report: Report, small_bundle: Bundle):
    assert report.bundle == "bundle"
    assert report.precision == "fp32"
    assert report.provenance == small_bundle.manifest.provenance
    assert report.exported_with["torch"]
    assert report.environment["onnxruntime"]
    assert report.environment["threads"] == "1"
    assert "torch" not in report.environment, "it was not used"
    assert "stored in the bundle" in report.reference
    assert report.pictures is not None
    assert report.pictures.frames == (0, 5, 9)
    assert report.pictures.panels.shape == (3, 64, 5 * 64, 3)
    assert report.sampler == "ddim, 10 steps, eta 1, guidance 1"


def test_against_the_model_itself(small_bundle: Bundle, small_model: LfdmModel, report: Report):
    found = verify_bundle(small_bundle.path, model=small_model, seed=77, threads=1)
    assert found.passed
    assert found.seed == 77
    assert found.environment["torch"]
    whole, thinned = the(found, "decode", "values"), the(report, "decode", "values")
    assert whole.compared == 2 * 3 * 8 * 64 * 64 > thinned.compared
    assert whole.mean_abs != thinned.mean_abs, "other inputs"


def test_fresh_seeds_differ(small_bundle: Bundle, small_model: LfdmModel, monkeypatch: pytest.MonkeyPatch):
    seeds: list[int] = []

    def no_reference(*arguments: Any, seed: int, **more: Any) -> Any:
        seeds.append(seed)
        raise KeyboardInterrupt

    monkeypatch.setattr("lfdm_export.reference.pytorch.make_reference", no_reference)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            verify_bundle(small_bundle, model=small_model)
    assert seeds[0] != seeds[1]


def test_progress(small_bundle: Bundle):
    seen: list[tuple[str, int, int]] = []
    verify_bundle(small_bundle, threads=1, progress=lambda *call: seen.append(call))
    assert list(dict.fromkeys(name for name, _, _ in seen)) == ["stages", "sample", "decode"]
    for name in ("stages", "sample", "decode"):
        done = [(count, total) for stage, count, total in seen if stage == name]
        assert done == sorted(done)
        assert done[-1][0] == done[-1][1]


def test_without_torch(small_bundle: Bundle):
    code = BLOCKER.format(optional={"torch", "onnx", "onnxscript", "safetensors", "transformers", "einops"}) + (
        "import pathlib\n"
        "from lfdm_export.parity.verify import verify_bundle\n"
        f"report = verify_bundle({str(small_bundle.path)!r}, threads=1)\n"
        "assert report.passed, report.failures\n"
        "assert 'torch' not in sys.modules\n"
        "print(report.verdict)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "checks passed" in done.stdout


# ----------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    ("data", "stages"),
    [
        ("decode.data", {"decode", CHAIN}),
        ("encode.data", {"encode", CHAIN}),
        ("estimate_motion.data", {"estimate_motion"}),
        ("unet.data", {"denoise", "denoise_guided", "step", "step_guided", CHAIN}),
    ],
)
def test_other_weights_fail_where_they_are_used(copy: Path, data: str, stages: set[str]):
    spoil(copy / "onnx" / data, scale)
    report = verify_bundle(rehash(copy), threads=1)
    assert not report.passed
    assert failing(report) == stages
    for check in report.failures:
        assert check.kind in ("values", "clip")
        assert check.found is not None
        assert check.allowed is not None
        assert check.found < check.allowed if check.at_least else check.found > check.allowed
        assert check.meaning
    assert all(stage in report.verdict for stage in stages)


def test_a_bundle_altered_without_new_hashes_is_not_opened(copy: Path):
    spoil(copy / "onnx" / "decode.data", scale)
    with pytest.raises(BundleError, match=r"decode\.data was altered"):
        verify_bundle(copy)


def test_nan_weights_are_found_before_values(copy: Path):
    def break_some(weights: np.ndarray) -> None:
        weights[: len(weights) // 2] = np.nan

    spoil(copy / "onnx" / "encode.data", break_some)
    report = verify_bundle(rehash(copy), threads=1)
    assert failing(report, "finite") == {"encode", CHAIN}
    check = next(check for check in report.failures if check.stage == "encode")
    assert check.found is not None
    assert check.found > 0
    assert "NaN" in check.meaning
    compared = {check.subject for check in report.checks if check.stage == "encode" and check.kind == "values"}
    assert not compared & {check.subject for check in report.failures}
    assert [step.max_abs for step in report.steps] == [None], "sampling stops at the first latent that is not finite"
    assert report.pictures is None


def test_a_swapped_stage_is_found_by_its_names(copy: Path):
    shutil.copyfile(copy / "onnx" / "decode.onnx", copy / "onnx" / "estimate_motion.onnx")
    report = verify_bundle(rehash(copy), threads=1)
    assert failing(report) == {"estimate_motion"}
    (check,) = report.failures
    assert check.kind == "interface"
    assert "is not the stage 'estimate_motion': its inputs are image, skip_0" in check.meaning


def test_a_clip_that_cannot_be_made_is_a_failure(copy: Path, small_bundle: Bundle):
    shutil.copyfile(copy / "onnx" / "decode.onnx", copy / "onnx" / "encode.onnx")
    report = verify_bundle(rehash(copy), threads=1)
    assert failing(report) == {"encode", CHAIN}
    assert "no clip can be sampled" in the(report, CHAIN, "clip").meaning
    shutil.copyfile(copy / "onnx" / "step.onnx", copy / "onnx" / "decode.onnx")
    shutil.copyfile(small_bundle.stage_path("encode"), copy / "onnx" / "encode.onnx")
    report = verify_bundle(rehash(copy), threads=1)
    assert failing(report) == {"decode", CHAIN}
    assert len(report.steps) == 10
    last = [check for check in report.checks if check.stage == CHAIN][-1]
    assert "the clip cannot be decoded" in last.meaning


def test_no_graph_at_all(copy: Path):
    (copy / "onnx" / "encode.onnx").write_bytes(b"no graph")
    with pytest.raises(BundleError, match=r"encode\.onnx"):
        rehash(copy)


def test_samples_that_affect_each_other_are_found(small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    real = OnnxRuntimeEngine.run

    def mixing(engine: OnnxRuntimeEngine, feeds: Any) -> Any:
        outputs: dict[str, Any] = dict(real(engine, feeds))
        if engine.spec.name == "denoise" and len(feeds["timestep"]) == 1:
            outputs["predicted_noise"] = np.add(outputs["predicted_noise"], np.float32(0.1))
        return outputs

    monkeypatch.setattr(OnnxRuntimeEngine, "run", mixing)
    report = verify_bundle(small_bundle, threads=1)
    (check,) = report.failures
    assert (check.stage, check.kind, check.subject) == ("denoise", "batch", "predicted_noise")
    assert "other samples of its batch" in check.meaning


def test_a_stage_that_takes_no_single_sample(small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    real = OnnxRuntimeEngine.run

    def refusing(engine: OnnxRuntimeEngine, feeds: Any) -> Any:
        if engine.spec.name == "denoise" and len(feeds["timestep"]) == 1:
            raise EngineError("only two")
        return real(engine, feeds)

    monkeypatch.setattr(OnnxRuntimeEngine, "run", refusing)
    (check,) = verify_bundle(small_bundle, threads=1).failures
    assert check.kind == "batch"
    assert "a single sample cannot be run: only two" in check.meaning


def test_a_wrong_sampler_fails_only_in_the_clip(small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    import lfdm_export.parity.chain as chain

    other = dataclasses.replace(CHAIN_OPTIONS, eta=0.5)
    monkeypatch.setattr(chain, "chain_table", lambda schedule, _provenance: other.table(schedule))
    report = verify_bundle(small_bundle, threads=1)
    assert failing(report) == {CHAIN}
    assert {check.subject for check in report.failures} >= {"latent, largest error", "latent, mean error"}


def test_the_manifests_tolerances_are_ignored(copy: Path):
    spoil(copy / "onnx" / "decode.data", scale)

    def loosen(manifest: dict[str, Any]) -> None:
        for stage in manifest["stages"]:
            stage["tolerance"] = {"fp32": 1e9}

    edit_manifest(copy, loosen)
    assert "decode" in failing(verify_bundle(rehash(copy), threads=1))


# ------------------------------------------------------------------------------------ what is missing


def test_neither_reference_nor_model(copy: Path):
    (copy / "reference.npz").unlink()
    bundle = rehash(copy)
    assert bundle.reference_path is None
    with pytest.raises(BundleError, match=r"holds no reference .* --lfae FILE --dm FILE, or --model"):
        verify_bundle(bundle)


def test_a_bundle_without_reference_is_verified_by_its_model(copy: Path, small_model: LfdmModel):
    (copy / "reference.npz").unlink()
    assert verify_bundle(rehash(copy), model=small_model, seed=1, threads=1).passed


def test_a_seed_with_a_stored_reference_is_refused(small_bundle: Bundle):
    with pytest.raises(InputError, match="seed is given"):
        verify_bundle(small_bundle, seed=3)


def test_another_model(small_bundle: Bundle, small_model: LfdmModel):
    other = dataclasses.replace(small_model, config=dataclasses.replace(small_model.config, residual_flow=False))
    with pytest.raises(InputError, match="residual_flow is False, expected True"):
        verify_bundle(small_bundle, model=other)


def test_another_seeds_weights_fail(small_bundle: Bundle):
    from lfdm_models.demo import untrained_model

    report = verify_bundle(small_bundle, model=untrained_model(seed=1), seed=0, threads=1)
    assert {"encode", "denoise", "step", "estimate_motion", CHAIN} <= failing(report)


def test_an_unknown_precision(tmp_path: Path):
    bundle = write_fake_bundle(tmp_path / "fake")

    def change(manifest: dict[str, Any]) -> None:
        manifest["precision"] = "fp4"
        for stage in manifest["stages"]:
            stage["tolerance"] = {"fp4": 1.0}

    edit_manifest(bundle.path, change)
    with pytest.raises(BundleError, match="precision 'fp4', for which this program knows no tolerances"):
        verify_bundle(bundle.path)


def test_provenance_that_strict_json_cannot_hold(copy: Path):
    edit_manifest(copy, lambda manifest: manifest["provenance"].update(loss=float("nan")))
    report = verify_bundle(copy, threads=1)
    assert report.provenance["loss"] == "NaN"
    assert Report.from_json(report.to_json()) == report


# --------------------------------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> BertTextEncoder:
    """A BERT with random weights, as wide as the small model's embeddings."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "person", "the", "right", "hand", "happiness"]
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=768,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder, config=config, do_lower_case=False)
    return BertTextEncoder(BertModel(config), tokenizer)


@pytest.fixture(scope="module")
def text_bundle(
    small_bundle: Bundle,
    small_model: LfdmModel,
    encoder: BertTextEncoder,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    """The small bundle with the stage `text`."""
    from lfdm_export.graphs import trace
    from lfdm_export.reference.pytorch import make_reference

    manifest = small_bundle.manifest
    specs = stage_specs(manifest.geometry, with_text=True)
    with BundleWriter(tmp_path_factory.mktemp("text") / "bundle") as writer:
        shutil.copytree(small_bundle.path / "onnx", writer.folder / "onnx", dirs_exist_ok=True)
        graph = trace.trace(encoder, specs["text"].inputs, specs["text"].outputs)
        trace.save({"text": graph}, writer.folder / "onnx", "text.data")
        writer.write_embeddings(small_bundle.embeddings, small_bundle.null_embedding)
        encoder.save_tokenizer(writer.folder / "tokenizer")
        writer.write_reference(make_reference(small_model, manifest.geometry, seed=5, text_encoder=encoder))
        return writer.finish(dataclasses.replace(manifest, stages=tuple(specs.values()), files={}))


def test_text_is_a_stage_like_the_others(text_bundle: Bundle):
    report = verify_bundle(text_bundle, threads=1)
    assert report.passed
    check = the(report, "text", "values")
    assert check.compared == 2 * 768
    assert check.scale is not None
    assert check.scale > 0.01


def test_another_text_encoder_fails(text_bundle: Bundle, tmp_path: Path):
    folder = shutil.copytree(text_bundle.path, tmp_path / "copy")
    spoil(folder / "onnx" / "text.data", scale)
    assert failing(verify_bundle(rehash(folder), threads=1)) == {"text"}


def test_the_text_encoder_is_required_with_the_model(
    text_bundle: Bundle, small_bundle: Bundle, small_model: LfdmModel, encoder: BertTextEncoder
):
    assert verify_bundle(text_bundle, model=small_model, text_encoder=encoder, seed=2, threads=1).passed
    with pytest.raises(InputError, match=r"has a text encoder .* give it beside the model"):
        verify_bundle(text_bundle, model=small_model)
    with pytest.raises(InputError, match=r"has no text encoder .* leave it out"):
        verify_bundle(small_bundle, model=small_model, text_encoder=encoder)
