from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lfdm_export import Bundle, InputError, Pipeline, export_bundle
from lfdm_export.cli.train import choose_settings, train_main
from lfdm_export.evaluation.distance import frechet_distance
from lfdm_export.evaluation.drawn import require_drawn_characters
from lfdm_export.evaluation.evaluate import evaluate_bundle
from lfdm_export.evaluation.report import JSON, MARKDOWN, markdown, write_evaluation
from lfdm_export.sampling.options import SamplingOptions
from lfdm_models.demo import untrained_model
from lfdm_models.training.classifier import (
    SHIPPED,
    ClassifierSettings,
    MotionClassifier,
    differences,
    load_classifier,
    save_classifier,
    shipped_classifier,
    train_classifier,
)
from lfdm_models.training.conditions import label_table
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.procedural import HELD_OUT_SEEDS, LABELS, sample_clip
from tests.closeness import assert_same_floats
from tests.fake_bundle import fake_manifest, write_fake_bundle

CLIPS = 1


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, traced_already: None) -> Bundle:
    """Of the untrained model, with labels of the procedural motions."""
    model = untrained_model()
    rows = label_table(LABELS[:3], 64)
    model.label_embeddings = {label: np.resize(row, model.config.dm.text_width) for label, row in rows.items()}
    folder = tmp_path_factory.mktemp("evaluate") / "bundle"
    return export_bundle(model, folder, frames=10, image_size=64, reference=False)


@pytest.fixture(scope="module")
def classifier() -> MotionClassifier:
    return shipped_classifier()


# --- The classifier --------------------------------------------------------------------------------


def test_the_shipped_classifier_knows_held_out_characters(classifier: MotionClassifier):
    assert SHIPPED.stat().st_size <= 1e6
    clips = [sample_clip(HELD_OUT_SEEDS[-1 - i], label=LABELS[i % len(LABELS)]) for i in range(48)]
    features, seen = classifier.judge(np.stack([clip.frames for clip in clips]))
    right = [LABELS[found] == clip.label for found, clip in zip(seen, clips, strict=True)]
    assert np.mean(right) >= 0.9
    assert features.shape == (48, 32)
    assert np.isfinite(features).all()


def test_other_sizes_and_lengths_are_judged_alike(classifier: MotionClassifier):
    clips = [sample_clip(HELD_OUT_SEEDS[i], size=96, frames=24, label=label) for i, label in enumerate(LABELS)]
    seen = classifier.judge(np.stack([clip.frames for clip in clips]))[1]
    assert np.mean([LABELS[found] == clip.label for found, clip in zip(seen, clips, strict=True)]) >= 0.75


def test_it_sees_changes_alone(classifier: MotionClassifier):
    frames = np.repeat(np.random.default_rng(0).integers(0, 255, (2, 1, 40, 40, 3), np.uint8), 5, axis=1)
    assert np.abs(differences(frames).numpy()).max() == 0
    as_floats = classifier.judge((frames / np.float32(255)).astype(np.float32))
    assert_same_floats(as_floats[0], classifier.judge(frames)[0])


def test_training_it_is_deterministic_and_it_learns(tmp_path: Path):
    settings = ClassifierSettings(clips=40, steps=60, image_size=32, frames=6)
    seen: list[tuple[int, int]] = []
    before = torch.get_rng_state()
    first = train_classifier(settings, lambda done, total: seen.append((done, total)))
    second = train_classifier(settings)
    assert torch.equal(before, torch.get_rng_state())
    assert seen[-1] == (100, 100)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in first.state_dict().items())
    save_classifier(first, tmp_path / "classifier.safetensors")
    again = load_classifier(tmp_path / "classifier.safetensors")
    assert again.labels == LABELS
    assert torch.equal(again.head.weight, first.head.weight)


