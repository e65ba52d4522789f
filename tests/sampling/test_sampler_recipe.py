"""Whoever adds a sampler writes its table and lists it: everything else follows. Here a small one is added."""

from __future__ import annotations

from collections.abc import MutableMapping
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from lfdm_export import Pipeline
from lfdm_export.bulk.job import JobSettings
from lfdm_export.engines.bundle_facts import bundle_facts
from lfdm_export.errors import InputError
from lfdm_export.sampling.noise import START, seeded_noise
from lfdm_export.sampling.options import SamplingOptions
from lfdm_export.sampling.rows import NEXT_FROM_LATENT, NEXT_FROM_NOISE, SamplerTable, estimating_rows, make_table
from lfdm_export.sampling.tables import SAMPLERS, Sampler
from lfdm_models.schedule import Schedule
from tests.fake_bundle import FRAMES, LATENT, SIZE, write_fake_bundle


def halving_table(schedule: Schedule, steps: int, eta: float) -> SamplerTable:
    """Half of the latent is left by each step, whatever the network says, and eta of fresh noise is added."""
    timesteps = np.arange(steps, 0, -1)
    rows = estimating_rows(schedule, timesteps)
    rows[:, NEXT_FROM_LATENT] = 0.5
    rows[:, NEXT_FROM_NOISE] = eta
    return make_table("halving", timesteps, rows, np.ones(steps, bool))


@pytest.fixture
def halving(monkeypatch: pytest.MonkeyPatch) -> Sampler:
    """A sampler is its table and an entry of the list."""
    sampler = Sampler("halves", halving_table, lambda schedule: schedule.steps - 1, default_steps=3, default_eta=0.25)
    monkeypatch.setitem(cast(MutableMapping[str, Sampler], SAMPLERS), "halving", sampler)
    return sampler


def test_a_listed_sampler_samples(halving: Sampler, tmp_path: Path):
    pipe = Pipeline(write_fake_bundle(tmp_path / "bundle"), target="onnxruntime")
    photo = np.full((SIZE, SIZE, 3), 90, np.uint8)
    clip = pipe.generate(photo, label="Anger", sampler="halving", seed=7)
    noise = seeded_noise([7], (3, FRAMES, LATENT, LATENT))
    expected = noise(START)
    for index in range(3):
        expected = expected * np.float32(0.5) + noise(index) * np.float32(0.25)
    np.testing.assert_allclose(clip.latent, expected, atol=1e-6)
    assert [clip.settings[name] for name in ("sampler", "steps", "eta")] == ["halving", 3, 0.25]
    still = pipe.generate(photo, label="Anger", sampler="halving", seed=7, steps=2, eta=0)
    np.testing.assert_allclose(still.latent, noise(START) / 4, atol=1e-6)
    assert "halving" in bundle_facts(pipe.bundle).samplers
    assert JobSettings(SamplingOptions("halving")).options.sampler == "halving"
    with pytest.raises(InputError, match="found 20, expected 1 to 19 for sampler 'halving'"):
        pipe.generate(photo, label="Anger", sampler="halving", steps=20)


def test_without_its_entry_it_is_unknown(tmp_path: Path):
    pipe = Pipeline(write_fake_bundle(tmp_path / "bundle"), target="onnxruntime")
    with pytest.raises(InputError, match="sampler: found 'halving', expected one of ddpm, ddim, "):
        pipe.generate(np.zeros((SIZE, SIZE, 3), np.uint8), label="Anger", sampler="halving")
