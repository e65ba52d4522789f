"""The warped image of a preview, made without an engine."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lfdm_export import Bundle, Pipeline
from lfdm_export.errors import InputError
from lfdm_export.generate.previews import Previews
from lfdm_export.generate.stage_runner import StageRunner
from lfdm_export.ops.warp.on_host import warped_images
from lfdm_export.ops.warp.reference import warp
from lfdm_export.pictures.preprocess import to_float, to_uint8
from lfdm_models.layers import coordinate_grid


@pytest.mark.parametrize("residual_flow", [False, True])
@pytest.mark.parametrize(
    ("batch", "frames", "size", "small"),
    [(1, 1, (16, 16), 4), (2, 3, (17, 9), 5), (1, 2, (8, 8), 8), (3, 1, (5, 31), 7)],
)
def test_it_is_the_operator(batch: int, frames: int, size: tuple[int, int], small: int, residual_flow: bool):
    random = np.random.default_rng(size[0])
    image = random.random((batch, 3, *size), np.float32)
    latent = random.normal(0, 0.9, (batch, 3, frames, small, small)).astype(np.float32)
    latent[0, 0, 0, 0, 0] = np.nan
    latent[0, 1, 0, 1, 1] = 1e30
    found = warped_images(image, latent, residual_flow=residual_flow)
    motion = torch.from_numpy(latent).transpose(1, 2).flatten(0, 1)
    if residual_flow:
        motion[:, :2] += coordinate_grid(small, small, motion).permute(2, 0, 1)
    expected = warp(torch.from_numpy(image), motion).unflatten(0, (batch, frames)).transpose(1, 2).numpy()
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_previews_of_warped_images_decode_nothing(small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    pipe = Pipeline.open(small_bundle, threads=1, self_check=False)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    stages: list[str] = []
    run = StageRunner.run

    def noting(self: StageRunner, stage: str, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        stages.append(stage)
        return run(self, stage, *inputs)

    monkeypatch.setattr(StageRunner, "run", noting)
    shown: list[tuple[int, int, np.ndarray]] = []
    estimates: list[np.ndarray] = []
    indices = np.array([0, 4, 9])
    previews = Previews(1, indices, lambda *preview: shown.append(preview), warped=True)
    encoded = pipe.encode(image)
    on_estimate = previews.on_estimate(pipe.stages, encoded, 3)

    def both(index: int, estimate: np.ndarray) -> None:
        estimates.append(estimate.copy())
        on_estimate(index, estimate)

    pipe.sample(encoded, small_bundle.embeddings[0], steps=3, seed=1, on_estimate=both)
    assert "decode" not in stages
    assert [(done, steps) for done, steps, _ in shown] == [(1, 3), (2, 3)]
    for (_, _, pictures), estimate in zip(shown, estimates, strict=False):
        _, warped = pipe.decode(pipe.encode(image), np.ascontiguousarray(estimate[:, :, indices]))
        assert np.abs(pictures.astype(int) - to_uint8(warped)).max() <= 1
        assert np.ptp(to_float(pictures[0])) > 0.1


def test_previews_take_a_number_of_steps():
    with pytest.raises(InputError, match="previews every 0 steps"):
        Previews(0, np.array([0]), lambda *_: None, warped=True)