def test_a_file_that_is_no_classifier_is_told(tmp_path: Path):
    path = tmp_path / "classifier.safetensors"
    for content in (b"nothing", b""):
        path.write_bytes(content)
        with pytest.raises(TrainingError, match="cannot be read as a classifier of motions"):
            load_classifier(path)
    with pytest.raises(ValueError, match="must be 1 or more"):
        ClassifierSettings(clips=0)


# --- The measures ----------------------------------------------------------------------------------


def test_the_distance_of_normal_features_is_known():
    rng = np.random.default_rng(0)
    first = rng.standard_normal((20_000, 2)).astype(np.float32)
    second = (first * [2, 1] + [3, 0]).astype(np.float32)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-6)
    # |3|^2 + (1 + 4 - 2 * 2) + (1 + 1 - 2)
    assert frechet_distance(first, second) == pytest.approx(10, rel=0.03)
    assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-5)


def test_an_evaluation_has_everything(bundle: Bundle, classifier: MotionClassifier, tmp_path: Path):
    told: list[str] = []
    pipeline = Pipeline(bundle, threads=1)
    settings = choose_settings("ddim,dpm++2m", "2,3", 0.0, None)
    found = evaluate_bundle(
        pipeline, classifier, settings, clips=CLIPS, seed=3, progress=lambda what, done, total: told.append(what)
    )
    assert found.labels == LABELS[:3]
    assert found.reconstruction.clips == 3 * CLIPS
    assert found.reconstruction.copied > 0
    assert set(found.reconstruction.by_label) == set(found.labels)
    assert [(one.setting.sampler, one.setting.steps) for one in found.generations] == [
        ("ddim", 2), ("ddim", 3), ("dpm++2m", 2), ("dpm++2m", 3),
    ]  # fmt: skip
    for one in found.generations:
        confusion = np.array(one.confusion)
        assert confusion.shape == (3, len(LABELS))
        assert confusion.sum() == one.clips == 3 * CLIPS
        right = [confusion[i, LABELS.index(label)] / CLIPS for i, label in enumerate(found.labels)]
        assert list(one.by_label.values()) == right
        assert one.accuracy == pytest.approx(np.mean(right))
        assert one.frechet > 0
        assert 0 <= one.still < 1
        assert one.seconds > 0
    assert {"reconstruction", "ddim 2", "dpm++2m 3"} <= set(told)
    again = evaluate_bundle(pipeline, classifier, settings[:1], clips=CLIPS, seed=3)
    assert dataclasses.replace(again.generations[0], seconds=0) == dataclasses.replace(found.generations[0], seconds=0)

    written = write_evaluation(found, tmp_path / "report")
    assert {JSON, MARKDOWN} <= {path.name for path in written}
    stored = json.loads((tmp_path / "report" / JSON).read_text(encoding="utf-8"))
    assert stored["generations"][1]["setting"] == {"sampler": "ddim", "steps": 3, "eta": 0.0, "guidance_scale": None}
    text = markdown(found)
    assert f"Measured on drawn characters that no training has seen: 1 of each of {', '.join(LABELS[:3])}, 10" in text
    assert f"**{found.reconstruction.ratio:.3f}**" in text
    assert "| ddim | 3 | 0 | default | 3 |" in text
    assert all(f"| {label} |" in text for label in found.labels)
    assert not list((tmp_path / "report").glob(".*.part"))


def test_copying_a_still_clip_costs_nothing_more(bundle: Bundle, classifier: MotionClassifier):
    reconstruction = evaluate_bundle(Pipeline(bundle, threads=1), classifier, (), clips=CLIPS).reconstruction
    real = [sample_clip(HELD_OUT_SEEDS[i], frames=10, label=label).frames for i, label in enumerate(LABELS[:3])]
    copied = np.mean([np.abs(frames[1:].astype(np.float32) - frames[0]).mean() / 255 for frames in real])
    assert reconstruction.copied == pytest.approx(copied, rel=1e-4)


