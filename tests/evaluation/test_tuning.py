"""Learning a sampler of few steps, and its way through manifest, pipeline, commands and requests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfdm_export import Bundle, InputError, Pipeline
from lfdm_export.bundle.manifest import Manifest
from lfdm_export.bundle.reader import MANIFEST
from lfdm_export.bundle.writer import store_tuned
from lfdm_export.cli import export_main, generate_main, info_main
from lfdm_export.cli.train import train_main
from lfdm_export.errors import BundleError
from lfdm_export.evaluation.tune_bundle import tune_bundle
from lfdm_export.evaluation.tuning import Search, Target, tune
from lfdm_export.files.json_codec import to_plain
from lfdm_export.generate.encoded import Encoded
from lfdm_export.protocol.requests import Limits, parse_sampling
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.sampling.tuned import TunedSampler, TunedSteps
from lfdm_models.schedule import cosine_schedule
from tests.fake_bundle import SIZE, fake_manifest, write_fake_bundle

SHA = "c" * 64
WITH_WEIGHTS = dataclasses.replace(fake_manifest(), provenance={"dm": {"file": "dm.pth", "sha256": SHA}})
TUNED = TunedSampler(SHA, 1.0, (TunedSteps((17, 5), (1.5, 1.0), (0.5,)),), "by hand")
QUICK = Search(clips=3, generations=2, candidates=3)


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_fake_bundle(tmp_path / "bundle", WITH_WEIGHTS)


def photo(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def pictures() -> np.ndarray:
    return np.stack([photo(seed) for seed in range(2)])


# --- The search ------------------------------------------------------------------------------------


def test_the_distance_is_that_of_means_and_spreads():
    latents = np.random.default_rng(0).standard_normal((12, 3, 2, 4, 4)).astype(np.float32)
    groups = np.arange(12) % 3
    target, everything = Target(latents, groups), slice(0, 12)
    assert target.distance(latents, everything) == pytest.approx(0, abs=1e-9)
    assert target.distance(latents[:6], slice(0, 6)) == pytest.approx(0, abs=1e-9)
    swapped = latents[[3, 4, 5, 0, 1, 2, *range(6, 12)]]  # each among others of its group
    assert target.distance(swapped, everything) == pytest.approx(0, abs=1e-9)
    moved = [target.distance(latents + shift, everything) for shift in (0.1, 0.2)]
    assert 0 < 3.9 * moved[0] < moved[1] < 4.1 * moved[0]
    narrow = latents.mean(axis=0) + 0.5 * (latents - latents.mean(axis=0))
    assert target.distance(narrow.astype(np.float32), everything) > 0.1
    assert target.distance(latents[[1, 2, 0, 4, 5, 3, 7, 8, 6, 10, 11, 9]], everything) > 0.1, "of other groups"


def test_the_search_finds_the_numbers_that_made_the_target():
    """Latents that show a table's own first gain, times and share of noise; the start is none of these."""
    schedule = cosine_schedule(1000)
    wanted = TunedSteps((700, 100), (2.5, 1.0), (0.3,))
    base = np.random.default_rng(1).standard_normal((8, 3, 1, 2, 2)).astype(np.float32)

    def sample(table: SamplerTable, part: slice, draw: int) -> np.ndarray:
        gain = -table.coefficients[0, 1] / schedule.sqrt_recipm1_alphas_cumprod[table.timesteps[0]]
        shown = np.array([gain, table.timesteps[0] / 300, 5 * table.coefficients[0, 7]], np.float32)
        return base[part] + shown[:, None, None, None]

    target = Target(sample(wanted.table(schedule), slice(0, 8), 0), np.zeros(8, np.int64))
    told: list[tuple[int, int]] = []
    before = np.random.get_state()  # noqa: NPY002
    found = [
        tune(
            schedule,
            2,
            sample,
            target,
            8,
            Search(clips=8, generations=30, candidates=8),
            lambda *done: told.append(done),
        )
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]  # noqa: NPY002
    assert told[239] == (240, 240)
    assert found[0].times[0] == pytest.approx(700, abs=40)
    assert found[0].gains[0] == pytest.approx(2.5, rel=0.1)


def test_a_bundle_is_tuned(bundle: Bundle):
    said: list[tuple[str, int, int]] = []
    pipeline = Pipeline.open(bundle, threads=1)
    found, again = (
        tune_bundle(
            pipeline,
            [3, 2],
            search=QUICK,
            conditions=6,
            pictures=pictures(),
            progress=lambda *done: said.append(done),
        )
        for _ in range(2)
    )
    assert found == again
    assert [table.steps for table in found.tables] == [2, 3]
    assert found.dm_sha256 == SHA
    assert "ddim of 19 steps" in found.found
    assert ("long chain", 6, 6) in said
    assert ("3 steps", 6, 6) in said
    other = tune_bundle(pipeline, [2], search=dataclasses.replace(QUICK, seed=1), conditions=6, pictures=pictures())
    assert other.tables[0] != found.tables[0]


