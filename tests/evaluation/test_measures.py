"""The measures of the LFDM paper, with a tiny TorchScript network in place of I3D."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from lfdm_export import Bundle, InputError, Pipeline
from lfdm_export.cli.train import train_main
from lfdm_export.errors import MissingDependencyError
from lfdm_export.evaluation.distance import frechet_distance, normal_distance
from lfdm_export.evaluation.held_out import HeldOutClips
from lfdm_export.evaluation.measure import measure_held_out
from lfdm_export.evaluation.measures import MEASURES, NOISE_SEEDS, Counts
from lfdm_export.evaluation.measures_report import JSON, MARKDOWN, PLOT, measures_markdown, write_measures
from lfdm_export.evaluation.reconstruction import summarize
from lfdm_export.evaluation.video_features import SIDE, VideoFeatures
from lfdm_export.pictures.preprocess import to_float
from lfdm_export.sampling.options import SamplingOptions
from lfdm_models.training import layouts
from tests.fake_bundle import FRAMES, SIZE, fake_manifest, write_fake_bundle

Float64 = NDArray[np.float64]

LABELS, SUBJECTS, TAKES = ("happiness", "turn left"), ("ann", "bob"), 3
SETTING = SamplingOptions("ddim", 2)
COUNTS = Counts(clips=12, batch=5, seed=7)


class Stand(torch.nn.Module):
    """Means of each color over space, at the first and the last frame: (B, 6)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        means = x.mean(dim=[3, 4])
        return torch.cat([means[:, :, 0], means[:, :, -1]], dim=1)


class LikeTheKnownFile(torch.nn.Module):
    """The signature of i3d_torchscript.pt; options show in the features."""

    def forward(
        self, x: torch.Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False
    ) -> torch.Tensor:
        flags = [
            float(rescale),
            float(resize),
            float(return_features),
            float(x.min()),
            float(x.max()),
            float(x.size(3)),
        ]
        return torch.tensor([flags]).repeat(x.size(0), 1)