@pytest.mark.parametrize(
    ("labels", "provenance", "why"),
    [
        (("anger", "fear"), {}, r"its labels \(anger, fear\) are not theirs \(smile, "),
        ((*LABELS[:2], "jump"), {}, r"its labels \(smile, surprise, jump\) are not theirs"),
        ((), {"trained": True}, "neither labels nor provenance say"),
        (LABELS, {"data": "mug"}, "its model was trained on the data set 'mug'"),
        ((), {"data": "plain"}, "its model was trained on the data set 'plain'"),
        (LABELS[:3], {"data": "procedural"}, None),
        ((), {"data": "procedural characters"}, None),
        (LABELS, {"trained": True}, None),
    ],
)
def test_models_of_other_data_are_refused(
    tmp_path: Path, labels: tuple[str, ...], provenance: dict[str, object], why: str | None
):
    manifest = dataclasses.replace(fake_manifest(), labels=labels, provenance=provenance)
    bundle = Bundle(tmp_path / "mine", manifest, np.zeros((len(labels), 6), np.float32), np.zeros(6, np.float32))
    if why is None:
        require_drawn_characters(bundle)
        return
    with pytest.raises(InputError, match=f"mine cannot be evaluated: this measures only drawn characters, and {why}"):
        require_drawn_characters(bundle)


def test_the_command_refuses_before_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    bundle = write_fake_bundle(tmp_path / "mine")
    assert train_main(["evaluate", str(bundle.path)]) == 1
    printed = capsys.readouterr()
    assert "its labels (Anger, happiness, turn left) are not theirs" in printed.err
    assert printed.err.count("\n") == 1
    assert not (bundle.path / "evaluation").exists()


def test_labels_that_nobody_can_judge_are_told(
    bundle: Bundle, classifier: MotionClassifier, monkeypatch: pytest.MonkeyPatch
):
    pipeline = Pipeline(bundle, threads=1)
    others = tuple(label for label in classifier.labels if label not in bundle.labels)
    monkeypatch.setattr(classifier, "labels", others)
    with pytest.raises(InputError, match="are none that the classifier knows"):
        evaluate_bundle(pipeline, classifier, [SamplingOptions("ddim", 2)], clips=1)
    with pytest.raises(InputError, match="expected 1 or more clips"):
        evaluate_bundle(pipeline, classifier, (), clips=0)
    with pytest.raises(InputError, match="expected numbers such as"):
        choose_settings("ddim", "ten", None, None)
    assert choose_settings("none", "10", None, None) == ()
    assert choose_settings("ddpm", "10,20", 1.0, 2.0) == (SamplingOptions("ddpm", None, None, 2.0),)
    etas = {one.sampler: one.eta for one in choose_settings("ddim,unipc,sde-dpm++2m,tuned", "5", 0.5, None)}
    assert etas == {"ddim": 0.5, "unipc": None, "sde-dpm++2m": 0.5, "tuned": None}


# --- The command -----------------------------------------------------------------------------------


def test_the_command_reports(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    common = [str(bundle.path), "--clips", "1", "--threads", "1", "--samplers", "ddim", "--steps", "2"]
    assert train_main(["evaluate", *common, "--out", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    assert "rebuilt / copied" in printed
    assert (tmp_path / "report" / JSON).is_file()
    assert train_main(["evaluate", *common, "--classifier", str(tmp_path / "none")]) == 1
    assert "cannot be read as a classifier" in capsys.readouterr().err


def test_the_command_makes_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "classifier.safetensors"
    assert train_main(["classifier", "--out", str(path), "--clips", "2", "--steps", "1"]) == 0
    assert str(path) in capsys.readouterr().out
    assert load_classifier(path).labels == LABELS


def test_help_loads_nothing_heavy():
    code = (
        "import sys\nfrom lfdm_export.cli import train_main\n"
        "try:\n    train_main(['evaluate', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'onnxruntime'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