def distilled(folder: Path, table: TunedSteps) -> Bundle:
    """A bundle whose DM was distilled for these steps."""
    return write_fake_bundle(
        folder,
        dataclasses.replace(WITH_WEIGHTS, provenance={**WITH_WEIGHTS.provenance, "few_steps": to_plain(table)}),
    )


def test_a_distilled_dm_is_tuned_from_its_steps_against_its_teacher(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    table = TunedSteps((17, 5), (1.5, 0.8), (1.0,))
    pipeline = Pipeline.open(distilled(tmp_path / "two", table), threads=1)
    with pytest.raises(InputError, match=r"the bundle's DM was distilled, .*; give its teacher's bundle"):
        tune_bundle(pipeline, [2], search=QUICK, conditions=6, pictures=pictures())
    teacher = Pipeline.open(bundle, threads=1)
    run: list[tuple[Pipeline, int]] = []

    def told(self: Pipeline, encoded: Encoded, embeddings: np.ndarray, table: SamplerTable, noise: object) -> object:
        run.append((self, table.steps))
        return run_table(self, encoded, embeddings, table, noise)  # type: ignore[arg-type]

    run_table = Pipeline.run_table
    monkeypatch.setattr(Pipeline, "run_table", told)
    starts: list[TunedSteps | None] = []

    def searched(*arguments: Any) -> TunedSteps:
        starts.append(arguments[-1])
        return tune(*arguments)

    monkeypatch.setattr("lfdm_export.evaluation.tune_bundle.tune", searched)
    found = tune_bundle(pipeline, [1, 2], search=QUICK, conditions=6, pictures=pictures(), teacher=teacher)
    assert [len(some.times) for some in found.tables] == [1, 2]
    assert starts == [None, table]
    assert {steps for runner, steps in run if runner is teacher} == {19}
    assert {steps for runner, steps in run if runner is pipeline} == {1, 2}


def test_a_teacher_must_fit(bundle: Bundle, tmp_path: Path):
    manifest = dataclasses.replace(WITH_WEIGHTS, labels=tuple(reversed(WITH_WEIGHTS.labels)))
    other = Pipeline.open(write_fake_bundle(tmp_path / "other", manifest), threads=1)
    with pytest.raises(InputError, match=r"the teacher's bundle has other labels: found \("):
        tune_bundle(
            Pipeline.open(bundle, threads=1), [2], search=QUICK, conditions=6, pictures=pictures(), teacher=other
        )


def test_a_search_without_width_ends_at_its_start(monkeypatch: pytest.MonkeyPatch):
    """Times, gains and noise become numbers of the search and come back; all noise fresh is almost reached."""
    monkeypatch.setattr("lfdm_export.evaluation.tuning._SIGMA", 1e-6)
    table, schedule = TunedSteps((875, 475, 0), (1.2, 0.9, 1.1), (1.0, 0.3)), cosine_schedule(1000)
    latents = np.random.default_rng(0).standard_normal((4, 3, 1, 2, 2)).astype(np.float32)
    target = Target(latents, np.zeros(4, np.int64))
    search = Search(clips=4, generations=1, candidates=4)
    found = tune(schedule, 3, lambda *_: latents, target, 4, search, lambda *_: None, table)
    assert found.times == table.times
    assert found.gains == pytest.approx(table.gains, rel=1e-4)
    assert found.fresh == pytest.approx((0.98, 0.3), rel=1e-4)


def test_what_cannot_be_tuned_is_refused(bundle: Bundle, tmp_path: Path):
    pipeline = Pipeline.open(bundle, threads=1)
    with pytest.raises(InputError, match="cannot be evaluated: this measures only drawn characters"):
        tune_bundle(pipeline, [2], search=QUICK, conditions=6)
    with pytest.raises(InputError, match="found 3 clips of 2 conditions"):
        tune_bundle(pipeline, [2], search=QUICK, conditions=2, pictures=pictures())
    nameless = Pipeline.open(write_fake_bundle(tmp_path / "nameless"), threads=1)
    with pytest.raises(InputError, match="provenance does not name its DM's checkpoint"):
        tune_bundle(nameless, [2], search=QUICK, conditions=6, pictures=pictures())


# --- Its way ---------------------------------------------------------------------------------------


def test_the_manifest_keeps_it_and_without_one_it_is_as_before(bundle: Bundle):
    before = json.loads((bundle.path / MANIFEST).read_bytes())
    assert "tuned" not in before
    stored = store_tuned(bundle, TUNED)
    assert Bundle.open(bundle.path).manifest.tuned == TUNED == stored.manifest.tuned
    assert stored.manifest.bundle_id == bundle.manifest.bundle_id
    without = dataclasses.replace(stored.manifest, tuned=None)
    assert json.loads(without.to_json()) == before
    more = dataclasses.replace(TUNED, tables=(TunedSteps((17,), (1.0,), ()),))
    assert store_tuned(stored, more).manifest.tuned == dataclasses.replace(TUNED, tables=(*more.tables, *TUNED.tables))


def test_other_weights_are_refused_in_one_sentence(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    other = dataclasses.replace(TUNED, dm_sha256="d" * 64)
    with pytest.raises(BundleError, match="was learned for the DM of SHA-256 dddddddddddd, this model's is cccc"):
        store_tuned(bundle, other)
    stored = store_tuned(bundle, TUNED).manifest.to_json()
    (bundle.path / MANIFEST).write_text(stored.replace(f'"dm_sha256": "{SHA}"', f'"dm_sha256": "{"d" * 64}"'))
    with pytest.raises(BundleError, match="tune it for these weights: lfdm-train schedule"):
        Bundle.open(bundle.path)
    other.save(tmp_path / "tuned.json")
    assert export_main(["--tuned", str(tmp_path / "tuned.json"), "--out", str(tmp_path / "new"), "--no-verify"]) == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "was learned for the DM of SHA-256 dddddddddddd" in line
    assert not (tmp_path / "new").exists()


def test_the_pipeline_runs_it(bundle: Bundle):
    plain = Pipeline.open(bundle, threads=1)
    with pytest.raises(InputError, match=r"this bundle has no tuned sampler; choose one of ddpm, .*, or tune one"):
        plain.generate(photo(), label="Anger", sampler="tuned")
    pipeline = Pipeline.open(store_tuned(bundle, TUNED), threads=1)
    clip = pipeline.generate(photo(), label="Anger", sampler="tuned", seed=4)
    assert (clip.settings["sampler"], clip.settings["steps"], clip.settings["eta"]) == ("tuned", 2, None)
    encoded, embedding = pipeline.encode(photo()), bundle.embedding("Anger")
    np.testing.assert_array_equal(pipeline.sample(encoded, embedding, sampler="tuned", steps=2, seed=4), clip.latent)
    with pytest.raises(InputError, match="has tables of 2 steps"):
        pipeline.generate(photo(), label="Anger", sampler="tuned", steps=3)
    with pytest.raises(InputError, match=r"eta: found 1\.0, but sampler 'tuned' has its own noise"):
        pipeline.generate(photo(), label="Anger", sampler="tuned", eta=1.0)


def test_requests_may_ask_for_it():
    asked = parse_sampling({"sampler": np.array([b"tuned"], object)}, Limits())
    assert asked.options.sampler == "tuned"


def test_the_commands(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    faces = tmp_path / "faces"
    faces.mkdir()
    for seed in range(2):
        Image.fromarray(photo(seed)).save(faces / f"{seed}.png")
    options = ["--steps", "2", "--conditions", "4", "--clips", "2", "--generations", "1", "--candidates", "3"]
    out = tmp_path / "tuned.json"
    command = ["schedule", str(bundle.path), "--images", str(faces), *options, "--threads", "1", "--out", str(out)]
    assert train_main(command) == 0
    assert "sampler 'tuned' of 2 steps" in capsys.readouterr().out
    assert Bundle.open(bundle.path).manifest.tuned == TunedSampler.load(out)
    image = str(faces / "0.png")
    made = ["--image", image, "--label", "anger", "--sampler", "tuned", "-o", str(tmp_path / "a.gif")]
    assert generate_main([str(bundle.path), *made]) == 0
    assert "sampler=tuned steps=2" in capsys.readouterr().out
    assert info_main([str(bundle.path)]) == 0
    assert "sde-dpm++2m, tuned" in capsys.readouterr().out
    assert train_main(["schedule", str(bundle.path), "--steps", "x"]) == 1
    assert "--steps is 'x', expected numbers of 1 to 20" in capsys.readouterr().err
    assert train_main(["schedule", str(bundle.path), "--images", str(tmp_path / "none")]) == 1
    assert "expected a folder of photographs" in capsys.readouterr().err


def test_an_older_manifest_has_none():
    text = json.loads(fake_manifest().to_json())
    assert "tuned" not in text
    assert Manifest.from_json(json.dumps(text)).tuned is None