def script(module: torch.nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(str(path))
    return path


@pytest.fixture(scope="module")
def i3d(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return script(Stand(), tmp_path_factory.mktemp("i3d") / "i3d.pt")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("measures") / "bundle")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips in LABEL/SUBJECT/CLIP: brightness tells the subject, its change the label."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for index, (label, subject) in enumerate((label, who) for label in LABELS for who in SUBJECTS):
            for take in range(TAKES):
                clip = folder / split / label / subject / f"take{take}"
                clip.mkdir(parents=True)
                for frame in range(FRAMES + 2):
                    level = 40 + 60 * (index % 2) + 10 * take + frame * (4 + 8 * (index // 2))
                    picture = np.clip(level + rng.integers(0, 30, (SIZE, SIZE, 3)), 0, 255).astype(np.uint8)
                    Image.fromarray(picture).save(clip / f"{frame}.png")
    return folder


@pytest.fixture(scope="module")
def held_out(root: Path, bundle: Bundle) -> HeldOutClips:
    return HeldOutClips.of(layouts.plain(root, "test"), bundle, COUNTS.seed)


# --- The Fréchet distance --------------------------------------------------------------------------


def covariance_of(seed: int, width: int, rank: int | None = None) -> Float64:
    factor = np.random.default_rng(seed).standard_normal((width, rank or width))
    return factor @ factor.T / width


def exact_distance(mean: Float64, covariance: Float64, other_mean: Float64, other: Float64) -> float:
    """By another library, with 40 digits, from the eigenvalues of the product itself, which is not symmetric."""
    with mpmath.workdps(40):
        product = mpmath.matrix(covariance.tolist()) * mpmath.matrix(other.tolist())
        cross = sum(mpmath.sqrt(mpmath.re(value)) for value in mpmath.eig(product, left=False, right=False))
    return float(((mean - other_mean) ** 2).sum() + np.trace(covariance) + np.trace(other) - 2 * cross)


def test_the_distance_of_diagonal_normals_has_a_closed_form():
    rng = np.random.default_rng(1)
    first, second = rng.uniform(0.1, 3, 7), rng.uniform(0.1, 3, 7)
    means = rng.standard_normal((2, 7))
    wanted = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert normal_distance(means[0], np.diag(first), means[1], np.diag(second)) == pytest.approx(wanted, rel=1e-12)


def test_the_distance_of_normals_that_differ_by_a_shift_or_a_factor_has_a_closed_form():
    mean, covariance = np.zeros(6), covariance_of(0, 6)
    assert normal_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-12)
    shift = np.arange(6.0)
    assert normal_distance(mean, covariance, mean + shift, covariance) == pytest.approx((shift**2).sum(), rel=1e-12)
    # (a C)^(1/2) C^(1/2) = a^(1/2) C
    wanted = np.trace(covariance) * (np.sqrt(3) - 1) ** 2
    assert normal_distance(mean, covariance, mean, 3 * covariance) == pytest.approx(wanted, rel=1e-12)
    assert normal_distance(mean, covariance, mean, 0 * covariance) == pytest.approx(np.trace(covariance), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_the_distance_is_that_of_an_implementation_with_more_digits(seed: int):
    rng = np.random.default_rng(seed)
    means = rng.standard_normal((2, 8))
    covariances = covariance_of(10 + seed, 8), covariance_of(20 + seed, 8)
    wanted = exact_distance(means[0], covariances[0], means[1], covariances[1])
    assert normal_distance(means[0], covariances[0], means[1], covariances[1]) == pytest.approx(wanted, rel=1e-10)


def test_the_distance_is_that_of_scipy_also_for_more_features_than_clips():
    linalg = pytest.importorskip("scipy.linalg", reason="SciPy is an extra of the tests")
    for rank, close in ((None, 1e-9), (5, 1e-5)):  # the product of singular covariances has no accurate root
        first, second = covariance_of(1, 30, rank), covariance_of(2, 30, rank)
        root = linalg.sqrtm(first @ second)
        wanted = float(np.trace(first + second - 2 * np.real(root)))
        assert normal_distance(np.zeros(30), first, np.zeros(30), second) == pytest.approx(wanted, rel=close)


def test_the_distance_of_features_uses_their_unbiased_covariance():
    rng = np.random.default_rng(3)
    first, second = rng.standard_normal((9, 4)), rng.standard_normal((6, 4)) + 1
    parts = [(part.mean(axis=0), np.cov(part, rowvar=False)) for part in (first, second)]
    wanted = exact_distance(*parts[0], *parts[1])
    assert frechet_distance(first, second, unbiased=True) == pytest.approx(wanted, rel=1e-9)
    assert frechet_distance(first, second) != pytest.approx(wanted, rel=1e-3)
    with pytest.raises(InputError, match=r"a set of 1 clips has no covariance.*give 2 or more"):
        frechet_distance(first, second[:1], unbiased=True)


# --- The network of the features -------------------------------------------------------------------


def test_clips_reach_the_network_scaled_to_its_size_and_range(i3d: Path):
    frames = np.zeros((2, 4, 10, 10, 3), np.uint8)
    frames[0, 0, ..., 0], frames[1, -1, ..., 2] = 255, 51
    found = VideoFeatures.load(i3d, "cpu")(frames)
    wanted = np.full((2, 6), -1.0)
    wanted[0, 0], wanted[1, 5] = 1, 2 * 51 / 255 - 1
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_the_known_files_own_scaling_is_off_and_its_logits_are_asked_for(tmp_path: Path):
    features = VideoFeatures.load(script(LikeTheKnownFile(), tmp_path / "known.pt"), "cpu")
    frames = np.zeros((1, 4, 10, 12, 3), np.uint8)
    frames[0, 1] = 255
    np.testing.assert_allclose(features(frames), [[0, 0, 1, -1, 1, SIDE]], rtol=1e-6)
    assert features.options == {"rescale": False, "resize": False, "return_features": True}


def test_pictures_are_scaled_without_corner_alignment(tmp_path: Path):
    class Left(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, :, 0, 0, :8].mean(dim=1)

    frames = np.zeros((1, 1, 28, 28, 3), np.uint8)  # 8 pixels of the result per pixel
    frames[:, :, :, 1:] = 255
    found = VideoFeatures.load(script(Left(), tmp_path / "left.pt"), "cpu")(frames)
    # Centers at (i + 1/2) / 8 - 1/2: the first four lie outside the first pixel's center, the others between two.
    wanted = np.array([0, 0, 0, 0, 1, 3, 5, 7]) / 16 * 2 - 1
    np.testing.assert_allclose(found[0], wanted, atol=1e-5)


def test_a_file_that_cannot_serve_is_told(tmp_path: Path, i3d: Path):
    class Needy(torch.nn.Module):
        def forward(self, x: torch.Tensor, level: int) -> torch.Tensor:
            return x.mean(dim=[2, 3, 4]) * level

    class Flat(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(dim=[1, 2, 3, 4])

    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[:, 0, 0, 0, :3] / 0.0

    class Long(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.avg_pool3d(x, [9, 224, 224]).flatten(1)

    with pytest.raises(InputError, match=r"none\.pt does not exist; give the TorchScript file"):
        VideoFeatures.load(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_bytes(b"hello")
    torch.save({"weights": torch.zeros(2)}, tmp_path / "weights.pt")
    for name in ("text.pt", "weights.pt"):
        with pytest.raises(InputError, match=r"cannot be read as TorchScript \(.*\); give a file of torch\.jit\.save"):
            VideoFeatures.load(tmp_path / name)
    with pytest.raises(InputError, match="also needs level, expected"):
        VideoFeatures.load(script(Needy(), tmp_path / "needy.pt"))
    clips = np.zeros((2, 4, 8, 8, 3), np.uint8)
    for module, why in (
        (Flat(), r"returns \(2,\) for 2 clips, expected one row of features per clip"),
        (Broken(), "returns features that are not finite"),
        (Long(), r"fails on clips of 4 frames, \(2, 3, 4, 224, 224\)"),
    ):
        features = VideoFeatures.load(script(module, tmp_path / "other.pt"), "cpu")
        with pytest.raises(InputError, match=why) as told:
            features(clips)
        assert "\n" not in str(told.value)


# --- Held-out clips --------------------------------------------------------------------------------


def test_every_held_out_clip_comes_once_per_epoch(held_out: HeldOutClips):
    assert len(held_out) == 12
    assert (held_out.labels, held_out.subjects) == (LABELS, SUBJECTS)
    assert {entry.path for entry in held_out.entries(12)} == {entry.path for entry in held_out.clips.entries}
    assert all("/test/" in entry.path.as_posix() for entry in held_out.clips.entries)
    assert [held_out.entry(n).path for n in range(12)] != [held_out.entry(n).path for n in range(12, 24)]
    frames = held_out.read(3)
    assert frames.shape == (FRAMES, SIZE, SIZE, 3)
    assert np.array_equal(held_out.read(3, first_only=True), frames[:1])
    assert np.array_equal(held_out.read(3), frames)
    again = next(n for n in range(12, 24) if held_out.entry(n).path == held_out.entry(3).path)
    assert not np.array_equal(held_out.read(again), frames), "another epoch shows other frames"


def test_clips_that_do_not_fit_are_told(tmp_path: Path, bundle: Bundle, root: Path):
    shutil.copytree(root, tmp_path / "data")
    split = tmp_path / "data" / "test"
    (split / "happiness").rename(split / "None")
    found = HeldOutClips.of(layouts.plain(tmp_path / "data", "test"), bundle, 0)
    assert found.labels == ("turn left",), "clips without a label have no class"
    (split / "turn left").rename(split / "jump")
    with pytest.raises(InputError, match=r"have the labels jump, which .*bundle does not know; its labels are"):
        HeldOutClips.of(layouts.plain(tmp_path / "data", "test"), bundle, 0)
    (split / "jump").rename(split / "anger")  # case does not count
    clips = HeldOutClips.of(layouts.plain(tmp_path / "data", "test"), bundle, 0)
    broken = next(clips.entry(0).path.iterdir())
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(InputError, match=r"cannot be read .*repair it, or remove it from the split"):
        [clips.read(number) for number in (0, 6, 12, 18)]  # some epoch shows that frame
    for path in list(clips.entry(0).path.iterdir())[1:]:
        path.unlink()
    with pytest.raises(InputError, match="has 1 frames, expected 2 or more"):
        clips.read(0)


def test_data_sets_name_their_subjects(tmp_path: Path):
    for name in ("mug/001/anger/take0", "mhad/a1_s02_t1_color", "natops/g01s11r01"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    found = {
        "mug": layouts.mug(tmp_path / "mug", "test"),
        "mhad": layouts.mhad(tmp_path / "mhad", "test"),
        "natops": layouts.natops(tmp_path / "natops", "test"),
    }
    assert {name: clips.entries[0].subject for name, clips in found.items()} == {
        "mug": "001", "mhad": "2", "natops": "11",
    }  # fmt: skip


# --- The measures ----------------------------------------------------------------------------------


def features_by_hand(bundle: Bundle, held_out: HeldOutClips, i3d: Path) -> tuple[Float64, Float64]:
    """Features of real and of generated clips, one by one."""
    network, pipeline = VideoFeatures.load(i3d, "cpu"), Pipeline(bundle, threads=1)
    real = [network(held_out.read(number)[None])[0] for number in range(len(held_out))]
    made = [
        network(
            pipeline.generate(
                held_out.read(number)[0],
                label=held_out.entry(number).label,
                seed=COUNTS.seed * NOISE_SEEDS + number,
                sampler="ddim",
                steps=2,
            ).frames
        )[0]
        for number in range(COUNTS.clips)
    ]
    return np.stack(real).astype(np.float64), np.stack(made).astype(np.float64)


def test_the_measures_are_those_of_clips_made_one_by_one(bundle: Bundle, held_out: HeldOutClips, i3d: Path):
    told: set[str] = set()
    found = measure_held_out(
        Pipeline(bundle, threads=1),
        held_out,
        [SETTING],
        MEASURES,
        features=VideoFeatures.load(i3d, "cpu"),
        counts=dataclasses.replace(COUNTS, batch=1),
        progress=lambda what, done, total: told.add(what),
    )
    assert told == {"reconstruction", "real clips", "ddim 2"}
    real, made = features_by_hand(bundle, held_out, i3d)

    def distance(rows: list[int]) -> float:
        parts = [(part[rows].mean(axis=0), np.cov(part[rows], rowvar=False)) for part in (made, real)]
        return normal_distance(*parts[0], *parts[1])

    (one,) = found.generations
    entries = held_out.entries(COUNTS.clips)
    assert one.fvd == pytest.approx(distance(list(range(12))), rel=1e-4)
    assert one.fvd is not None
    assert one.fvd > 0
    for conditional, names, attribute in ((one.cfvd, LABELS, "label"), (one.sfvd, SUBJECTS, "subject")):
        assert conditional is not None
        wanted = {
            name: distance([n for n, entry in enumerate(entries) if getattr(entry, attribute) == name])
            for name in names
        }
        assert {name: group.fvd for name, group in conditional.groups.items()} == pytest.approx(wanted, rel=1e-4)
        assert conditional.mean == pytest.approx(np.mean(list(wanted.values())), rel=1e-4)
        assert conditional.deviation == pytest.approx(np.std(list(wanted.values())), rel=1e-3)
        assert {(group.real, group.generated) for group in conditional.groups.values()} == {(6, 6)}
    assert (found.held_out, found.real, found.first_noise_seed) == (12, 12, 7 * 2**32)
    assert found.features is not None
    assert (found.features.file, found.features.width) == ("i3d.pt", 6)


def test_self_reconstruction_is_the_mean_difference_of_rebuilt_clips(bundle: Bundle, held_out: HeldOutClips):
    pipeline = Pipeline(bundle, threads=1)
    found = measure_held_out(pipeline, held_out, [], ["l1"], counts=COUNTS).reconstruction
    assert found is not None
    errors = []
    for number in range(12):
        frames = held_out.read(number)
        rebuilt = pipeline.transfer_motion(frames[0], frames).frames  # to 8 bits, truncated
        errors.append(np.abs(to_float(rebuilt[0]) - to_float(frames))[1:].mean())
    assert found.frame == pytest.approx(np.mean(errors), abs=1 / 255)
    assert found.clips == 12
    assert set(found.by_label) == set(LABELS)


def test_clips_that_do_not_move_have_no_ratio():
    errors = np.array([[0.1, 0.2, 0.4], [0.1, 0.1, 0.0]])
    found = summarize(errors, ["moves", "stays"])
    assert found.by_label == {"moves": pytest.approx(0.25)}
    with pytest.raises(InputError, match="none of 1 clips moves"):
        summarize(errors[1:], ["stays"])


def test_the_same_seed_gives_the_same_measures_and_another_one_others(bundle: Bundle, root: Path, i3d: Path):
    network = VideoFeatures.load(i3d, "cpu")

    def measured(seed: int) -> Any:
        clips = HeldOutClips.of(layouts.plain(root, "test"), bundle, seed)
        counts = dataclasses.replace(COUNTS, seed=seed)
        pipeline = Pipeline(bundle, threads=1)
        found = measure_held_out(pipeline, clips, [SETTING], MEASURES, features=network, counts=counts)
        return dataclasses.replace(found.generations[0], seconds=0.0)

    first = measured(7)
    assert measured(7) == first
    assert measured(8) != first


@pytest.mark.parametrize(
    ("measures", "counts", "why"),
    [
        (("fvd",), Counts(clips=1), "fvd needs 2 or more clips for a covariance, found 1 generated and 12 real"),
        (("fvd",), Counts(clips=12, real=1), "found 12 generated and 1 real"),
        (("cfvd",), Counts(clips=2), "cfvd needs 2 or more generated clips per group for a covariance, found fewer of"),
        (("sfvd",), Counts(clips=12, real=2), "sfvd needs 2 or more real clips per group"),
    ],
)
def test_too_few_clips_for_a_covariance_are_told_before_anything_is_generated(
    bundle: Bundle, held_out: HeldOutClips, i3d: Path, measures: Any, counts: Counts, why: str
):
    told: list[str] = []
    with pytest.raises(InputError, match=why):
        measure_held_out(
            Pipeline(bundle, threads=1),
            held_out,
            [SETTING],
            measures,
            features=VideoFeatures.load(i3d, "cpu"),
            counts=counts,
            progress=lambda what, done, total: told.append(what),
        )
    assert not told


def test_what_a_measure_lacks_is_told(bundle: Bundle, held_out: HeldOutClips, i3d: Path):
    pipeline, network = Pipeline(bundle, threads=1), VideoFeatures.load(i3d, "cpu")
    with pytest.raises(InputError, match="fvd, cfvd compare features of clips, and no network for them is given"):
        measure_held_out(pipeline, held_out, [SETTING], ["fvd", "cfvd"])
    with pytest.raises(InputError, match="fvd compare generated clips, and no sampler is given"):
        measure_held_out(pipeline, held_out, [], ["fvd"], features=network)
    nameless = [dataclasses.replace(entry, subject="") for entry in held_out.clips.entries]
    clips = dataclasses.replace(held_out, clips=dataclasses.replace(held_out.clips, entries=tuple(nameless)))
    with pytest.raises(InputError, match="sfvd is per subject, and clips of plain name none; sort them as LABEL/"):
        measure_held_out(pipeline, clips, [SETTING], ["sfvd"], features=network)
    for counts in ({"clips": 0}, {"batch": 0}, {"real": 0}, {"seed": -1}):
        with pytest.raises(InputError, match="expected 1 or more clips and a seed"):
            Counts(**counts)


def test_a_bundle_without_motion_transfer_rebuilds_nothing(tmp_path: Path, root: Path):
    bundle = write_fake_bundle(tmp_path / "bundle", fake_manifest(with_drive=False))
    clips = HeldOutClips.of(layouts.plain(root, "test"), bundle, 0)
    with pytest.raises(InputError, match="reconstruction"):
        measure_held_out(Pipeline(bundle, threads=1), clips, [], ["l1"])


# --- The report and the command --------------------------------------------------------------------


def command(bundle: Bundle, root: Path, *more: str) -> list[str]:
    common = ["--data", "plain", "--root", str(root), "--clips", "12", "--threads", "1", "--seed", "7", "--no-plot"]
    return ["evaluate", str(bundle.path), *common, *more]


def test_the_command_reports(bundle: Bundle, root: Path, i3d: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "report"
    samplers = ("--i3d", str(i3d), "--samplers", "ddim,unipc", "--steps", "2", "--out", str(out))
    assert train_main(command(bundle, root, *samplers)) == 0
    printed = capsys.readouterr().out
    assert "Measured on 12 held-out clips of 2 subjects and 2 labels, 5 frames of 16x16." in printed
    assert "clip n has the noise of seed 30064771072 + n" in printed
    assert "| ddim | 2 | default | default | 12 |" in printed
    assert all(f"| {name} | 6 | 6 |" in printed for name in (*LABELS, *SUBJECTS))
    stored = json.loads((out / JSON).read_text(encoding="utf-8"))
    assert stored["seed"] == 7
    assert [one["setting"]["sampler"] for one in stored["generations"]] == ["ddim", "unipc"]
    one = stored["generations"][0]
    assert one["cfvd"]["mean"] == pytest.approx(np.mean([group["fvd"] for group in one["cfvd"]["groups"].values()]))
    assert stored["reconstruction"]["clips"] == 12
    assert (out / MARKDOWN).read_text(encoding="utf-8").strip() == printed.partition("report  ")[0].strip()
    assert not (out / PLOT).exists()


def test_the_command_measures_what_is_asked_for(
    bundle: Bundle, root: Path, i3d: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def stored(*more: str) -> Any:
        assert train_main(command(bundle, root, "--out", str(tmp_path / "out"), *more)) == 0
        return json.loads((tmp_path / "out" / JSON).read_text(encoding="utf-8"))

    alone = stored()
    assert (alone["features"], alone["generations"]) == (None, [])
    assert alone["reconstruction"]["clips"] == 12
    found = stored("--i3d", str(i3d), "--measures", "FVD", "--steps", "3", "--real-clips", "24")
    assert found["reconstruction"] is None
    assert found["real"] == 24
    (one,) = found["generations"]
    assert (one["setting"]["sampler"], one["setting"]["steps"]) == ("ddim", 3)
    assert (one["cfvd"], one["sfvd"]) == (None, None)
    assert "cFVD" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--measures", "fid"), "--measures has 'fid', expected some of l1, fvd, cfvd, sfvd"),
        (("--measures", "fvd"), "no network for them is given"),
        (("--subjects", "1,b"), "--subjects is '1,b', expected numbers such as 2,4,6"),
        (("--subjects", "1"), "does not support a choice of subjects"),
        (("--classifier", "file"), "--classifier judges drawn characters, not --data plain"),
        (("--i3d", "nowhere.pt"), "nowhere.pt does not exist"),
        (("--data", "mug"), "has no clips of the test split"),
        (("--data", "procedural"), "--root is for data sets, and the data are drawn characters"),
        (("--samplers", "ddim", "--steps", "two"), "--steps is 'two', expected numbers"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    bundle: Bundle, root: Path, more: tuple[str, ...], why: str, capsys: pytest.CaptureFixture[str]
):
    assert train_main(command(bundle, root, *more)) == 1
    printed = capsys.readouterr()
    assert why in printed.err
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_a_plot_without_matplotlib_is_refused_before_anything_is_measured(
    bundle: Bundle, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    arguments = [word for word in command(bundle, root) if word != "--no-plot"]
    assert train_main(arguments) == 1
    assert capsys.readouterr().err == (
        "lfdm-train evaluate: error: the plot, which --no-plot leaves out, needs the package 'matplotlib', "
        "which is not installed; install it with: pip install 'lfdm-export[bench]'\n"
    )


def test_the_plot_is_a_picture(bundle: Bundle, held_out: HeldOutClips, i3d: Path, tmp_path: Path):
    pytest.importorskip("matplotlib", reason="the extra bench")
    network = VideoFeatures.load(i3d, "cpu")
    settings = [SETTING, SamplingOptions("unipc", 2)]
    found = measure_held_out(Pipeline(bundle, threads=1), held_out, settings, MEASURES, features=network, counts=COUNTS)
    written = write_measures(found, tmp_path)
    assert [path.name for path in written] == [JSON, MARKDOWN, PLOT]
    with Image.open(tmp_path / PLOT) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300


def test_measures_that_were_not_taken_have_no_number(
    bundle: Bundle, held_out: HeldOutClips, i3d: Path, monkeypatch: pytest.MonkeyPatch
):
    network = VideoFeatures.load(i3d, "cpu")
    pipeline = Pipeline(bundle, threads=1)
    found = measure_held_out(pipeline, held_out, [SETTING], ["fvd"], features=network, counts=COUNTS)
    text = measures_markdown(found)
    assert f"| 12 | {found.generations[0].fvd:.2f} | — | — |" in text
    assert "Reconstruction" not in text
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"'lfdm-export\[bench\]'"):
        write_measures(found, Path("nowhere"))
